"""Routing statistics of a run: recorded from the layers of any routed method, tabled and plotted.

Methods leave ``load``, ``mass``, ``effective`` and ``entropy`` at each layer where somebody records
(`lorry.context(model, recording=True)`); see `lorry.methods.parts.routing.report`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import LorryError
from lorry.core.life import duties
from lorry.core.life.api import adapters, log_probability
from lorry.core.method.context import Context
from lorry.methods.parts.routing import leave_one_out

#: What a routed layer records, with the meaning that tables and plots show.
STATISTICS = {
    "load": "share of tokens that use an expert",
    "mass": "mean gate of an expert",
    "effective": "effective number of experts of a token",
    "entropy": "entropy of the router in nats",
}


@dataclass
class RoutingLog:
    """Routing statistics by step.

    Attributes
    ----------
    rows
        One for each step, layer and adapter: step, adapter, site, and what the layer recorded
        (``load`` and ``mass`` as lists over the experts).
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: int, context: Context) -> int:
        """Take what layers recorded in one pass; returns the number of layers that did."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for (adapter, site, name), value in context.records.items():
            if name in STATISTICS:
                row = found.setdefault((adapter, site), {"step": step, "adapter": adapter, "site": site})
                row[name] = value.tolist()
        self.rows += found.values()
        return len(found)

    def adapters(self) -> list[str]:
        """Names of the adapters that were recorded, in order of appearance."""
        return list(dict.fromkeys(row["adapter"] for row in self.rows))

    def of(self, adapter: str | None = None) -> list[dict[str, Any]]:
        """The rows of one adapter; it must be named if there are several.

        Raises
        ------
        LorryError
            Nothing was recorded, or the adapter was not.
        """
        names = self.adapters()
        if adapter is None and len(names) == 1:
            adapter = names[0]
        if adapter not in names:
            raise LorryError(
                f"No routing of adapter {adapter!r} was recorded (recorded: {names or 'none'}). Record a "
                "routed method with lorry.context(model, recording=True)."
            )
        return [row for row in self.rows if row["adapter"] == adapter]

    def loads(self, adapter: str | None = None, last: int = 1) -> dict[str, Tensor]:
        """Mean load of each expert by site over the last recorded steps, ``(experts,)``."""
        rows = self.of(adapter)
        steps = sorted({row["step"] for row in rows})[-last:]
        found: dict[str, list[Tensor]] = {}
        for row in rows:
            if row["step"] in steps:
                found.setdefault(row["site"], []).append(torch.tensor(row["load"]))
        return {site: torch.stack(values).mean(0) for site, values in found.items()}

    def summary(self, adapter: str | None = None) -> list[dict[str, float]]:
        """One row for each step: means over the layers, and the coefficient of variation of the loads.

        Loads are compared within each layer, so layers that collapsed onto different experts show.
        """
        by_step: dict[int, list[dict[str, Any]]] = {}
        for row in self.of(adapter):
            by_step.setdefault(row["step"], []).append(row)
        return [{"step": step, **_means(rows)} for step, rows in sorted(by_step.items())]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the rows as JSON lines, whole or not at all."""
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(part, target)
        return target

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RoutingLog:
        """Read what `save` wrote."""
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return cls([json.loads(line) for line in lines if line])

    def plot(self, path: str | os.PathLike[str], adapter: str | None = None) -> Path:
        """Draw the loads of the last step by layer, and entropy, effective number and imbalance by step.

        Parameters
        ----------
        path
            Where to write; the suffix decides the format (png, svg, pdf).
        adapter
            Which, if several were recorded.
        """
        import matplotlib

        matplotlib.use("Agg", force=False)
        from matplotlib.figure import Figure

        loads, steps = self.loads(adapter), self.summary(adapter)
        widest = max(len(load) for load in loads.values())
        table = torch.full((len(loads), widest), float("nan"))
        for line, load in zip(table, loads.values(), strict=True):
            line[: len(load)] = load
        figure = Figure(figsize=(11, max(3.0, 1.2 + 0.22 * len(loads))), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        image = left.imshow(table.numpy(), aspect="auto", vmin=0, cmap="viridis")
        left.set_yticks(range(len(loads)), list(loads), fontsize=6)
        left.set_xlabel("expert")
        left.set_title(f"{STATISTICS['load']}, step {steps[-1]['step']:g}", fontsize=9)
        figure.colorbar(image, ax=left)
        for name in ("effective", "entropy", "imbalance"):
            points = [(row["step"], row[name]) for row in steps if name in row]
            if points:
                label = STATISTICS.get(name, "coefficient of variation of the loads")
                right.plot(*zip(*points, strict=True), marker=".", label=label)
        right.set_xlabel("step")
        right.set_title("means over layers", fontsize=9)
        right.legend(fontsize=7)
        figure.savefig(Path(path), dpi=120)
        return Path(path)


def _means(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        for name in ("effective", "entropy"):
            if name in row:
                values.setdefault(name, []).append(row[name])
        load = torch.tensor(row["load"])
        if len(load) > 1 and load.any():
            values.setdefault("imbalance", []).append(float(load.std(correction=0) / load.mean()))
    return {name: sum(found) / len(found) for name, found in values.items()}


def repeated(batch: Mapping[str, Tensor], draws: int) -> dict[str, Tensor]:
    """Return the rows of a batch once for each draw, draw after draw, for methods with ``method.row_draws`` above 1.

    What is no tensor, or a scalar, stays as it is.
    """
    return {
        name: value.repeat(draws, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
        for name, value in batch.items()
    }


def policy_loss(model: nn.Module, adapter: str, losses: Tensor, draws: int) -> Tensor:
    """Return the loss of a pass over `repeated` rows: it trains the adapter, and its router as a policy.

    Parameters
    ----------
    model
        Carries the adapter; its last pass drew the routes.
    adapter
        Its name; all rows use it.
    losses
        Of each row, ``(draws · rows,)``.
    draws
        How often each row is in the batch.

    Raises
    ------
    OptionError
        Fewer than two draws.
    """
    duties.attend(adapters(model)[adapter], duties.DRAWS)
    chosen = log_probability(model, adapter)
    each = losses.unflatten(0, (draws, -1))
    # with every expert active nothing is drawn
    return each.mean() if chosen is None else leave_one_out(each, chosen.to(losses).unflatten(0, (draws, -1)))
