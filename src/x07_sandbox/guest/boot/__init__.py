"""Programs that the image build runs or compiles inside the built root; never imported."""
