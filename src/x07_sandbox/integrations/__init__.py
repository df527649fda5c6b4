"""One module for each framework in which users already work. Each imports its framework only when it is used."""
