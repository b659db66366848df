"""Roles of an agent on the pocket model: adapters for three skills, with one A at values or each with its own."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorry.claims.ledger import Setting
from lorry.core.errors import AdapterError
from lorry.serving.agents import Trajectory
from lorry.training import Job, train

#: Role -> its skill; each writes in a form of its own.
ROLES = {"plan": "star", "act": "unrotate", "reflect": "opens"}
RANK, ALPHA, STEPS, BATCH = 8, 16, 200, 8
#: Earlier lines of a context, at most, in training and in trials.
LINES = 5
#: The roles' adapters that have an A of their own at values, too.
APART = "apart-"


@dataclass(frozen=True)
class Line:
    """What a tool asks of a role, and the right answer with its end of line."""

    role: str
    prompt: str
    answer: str


def lines(split: Any, count: int, seed: int) -> list[Line]:
    """Draw lines, of each role in turn but in an order of its own."""
    from lorry.pocket import world

    drawn = {r: world.examples(s, split, -(-count // len(ROLES)) + 1, seed) for r, s in ROLES.items()}
    draw = random.Random(seed)
    found = []
    for index in range(count):
        role = draw.choice(list(ROLES))
        one = drawn[role][index % len(drawn[role])]
        found.append(Line(role, one.prompt, one.answer + "\n"))
    return found


def rows(role: str, count: int, seed: int) -> list[dict[str, str]]:
    """Rows for the training of a role: up to five earlier lines of all roles, then its own."""
    draw, every = random.Random(seed), lines("train", count * 3, seed)
    own = [line for line in every if line.role == role]
    found = []
    for index in range(count):
        before = draw.sample(every, draw.randint(0, LINES))
        last = own[index % len(own)]
        text = "".join(line.prompt + line.answer for line in before) + last.prompt
        found.append({"prompt": text, "completion": last.answer.rstrip("\n")})
    return found


def _job(setting: Setting, name: str, role: str, rate: float, seed: int, **more: Any) -> Job:
    return Job(
        name,
        rows(role, setting.much(1600, 64), seed),
        {"method": "lora", "rank": RANK, "alpha": ALPHA},
        targets=["*.q_proj", "*.v_proj"],
        objective="completion",
        steps=setting.much(STEPS, 3),
        batch_size=BATCH,
        learning_rate=rate,
        schedule="cosine",
        hold_out=0.05,
        seed=seed,
        **more,
    )


def held_out_loss(setting: Setting, rate: float, seed: int) -> float:
    """Train the first role and return its loss on held-out rows."""
    from lorry import pocket

    model, tokenizer = pocket.load()
    first = next(iter(ROLES))
    with tempfile.TemporaryDirectory() as folder:
        report = train(model, tokenizer, [_job(setting, first, first, rate, seed)], folder).report
    return float(report["jobs"][0]["eval"]["end"]["loss"])


@contextmanager
def trained(setting: Setting, rate: float, seed: int) -> Iterator[tuple[nn.Module, Any]]:
    """Train the first role as it is, the others with its A and with A of their own.

    Gives the model with all five adapters on it (``plan``, ``act``, ``reflect``, ``apart-act``, ``apart-reflect``), and
    the tokenizer.
    """
    from lorry import pocket

    model, tokenizer = pocket.load()
    first, *others = ROLES
    with tempfile.TemporaryDirectory() as folder:
        alone = train(model, tokenizer, [_job(setting, first, first, rate, seed)], Path(folder) / "first")
        given = Path(folder) / "given"
        alone.adapters[first].save(given)
        shared: dict[str, Any] = {
            "start": {"start": "shared-down", "adapter": str(given)},
            "dynamics": [{"dynamics": "freezing", "tensors": "*.v_proj.A"}],
            "stages": {"freeze": 0},
        }
        jobs = [_job(setting, role, role, rate, seed + 1, **shared) for role in others]
        jobs += [_job(setting, APART + role, role, rate, seed + 1) for role in others]
        train(model, tokenizer, jobs, Path(folder) / "rest")
    yield model, tokenizer


def names(apart: bool) -> dict[str, str]:
    """Role -> its adapter."""
    first = next(iter(ROLES))
    return {role: role if role == first or not apart else APART + role for role in ROLES}


class Unchecked(Trajectory):
    """A trajectory that keeps X A once though the roles' A differ: what the scheme's rule is there to prevent."""

    def _check_shared(self) -> None:
        return


def distances(model: nn.Module, tokenizer: Any, apart: bool, policies: Sequence[str], count: int, seed: int) -> Any:
    """Return for each scheme the mean divergence of the next token's distribution from that of caches of their own.

    The text is the right one, so that all schemes are asked about the same contexts.
    """
    found: dict[str, list[float]] = {policy: [] for policy in policies}
    for number in range(count):
        text = lines("test", LINES + 1, 1000 * seed + number)
        exact = _distributions(Trajectory(model, names(apart), "non-shared"), tokenizer, text)
        for policy in policies:
            other = _distributions(Unchecked(model, names(apart), policy), tokenizer, text)
            found[policy].append(float((exact.exp() * (exact - other)).sum(-1).mean()))
    return {policy: sum(values) / len(values) for policy, values in found.items()}


def _distributions(trajectory: Trajectory, tokenizer: Any, text: Sequence[Line]) -> Tensor:
    found = []
    for line in text:
        trajectory.append(_coded(tokenizer, line.prompt))
        for token in _coded(tokenizer, line.answer):
            found.append(trajectory.logits(line.role).double().log_softmax(-1))
            trajectory.append([token])
    return torch.stack(found)


def accuracy(model: nn.Module, tokenizer: Any, apart: bool, policy: str, count: int, seed: int) -> float:
    """Return the share of right answers where roles read what they and others wrote themselves."""
    right = total = 0
    for number in range(count):
        trajectory = Unchecked(model, names(apart), policy)
        for line in lines("test", LINES + 1, 1000 * seed + number):
            trajectory.append(_coded(tokenizer, line.prompt))
            turn = trajectory.turn(line.role, 12, stop_tokens=[tokenizer.eos_token_id])
            right += list(turn.tokens) == _coded(tokenizer, line.answer)
            total += 1
            if not turn.stopped:
                trajectory.append([tokenizer.eos_token_id])
    return right / total


def similarity(model: nn.Module, tokenizer: Any, apart: bool, count: int, seed: int) -> dict[str, float]:
    """Return the mean cosine between roles that have read the same text: of whole values, base values, low-rank values
    and what the adapters add to the values.
    """
    found: dict[str, list[float]] = {"values": [], "base values": [], "low-rank values": [], "updates": [], "keys": []}
    for number in range(count):
        text = [t for line in lines("test", LINES + 1, 1000 * seed + number) for t in (line.prompt, line.answer)]
        tokens = _coded(tokenizer, "".join(text))
        seen = [_read(model, role, adapter, tokens) for role, adapter in names(apart).items()]
        for what in found:
            pairs = [(a[what], b[what]) for i, a in enumerate(seen) for b in seen[i + 1 :]]
            found[what] += [float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]
    return {what: sum(values) / len(values) for what, values in found.items()}


def _read(model: nn.Module, role: str, adapter: str, tokens: Sequence[int]) -> dict[str, Tensor]:
    """Return what one role alone keeps of a text, ``(layers, heads or 1, length, width)`` each."""
    trajectory = Trajectory(model, {role: adapter}, "base-shared")
    trajectory.append(tokens)
    trajectory.logits(role)
    base = torch.cat([layer.values.value for layer in trajectory.store.whole("")]).double()
    keys = torch.cat([layer.keys.value for layer in trajectory.store.whole("")]).double()
    low = torch.stack([one.value for one in trajectory.store.low(role)]).double()
    ups = [factors[1].double() for factors in trajectory.factors(role).values() if factors is not None]
    if len(ups) != len(low):
        raise AdapterError(f"Adapter '{adapter}' changes values in {len(ups)} of {len(low)} layers; expected all.")
    updates = torch.cat([part @ up.T for part, up in zip(low, ups, strict=True)])
    shaped = updates.view(*updates.shape[:2], base.shape[1], -1).transpose(1, 2)
    found = {"values": base + shaped, "base values": base, "low-rank values": low, "updates": shaped, "keys": keys}
    return {what: tensor.flatten(0, 1) if what != "low-rank values" else tensor for what, tensor in found.items()}


def _coded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
