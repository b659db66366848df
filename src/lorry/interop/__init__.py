"""Bringing in what other libraries made, with the help of those libraries."""
