"""From logits to tokens and from tokens to text, for many requests at a time, each with its own options.

`Chooser` is what one request remembers, `choose` takes a batch of logits to a token each, `TextStream` takes the tokens
of one request to text piece by piece, and `check_sampling` refuses options that mean nothing.
"""

from __future__ import annotations

from .checks import check_sampling
from .choose import choose, report
from .chooser import Chooser
from .text import TextStream
from .vocabulary import Vocabulary

__all__ = ["Chooser", "TextStream", "Vocabulary", "check_sampling", "choose", "report"]
