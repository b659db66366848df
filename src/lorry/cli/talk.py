"""What a conversation in the terminal understands, whoever answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from lorry.cli.output import note
from lorry.core.errors import OptionError

HELP = "/adapter NAME[:W][+NAME[:W]] or none: what applies from now on; /adapters; /system TEXT; /reset; /quit"


class Talk(ABC):
    """A conversation whose adapters may change between turns.

    Parameters
    ----------
    system
        What the system message says.

    Attributes
    ----------
    messages
        The turns so far.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.messages: list[dict[str, str]] = []

    @abstractmethod
    def switch(self, text: str) -> str:
        """Let the adapters that a text names apply from now on; returns how they are called."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Return the adapters that may be named."""

    @abstractmethod
    def answer(self, text: str) -> str:
        """Write the answer to what the user says, word by word, and return it; Ctrl-C ends it early."""

    def hear(self, line: str) -> bool:
        """Act on a line: a command, or what the user says; returns whether the conversation goes on."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if not word:
            return True
        if word in ("/quit", "/exit"):
            return False
        if word == "/reset":
            self.messages.clear()
            note("the conversation begins anew")
        elif word == "/adapter":
            note(f"from now on: {self.switch(rest)}")
        elif word == "/adapters":
            note(", ".join(self.names()) or "no adapter is loaded")
        elif word == "/system":
            self.system = rest or None
            note("the system message is changed" if rest else "no system message any more")
        elif word == "/help":
            note(HELP)
        elif word.startswith("/"):
            raise OptionError(f"There is no command {word}; there are: {HELP}.")
        else:
            text = line.strip()
            answer = self.answer(text)
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return True
