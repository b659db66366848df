"""AuthenLoRA: a style adapter of which every user gets a copy whose pictures say whose it is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Generator, Tensor

from lorry import activate, adapters
from lorry import load as load_adapter
from lorry.formats.reader import open_adapter
from lorry.protection.bake import bake, new_secret, sign
from lorry.protection.codec import Codec
from lorry.protection.messages import drawn, to_text
from lorry.protection.robustness import curve
from lorry.protection.verify import verify

from ..authenlora.stages import BITS, SIGNED, Stage, stage_for
from ..catalogue import Outcome, Run, system

USERS = ("anna", "ben")
#: Accepted false-positive rate of one picture: 7 of 8 bits.
RATE = 0.05


@system(
    "authenlora",
    title="A style adapter whose copies sign the pictures that they make, each with its user's message.",
    source="arXiv 2511.21216",
)
def run(given: Run) -> Outcome:
    """Train codec and adapter, bake two users' copies, judge their pictures and those of nobody, and attack them."""
    stage = stage_for(given.base, given.data, given.seed, given.scaled(800, 2))
    count, steps = given.scaled(100, 4), given.scaled(stage.codec_steps, 2)
    codec = stage.codec(steps, given.seed, lambda done: given.step("codec", done, steps))
    codec.save(given.out / "private" / "codec")
    given.step("adapter", 0, 1)
    stage.train(codec, given.scaled(stage.steps, 2), given.seed, given.out / "run")
    given.step("adapter", 1, 1)
    base = stage.network
    trained = given.out / "run" / SIGNED / "adapter"
    messages = _messages(given.seed)
    adapters(base)[SIGNED].detach()
    made: dict[str, Tensor] = {"nobody": stage.draw(count, given.seed)}
    for user, message in messages.items():
        private = given.out / "private" / f"{user}.json"
        private.unlink(missing_ok=True)
        secret = new_secret(message, user=user, adapter=user)
        sign(trained, given.out / user, secret, private, overwrite=True)
        adapter = load_adapter(base, given.out / user, name=user, activate=False)
        with activate(base, user):
            made[user] = stage.draw(count, given.seed)
        adapter.detach()
    rows = [_judged(codec, made[of], of, user, messages[user]) for of in ("nobody", *USERS) for user in USERS]
    curves = _attacked(stage, codec, trained, messages, given, count)
    _draw(curves, given.out / "robustness.png")
    _grid(made, given.out / "pictures.png")
    return _outcome(rows, curves, count)


def _messages(seed: int) -> dict[str, Tensor]:
    """Return two messages that differ in at least half of the bits."""
    g = Generator().manual_seed(seed)
    first = second = drawn(BITS, g)
    while int((first != second).sum()) < BITS // 2:
        second = drawn(BITS, g)
    return dict(zip(USERS, (first, second), strict=True))


def _judged(codec: Codec, pictures: Tensor, of: str, user: str, message: Tensor) -> tuple[str | float | int, ...]:
    each, together = verify(codec, pictures, message, RATE)
    bits = statistics.fmean(verdict.matching / verdict.bits for verdict in each)
    passed = statistics.fmean(float(verdict.signed) for verdict in each)
    found = f"{together.matching} of {together.bits}, p = {together.p_value:.2g}"
    return of, f"{user} ({to_text(message)})", round(bits, 3), round(passed, 3), found


def _attacked(
    stage: Stage, codec: Codec, trained: Path, messages: Mapping[str, Tensor], given: Run, count: int
) -> dict[str, dict[str, float]]:
    file = open_adapter(trained)
    copies = {user: bake(file, message) for user, message in messages.items()}
    found = {}
    for number, (user, copy) in enumerate(copies.items()):
        other = next(c for name, c in copies.items() if name != user)
        found[user] = curve(
            stage.network, copy, codec, messages[user], lambda: stage.draw(count, given.seed), other=other
        )
        given.step("attacks", number + 1, len(copies))
    return found


def _outcome(rows: Sequence[tuple[Any, ...]], curves: Mapping[str, Mapping[str, float]], count: int) -> Outcome:
    own = statistics.fmean(row[2] for row in rows if row[1].startswith(f"{row[0]} "))
    nobody = statistics.fmean(row[3] for row in rows if row[0] == "nobody")
    attacks = {name: statistics.fmean(c[name] for c in curves.values()) for name in next(iter(curves.values()))}
    after = ", ".join(f"{name} {value:.3f}" for name, value in attacks.items() if name != "none")
    says = (
        f"Two copies of one training, {count} pictures each: {own:.1%} of the bits of the user's own message are read "
        f"right; {nobody:.1%} of the pictures without an adapter pass for a user's (accepted: {RATE:.0%})."
    )
    return Outcome(
        says,
        ("pictures of", "judged for", "bits right", "pictures that pass", "all together"),
        rows,
        ["robustness.png", "pictures.png", *USERS, "private"],
        [
            f"Bits read right after attacks: {after}.",
            f"A picture passes with 7 of {BITS} bits. The averaged adapter is that of both users.",
            "private/ holds the codec and the users' messages; anna/ and ben/ are plain LoRA adapters to give away.",
        ],
    )


def _draw(curves: Mapping[str, Mapping[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for user, found in curves.items():
        axis.plot(list(found), list(found.values()), marker="o", label=user)
    axis.axhline(0.5, color="grey", linestyle=":", label="chance")
    axis.set_ylim(0.4, 1.02)
    axis.set_ylabel("bits read right")
    axis.tick_params(axis="x", rotation=40)
    for label in axis.get_xticklabels():
        label.set_horizontalalignment("right")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _grid(made: Mapping[str, Tensor], path: Path, shown: int = 12) -> None:
    """Write pictures in rows, those of nobody first, all from the same noise."""
    import torch
    from PIL import Image

    rows = [torch.cat(list(torch.nn.functional.pad(p[:shown], (1, 1, 1, 1), value=-1)), -1) for p in made.values()]
    levels = ((torch.cat(rows, -2).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).contiguous().numpy())
    factor = max(1, 640 // image.width)
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(path)
