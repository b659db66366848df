"""Model cards of adapters in the hub's format: what it is, what it was measured by, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.cli.hub import is_hub_name

if TYPE_CHECKING:
    from lorry.formats.file import AdapterFile

#: The hub's names of what the objectives are.
_TASKS = {"classification": "text-classification"}
_SHOWN = ("objective", "epochs", "steps", "batch_size", "learning_rate", "schedule", "optimizer", "seed", "dtype")


def model_card(file: AdapterFile, name: str, licence: str | None = None) -> str:
    """Return the card of an adapter: metadata for the hub, and the same for people.

    Parameters
    ----------
    file
        The opened adapter.
    name
        What it is called on the hub, as ``OWNER/NAME``, or its folder's name.
    licence
        As the hub spells it; left out if not given.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from lorry.formats.folders import PEFT_CONFIG

    training = file.metadata.get("training")
    facts: Mapping[str, Any] = training if isinstance(training, Mapping) else {}
    job: Mapping[str, Any] = facts.get("job") or {}
    objective = job.get("objective")
    objective = objective.get("objective", objective.get("name")) if isinstance(objective, Mapping) else objective
    task = _TASKS.get(str(objective), "text-generation")
    data = job.get("eval_data") or job.get("data")
    end = {k: v for k, v in ((facts.get("eval") or {}).get("end") or {}).items() if k not in ("step", "count")}
    held = Path(str(data)).name if isinstance(data, str) else "the data"
    results = [
        EvalResult(task_type=task, dataset_type="held-out", dataset_name=held, metric_type=k, metric_value=v)
        for k, v in end.items()
        if isinstance(v, int | float)
    ]
    plain = file.path is not None and (file.path / PEFT_CONFIG).is_file()
    slug = file.method.info.slug
    base = file.base if file.base and "/" in file.base and is_hub_name(file.base) else None
    relation: Any = {"base_model_relation": "adapter"} if base else {}
    metadata = ModelCardData(
        base_model=base,
        library_name="peft" if plain else "lorry",
        license=licence,
        model_name=name.rpartition("/")[2],
        pipeline_tag=task if objective else None,
        tags=list(dict.fromkeys(["lorry", "adapter", *(["lora"] if plain else []), slug])),
        eval_results=results or None,
        **relation,
    )
    text = _text(file, name, plain, job, facts, held)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}"))


def _text(
    file: AdapterFile, name: str, plain: bool, job: Mapping[str, Any], facts: Mapping[str, Any], held: str
) -> str:
    """Return the card for people."""
    options = ", ".join(f"{k} {v}" for k, v in file.method.to_dict().items() if k != "method" and v is not None)
    mark = (
        f"`{file.fingerprint.digest}`" if file.fingerprint is not None else "none: any base of its shapes is accepted"
    )
    base = file.base or "not said"
    lines = [
        f"# {name.rpartition('/')[2]}",
        "",
        f"An adapter of the method `{file.method.info.slug}` ({options}) for the base `{base}`, made with Lorry.",
        "",
        "## Receipt",
        "",
        "| | |",
        "|---|---|",
        f"| tensors | {file.tensor_count} at {len(file.sites)} sites, each read and checked before it was published |",
        f"| base | `{base}` |",
        f"| base fingerprint | {mark} |",
    ]
    measured = facts.get("eval") or {}
    start, end = measured.get("start") or {}, measured.get("end") or {}
    if end:
        lines += [
            "",
            "## Metrics",
            "",
            f"On held-out rows of {held}, before and after training:",
            "",
            "| metric | before | after |",
            "|---|---:|---:|",
        ]
        lines += [
            f"| {k} | {_number(start.get(k))} | {_number(v)} |" for k, v in end.items() if k not in ("step", "count")
        ]
    if facts:
        lines += ["", "## Training", "", "| | |", "|---|---|"]
        lines += [f"| {k} | {job[k]} |" for k in _SHOWN if job.get(k) is not None]
        lines += [f"| {k} | {_number(facts[k])} |" for k in ("tokens", "examples", "last_loss") if k in facts]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import lorry",
        "",
        f'lorry.load(model, "PATH", name="{file.name}")  # lorry pull {name} PATH',
    ]
    if plain:
        lines += [
            "",
            "# or with peft:",
            "from peft import PeftModel",
            "",
            f'PeftModel.from_pretrained(model, "{name}")',
        ]
    return "\n".join([*lines, "```", ""])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
