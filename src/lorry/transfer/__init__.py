"""Transfer: an adapter moves to another base without the data that it was trained on (Trans-LoRA, arXiv 2405.17258).

A kit (`kit`) holds the adapter, a small discriminator (`membership`) and a few seeds. On the target's side inputs are
generated (`generate`), filtered, answered by the source with its adapter, and learned (`distil`).
"""
