"""AuthenLoRA (arXiv 2511.21216): a style adapter whose pictures say whose copy made them."""
