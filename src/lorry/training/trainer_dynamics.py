"""Dynamics in a Hugging Face Trainer: the moments of its loop, and what its checkpoints need for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.life.adapter import Adapter
from lorry.core.method.registry import method_from

from .groups import ParameterGroups
from .hooks import Acting, Dynamic, Moment
from .row_gradients import RowGradients

#: What dynamics remember, and how the parameters are grouped.
STATE_FILE, GROUPS_FILE = "lorry_dynamics.safetensors", "lorry_dynamics.json"


class TrainerDynamics:
    """Lets dynamics act on the one adapter that a trainer trains.

    Parameters
    ----------
    trainer
        A ``transformers.Trainer``.
    chosen
        The dynamics.
    adapters
        The adapters in training.

    Raises
    ------
    AdapterError
        Several adapters, or a way of training in which gradients cannot be read as they are.
    OptionError
        Dynamics that cannot act together.
    """

    def __init__(self, trainer: Any, chosen: Sequence[Dynamic], adapters: Mapping[str, Adapter]) -> None:
        self.trainer = trainer
        self.acting = Acting(list(chosen))
        self.groups: ParameterGroups | None = None
        self.pending: Path | None = None
        self._rows: RowGradients | None = None
        self._raised: list[str] = []
        self._total = self._micro = 0
        if len(adapters) > 1:
            raise AdapterError(
                f"Dynamics act on one adapter in training, and this model has {len(adapters)} ({', '.join(adapters)}); "
                "let the others rest (adapter.freeze()), or train them as jobs of a fleet."
            )
        arguments = trainer.args
        if arguments.fp16 or arguments.world_size > 1 or arguments.n_gpu > 1:
            raise AdapterError(
                "Dynamics read gradients as they are, in one process: train on one device, and without the scaled "
                "losses of fp16 (bf16 works)."
            )
        judging = [dynamic.name for dynamic in chosen if dynamic.by_task]
        if judging:
            raise AdapterError(
                f"'{judging[0]}' judges tasks by evaluations that the engine tells apart, which a trainer's are not: "
                "train a job with lorry.train, or leave its target out."
            )
        self.adapter = next(iter(adapters.values()))
        self._methods = {path: entry.method for path, entry in self.adapter.entries.items()}

    # -- the loop

    def begin(self, optimizer: torch.optim.Optimizer, total: int) -> Path | None:
        """Take up the trainer's optimizer before its schedule is made, as a checkpoint says where there is one.

        Returns the folder of the checkpoint, whose adapter has the shapes of the model's now.
        """
        if self.groups is not None:
            return None
        self._total = total
        known = {id(p) for p in self.adapter.parameters()}
        if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
            raise AdapterError(
                "Dynamics act on an adapter alone, and this trainer's optimizer has other parameters too; freeze them."
            )
        for group in optimizer.param_groups:
            group["factor"] = 1.0
        self.groups = ParameterGroups(optimizer, self.adapter)
        self._each(lambda dynamic, at: dynamic.begin(at))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group["factor"]
        if self.pending is not None:
            self._restore(self.pending)
        if self.acting.row_gradients:
            self._rows = RowGradients(self.adapter)
        return self.pending

    @contextmanager
    def around(self, inputs: Mapping[str, Any], items: Any) -> Iterator[None]:
        """Let dynamics be around forward and backward of a micro-batch, and act after it."""
        facts = self._facts(inputs, items)
        rows = facts["rows"]
        with ExitStack() as stack:
            for dynamic in self.acting.dynamics:
                stack.enter_context(dynamic.around_pass(self._moment(dynamic, facts)))
            if self._rows is not None:
                stack.enter_context(self._rows.watching(*rows))
            yield
        found = {} if self._rows is None else self._rows.found
        self._each(lambda dynamic, at: dynamic.after_pass(at, found if dynamic.row_gradients else {}), facts)
        self._micro += 1
        if self.trainer.accelerator.sync_gradients:
            self._each(lambda dynamic, at: dynamic.before_step(at))

    def callback(self) -> Any:
        """Return the callback for what happens around the optimizer's step."""
        from transformers import TrainerCallback

        outer = self

        class Acts(TrainerCallback):  # type: ignore[misc]
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                outer._each(lambda dynamic, at: dynamic.after_clipping(at))

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                outer._each(lambda dynamic, at: dynamic.after_step(at))
                outer._micro = 0
                outer._raise()
                outer._follow()

        return Acts()

    def _facts(self, inputs: Mapping[str, Any], items: Any) -> dict[str, Any]:
        """Return what is known of a micro-batch: its rows, what each is scored on, and how the loss is scaled."""
        batch = next(len(v) for v in inputs.values() if isinstance(v, Tensor) and v.dim())
        labels = inputs.get("labels")
        counts = [1] * batch
        if isinstance(labels, Tensor) and labels.dim() == 2:
            counts = (labels[:, 1:] != -100).sum(1).tolist()  # a language model's first token is not predicted
        accumulated = getattr(self.trainer, "current_gradient_accumulation_steps", 1)
        scaled = self.trainer.model_accepts_loss_kwargs and items is not None
        weight = 1 / float(items) if scaled else 1 / (sum(counts) * accumulated)
        return {"rows": (0, batch, batch), "weight": weight, "heights": (1,) * batch, "counts": tuple(counts)}

    def _moment(self, dynamic: Dynamic, facts: Mapping[str, Any] | None = None) -> Moment:
        assert self.groups is not None
        trainer = self.trainer
        rate = next((group["lr"] / group["factor"] for group in self.groups.optimizer.param_groups), 0.0)
        values = (trainer.state.global_step, self._total, self._micro, rate, trainer.args.seed, dynamic.name)
        found = Moment(self.adapter, self.groups, *values, self.acting.remembered(dynamic.name), **facts or {})
        found.raised = self._raised
        return found

    def _raise(self) -> None:
        """Let the stages begin that dynamics asked for: before the next step, which is now."""
        stages, self._raised = self._raised, []
        for stage in stages:
            self._each(lambda dynamic, at, stage=stage: dynamic.at_stage(at, stage))  # type: ignore[misc]

    def _each(self, act: Callable[[Dynamic, Moment], None], facts: Mapping[str, Any] | None = None) -> None:
        for dynamic in self.acting.dynamics:
            with torch.no_grad():
                act(dynamic, self._moment(dynamic, facts))

    def _follow(self) -> None:
        """Let the trainer's schedule know of groups that came or went."""
        scheduler = getattr(self.trainer.lr_scheduler, "scheduler", self.trainer.lr_scheduler)
        if self.groups is None or not hasattr(scheduler, "base_lrs"):
            return
        groups = self.groups.optimizer.param_groups
        for group in groups:
            group.setdefault("initial_lr", self.trainer.args.learning_rate * group["factor"])
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        if hasattr(scheduler, "lr_lambdas"):
            scheduler.lr_lambdas = [scheduler.lr_lambdas[0]] * len(groups)

    # -- checkpoints

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs beside the adapter and the optimizer's state."""
        if self.groups is None:
            return
        tensors = {f"acting/{name}": t for name, t in self.acting.tensors().items()}
        for name, (resting, _) in self.groups.resting.items():
            tensors |= {f"frozen/{name}/{k}": torch.as_tensor(v) for k, v in resting.items() if v is not None}
        for path, entry in self.adapter.entries.items():
            if entry.method != self._methods[path]:
                tensors |= {f"adapter/{path}.{n}": t for n, t in entry.home.tensors().items()}
        changed = {p: e.method.to_dict() for p, e in self.adapter.entries.items() if e.method != self._methods[p]}
        described = {"groups": self.groups.describe(), "methods": changed}
        (folder / GROUPS_FILE).write_text(json.dumps(described), encoding="utf-8")
        plain = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        save_file(plain, folder / STATE_FILE)

    def _restore(self, folder: Path) -> None:
        """Bring the adapter's shapes, the groups and what is remembered to where a checkpoint was."""
        assert self.groups is not None
        if not (folder / GROUPS_FILE).is_file():
            raise AdapterError(f"The checkpoint {folder} was written without dynamics; go on without them.")
        described = json.loads((folder / GROUPS_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / STATE_FILE, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        parts: dict[str, dict[str, Tensor]] = {"acting": {}, "frozen": {}, "adapter": {}}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            parts[kind][name] = value
        for path, method in described["methods"].items():
            own = {n[len(path) + 1 :]: t for n, t in parts["adapter"].items() if n.rpartition(".")[0] == path}
            self.groups.replace(path, method_from(method), own)
        frozen: dict[str, dict[str, Tensor]] = {}
        for full, value in parts["frozen"].items():
            name, _, key = full.rpartition("/")
            frozen.setdefault(name, {})[key] = value
        self.groups.resting.clear()
        self.groups.restore(described["groups"], frozen)
        self.acting.restore(parts["acting"])


def acting(
    trainer_class: type[Any],
    chosen: Sequence[Dynamic],
    adapters: Callable[[nn.Module], Mapping[str, Adapter]],
    load: Callable[[nn.Module, Path], None],
) -> type[Any]:
    """Return a Trainer class in which dynamics act.

    Parameters
    ----------
    trainer_class
        What `lorry.training.huggingface.with_adapters` makes of a Trainer.
    chosen
        The dynamics.
    adapters, load
        How the adapters in training are found, and how a checkpoint's tensors are copied into them.
    """

    class Acts(trainer_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.lorry_dynamics = TrainerDynamics(self, chosen, adapters(self.model))
            self.add_callback(self.lorry_dynamics.callback())

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            # here the optimizer is what it will be, and its schedule has not read its rates
            folder = self.lorry_dynamics.begin(_unwrapped(self.optimizer), num_training_steps)
            if folder is not None:
                load(self.model, folder)
            return super().create_scheduler(num_training_steps, optimizer)

        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
            with self.lorry_dynamics.around(inputs, num_items_in_batch):
                return super().training_step(model, inputs, num_items_in_batch)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            self.lorry_dynamics.save(Path(output_dir if output_dir is not None else self.args.output_dir))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            # its tensors are copied when the adapter has got the shapes that it had then
            self.lorry_dynamics.pending = Path(resume_from_checkpoint)

    Acts.__name__ = Acts.__qualname__ = trainer_class.__name__
    Acts.__doc__ = trainer_class.__doc__
    return Acts


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside of what accelerate makes of one."""
    found = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(found, torch.optim.Optimizer)
    return found
