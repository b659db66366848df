"""Training as a service: steps of several clients together, beside the same steps of one client after another.

What the server does is measured, without HTTP and without the clients: requests are written down, passes and optimizer
steps done, states written, answers read. Random tokens on a Llama of random weights.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from lorry.bench._measure import integers, interleaved, lines, llama, machine, ratios, threads
from lorry.bench._registry import register
from lorry.core.errors import OptionError
from lorry.serving.engine import Engine
from lorry.serving.options import EngineOptions
from lorry.serving.service import Service
from lorry.serving.training.options import TrainingOptions
from lorry.serving.training.queues import PASS
from lorry.serving.training.store import Entry
from lorry.serving.training.tenant import LoraChoice
from lorry.serving.training.trainer import Trainer, plain
from lorry.serving.training.wire import messages, raw

_VOCABULARY = 512
_AFTER, _TOGETHER = "one after another", "together"


def run(
    rounds: int = 5,
    widths: str = "64,128,256,512",
    layers: int = 2,
    tenants: int = 8,
    steps: int = 8,
    rows: int = 1,
    tokens: int = 32,
    rank: int = 8,
) -> dict[str, Any]:
    """Let `tenants` clients do `steps` steps each, of `rows` examples of `tokens` tokens, on bases of `widths`."""
    if min(tenants, steps, rows, tokens) < 1:
        raise OptionError("The bench needs at least one tenant, step, row and token.")
    found: dict[str, Any] = {}
    with threads(1):
        for width in integers(widths):
            with ExitStack() as scope:
                crowd = _Crowd(scope, layers, width, tenants, steps, (rows, tokens), rank)
                seconds = interleaved({_AFTER: crowd.after, _TOGETHER: crowd.together}, rounds, warm_up=1)
                each = {name: 1e3 * statistics.median(s) / (tenants * steps) for name, s in seconds.items()}
                found[str(width)] = {
                    "speed-up": ratios(seconds, _TOGETHER)[_AFTER],
                    "milliseconds a step": each,
                    "passes": dict(crowd.passes),
                }
        described = {"layers": layers, "tenants": tenants, "steps": steps, "rows": rows, "tokens": tokens, "rank": rank}
        return {"machine": machine("cpu"), "shape": described, "rounds": rounds, "widths": found}


class _Crowd:
    """Clients of one server."""

    def __init__(
        self, scope: ExitStack, layers: int, width: int, tenants: int, steps: int, rows: tuple[int, int], rank: int
    ) -> None:
        base = llama(layers, width, 11 * width // 4, _VOCABULARY, eos_token_id=None, bos_token_id=None)
        engine = Engine(base.eval().requires_grad_(False), None, EngineOptions(pages=16))
        scope.callback(engine.close)
        service = Service(engine)
        scope.callback(service.close)
        folder = Path(scope.enter_context(tempfile.TemporaryDirectory()))
        self.trainer = Trainer(service, TrainingOptions(folder=folder))
        scope.callback(self.trainer.close)
        self.steps, self.rows = steps, rows
        self.passes: dict[str, int] = {}
        self._next = {f"bench:train:{number}": 1 for number in range(tenants)}
        self.trainer.store.add_session("bench", "", {})
        asyncio.run(self._create(rank))

    async def _create(self, rank: int) -> None:
        for number, name in enumerate(self._next):
            choice = dataclasses.asdict(LoraChoice(rank, 32.0, number, unembed=False))
            self.trainer.store.add_model(name, "bench", "", choice, None)
            await self._done(Entry(name, 0, "create", plain({})))

    def after(self) -> None:
        """Do the steps of one client after those of another."""

        async def work() -> None:
            for name in self._next:
                await self._train(name)

        self._counted(_AFTER, work)

    def together(self) -> None:
        """Do the steps of all clients at once."""

        async def work() -> None:
            await asyncio.gather(*map(self._train, self._next))

        self._counted(_TOGETHER, work)

    def _counted(self, case: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        before = self.trainer.passes.count
        asyncio.run(work())
        self.passes[case] = self.trainer.passes.count - before

    async def _train(self, name: str) -> None:
        for _ in range(self.steps):
            seq = self._next[name]
            self._next[name] += 2
            step = Entry(name, seq + 1, "optim_step", plain({"adam_params": {"learning_rate": 1e-4}}))
            done = asyncio.ensure_future(self._done(Entry(name, seq, PASS, _body(name, seq, *self.rows))))
            await asyncio.sleep(0)  # the pass is sent before the step, as clients do
            await asyncio.gather(done, self._done(step))

    async def _done(self, entry: Entry) -> None:
        self.trainer.submit(entry)
        found = await self.trainer.answer(entry.model, entry.seq, 600)
        if found is None or found.answer is None or found.answer.startswith(b'{"error"'):
            raise RuntimeError(f"A request of the bench was not done: {found}")


def _body(name: str, seq: int, rows: int, tokens: int) -> bytes:
    """Return a request for a pass of random tokens, as the client sends it."""
    generator = torch.Generator().manual_seed(seq)
    message = messages()["ForwardBackwardRequest"](model_id=name, seq_id=seq, loss_fn="cross_entropy")
    for _ in range(rows):
        drawn = torch.randint(0, _VOCABULARY, (tokens + 1,), generator=generator)
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = raw(drawn[:-1].int())
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = raw(drawn[1:]), 2
        target.shape.append(tokens)
    return bytes(message.SerializeToString())


def table(result: dict[str, Any]) -> Any:
    """Return how much faster the clients are together, by the width of the base."""
    shape = result["shape"]
    title = (
        f"{shape['tenants']} clients, {shape['rows']} x {shape['tokens']} tokens a step, {shape['layers']} layers, "
        f"rank {shape['rank']}, {result['machine']}"
    )
    rows = [
        (
            width,
            each["speed-up"]["ratio"],
            f"{each['speed-up']['least']:.2f} - {each['speed-up']['most']:.2f}",
            each["milliseconds a step"][_AFTER],
            each["milliseconds a step"][_TOGETHER],
            f"{each['passes'][_AFTER]} / {each['passes'][_TOGETHER]}",
        )
        for width, each in result["widths"].items()
    ]
    return lines(
        title, ("width", "speed-up", "least - most", "ms a step, alone", "ms a step, together", "passes"), rows
    )


register("tenants", run, table, help=__doc__)
