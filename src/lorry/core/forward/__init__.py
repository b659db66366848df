"""One forward pass: what is active, in which rows, and the paths by which a layer adds it."""
