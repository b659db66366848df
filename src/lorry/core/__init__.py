"""The core: sites, families of methods, adapters, what is active, checkpoints and receipts."""
