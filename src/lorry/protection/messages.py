"""Messages of zeros and ones: how they are written, which are refused, and what a match means against chance."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError


def from_text(text: str, bits: int | None = None) -> Tensor:
    """Return the message ``(bits,)`` that a text of 0 and 1 says.

    Parameters
    ----------
    text
        Zeros and ones; spaces and underscores are left out.
    bits
        Expected length, if any.

    Raises
    ------
    OptionError
        Another character, or another length.
    """
    plain = text.replace(" ", "").replace("_", "")
    if not plain or set(plain) - {"0", "1"}:
        raise OptionError(f"A message is written as zeros and ones, such as 01101001; found {text!r}.")
    if bits is not None and len(plain) != bits:
        raise OptionError(f"The message must have {bits} bits, found {len(plain)}: {plain}.")
    return torch.tensor([int(c) for c in plain], dtype=torch.uint8)


def to_text(message: Tensor) -> str:
    """Return a message as zeros and ones."""
    return "".join(str(int(bit)) for bit in message.tolist())


def check_message(message: Tensor) -> Tensor:
    """Return a message that may be given to a user.

    Raises
    ------
    OptionError
        It is the zero message, which is reserved for pictures without one, or so near to it that such pictures would
        match it.
    """
    weight, bits = int(message.sum()), len(message)
    if weight < max(1, bits // 4):
        raise OptionError(
            f"The message {to_text(message)} has {weight} ones of {bits} bits: the zero message stands for pictures "
            f"without a signature, and one so near to it proves nothing. Choose one with at least {max(1, bits // 4)}."
        )
    return message


def drawn(bits: int, generator: Generator) -> Tensor:
    """Return a message ``(bits,)`` for a user, in which half of the bits, rounded up, are ones."""
    order = torch.randperm(bits, generator=generator)
    return (order < (bits + 1) // 2).to(torch.uint8)


def false_positive_rate(bits: int, threshold: int) -> float:
    """Return the probability that random bits match a message in at least `threshold` places:
    ``2^-bits Σ_{i >= threshold} C(bits, i)``.
    """
    from scipy.stats import binom

    return float(binom.sf(threshold - 1, bits, 0.5))


def threshold_for(bits: int, rate: float) -> int:
    """Return the least number of matching bits that random bits reach with a probability of at most `rate`.

    Raises
    ------
    OptionError
        A rate outside (0, 1), or one that not even a full match proves.
    """
    if not 0 < rate < 1:
        raise OptionError(f"A false-positive rate lies between 0 and 1, found {rate}.")
    found = next((t for t in range(bits + 1) if false_positive_rate(bits, t) <= rate), None)
    if found is None:
        raise OptionError(
            f"Messages of {bits} bits cannot prove anything at a false-positive rate of {rate:g}: all bits match by "
            f"chance in {0.5**bits:.1e} of cases. Allow a higher rate, or use longer messages."
        )
    return found


def p_value(matching: int, bits: int) -> float:
    """Return the probability that random bits match at least as well."""
    return false_positive_rate(bits, matching)
