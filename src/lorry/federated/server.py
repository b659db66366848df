"""The server: sends the state, checks what comes back, aggregates it, and can be taken up again after any round."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError, FingerprintError, LorryError, OptionError
from lorry.core.life.adapter import Adapter
from lorry.core.method.start import mix_seed
from lorry.core.receipt import Receipt
from lorry.merging.factors import Factors, stack
from lorry.training.evaluate import evaluate
from lorry.training.joint import Base
from lorry.training.prepare import prepare
from lorry.training.run import Run
from lorry.training.task import Setting

from . import holding, wire
from .aggregate import State, Update, aggregate, compressed, error
from .client import OFFSET, anchor, client_job, offset_of
from .options import Federation
from .transport import InProcess, Transport

_STATE = "state.safetensors"
_PAIR, _EXTRA = "pair/", "extra/"


class FederationError(LorryError):
    """Too few clients sent an update that can be used; the state is that of the last round that counted."""


@dataclass(frozen=True)
class FederationResult:
    """What a federation made.

    Attributes
    ----------
    report
        As in ``report.json``: each round with its clients, failures, bytes, loss and aggregation error.
    receipt
        What was aggregated; its notes say what was sent and what privacy was spent.
    path
        The adapter's folder.
    state
        The server's last state.
    """

    report: dict[str, Any]
    receipt: Receipt
    path: Path
    state: State


@dataclass(frozen=True)
class _Start:
    """What all clients of a rank start from: their tensors, which of them are sent, scales, and the base."""

    values: dict[str, Tensor]
    sent: list[str]
    paths: list[str]
    scales: dict[str, float]
    base: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: tuple(self.values[n].shape) for n in self.sent}

    def pairs(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        whole = {**self.values, **tensors}
        return {p: (whole[f"{p}.A"], whole[f"{p}.B"]) for p in self.paths}

    def extra(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {f"{p}.{key}" for p in self.paths for key in "AB"}
        return {n: tensors[n] for n in self.sent if n not in own}


class Server:
    """The server of a federation.

    Parameters
    ----------
    options
        The run file.
    setting
        The base and its tokenizer.
    transport
        How clients are reached.
    resume
        Go on after the last round that is in the output folder.
    overwrite
        Replace a federation in the output folder.

    Raises
    ------
    OptionError
        The folder holds another federation.
    """

    def __init__(
        self,
        options: Federation,
        setting: Setting,
        transport: Transport,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.options, self.setting, self.transport = options, setting, transport
        self.aggregation = options.make_aggregation()
        self.out = Path(options.out)
        self.rounds: list[dict[str, Any]] = []
        self.known: list[str] = []
        self._starts: dict[tuple[int, int], _Start] = {}
        begin = self._start(max(options.rank(n) for n in options.names()), 0)
        pairs = None if self.aggregation.fresh else begin.pairs(begin.values)
        self.state = State(pairs, extra=begin.extra(begin.values))
        self._open(resume, overwrite)

    def run(self) -> FederationResult:
        """Do the rounds that are left, and write the adapter.

        Raises
        ------
        FederationError
            A round got fewer updates than `minimum`.
        """
        while len(self.rounds) < self.options.rounds:
            self.round()
        return self._finish()

    def round(self) -> dict[str, Any]:
        """Do one round and return its record."""
        number = len(self.rounds)
        names = self._chosen(number)
        messages = {name: self._message(name, number) for name in names}
        answers = self.transport.exchange(messages)
        record: dict[str, Any] = {
            "round": number + 1,
            "clients": [],
            "joined": [n for n in names if n not in self.known],
            "failed": {},
            "bytes_down": sum(map(len, messages.values())),
            "bytes_up": 0,
            "tensor_bytes_down": 0,
            "tensor_bytes_up": 0,
            "privacy": {},
        }
        record["tensor_bytes_down"] = sum(wire.size_of(wire.unpack(m)[0]) for m in messages.values())
        taken = {}
        for name in names:
            try:
                taken[name] = self._taken(name, number, answers.get(name), record)
            except (LorryError, OSError) as failure:
                record["failed"][name] = str(failure)
        if len(taken) < self.options.minimum:
            why = "; ".join(f"{n}: {text}" for n, text in record["failed"].items()) or "no client can be reached"
            raise FederationError(
                f"Round {number + 1} got {len(taken)} updates of {len(names)} clients, expected at least "
                f"{self.options.minimum}. {why} The state of round {number} is in {self.out}; mend the clients and go "
                "on with resume."
            )
        self._aggregate(taken, record)
        return record

    def _aggregate(self, taken: Mapping[str, tuple[Update, dict[str, Any]]], record: dict[str, Any]) -> None:
        """Make the next state of the updates of a round, measure it, and write it."""
        equal = self.options.weighting() == "equal"
        counts = {n: 1 if equal else int(facts["examples"]) for n, (_, facts) in taken.items()}
        total = sum(counts.values())
        updates = [dataclasses.replace(u, weight=counts[n] / total) for n, (u, _) in taken.items()]
        trained = frozenset("AB") - {self.options.freeze} - self._frozen_by_method()
        before, self.state = self.state, aggregate(self.aggregation.name, self.state, updates, trained)
        losses = [(facts["loss"], counts[n]) for n, (_, facts) in taken.items() if facts.get("loss") is not None]
        record["clients"] = list(taken)
        record["aggregation_error"] = error(self.state, before, updates)
        record["loss"] = sum(v * c for v, c in losses) / sum(c for _, c in losses) if losses else None
        for name, (_, facts) in taken.items():
            if "privacy" in facts:
                record["privacy"][name] = facts["privacy"]
        self.known += [n for n in taken if n not in self.known]
        self.rounds.append(record)
        every, number = self.options.eval_every, len(self.rounds)
        if number == self.options.rounds or (every and number % every == 0):
            record["evaluation"] = self.evaluate()
        self._save()

    # -- messages

    def _chosen(self, number: int) -> list[str]:
        """Return the clients of a round: those that can be reached, or a share of them."""
        here = set(self.transport.names())
        names = [n for n in self.options.names() if n in here]
        if self.options.fraction == 1:
            return names
        count = max(self.options.minimum, math.ceil(self.options.fraction * len(names)))
        generator = torch.Generator().manual_seed(mix_seed(self.options.seed, "round", number))
        picked = torch.randperm(len(names), generator=generator)[:count].tolist()
        return [names[i] for i in sorted(picked)]

    def _message(self, name: str, number: int) -> bytes:
        begin = self._start(self.options.rank(name), number)
        tensors: dict[str, Tensor] = {}
        for path, (a, b) in (self.state.pairs or {}).items():
            rank = begin.values[f"{path}.A"].shape[0]
            scale = begin.scales[path] if self.state.folded else 1.0
            tensors |= {f"{path}.A": a[:rank], f"{path}.B": b[:, :rank] / scale}
        tensors |= self.state.extra
        sent = {n: tensors[n] for n in begin.sent if n in tensors}
        if not self.rounds:  # everybody has the start already
            sent = {}
        if self.state.pairs is None and sent:  # factors start anew, whole modules do not
            sent = {**{n: begin.values[n] for n in begin.sent}, **sent}
        for path, factors in self.state.offset.items():
            sent |= {f"{OFFSET}{path}.A": factors.a.float(), f"{OFFSET}{path}.B": factors.b.float()}
        facts = {"round": number, "seed": self._seed(number), "base": begin.base}
        return wire.pack(sent, {**facts, "anchor": anchor(begin.values, begin.sent)})

    def _taken(
        self, name: str, number: int, answer: bytes | Exception | None, record: dict[str, Any]
    ) -> tuple[Update, dict[str, Any]]:
        """Return a client's update, checked.

        Raises
        ------
        LorryError
            It failed, or what it sent cannot be used.
        """
        if not isinstance(answer, bytes):
            raise FederationError(f"The client failed ({answer if answer is not None else 'no answer'}).")
        record["bytes_up"] += len(answer)
        tensors, facts = wire.unpack(answer)
        record["tensor_bytes_up"] += wire.size_of(tensors)
        if "error" in facts:
            raise FederationError(str(facts["error"]))
        begin = self._start(self.options.rank(name), number)
        if facts.get("client") != name or facts.get("round") != number:
            raise CheckpointError(
                f"The answer is of {facts.get('client')} in round {facts.get('round')}; start it again."
            )
        wire.check(tensors, begin.shapes, f"Client '{name}'")
        if facts.get("anchor") != anchor(begin.values, begin.sent):
            raise FingerprintError(
                f"Client '{name}' trained beside another frozen {self.options.freeze} than the server's, so its update "
                "is left out. Use one run file and one seed everywhere."
            )
        count = facts.get("examples", 1)
        if self.options.weighting() == "examples" and (not isinstance(count, int) or count < 1):
            raise CheckpointError(f"Client '{name}' says it has {count!r} examples, expected a number from 1.")
        pairs = begin.pairs(tensors)
        return Update(pairs, begin.scales, 1.0, begin.extra(tensors)), {"examples": 1, **facts}

    # -- the start that is shared

    def _seed(self, number: int) -> int:
        return mix_seed(self.options.seed, "start", number if self.aggregation.fresh else 0)

    def _start(self, rank: int, number: int) -> _Start:
        seed = self._seed(number)
        if (rank, seed) not in self._starts:
            with holding.start(self.setting.model, self.options, rank, seed, "federated") as adapter:
                paths = holding.pair_paths(adapter)
                scales = {p: _scale(adapter, p) for p in paths}
                sent = holding.sent_names(adapter, self.options)
                made = _Start(holding.values(adapter), sent, paths, scales, adapter.fingerprint.digest)
            if self.aggregation.fresh:
                self._starts = {k: v for k, v in self._starts.items() if k[1] == seed}
            self._starts[rank, seed] = made
        return self._starts[rank, seed]

    def _frozen_by_method(self) -> frozenset[str]:
        begin = next(iter(self._starts.values()))
        return frozenset(k for k in "AB" if not any(f"{p}.{k}" in begin.sent for p in begin.paths))

    # -- what comes out

    def whole(self) -> dict[str, Factors]:
        """Return the update of the state at each site, the scale folded in, at its numerical rank."""
        begin = self._start(max(self.options.rank(n) for n in self.options.names()), 0)
        found = {}
        for path in begin.paths:
            parts = [self.state.offset[path]] if path in self.state.offset else []
            if self.state.pairs is not None:
                a, b = self.state.pairs[path]
                parts.append(Factors(a.double(), b.double() * (1.0 if self.state.folded else begin.scales[path])))
            found[path] = compressed(stack(parts)) if parts else Factors(*_nothing(begin.values, path))
        return found

    @contextmanager
    def adapter(self) -> Iterator[Adapter]:
        """Attach what the rounds made so far, not active; where nothing lies beside the factors, as the job has it."""
        options, model = self.options, self.setting.model
        if self.state.offset or self.state.pairs is None or self.state.folded:
            made = holding.attach_factors(
                model, self.whole(), "federated", holding.modules_of(options), self.state.extra
            )
            try:
                yield made
            finally:
                made.detach()
            return
        rank = max(options.rank(n) for n in options.names())
        with holding.start(model, options, rank, self._seed(0), "federated") as adapter:
            pairs = self.state.pairs.items()
            holding.load(adapter, {f"{p}.{k}": t for p, pair in pairs for k, t in zip("AB", pair, strict=True)})
            holding.load(adapter, self.state.extra)
            yield adapter

    def evaluate(self) -> dict[str, float] | None:
        """Return the metrics of the state on the held-out data; None without any."""
        data = self.options.evaluation()
        if data is None:
            return None
        job = dataclasses.replace(client_job(self.options, "federated", data), eval_data=data)
        with self.adapter() as adapter:
            adapter.train()
            run = Run(job)
            run.begin(adapter, prepare(job, self.setting), self.setting)
            return evaluate(Base(self.setting), [run], None, None)["federated"]

    def _finish(self) -> FederationResult:
        spent: dict[str, Any] = {}
        for record in self.rounds:
            spent |= record["privacy"]
        totals = {k: sum(r[k] for r in self.rounds) for k in ("bytes_down", "bytes_up", "tensor_bytes_up")}
        report = {
            "options": plain_options(self.options),
            "rounds": self.rounds,
            "privacy": spent,
            **totals,
            "evaluation": self.rounds[-1].get("evaluation"),
        }
        notes = [f"{len(self.rounds)} rounds, {totals['bytes_up']} bytes up, {totals['bytes_down']} bytes down"]
        if self.options.make_privacy() is not None:
            notes.append(_privacy_note(spent))
        path = self.out / "adapter"
        with self.adapter() as adapter:
            count = len(list(adapter.named_tensors()))
            receipt = Receipt("federate", adapter.name, count, count, len(adapter.entries), "match", notes=tuple(notes))
            facts = {k: v for k, v in report.items() if k != "rounds"}
            adapter.metadata["federated"] = {**facts, "rounds": len(self.rounds)}
            if path.exists():
                shutil.rmtree(path)
            adapter.save(path)
        write(self.out / "report.json", json.dumps({**report, "receipt": receipt.to_dict()}, indent=2).encode())
        return FederationResult(report, receipt, path, self.state)

    # -- resume

    def _open(self, resume: bool, overwrite: bool) -> None:
        path = self.out / _STATE
        if not path.exists():
            return
        if overwrite:
            path.unlink()
            return
        if not resume:
            raise OptionError(
                f"{self.out} holds a federation already; take it up again (resume), replace it (overwrite), or choose "
                "another folder."
            )
        tensors, facts = wire.unpack(path.read_bytes())
        saved, own = facts["options"], plain_options(self.options)
        differing = [k for k in own if saved.get(k) != own[k] and k not in ("out", "rounds", "eval_every", "minimum")]
        if self.options.privacy is not None and saved.get("rounds") != own["rounds"]:
            differing.append("rounds")  # the noise was chosen for their number
        if differing:
            raise OptionError(
                f"Cannot resume {self.out}: {', '.join(differing)} differ from what it began with. Restore them, or "
                "begin in another folder."
            )
        self.rounds, self.known = facts["rounds"], facts["known"]
        pairs = {n[len(_PAIR) : -2] for n in tensors if n.startswith(_PAIR)}
        self.state = State(
            {p: (tensors[f"{_PAIR}{p}.A"], tensors[f"{_PAIR}{p}.B"]) for p in sorted(pairs)} or None,
            offset_of(tensors),
            facts["folded"],
            {n[len(_EXTRA) :]: t for n, t in tensors.items() if n.startswith(_EXTRA)},
        )

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {f"{_EXTRA}{n}": t for n, t in self.state.extra.items()}
        for path, (a, b) in (self.state.pairs or {}).items():
            tensors |= {f"{_PAIR}{path}.A": a, f"{_PAIR}{path}.B": b}
        for path, factors in self.state.offset.items():
            tensors |= {f"{OFFSET}{path}.A": factors.a, f"{OFFSET}{path}.B": factors.b}
        facts = {"rounds": self.rounds, "known": self.known, "folded": self.state.folded}
        write(self.out / _STATE, wire.pack(tensors, {**facts, "options": plain_options(self.options)}))


def simulate(
    options: Federation, setting: Setting, clients: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> FederationResult:
    """Run a federation in one process, over the code that runs at a server and at clients.

    Parameters
    ----------
    options
        The run file.
    setting
        The base, which all share, and its tokenizer.
    clients
        Name -> `Client`.
    resume, overwrite
        As for `Server`.
    """
    transport = InProcess({name: client.answer for name, client in clients.items()})
    return Server(options, setting, transport, resume=resume, overwrite=overwrite).run()


def plain_options(options: Federation) -> dict[str, Any]:
    """Return the run file as plain data; data in memory are described, not written out."""
    found: dict[str, Any] = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    found["job"] = options.make_job().to_dict()
    privacy = options.make_privacy()
    found["privacy"] = None if privacy is None else dataclasses.asdict(privacy)
    plain: dict[str, Any] = json.loads(json.dumps(found, default=lambda value: type(value).__name__))
    return plain


def write(path: Path, blob: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(blob)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _scale(adapter: Adapter, path: str) -> float:
    entry = adapter.entries[path]
    return float(entry.method.scale(entry.site))  # type: ignore[attr-defined]


def _nothing(values: Mapping[str, Tensor], path: str) -> tuple[Tensor, Tensor]:
    a, b = values[f"{path}.A"], values[f"{path}.B"]
    return torch.zeros(1, a.shape[1], dtype=torch.float64), torch.zeros(b.shape[0], 1, dtype=torch.float64)


def _privacy_note(spent: Mapping[str, Mapping[str, Any]]) -> str:
    worst = [f["epsilon"] for f in spent.values()]
    if not worst or None in worst:
        return "no privacy: steps without noise have no bound"
    most = max(spent.values(), key=lambda f: float(f["epsilon"]))
    return (
        f"differential privacy of each client's examples: epsilon {most['epsilon']:.4g} at delta {most['delta']} at "
        f"most, over {most['steps']} steps of all rounds ({most['accountant']} accountant)"
    )
