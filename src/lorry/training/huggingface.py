"""Adapters in Hugging Face's Trainer and TRL's trainers.

Adapters in training are parameters of the model, so any Trainer trains them as it is, and what it saves of the
model is the bare base. `with_adapters` adds what a Trainer cannot know: its checkpoints hold the adapters in
place of the base, and what methods need beside their gradients happens (`lorry.training.attendance`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import adapters

from .attendance import Attendance
from .hooks import by_name, make_dynamics
from .starts import STARTS, Start
from .trainer_dynamics import acting

#: Exact tensors of all adapters, for resuming; beside it are adapters as `Adapter.save` writes them.
STATE_FILE = "lorry_adapters.safetensors"
FOLDER = "adapters"


def with_adapters(trainer_class: type[Any], dynamics: Any = (), start: Any = None) -> type[Any]:
    """Return a Trainer class that trains adapters with all that their methods need, and saves them instead of the base.

    Each checkpoint gets a folder ``adapters/NAME`` for every adapter in training, which loads like any saved one, and
    the exact tensors from which ``trainer.train(resume_from_checkpoint=...)`` and ``load_best_model_at_end`` go on.
    What methods need beside their gradients happens; see `lorry.training.attendance.Attendance`.

    Parameters
    ----------
    trainer_class
        ``transformers.Trainer``, ``trl.SFTTrainer`` or a subclass of them.
    dynamics
        What acts on the training of the one adapter, as in `lorry.training.Job`: names, mappings ``{dynamics: name,
        **options}`` or instances. Their stages are for jobs alone.
    start
        How the tensors of fresh adapters begin, as in `lorry.training.Job`: a name, ``{start: name, **options}`` or an
        instance. One that wants to see data is shown the trainer's first batches.

    Raises
    ------
    AdapterError
        At the construction of the trainer, if no adapter of the model is in training; at the first step, if one
        learns from several draws of each row and the trainer has a loss of its own that cannot be repeated.
    CheckpointError
        At resuming, if the checkpoint holds other adapters than the model.
    OptionError
        Unknown dynamics or an unknown start, or dynamics that cannot act together.
    """
    chosen = make_dynamics(dynamics)
    made = _with_adapters(trainer_class, by_name(STARTS, "start", start))
    return acting(made, chosen, trained_adapters, load_adapters) if chosen else made


def _with_adapters(trainer_class: type[Any], start: Start | None) -> type[Any]:
    class WithAdapters(trainer_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            trained_adapters(self.model)
            self.lorry = Attendance(self, start)
            self.add_callback(self.lorry.callback())

        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.lorry.calibrate(super().compute_loss)
            return super().train(*args, **kwargs)

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            return self.lorry.loss(super().compute_loss, model, dict(inputs), return_outputs, **more)

        def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with self.lorry.told(dict(inputs)) as (rest, _):
                return super().prediction_step(model, rest, *args, **kwargs)

        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            if "task_ids" not in self._signature_columns:
                self._signature_columns.append("task_ids")

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            save_adapters(self.model, folder)
            tokenizer = getattr(self, "processing_class", None)
            if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
                tokenizer.save_pretrained(folder)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            load_adapters(self.model if model is None else model, Path(resume_from_checkpoint))

        def _load_best_model(self) -> None:
            load_adapters(self.model, Path(self.state.best_model_checkpoint))

    WithAdapters.__name__ = WithAdapters.__qualname__ = f"{trainer_class.__name__}WithAdapters"
    WithAdapters.__doc__ = trainer_class.__doc__
    return WithAdapters


def trained_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters in training by name.

    Raises
    ------
    AdapterError
        There are none.
    """
    found = {name: a for name, a in adapters(model).items() if a.trainable}
    if not found:
        raise AdapterError(
            "No adapter of this model is in training; attach one with lorry.attach, or call adapter.train()."
        )
    return found


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Write the adapters in training into a folder: as adapters, and as the exact tensors for resuming."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, adapter in trained_adapters(model).items():
        adapter.save(folder / FOLDER / name)
        for key, tensor, _ in adapter.named_tensors():
            value = whole(tensor).detach().cpu()
            tensors[f"{name}/{key}"] = value.clone(memory_format=torch.contiguous_format)
    draft = folder / f".{STATE_FILE}.draft"
    save_file(tensors, draft)
    os.replace(draft, folder / STATE_FILE)


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Copy what `save_adapters` wrote into the adapters in training, all of it or nothing.

    Raises
    ------
    CheckpointError
        No such file, or other adapters or shapes than the model has.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no adapters: there is no {STATE_FILE}. Was it written by another Trainer class?"
        )
    with safe_open(path, "pt") as file:
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    own = {f"{n}/{k}": t for n, a in trained_adapters(model).items() for k, t, _ in a.named_tensors()}
    wrong = sorted(own.keys() ^ values.keys()) or sorted(k for k in own if own[k].shape != values[k].shape)
    if wrong:
        raise CheckpointError(
            f"The adapters in {folder} do not fit the model: {len(wrong)} tensors differ, first '{wrong[0]}'."
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(_like(values[key], tensor))


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of one that FSDP2 spreads over processes; every process has to call this."""
    gather = getattr(tensor, "full_tensor", None)
    result: Tensor = tensor if gather is None else gather()
    return result


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """Spread a full tensor as `tensor` is spread."""
    spread: Any = tensor
    if not hasattr(spread, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(spread.device), spread.device_mesh, spread.placements)
