"""What a picture says, against what chance would say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.protection.codec import Codec
from lorry.protection.messages import p_value, threshold_for, to_text


@dataclass(frozen=True)
class Verdict:
    """What one picture, or several together, say of a message.

    Attributes
    ----------
    bits
        Length of the message.
    matching
        Bits that agree with it.
    threshold
        How many are asked for at the false-positive rate.
    p_value
        Probability that random bits agree as well.
    read
        What was read.
    """

    bits: int
    matching: int
    threshold: int
    p_value: float
    read: str

    @property
    def signed(self) -> bool:
        """Whether the picture counts as signed with the message."""
        return self.matching >= self.threshold


@torch.no_grad()
def verify(codec: Codec, pictures: Tensor, message: Tensor, rate: float = 1e-3) -> tuple[list[Verdict], Verdict]:
    """Read pictures and compare with a message.

    Parameters
    ----------
    codec
        What reads.
    pictures
        ``(rows, channels, h, w)`` from -1 to 1.
    message
        ``(bits,)``.
    rate
        Accepted probability that random bits count as signed.

    Returns
    -------
    tuple
        The verdict on each picture, and that on all of them together: of every bit the scores are added up, which
        supposes that they have one maker.

    Raises
    ------
    OptionError
        The codec has messages of another length, or the rate cannot be reached.
    """
    if len(message) != codec.shape.bits:
        raise OptionError(f"The message has {len(message)} bits, the codec reads {codec.shape.bits}.")
    threshold = threshold_for(len(message), rate)
    codec.eval()
    scores = codec.logits(pictures).log_softmax(-1)
    each = [_verdict(read, message, threshold) for read in scores.argmax(-1)]
    return each, _verdict(scores.sum(0).argmax(-1), message, threshold)


def _verdict(read: Tensor, message: Tensor, threshold: int) -> Verdict:
    matching = int((read.cpu() == message.cpu()).sum())
    return Verdict(len(message), matching, threshold, p_value(matching, len(message)), to_text(read))


def bit_accuracy(codec: Codec, pictures: Tensor, messages: Tensor) -> float:
    """Return the share of bits read right in pictures with the messages ``(rows, bits)`` or ``(bits,)``."""
    return float((codec.read(pictures).cpu() == messages.cpu()).double().mean())
