"""Parametrisations, one file each. A file registers its method; nothing else names it."""
