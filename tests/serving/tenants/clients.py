"""Servers that train, and what the public client sends them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from serving.api.running import running, serving_of

from lorry import pocket
from lorry.pocket import Example
from lorry.serving.http.keys import Keys
from lorry.serving.training.options import TrainingOptions
from lorry.serving.training.trainer import Trainer

KEY = "tml-anyone"


@dataclass
class Training:
    """A server that listens, and what trains there."""

    url: str
    trainer: Trainer
    app: Any


@contextmanager
def training(folder: Path, keys: Keys | None = None, **options: Any) -> Iterator[Training]:
    """A server of the pocket model that trains, in a thread."""
    with serving_of(keys=keys) as serving:
        trainer = Trainer(serving.service, TrainingOptions(folder=folder, **options))
        try:
            with running(serving, training=trainer, tokenizer=str(pocket.PATH)) as found:
                yield Training(found.url, trainer, found.server.config.app)
        finally:
            trainer.close()


def service(url: str, key: str = KEY) -> Any:
    """The public client."""
    import tinker

    return tinker.ServiceClient(base_url=url, api_key=key)


def tokens(text: str) -> list[int]:
    """A text's tokens."""
    return list(_tokenizer()(text, add_special_tokens=False)["input_ids"])


def text(ids: Sequence[int]) -> str:
    """The text of tokens."""
    return str(_tokenizer().decode(list(ids), skip_special_tokens=True))


def _tokenizer() -> Any:
    if not _KEPT:
        _KEPT.append(pocket.load()[1])
    return _KEPT[0]


_KEPT: list[Any] = []


def datum(example: Example) -> Any:
    """An example whose answer, with the end of text, is learned."""
    import tinker

    prompt = tokens(example.prompt)
    answer = [*tokens(example.answer), _tokenizer().eos_token_id]
    whole = prompt + answer
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(whole[:-1]),
        loss_fn_inputs={"target_tokens": whole[1:], "weights": weights},
    )


def losses(client: Any, batches: Sequence[list[Any]], rate: float = 5e-3) -> list[float]:
    """Train on batches, and return the loss of each for a token."""
    import tinker

    found = []
    for batch in batches:
        done = client.forward_backward(batch, "cross_entropy")
        step = client.optim_step(tinker.AdamParams(learning_rate=rate))
        count = sum(sum(each.loss_fn_inputs["weights"].data) for each in batch)
        found.append(done.result().metrics["loss:sum"] / count)
        step.result()
    return found


def logprobs(client: Any, data: list[Any]) -> torch.Tensor:
    """What a model says of the targets of examples."""
    done = client.forward(data, "cross_entropy").result()
    return torch.cat([torch.as_tensor(each["logprobs"].data) for each in done.loss_fn_outputs])
