"""The HTTP interface of the public client ``tinker``."""
