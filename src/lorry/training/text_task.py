"""What all tasks on text have in common: how rows of tokens are padded, run and checked against the model."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorry.core.life.state import unwrapped

from .batches import block_mask, collate
from .data import Record
from .data_errors import DataError
from .heads import check_head
from .losses import count_labels
from .rows import Encoded, one_row
from .task import Batch, Examples, Setting, Task


def flat(example: Any) -> tuple[Encoded, ...]:
    """Return the rows of an example: itself, those of a tuple, or its ``rows``; what is no row is passed over."""
    if isinstance(example, Encoded):
        return (example,)
    parts = example if isinstance(example, tuple) else getattr(example, "rows", ())
    return tuple(row for part in parts for row in flat(part))


@dataclass(frozen=True)
class TextPass:
    """How a model takes rows of tokens.

    Attributes
    ----------
    pad_id
        Token that fills up rows; the mask hides it.
    extra
        Further arguments of the forward pass.
    token_types
        Whether the model tells the two texts of a pair apart.
    eager
        Whether its attention takes masks to be added, in place of boolean ones.
    """

    pad_id: int
    extra: dict[str, Any]
    token_types: bool
    eager: bool

    @classmethod
    def of(cls, setting: Setting) -> TextPass:
        """Return how the model of a setting takes rows."""
        return setting.once("text", lambda: cls._read(setting))

    @classmethod
    def _read(cls, setting: Setting) -> TextPass:
        model = unwrapped(setting.model)
        accepted = inspect.signature(model.forward).parameters
        config: Any = getattr(model, "config", None)
        return cls(
            pad_id=_pad_id(setting.processor, config),
            extra={"use_cache": False} if "use_cache" in accepted else {},
            token_types="token_type_ids" in accepted,
            eager=getattr(config, "_attn_implementation", "sdpa") != "sdpa",
        )


def _pad_id(tokenizer: Any, config: Any) -> int:
    """Return the token that fills up rows; any will do where the tokenizer has none."""
    found = [getattr(config, "pad_token_id", None)]
    found += [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
    return next((int(value) for value in found if isinstance(value, int)), 0)


class TextTask(Task):
    """A task whose examples are rows of tokens (`Encoded`), or hold several (`flat`).

    Subclasses give `encode`, and a loss of logits and labels.
    """

    unit: ClassVar[str] = "tokens"
    #: Whether the loss is a sum over tokens that needs no borders of rows, but for first tokens, which have no label.
    token_by_token: ClassVar[bool] = False
    task: ClassVar[str | None] = "causal-lm"

    def encode(
        self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Return the examples of records, with a report of what was left out."""
        raise NotImplementedError

    @property
    def family(self) -> str:
        """Rows that predict tokens go together, and rows that have a class."""
        return f"text, {self.task}"

    def examples(
        self, setting: Setting, records: Sequence[Record], labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode records."""
        if setting.processor is None:
            raise DataError("Text needs a tokenizer; give one, or give rows that are encoded already (EncodedSet).")
        return self.encode(setting.processor, records, labels=labels)

    def collate(self, setting: Setting, examples: Sequence[Any]) -> Batch:
        """Pad rows to one length; packed ones get a mask that keeps their documents apart.

        An example of a task that compares texts is a tuple of rows.
        """
        how = TextPass.of(setting)
        found = [row for e in examples for row in flat(e)]
        batch = {k: v.to(setting.device) for k, v in collate(found, how.pad_id).items()}
        labels, mask = batch.pop("labels"), batch["attention_mask"].bool()
        if "position_ids" in batch:
            dtype = getattr(setting.model, "dtype", torch.float32) if how.eager else None
            batch["attention_mask"] = block_mask(batch["position_ids"], batch["attention_mask"], dtype)
        if not how.token_types:
            batch.pop("token_type_ids", None)
        return Batch(batch, labels, {"padding_mask": mask})

    def padding_needed(self, setting: Setting, examples: Sequence[Any]) -> str | None:
        """Return why rows cannot lie one after another: a loss of whole rows, or a model that would mix them."""
        if not self.token_by_token:
            return super().padding_needed(setting, examples)
        model = unwrapped(setting.model)
        config: Any = getattr(model, "config", None)
        attention = getattr(config, "_attn_implementation", "sdpa")
        reach = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        longest = max(map(len, examples))
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return f"{type(model).__name__} takes no position_ids"
        if getattr(model, "_is_stateful", False):
            return f"{type(model).__name__} carries a state from one token to the next, across rows"
        if attention not in ("sdpa", "eager"):
            return f"its attention is '{attention}', which takes no mask of blocks (load the base with sdpa or eager)"
        if any(isinstance(r, int) and r < longest for r in reach):
            return f"its attention reaches fewer tokens back than the {longest} of the longest row"
        return None

    def collate_in_one(self, setting: Setting, examples: Sequence[Encoded]) -> Batch:
        """Put rows one after another; positions begin anew with each, and a mask keeps them apart."""
        how = TextPass.of(setting)
        joined = collate([one_row(examples)], how.pad_id)
        batch = {k: v.to(setting.device) for k, v in joined.items()}
        dtype = getattr(setting.model, "dtype", torch.float32) if how.eager else None
        batch["attention_mask"] = block_mask(batch["position_ids"], batch["attention_mask"], dtype)
        labels = batch.pop("labels")
        return Batch(batch, labels, lengths=tuple(map(len, examples)))

    def forward(self, setting: Setting, batch: Batch) -> Tensor:
        """Return the model's logits."""
        logits: Tensor = setting.model(**batch.inputs, **TextPass.of(setting).extra).logits
        return logits

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed loss of each row, and its number of predictions."""
        pairs = list(zip(outputs.split(1), targets.split(1), strict=True))
        counts = [count_labels(labels) for _, labels in pairs]
        return torch.stack([self.loss(*pair)[0] for pair in pairs]), torch.tensor(counts)

    def rows_of(self, example: Any) -> int:
        """Return the number of rows in the example."""
        return len(flat(example))

    def count(self, example: Any) -> int:
        """Return the number of labelled tokens, or 1 for a class."""
        return sum(row.label_count for row in flat(example))

    def cost(self, example: Any) -> int:
        """Return the number of tokens of its longest row."""
        return max(map(len, flat(example)))

    def fingerprint(self, examples: Sequence[Any]) -> str:
        """Return a hash of tokens and labels."""
        state = hashlib.blake2b(digest_size=8)
        for row in (row for example in examples for row in flat(example)):
            state.update(row.input_ids.numpy().tobytes())
            state.update(b"|" if row.labels is None else row.labels.numpy().tobytes())
            state.update(str(row.label).encode())
        return state.hexdigest()

    def check_model(self, setting: Setting) -> None:
        """Refuse a model that has another head (`check_head`)."""
        check_head(self.task, setting.model, self.name)

    def check(self, setting: Setting, examples: Examples[Any], name: str) -> None:
        """Refuse tokens that the model does not know, and rows that are too long for it."""
        rows = [row for example in examples.examples for row in flat(example)]
        ids = torch.cat([row.input_ids for row in rows])
        low, high = int(ids.min()), int(ids.max())
        getter = getattr(setting.model, "get_input_embeddings", None)
        table: Any = getter() if callable(getter) else None
        size = getattr(table, "num_embeddings", None)
        if size is not None and not 0 <= low <= high < size:
            bad = high if high >= size else low
            raise DataError(
                f"{name} has the token {bad}, but the model knows {size} tokens: the tokenizer does not belong "
                "to this model."
            )
        config: Any = getattr(setting.model, "config", None)
        most = getattr(config, "max_position_embeddings", None)
        longest = max(map(len, rows))
        if most is not None and longest > most:
            raise DataError(
                f"{name} has rows of {longest} tokens, but the model takes {most}; set max_length to {most} or less."
            )
