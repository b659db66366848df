"""Many adapters, compositions of them and the bare base, served together on one model."""
