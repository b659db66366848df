"""Which requests run when: policies of the queue, exact admission to the pool, workloads, and a simulator of both."""
