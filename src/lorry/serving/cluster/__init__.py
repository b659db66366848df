"""Replicas of the server on Ray Serve, to which requests go where their adapters are."""
