"""Jobs as people write them: options of a method straight in the job, defaults, and names of other trainers.

What another trainer calls otherwise is refused with the name that it has here: a name that is read silently in one
place and not in the next would be worse than an error that says what to write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from lorry.core.errors import OptionError, near_misses
from lorry.core.method.registry import METHODS

from .aliases import renamed

#: Parts of a job that have options of their own: ``part: name`` and ``part_options: {...}``, or both in one mapping.
PARTS = ("method", "objective", "start", "scaling")
#: Options that exclude each other: a job that sets one does not take the other from the defaults.
_RIVALS = {"steps": "epochs", "epochs": "steps"}

#: Name here -> names there, each with the programs that use it.
_THERE: dict[str, dict[str, str]] = {
    "base": {"base_model": "axolotl", "model_name_or_path": "LLaMA-Factory and TRL", "base_model_name_or_path": "peft"},
    "out": {"output_dir": "axolotl, LLaMA-Factory and TRL"},
    "checkpoint_every": {"save_steps": "axolotl, LLaMA-Factory and TRL", "saves_per_epoch": "axolotl"},
    "keep_checkpoints": {"save_total_limit": "axolotl, LLaMA-Factory and TRL"},
    "data": {"datasets": "axolotl", "dataset": "LLaMA-Factory", "dataset_name": "TRL", "train_dataset": "TRL"},
    "eval_data": {"test_datasets": "axolotl", "eval_dataset": "LLaMA-Factory and TRL"},
    "hold_out": {"val_set_size": "axolotl", "val_size": "LLaMA-Factory"},
    "method": {
        "adapter": "axolotl",
        "finetuning_type": "LLaMA-Factory",
        "peft_type": "peft",
        "use_dora": "peft and LLaMA-Factory",
        "peft_use_dora": "axolotl",
        "use_rslora": "peft and LLaMA-Factory",
        "peft_use_rslora": "axolotl",
        "pissa_init": "LLaMA-Factory",
        "init_lora_weights": "peft",
        "loraplus_lr_ratio": "axolotl and LLaMA-Factory",
    },
    "rank": {"lora_r": "axolotl and TRL", "lora_rank": "LLaMA-Factory", "r": "peft"},
    "alpha": {"lora_alpha": "axolotl, LLaMA-Factory, TRL and peft"},
    "dropout": {"lora_dropout": "axolotl, LLaMA-Factory, TRL and peft"},
    "targets": {
        "lora_target_modules": "axolotl and TRL",
        "lora_target_linear": "axolotl",
        "lora_target": "LLaMA-Factory",
        "target_modules": "peft",
    },
    "exclude": {"exclude_modules": "peft"},
    "layers": {"layers_to_transform": "peft", "peft_layers_to_transform": "axolotl"},
    "site_options": {"rank_pattern": "peft", "alpha_pattern": "peft"},
    "modules_to_save": {"lora_modules_to_save": "axolotl and TRL", "additional_target": "LLaMA-Factory"},
    "objective": {"stage": "LLaMA-Factory", "task_type": "peft"},
    "max_length": {"sequence_len": "axolotl", "cutoff_len": "LLaMA-Factory", "max_seq_length": "TRL"},
    "packing": {"sample_packing": "axolotl"},
    "epochs": {"num_epochs": "axolotl", "num_train_epochs": "LLaMA-Factory and TRL"},
    "steps": {"max_steps": "axolotl, LLaMA-Factory and TRL"},
    "batch_size": {"micro_batch_size": "axolotl"},
    "eval_batch_size": {"per_device_eval_batch_size": "LLaMA-Factory and TRL"},
    "bucketing": {"group_by_length": "axolotl and transformers"},
    "learning_rate": {"lr": "torch"},
    "schedule": {"lr_scheduler": "axolotl"},
    "schedule_options": {"lr_scheduler_kwargs": "LLaMA-Factory and TRL"},
    "warmup": {"warmup_steps": "axolotl, LLaMA-Factory and TRL", "warmup_ratio": "axolotl, LLaMA-Factory and TRL"},
    "optimizer": {"optim": "LLaMA-Factory and TRL"},
    "betas": {"adam_beta1": "LLaMA-Factory and TRL", "adam_beta2": "LLaMA-Factory and TRL"},
    "eval_every": {"eval_steps": "axolotl, LLaMA-Factory and TRL", "evals_per_epoch": "axolotl"},
    "patience": {"early_stopping_patience": "axolotl"},
    "keep_best": {"load_best_model_at_end": "axolotl, LLaMA-Factory and TRL"},
    "loggers": {"report_to": "LLaMA-Factory and TRL", "wandb_project": "axolotl", "use_tensorboard": "axolotl"},
    "dtype": {name: "axolotl, LLaMA-Factory and TRL" for name in ("bf16", "fp16", "torch_dtype")},
}
#: Name there -> name here, programs.
OTHER_NAMES = {there: (here, who) for here, names in _THERE.items() for there, who in names.items()}


def called_here(name: str) -> str | None:
    """Return the sentence that says what another trainer's option is called here; None for any other name."""
    if name not in OTHER_NAMES:
        return None
    here, who = OTHER_NAMES[name]
    return f"'{name}' ({who}) is called '{here}' here."


def method_options() -> set[str]:
    """Return the names of the options that any method has."""
    return {field.name for info in METHODS.values() for field in dataclasses.fields(info.cls)}  # type: ignore[arg-type]


def spelled_out(
    job: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, *, known: Collection[str]
) -> dict[str, Any]:
    """Return a job's options with the defaults filled in, each in its place.

    ``rank: 8`` becomes an option of the method. A job that names a method of its own takes none of the options in the
    method's mapping of the defaults, but those that stand straight in the defaults, which are meant for every job.

    Parameters
    ----------
    job
        As it was written.
    defaults
        What holds for a job that does not say otherwise.
    known
        The names of a job's options.

    Raises
    ------
    OptionError
        An unknown name, with what it is called here or near misses; one option given twice.
    """
    own, given = renamed(job), renamed(defaults or {})
    for values in (own, given):
        _check_names(values, known)
    merged = {k: v for k, v in {**given, **own}.items() if k in known and (k in own or _RIVALS.get(k) not in own)}
    for part in PARTS:
        whole = _merge(part, own, given, known)
        if whole is not None:
            merged[part] = whole
    return merged


def _check_names(values: Mapping[str, Any], known: Collection[str]) -> None:
    options = method_options()
    names = {*known, *(f"{part}_options" for part in PARTS), *options}
    nested = values.get("method")
    inside = [k for k in nested if k in OTHER_NAMES and k not in options] if isinstance(nested, Mapping) else []
    for name in [*inside, *(k for k in values if k not in names)]:
        raise OptionError(
            called_here(name)
            or f"A job has no option '{name}'.{near_misses(name, names)} It has: {', '.join(sorted(known))}."
        )


def _merge(part: str, own: Mapping[str, Any], given: Mapping[str, Any], known: Collection[str]) -> Any:
    """Return a part with its options: its name where it has none, None where nothing is said of it."""
    named, options = _split(part, own, known)
    default, shared = _split(part, given, known)
    if named is not None and not isinstance(named, Mapping):
        return named
    if named is None and default is not None and not isinstance(default, Mapping):
        if options or shared:
            raise OptionError(f"Options of the {part} cannot be added to {default!r}; give it by its name.")
        return default
    whole = {**(default or {} if named is None else {}), **shared, **(named or {}), **options}
    return whole.get(part) if set(whole) == {part} else whole or None


def _split(part: str, values: Mapping[str, Any], known: Collection[str]) -> tuple[Any, dict[str, Any]]:
    """Return a part as a mapping (None where it is not given), and the options of it that stand outside."""
    named = values.get(part)
    if isinstance(named, str):
        named = {part: named}
    options = values.get(f"{part}_options") or {}
    if not isinstance(options, Mapping):
        raise OptionError(f"'{part}_options' must be a mapping, found {options!r}.")
    short = {k: v for k, v in values.items() if part == "method" and k not in known and k != "method_options"}
    short = {k: v for k, v in short.items() if k not in {f"{p}_options" for p in PARTS}}
    inside = named if isinstance(named, Mapping) else {}
    twice = [k for k in {**inside, **options} if k in short or (k in inside and k in options)]
    if twice:
        raise OptionError(f"The option '{twice[0]}' of the {part} is given twice; give it once.")
    if named is not None and not isinstance(named, Mapping) and (options or short):
        raise OptionError(f"Options of the {part} cannot be added to {named!r}; give it by its name.")
    return named, {**options, **short}
