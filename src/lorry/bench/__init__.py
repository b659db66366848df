"""Benches: side-by-side comparisons, run by `lorry bench NAME`."""
