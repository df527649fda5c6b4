"""How quick a run is, against physical floors and other tools, as ratios of one interleaved run."""
