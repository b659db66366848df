"""Planners of passes: one file each, registered by name; see `lorry.training.pass_planner`."""
