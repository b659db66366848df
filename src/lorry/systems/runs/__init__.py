"""One file for each published system that can be run whole; a file registers its run, nothing else names it."""
