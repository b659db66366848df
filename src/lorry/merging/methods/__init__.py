"""Merge methods, one file each; variants that differ by a parameter are rows of a table in one file."""
