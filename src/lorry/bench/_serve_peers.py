"""How the same load is answered with PEFT and with transformers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorry.bench._serve_load import Asked, Shape, asked

#: The answers' tokens, in the order of what was asked.
Answers = list[list[int]]


def generated(model: Any, load: Sequence[Asked], **options: Any) -> Answers:
    """Return what `generate` answers to requests that are one padded batch, which ends with the longest answer."""
    longest = max(len(each.prompt) for each in load)
    tokens = torch.zeros(len(load), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, each in enumerate(load):
        tokens[row, longest - len(each.prompt) :] = torch.tensor(each.prompt)
        mask[row, longest - len(each.prompt) :] = 1
    most = max(each.answer for each in load)
    found: Tensor = model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0, **options
    )
    return [row[longest : longest + each.answer].tolist() for row, each in zip(found, load, strict=True)]


class Peer:
    """A way of answering, which takes the load of one seed after another.

    Parameters
    ----------
    shape
        The load.
    adapters
        How many there are.
    answer
        Answers a load.
    """

    def __init__(self, shape: Shape, adapters: int, answer: Callable[[Sequence[Asked]], Answers]) -> None:
        self.shape, self.adapters, self.answer = shape, adapters, answer
        self._calls = 0

    def __call__(self) -> None:
        """Answer the next load."""
        self._calls += 1
        self.answer(asked(self.shape, self.adapters, self._calls))


def peft_model(shape: Shape, adapters: int) -> Any:
    """Return PEFT's model with adapters ``a0``, ``a1``, ... of the shape's ranks."""
    from peft import LoraConfig, get_peft_model

    model: Any = None
    for number in range(adapters):
        config = LoraConfig(
            r=shape.rank(number), lora_alpha=shape.rank(number), target_modules="all-linear", init_lora_weights=False
        )
        if model is None:
            model = get_peft_model(shape.base(), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{number}", config)
    return model.eval()


def peft_names(shape: Shape, adapters: int) -> Peer:
    """Return PEFT with `adapter_names`: padded batches in which each row has its adapter."""
    model = peft_model(shape, adapters)

    def answer(load: Sequence[Asked]) -> Answers:
        batches = [load[start : start + shape.batch] for start in range(0, len(load), shape.batch)]
        return [
            row
            for batch in batches
            for row in generated(model, batch, adapter_names=[f"a{each.adapter}" for each in batch])
        ]

    return Peer(shape, adapters, answer)


def _by_adapter(model: Any, load: Sequence[Asked], batch: int, before: Any, after: Any) -> Answers:
    """Answer a load adapter after adapter, with all requests of an adapter together."""
    places: dict[int, list[int]] = {}
    for place, each in enumerate(load):
        places.setdefault(each.adapter, []).append(place)
    found: Answers = [[] for _ in load]
    for adapter, group in places.items():
        before(f"a{adapter}")
        for start in range(0, len(group), batch):
            some = group[start : start + batch]
            for place, row in zip(some, generated(model, [load[place] for place in some]), strict=True):
                found[place] = row
        after()
    return found


def peft_switch(shape: Shape, adapters: int) -> Peer:
    """Return PEFT switching: `set_adapter`, then all requests of that adapter as a padded batch."""
    model = peft_model(shape, adapters)
    return Peer(
        shape, adapters, lambda load: _by_adapter(model, load, shape.batch, model.set_adapter, lambda: None)
    )  # fmt: skip


def peft_merge(shape: Shape, adapters: int) -> Peer:
    """Return PEFT merging an adapter into the weights for the requests of that adapter, and out again."""
    model = peft_model(shape, adapters)

    def merge(name: str) -> None:
        model.merge_adapter(adapter_names=[name])

    return Peer(shape, adapters, lambda load: _by_adapter(model, load, shape.batch, merge, model.unmerge_adapter))


def batched_generate(shape: Shape) -> Peer:
    """Return transformers' `generate` on the bare base in padded batches."""
    model: nn.Module = shape.base()

    def answer(load: Sequence[Asked]) -> Answers:
        batches = [load[start : start + shape.batch] for start in range(0, len(load), shape.batch)]
        return [row for batch in batches for row in generated(model, batch)]

    return Peer(shape, 0, answer)


@contextmanager
def continuous_batching(shape: Shape) -> Iterator[Peer]:
    """Give transformers' continuous batching on the bare base, with room for as many tokens as a full batch takes.

    Its thread runs all the while; between loads it looks for work ten times in a second.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model: Any = shape.base()
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=shape.answers[1])
    options = ContinuousBatchingConfig(
        page_size=16,
        num_blocks=-(-shape.most_tokens // 16) + 1,
        max_batch_tokens=512,
        max_requests_per_batch=shape.batch,
    )
    manager = model.init_continuous_batching(generation, options)
    manager.warmup()
    manager.start()

    def answer(load: Sequence[Asked]) -> Answers:
        ids = [manager.add_request(list(each.prompt), max_new_tokens=each.answer) for each in load]
        found: dict[str, list[int]] = {}
        while len(found) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("The thread of transformers' continuous batching ended before its requests did.")
        return [found[id] for id in ids]

    try:
        yield Peer(shape, 0, answer)
    finally:
        manager.stop()
        manager.destroy()
