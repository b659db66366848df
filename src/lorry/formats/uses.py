"""The commands that use an exported adapter, by format: what a user types next."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorry.core.errors import CheckpointError
from lorry.core.registry import Registry


@dataclass(frozen=True)
class Exported:
    """An adapter that was written in some format.

    Attributes
    ----------
    path
        The file or folder.
    base
        Where the base is: a folder, or a name on the hub.
    name
        What the adapter is called.
    """

    path: Path
    base: str
    name: str

    def quoted(self, *parts: str | Path) -> str:
        """Return a command line whose parts a shell reads as they are."""
        return shlex.join(str(part) for part in parts)


#: Format of `lorry.core.life.writers.WRITERS` -> the commands that use what was written.
USES: Registry[Callable[[Exported], list[str]]] = Registry("use of a format", error=CheckpointError)


def commands(format: str, exported: Exported) -> list[str]:
    """Return the commands that use an exported adapter; none for a format that says nothing of it."""
    USES.discover()
    found = USES.get(format)
    return found(exported) if found is not None else []


def _lorry(exported: Exported) -> list[str]:
    adapter = f"{exported.name}={exported.path}"
    return [exported.quoted("lorry", "generate", exported.base, "--adapter", adapter, "--prompt", "Hello")]


def _peft(exported: Exported) -> list[str]:
    code = (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM as M; "
        f"PeftModel.from_pretrained(M.from_pretrained({exported.base!r}), {str(exported.path)!r})"
    )
    return [exported.quoted("python", "-c", code)]


def _pipeline(exported: Exported) -> list[str]:
    code = (
        "from diffusers import DiffusionPipeline as P; "
        f"P.from_pretrained('PIPELINE').load_lora_weights({str(exported.path)!r})"
    )
    return [exported.quoted("python", "-c", code)]


USES.add("lorry", _lorry)
USES.add("peft", _peft)
USES.add("plain", _peft)
USES.add("diffusers", _pipeline)
USES.add("kohya", _pipeline)
