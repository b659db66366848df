"""Bases for training: with the head that the jobs need, which may be new."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lorry.cli.bases import POCKET, config_of, dtype_of, folder_of, load_base, load_tokenizer, model_class, said_name
from lorry.core.errors import CheckpointError


def load_for_training(name: str, dtype: str, task: str, labels: int | None) -> tuple[nn.Module, list[str]]:
    """Return a base, and the modules for which its folder has no weights (a new classification head).

    They are drawn from a fixed seed, so that a resumed run starts from the same base.
    """
    if task in ("causal-lm", "auto"):
        return load_base(name, dtype, task="auto" if name == POCKET else task), []
    torch.manual_seed(0)
    cls = model_class(config_of(name), task)
    options: dict[str, Any] = {"num_labels": labels} if labels else {}
    wanted = torch.float32 if dtype == "auto" and name == POCKET else dtype_of(dtype)
    try:
        model, info = cls.from_pretrained(
            folder_of(name),
            dtype=wanted,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot load {folder_of(name)} for {task}: {str(error).splitlines()[0]}") from error
    if name == POCKET:
        model.config._name_or_path = POCKET  # adapters note the name of their base, not where this installation lies
    if getattr(model.config, "pad_token_id", 0) is None:
        # a classifier finds the last token of a row by its padding
        model.config.pad_token_id = load_tokenizer(name).pad_token_id
    model.config._name_or_path = said_name(name) or model.config._name_or_path
    fresh = sorted({key.rpartition(".")[0] for key in info["missing_keys"]})
    return model.eval(), [f for f in fresh if f]


def load_processor(name: str, tasks: Collection[str | None]) -> Any:
    """Return what makes tensors of a base's data: its image processor for jobs on pictures, else its tokenizer."""
    if "image-classification" not in tasks:
        return load_tokenizer(name)
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder_of(name, weights=False), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} has no image processor that can be read: {str(error).splitlines()[0]} Save one beside the model."
        ) from error
