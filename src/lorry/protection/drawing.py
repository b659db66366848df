"""What both signing objectives draw: the codec that they share, and a message for each picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from lorry.protection.codec import Codec, load_codec
from lorry.protection.messages import check_message, from_text
from lorry.training.data_errors import DataError
from lorry.training.task import Setting


def codec_label(codec: Codec | str | Path) -> str:
    """Return what two jobs with the same codec have in common."""
    return str(id(codec)) if isinstance(codec, Codec) else str(codec)


def codec_of(codec: Codec | str | Path, setting: Setting) -> Codec:
    """Return a codec that was given as itself or as its folder; loaded once for a setting."""

    def make() -> Codec:
        return (codec if isinstance(codec, Codec) else load_codec(codec)).to(setting.device).eval()

    return setting.once(f"codec {codec_label(codec)}", make)


def fixed_message(text: str, codec: Any, objective: str, bits: int | None = None) -> None:
    """Raise an error unless a codec is given, and the one message, if any, may be given to a user.

    Parameters
    ----------
    text
        Zeros and ones; empty where messages are drawn.
    codec
        What the user gave.
    objective
        Its name, for errors.
    bits
        Length of the messages, once it is known.

    Raises
    ------
    DataError
        There is no codec.
    OptionError
        The message is reserved, or of another length.
    """
    if codec is None or not isinstance(codec, str | Path | Codec):
        raise DataError(f"The objective '{objective}' needs a codec: give its folder, as `lorry codec` writes it.")
    if text:
        check_message(from_text(text, bits))


def drawn_messages(text: str, count: int, bits: int, zero_rate: float, generator: Generator) -> Tensor:
    """Return messages ``(count, bits)``, drawn or all the same, of which a share is zero."""
    message = (
        from_text(text, bits).long().repeat(count, 1) if text else torch.randint(2, (count, bits), generator=generator)
    )
    return message * (torch.rand(count, 1, generator=generator) >= zero_rate)
