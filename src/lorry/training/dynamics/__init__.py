"""Dynamics: one file each, registered by name; see `lorry.training.hooks`."""
