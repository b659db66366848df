"""Policies of the queue: one file each, registered by name; see `lorry.serving.scheduling.policy`."""
