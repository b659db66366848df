"""Training as a service: tenants' adapters on the served base, over the interface of the public client ``tinker``."""
