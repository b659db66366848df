"""What several samplers are made of, each part usable by itself."""
