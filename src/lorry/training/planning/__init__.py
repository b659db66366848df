"""How samples of several jobs become micro-batches: packing, order, and what a pipeline makes of their lengths."""
