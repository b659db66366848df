"""The few hot operations, each with a plain reference that it is held against."""
