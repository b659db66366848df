"""AutoLoRA: adapters found by words from their weights alone, and several at once behind a gate (arXiv 2508.02107).

``pool``
    Small adapters of known concepts on the pocket world, trained by fleets.
``baselines``
    What the retriever is held against: flattened weights, and the names of files.
``fusing``
    Gates over members that each step draws, and pictures of a right adapter among wrong ones.
``tokens``
    The mode ``prompt_token``: an adapter's own words behind the prompt.
"""
