"""Keys and values of many sequences, and adapters, in the pages of one pool: what is stored, what is known of a batch,
and what computes with both, each in a module of its own.
"""
