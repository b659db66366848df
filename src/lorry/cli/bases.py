"""Base models as commands name them: ``pocket``, a local Hugging Face folder, or a name on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorry.cli.hub import from_hub, is_hub_name, repository
from lorry.core.errors import CheckpointError, OptionError, near_misses

POCKET = "pocket"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quiet() -> None:
    """Keep transformers' and torch's bars and notices off the terminal; errors still show."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def dtype_of(text: str) -> torch.dtype | str:
    """Return a dtype by name; ``auto`` stays as it is and means the checkpoint's own."""
    if text == "auto":
        return text
    if text not in _DTYPES:
        raise OptionError(
            f"There is no dtype '{text}'.{near_misses(text, _DTYPES)} Expected auto, {', '.join(_DTYPES)}."
        )
    return _DTYPES[text]


def folder_of(name: str, *, weights: bool = True) -> Path:
    """Return the folder of a base; one that is named by its name on the hub is fetched into the hub's cache.

    Parameters
    ----------
    name
        ``pocket``, a folder, or ``OWNER/NAME@REVISION``.
    weights
        Whether its weights are wanted, too.

    Raises
    ------
    CheckpointError
        Nothing is there, or it holds no ``config.json``.
    """
    if name == POCKET:
        from lorry.pocket.loading import PATH

        return PATH
    path = Path(name).expanduser()
    if is_hub_name(name):
        path = from_hub(name, "model" if weights else "config")
    elif not path.is_dir():
        raise CheckpointError(
            f"There is no folder {path}. Expected 'pocket', a local Hugging Face model folder, or a name on the hub "
            "such as Qwen/Qwen3-0.6B."
        )
    if not (path / "config.json").is_file():
        hint = (
            "it is an adapter"
            if any((path / f).exists() for f in ("lorry.json", "adapter_config.json"))
            else "it has none"
        )
        raise CheckpointError(f"{path} is no Hugging Face model folder: a config.json was expected, {hint}.")
    return path


def config_of(name: str) -> Any:
    """Return the configuration of a base, without running any code of the folder."""
    folder = folder_of(name, weights=False)
    quiet()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"Cannot read {folder / 'config.json'}: {str(error).splitlines()[0]}") from error


def model_class(config: Any, task: str = "auto") -> Any:
    """Return the transformers class of a base: for a task, or the architecture that the config names."""
    import transformers

    if task != "auto":
        from lorry.training.heads import HEADS

        if task not in HEADS:
            raise OptionError(
                f"There is no task '{task}'.{near_misses(task, HEADS)} Expected auto, {', '.join(HEADS)}."
            )
        return getattr(transformers, HEADS[task].auto)
    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def skeleton(name: str, task: str = "auto", labels: int | None = None) -> nn.Module:
    """Return a base on the meta device: its real class and shapes, without memory and without reading
    weights.
    """
    folder = folder_of(name, weights=False)
    diffuser = _diffusers_class(folder)
    if diffuser is not None:
        with torch.device("meta"):
            drawn: nn.Module = diffuser.from_config(diffuser.load_config(folder))
        return drawn
    config = config_of(name)
    if labels:
        config.num_labels = labels
    cls = model_class(config, task)
    with torch.device("meta"):
        build = getattr(cls, "_from_config", None) or cls.from_config
        try:
            model: nn.Module = build(config)
        except ValueError as error:
            raise CheckpointError(f"{name} has no model for the task '{task}': {str(error).splitlines()[0]}") from error
    model.config._name_or_path = said_name(name) or str(folder)  # type: ignore[union-attr]
    return model


def said_name(name: str) -> str | None:
    """Return what an adapter says its base is called, where that is not its folder."""
    return POCKET if name == POCKET else repository(name) if is_hub_name(name) else None


def load_base(name: str, dtype: str = "auto", task: str = "auto", labels: int | None = None) -> nn.Module:
    """Return a base with its weights, in eval mode on the CPU."""
    wanted = dtype_of(dtype)
    folder = folder_of(name)
    if name == POCKET:
        if wanted == "auto":
            wanted = torch.float32  # stored in bfloat16 to be small, fastest in float32 on a CPU
        if not (folder / "model.safetensors").is_file():
            from lorry.pocket.loading import load

            return load()[0]  # raises with what to do
    options: dict[str, Any] = {"num_labels": labels} if labels else {}
    diffuser = _diffusers_class(folder)
    if diffuser is not None:
        cls = diffuser
        options["torch_dtype"] = None if wanted == "auto" else wanted
    else:
        cls = model_class(config_of(name), task)
        options["dtype"] = wanted
    try:
        model: nn.Module = cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot load the base {folder}: {str(error).splitlines()[0]}") from error
    said = said_name(name)
    if said is not None and diffuser is None:
        model.config._name_or_path = said  # type: ignore[union-attr]
    return model.eval()


def _diffusers_class(folder: Path) -> Any:
    """Return the diffusers class of a folder such as a pipeline's ``unet``, or None for a
    transformers model.
    """
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
    if not name:
        return None
    import diffusers

    cls = getattr(diffusers, str(name), None)
    if cls is None:
        raise CheckpointError(
            f"{folder / 'config.json'} names the class '{name}', which this version of diffusers lacks."
        )
    return cls


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a base, with a padding token (the end of text where it has none of its own)."""
    folder = folder_of(name, weights=False)
    quiet()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no tokenizer that can be read: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
