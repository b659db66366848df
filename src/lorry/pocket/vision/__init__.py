"""A generated world of pictures with questions about them, and the training of the two models that live in it.

The models themselves are `lorry.pocket.clip` and `lorry.pocket.vlm`.
"""
