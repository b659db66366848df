"""Names of models and checkpoints: what clients may choose, and where it lies on disk.

A checkpoint is addressed as ``tinker://MODEL/KIND/NAME``. Names become parts of paths, so they hold no separators and
no dots at their beginning.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lorry.serving.training.errors import Refused

SCHEME = "tinker://"
#: What the engine's names of saved weights begin with; no other interface gives them to anybody.
SERVED = "tinker-"
#: Kind in a path -> what clients call it.
KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9\-]{0,63}:train:[0-9]{1,9}")


@dataclass(frozen=True)
class Address:
    """What a path ``tinker://MODEL/KIND/NAME`` names."""

    model: str
    kind: str
    name: str

    @classmethod
    def parse(cls, path: str) -> Address:
        """Return what a path names; raise `Refused` for anything else."""
        model, _, rest = path.removeprefix(SCHEME).partition("/")
        if not path.startswith(SCHEME):
            raise Refused(f"A path of weights is {SCHEME}MODEL/KIND/NAME, found {path[:200]!r}.")
        return cls.of(model, rest)

    @classmethod
    def of(cls, model: str, checkpoint: str) -> Address:
        """Return what a model and a checkpoint ``KIND/NAME`` name; raise `Refused` for anything else."""
        kind, _, name = checkpoint.partition("/")
        if not _MODEL.fullmatch(model) or kind not in KINDS or not _NAME.fullmatch(name):
            raise Refused(
                f"A path of weights is {SCHEME}MODEL/KIND/NAME, where KIND is one of {', '.join(KINDS)}; found "
                f"{(model + '/' + checkpoint)[:200]!r}."
            )
        return cls(model, kind, name)

    @property
    def path(self) -> str:
        """How clients write it."""
        return f"{SCHEME}{self.model}/{self.checkpoint}"

    @property
    def checkpoint(self) -> str:
        """The part behind the model."""
        return f"{self.kind}/{self.name}"

    @property
    def served(self) -> str:
        """The name under which the engine has it, which tells nothing about its owner."""
        return f"{SERVED}{hashlib.sha256(self.path.encode()).hexdigest()[:32]}"

    def below(self, root: Path) -> Path:
        """Return the folder of the checkpoint below that of all."""
        return root / folder_name(self.model) / self.kind / self.name


def check_name(name: str) -> str:
    """Return the name that a client gives a checkpoint; raise `Refused` unless it can be one."""
    if not _NAME.fullmatch(name):
        raise Refused(
            "The name of a checkpoint consists of up to 200 letters, digits, '_', '-' and '.', and begins with none of "
            f"the last two; found {name[:200]!r}."
        )
    return name


def model_id(session: str, number: int) -> str:
    """Return the id of a session's model, which clients work out as well."""
    return f"{session}:train:{number}"


def folder_name(model: str) -> str:
    """Return a model's id as the name of a folder."""
    return model.replace(":", "-")
