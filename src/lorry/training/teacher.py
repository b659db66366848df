"""A teacher of a job: an adapter on the same base, another model, or the base itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.life.api import adapters
from lorry.core.life.state import unwrapped
from lorry.formats.load import load

from .data_errors import DataError
from .reference import ask, asking
from .rows import Encoded
from .task import Setting
from .text_task import TextTask


@dataclass(frozen=True, eq=False)
class Teacher:
    """Who is asked.

    Attributes
    ----------
    model
        Another model; None is the base of the setting.
    adapter
        The adapter on the base that applies; None is the bare base.
    """

    model: nn.Module | None = None
    adapter: str | None = None

    @classmethod
    def of(cls, setting: Setting, given: Any) -> Teacher:
        """Return the teacher that a job names, loaded once for a setting.

        Parameters
        ----------
        setting
            Where the base is.
        given
            None, a model, the name of an adapter on the base, or the folder of an adapter or of a model.

        Raises
        ------
        DataError
            Nothing of the kind is there.
        """
        if given is None:
            return cls()
        if isinstance(given, nn.Module):
            return cls(model=given.eval())
        text = str(given)
        if text in adapters(setting.model):
            return cls(adapter=text)
        return setting.once(f"teacher {text}", lambda: cls._loaded(setting, Path(text).expanduser()))

    @classmethod
    def _loaded(cls, setting: Setting, path: Path) -> Teacher:
        if (path / "config.json").is_file():
            from transformers import AutoModelForCausalLM

            model: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, use_safetensors=True)
            return cls(model=model.to(setting.device).requires_grad_(False).eval())
        if not path.exists():
            known = ", ".join(adapters(setting.model)) or "none"
            raise DataError(
                f"There is no teacher '{path}': expected a folder of an adapter or of a model, or an adapter on the "
                f"model (there are: {known})."
            )
        taken, number = adapters(setting.model), 0
        while f"teacher-{number}" in taken:
            number += 1
        adapter = load(setting.model, path, name=f"teacher-{number}", activate=False)
        return cls(adapter=adapter.name)

    @contextmanager
    def asked(self, setting: Setting, count: int) -> Iterator[Any]:
        """Give the model to ask about `count` rows, with the teacher alone in force."""
        if self.model is not None:
            with torch.no_grad():
                yield self.model
            return
        with asking(setting.model, self.adapter, count):
            yield unwrapped(setting.model)

    def ask(self, task: TextTask, setting: Setting, examples: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits of rows, and their labels; see `lorry.training.reference.ask`."""
        if self.model is None:
            return ask(task, setting, examples, self.adapter)
        other = setting.once(f"model {id(self.model)}", lambda: Setting(self.model, setting.processor))  # type: ignore[arg-type]
        batch = TextTask.collate(task, other, examples)
        with torch.no_grad():
            return TextTask.forward(task, other, batch), batch.targets
