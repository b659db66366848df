"""The client: answers a server's message with what its own data make of the state; its answers depend on nothing else.

It keeps no state between rounds but the record of the privacy that it has spent. What it is told is checked before
it is used, and how private it is it decides by its own run file, never by what a server says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from lorry.core.errors import FingerprintError, LorryError
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import rows as active_rows
from lorry.core.method.start import mix_seed
from lorry.merging.factors import Factors
from lorry.training.data_errors import DataError
from lorry.training.jobs import Job
from lorry.training.joint import Base, Place, Share, train_pass
from lorry.training.optim import set_rate
from lorry.training.prepare import prepare
from lorry.training.row_gradients import RowGradients
from lorry.training.run import Run
from lorry.training.schedule import rate_factor
from lorry.training.task import Prepared, Setting

from . import holding, wire
from .options import Federation
from .privacy import Ledger, noised, poisson, private_sum, secret_generator

OFFSET = "offset/"
Around = AbstractContextManager[Any]


class Client:
    """One client of a federation.

    Parameters
    ----------
    options
        The run file.
    name
        Which client of it.
    setting
        The base and its tokenizer.
    data
        Its data, if not those of the run file.
    folder
        Where the record of spent privacy lies; None keeps it in memory.
    noise
        Source of the noise and of the draws of private batches; the operating system's entropy if not given, as it
        should be outside of tests.
    """

    def __init__(
        self,
        options: Federation,
        name: str,
        setting: Setting,
        *,
        data: Any = None,
        folder: Path | None = None,
        noise: Generator | None = None,
    ) -> None:
        self.options, self.name, self.setting = options, name, setting
        self.base = Base(setting)
        self.job = client_job(options, name, options.data_of(name) if data is None else data)
        self.prepared: Prepared = prepare(self.job, setting)
        self.privacy = options.make_privacy()
        self.generator = secret_generator() if noise is None else noise
        self.ledger: Ledger | None = None
        self.noise = 0.0
        if self.privacy is not None:
            self.privacy.check_data(len(self.prepared.train), self.job.batch_size)
            self.noise = self.privacy.noise(self.sample_rate, options.rounds * options.local_steps)
            self.ledger = Ledger.open(self.privacy, None if folder is None else folder / "privacy.json")

    @property
    def sample_rate(self) -> float:
        """Chance of each example to be in a private batch."""
        return self.job.batch_size / len(self.prepared.train)

    def answer(self, message: bytes) -> bytes:
        """Return the answer to a server's message: an update, or why there is none."""
        try:
            tensors, facts = wire.unpack(message)
            return self._train(tensors, facts)
        except (LorryError, DataError) as error:
            return wire.pack({}, {"client": self.name, "error": str(error)})

    def _train(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
        number, seed = int(facts["round"]), int(facts["seed"])
        options, model = self.options, self.setting.model
        with holding.start(model, options, options.rank(self.name), seed, self.name) as adapter:
            self._check(adapter, facts)
            received = {n: t for n, t in tensors.items() if not n.startswith(OFFSET)}
            if received:
                found = holding.values(adapter)
                shapes = {n: tuple(found[n].shape) for n in holding.sent_names(adapter, options)}
                wire.check(received, shapes, "The server")
                holding.load(adapter, received)
            with holding.beside(model, offset_of(tensors)) as offset, self.base.mode(training=True):
                loss = self._steps(adapter, number, offset)
            result = holding.values(adapter)
            sent = holding.sent_names(adapter, options)
        answer = {"client": self.name, "round": number, "anchor": anchor(result, sent)}
        if self.ledger is None:
            answer |= {"loss": loss, "examples": len(self.prepared.train)}
        else:  # neither the loss nor the count of examples has noise on it
            answer |= {"privacy": self.ledger.facts()}
        return wire.pack({n: result[n] for n in sent}, answer)

    def _check(self, adapter: Adapter, facts: Mapping[str, Any]) -> None:
        """Refuse another base, or another start, than the server's."""
        if facts.get("base") != adapter.fingerprint.digest:
            raise FingerprintError(
                f"Client '{self.name}' has the base {adapter.fingerprint.digest}, the server {facts.get('base')}: "
                "updates of different bases must not be averaged. Load the server's base."
            )
        own = anchor(holding.values(adapter), holding.sent_names(adapter, self.options))
        if facts.get("anchor") != own:
            raise FingerprintError(
                f"Client '{self.name}' starts from another frozen {self.options.freeze} than the server, so the mean "
                "of the trained factors would mean nothing. Use the server's run file, with the same seed, rank, "
                "targets and method, and the same version of torch."
            )

    def _steps(self, adapter: Adapter, number: int, offset: str | None) -> float | None:
        job = self._round_job(number)
        run = Run(job)
        run.begin(adapter, self.prepared, self.setting)
        assert run.groups is not None
        run.groups.freeze([n for n in run.groups.names() if holding.is_frozen(n, adapter, self.options)])
        if self.ledger is not None:
            self._private_steps(run, adapter, offset)
            return None
        losses = []
        while run.running and run.progress.step < run.total:
            run.open_step()
            share = run.share()
            share.around = self._around(offset, share.seed)
            train_pass(self.base, [share], job.seed)
            row = run.finish_step() if run.take(share) else None
            losses += [row["loss"]] if row else []
        if run.failed:
            raise DataError(f"Client '{self.name}' {run.progress.status}. Lower the learning rate, or mend its data.")
        run.release()
        return sum(losses) / len(losses)

    def _around(self, offset: str | None, seed: int, watch: RowGradients | None = None) -> Callable[[Place], Around]:
        """Return what is around each pass: the offset beside the adapter on every row, and who watches the rows."""

        def around(place: Place) -> Around:
            stack = ExitStack()
            if offset is not None:
                each = {self.name: 1.0, offset: 1.0}
                stack.enter_context(active_rows(self.setting.model, [each] * place.total, seeds={self.name: seed}))
            if watch is not None:
                stack.enter_context(watch.watching(place.start, place.stop, place.total))
            return stack

        return around

    def _round_job(self, number: int) -> Job:
        """Return the job of one round: a fresh optimizer, an order of its own, the rate of this round."""
        job, steps = self.job, self.options.local_steps
        total = steps * self.options.rounds
        factor = rate_factor(job.make_schedule(), steps * number, total, job.warmup, job.rate_floor)
        return dataclasses.replace(
            job,
            name=self.name,
            steps=steps,
            epochs=None,
            schedule="constant",
            schedule_options=None,
            warmup=0.0,
            learning_rate=max(job.learning_rate * factor, 1e-30),
            seed=mix_seed(job.seed, self.name, number),
        )

    def _private_steps(self, run: Run, adapter: Adapter, offset: str | None) -> None:
        """Take the local steps on clipped gradients with noise; they are counted before they are taken."""
        assert self.ledger is not None and self.privacy is not None and run.optimizer is not None
        steps, rate = self.options.local_steps, self.sample_rate
        rows = RowGradients(adapter)
        self.ledger.spend(self.noise, rate, steps)
        parameters = dict(adapter.named_parameters())
        trained = {n: p for n, p in parameters.items() if not holding.is_frozen(n, adapter, self.options)}
        for step in range(steps):
            chosen = poisson(len(self.prepared.train), rate, self.generator)
            total = {n: torch.zeros_like(p) for n, p in trained.items()}
            for start in range(0, len(chosen), run.job.batch_size):
                part = chosen[start : start + run.job.batch_size]
                for name, value in self._clipped(run, rows, part, mix_seed(run.job.seed, step, start), offset).items():
                    total[name] += value
            deviation = self.noise * self.privacy.max_grad_norm
            for name, value in noised(total, deviation, self.generator).items():
                trained[name].grad = value / run.job.batch_size
            set_rate(run.optimizer, run.job.learning_rate)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)

    def _clipped(
        self, run: Run, rows: RowGradients, chosen: list[int], seed: int, offset: str | None
    ) -> dict[str, Tensor]:
        """Return the sum of the clipped gradients of some examples' mean losses."""
        assert run.optimizer is not None and self.privacy is not None
        made, task = self.prepared, self.prepared.task
        drawn = task.draw(made.train.take(chosen), torch.Generator().manual_seed(seed), self.setting, self.name)
        share = Share(
            name=self.name,
            prepared=made,
            examples=drawn,
            task_ids=made.train.ids(chosen),
            seed=seed,
            around=self._around(offset, seed, rows),
        )
        train_pass(self.base, [share], seed)
        run.optimizer.zero_grad(set_to_none=True)
        if share.error is not None:
            raise DataError(f"Client '{self.name}' failed: {share.error}.")
        heights = torch.tensor([task.rows_of(e) for e in drawn])
        counts = torch.tensor([max(task.count(e), 1) for e in drawn])
        owner = torch.arange(len(drawn)).repeat_interleave(heights)
        found = {}
        for name, gradient in rows.found.items():
            each = gradient.new_zeros(len(drawn), *gradient.shape[1:]).index_add_(0, owner, gradient)
            found[name] = each / counts.to(each).view(-1, *[1] * (each.dim() - 1))
        return private_sum(found, self.privacy.max_grad_norm)


def client_job(options: Federation, name: str, data: Any) -> Job:
    """Return the job of a client, whose evaluation is the server's business."""
    job = options.make_job(data)
    return dataclasses.replace(
        job, name=name, eval_data=None, hold_out=0.0, eval_every=0, patience=None, keep_best=False
    )


def anchor(values: Mapping[str, Tensor], sent: list[str]) -> str:
    """Return a hash of what is never sent, because all have it alike."""
    return wire.digest({n: t for n, t in values.items() if n not in sent})


def offset_of(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Return the offset in a message."""
    paths = {n[len(OFFSET) : -2] for n in tensors if n.startswith(OFFSET)}
    return {p: Factors(tensors[f"{OFFSET}{p}.A"], tensors[f"{OFFSET}{p}.B"]) for p in sorted(paths)}
