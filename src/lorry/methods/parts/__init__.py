"""What some methods share: routing, tasks, mixtures, feed-forward blocks, Kronecker products, nested ranks."""
