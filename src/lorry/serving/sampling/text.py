"""Tokens to text, piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one answer as its tokens come; it ends at the first stop text that is complete.

    The pieces joined are ``tokenizer.decode`` of all tokens (without a clean-up of spaces), up to the stop text. What
    may still change is held back: a character of which bytes are missing, and the beginning of a stop text. Of two
    stop texts that are complete at the same character, the longer one counts.

    Parameters
    ----------
    tokenizer
        A tokenizer of transformers.
    stop
        Texts at which to end; they are left out.
    min_tokens
        Tokens within which no stop text counts.
    skip_special_tokens
        Whether special tokens, such as the end of sequence, have no text.

    Attributes
    ----------
    stopped
        The stop text that ended it; nothing comes after it.
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...] = (), *, min_tokens: int = 0, skip_special_tokens: bool = True
    ) -> None:
        self.stopped: str | None = None
        self._stop = stop
        self._longest = max((len(text) for text in stop), default=0)
        self._free = min_tokens
        self._pieces = _Pieces(tokenizer, skip_special_tokens)
        self._held = ""
        self._settled = 0

    def push(self, tokens: Iterable[int]) -> str:
        """Return the text that is certain now; a token that ended the answer (a stop token) is not to be given."""
        out = []
        for token in tokens:
            if self.stopped is not None:
                break
            out.append(self._take(self._pieces.push(token)))
            if self._free:
                self._free -= 1
                self._settled = len(self._held)
        return "".join(out)

    def finish(self) -> str:
        """Return what was held back: there are no more tokens."""
        if self.stopped is not None:
            return ""
        text = self._take(self._pieces.finish())
        held, self._held = self._held, ""
        return text if self.stopped is not None else text + held

    def _take(self, piece: str) -> str:
        if not self._stop or not piece:
            return piece
        text = self._held + piece
        if not self._free:
            self._look(text, len(self._held))
            if self.stopped is not None:
                held, self._held = self._held, ""
                return held
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        out = text[: len(text) - keep]
        self._settled = max(0, self._settled - len(out))
        return out

    def _look(self, text: str, fresh: int) -> None:
        """Find the stop text that is complete first and ends in what is fresh; leave what precedes it in `_held`."""
        after = max(fresh, self._settled)
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = text.find(stop, max(0, after - len(stop) + 1))
            if start >= 0:
                found = (start + len(stop), start, stop)
                best = found if best is None else min(best, found)
        if best is not None:
            self._held, self.stopped = text[: best[1]], best[2]

    def _beginning(self, text: str) -> int:
        """Return how many characters at the end of a text may be the beginning of a stop text."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop):
                return length
        return 0


class _Pieces:
    """Text of tokens as they come, held back while a character or a run of bytes is not complete.

    What a token adds is read from a window that begins with earlier tokens, since decoders treat the first token
    apart (they strip its space, or leave its sign of continuation).
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self._whole_runs = _falls_back_to_bytes(tokenizer)
        self._window: list[int] = []
        self._read = 0
        self._known = ""

    def push(self, token: int) -> str:
        """Return the text that is certain with this token."""
        name = None if token in self._skipped else self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # also an entry of the logits that the tokenizer does not know
            return ""
        self._window.append(token)
        if self._whole_runs and _BYTE.fullmatch(name):
            return ""  # a byte that spoils its run changes the text of the whole run
        text = self._decode(self._window)
        return "" if text.endswith(_REPLACEMENT) else self._advance(text)

    def finish(self) -> str:
        """Return the text of what was held back."""
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        new = text[len(self._known) :]
        recent = self._decode(self._window[self._read :])
        if recent:  # it can stand before what comes: its beginning was treated as a beginning
            self._window = self._window[self._read :]
            self._known = recent
        else:
            self._known = text
        self._read = len(self._window)
        return new

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _falls_back_to_bytes(tokenizer: Any) -> bool:
    """Whether some tokens are single bytes, whose text depends on the bytes beside them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.convert_tokens_to_ids("<0x00>") not in (None, tokenizer.unk_token_id)
    if backend.decoder is None:
        return False
    state = json.loads(backend.decoder.__getstate__())
    return any(part["type"] == "ByteFallback" for part in state.get("decoders", [state]))
