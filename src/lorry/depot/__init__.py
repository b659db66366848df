"""The depot: a folder of adapters, found by what they do, from their weights alone (AutoLoRA, arXiv 2508.02107)."""
