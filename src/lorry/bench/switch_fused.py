"""Changing the adapter that is in the weights: overwriting a few values (SHiRA) against fusing and unfusing LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lorry
from lorry.bench._measure import Case, integers, interleaved, lines, machine, ratios, threads
from lorry.bench._registry import register
from lorry.core.life.adapter import Adapter
from lorry.core.life.switch import Switch, make_switch
from lorry.kernels.products import add_product

_NAMES = ("a", "b")
_LINE = 64  # bytes that a processor moves at once


def run(
    rounds: int = 9,
    widths: Sequence[int] | str | int = (512, 1024, 2048, 4096),
    layers: int = 2,
    density: float = 0.01,
    rank: int = 32,
    dtype: str = "float32",
    peer: bool = True,
) -> dict[str, Any]:
    """Measure two adapters put into square linear layers and taken out again, in turn.

    Parameters
    ----------
    rounds, layers, dtype
        Of the timing; each round is adapter a in, a out, b in, b out.
    widths
        Of the layers; a text is split at commas.
    density, rank
        Of the sparse adapters, and of the low-rank ones.
    peer
        Run PEFT's ``merge_adapter`` and ``unmerge_adapter`` too.

    Returns
    -------
    dict
        For each width ``ratios`` of time to the scatter, ``bytes`` that one way of a switch reads and writes
        (counted), and for float32 and bfloat16 ``changed``: the share of entries that differ from the original
        weights after a and b were put in and taken out.
    """
    found: dict[int, dict[str, Any]] = {}
    with threads(1), torch.no_grad():
        for width in integers(widths):
            sides = _Sides(width, layers, density, rank, getattr(torch, dtype), peer)
            seconds = interleaved(sides.cases(), rounds, repeat=min(16, max(1, (2048 // width) ** 2)))
            found[width] = {"ratios": ratios(seconds, "scatter"), "bytes": sides.nbytes()}
            found[width]["changed"] = {
                kind: _Sides(width, layers, density, rank, getattr(torch, kind), peer).changed()
                for kind in ("float32", "bfloat16")
            }
        return {"machine": machine("cpu"), "dtype": dtype, "density": density, "rank": rank, "widths": found}


class _Sides:
    """The same base and two adapters of each sort on it, for every way of switching."""

    def __init__(self, width: int, layers: int, density: float, rank: int, dtype: torch.dtype, peer: bool) -> None:
        self.width, self.layers, self.rank, self.dtype = width, layers, rank, dtype
        self.model = self._base()
        self.switches = self._switches(density)
        self.low_rank = self._low_rank()
        self.plain = self._base()
        self.peft = _peft(self._base(), rank) if peer else None

    def _base(self) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(self.width, self.width, bias=False) for _ in range(self.layers))).to(
            self.dtype
        )

    def _switches(self, density: float) -> list[Switch]:
        options = {"method": "shira", "density": density}
        return [make_switch(a) for a in _attached(self.model, options, "sparse", 0.02)]

    def _low_rank(self) -> list[Adapter]:
        return _attached(self.model, {"method": "lora", "rank": self.rank, "alpha": self.rank}, "lora", 0.02)

    def cases(self) -> dict[str, Case]:
        """Return the ways of switching, each both adapters in and out."""
        cases: dict[str, Case] = {
            "scatter": self._scatter,
            "add, subtract": self._add_subtract,
            "lorry fuse, unfuse": self._fuse,
        }
        if self.peft is not None:
            cases["peft merge, unmerge"] = partial(_peft_merge, self.peft)
        return cases

    def _scatter(self) -> None:
        for switch in self.switches:
            switch.on()
            switch.off()

    def _add_subtract(self) -> None:
        weights = [layer.weight for layer in self.plain]
        for adapter in self.low_rank:
            for sign in (1.0, -1.0):
                for weight, entry in zip(weights, adapter.entries.values(), strict=True):
                    own = entry.tensors()
                    add_product(weight, own["B"].to(weight.dtype), own["A"].to(weight.dtype), sign)  # type: ignore[arg-type]

    def _fuse(self) -> None:
        for adapter in self.low_rank:
            adapter.fuse(safe=False)
            adapter.unfuse()

    def nbytes(self) -> dict[str, int]:
        """Return the bytes that putting one adapter in reads and writes, and those of the base's cache lines among
        them.
        """
        size = self.dtype.itemsize
        matrix = self.width**2 * size
        lines_touched = sum(int((p.index * size // _LINE).unique().numel()) for p in self.switches[0].patches)
        return {
            "scatter": self.switches[0].nbytes,
            "scatter, whole cache lines": 2 * _LINE * lines_touched
            + sum(p.index.nbytes + p.new.nbytes for p in self.switches[0].patches),
            "fuse": self.layers * (2 * matrix + 2 * self.rank * self.width * size),
        }

    def changed(self) -> dict[str, float]:
        """Return the share of entries that are not what they were, bit for bit, after each way of switching."""
        bases = {"add, subtract": self.plain, "peft merge, unmerge": self.peft}
        found = {}
        for name, case in self.cases().items():
            model = bases.get(name, self.model)
            before = [p.clone() for p in _matrices(model)]
            case()
            pairs = list(zip(before, _matrices(model), strict=True))
            different = sum(int((_bits(a) != _bits(b)).sum()) for a, b in pairs)
            found[name] = different / sum(a.numel() for a in before)
        return found


def _attached(model: nn.Module, options: dict[str, Any], prefix: str, std: float) -> list[Adapter]:
    adapters = []
    for seed, name in enumerate(_NAMES):
        adapter = lorry.attach(model, options, name=f"{prefix}-{name}", seed=seed, activate=False).train(False)
        generator = torch.Generator().manual_seed(seed)
        for entry in adapter.entries.values():
            for tensor, spec in zip(entry.tensors().values(), entry.home.specs.values(), strict=True):
                if spec.trained:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
        adapters.append(adapter)
    return adapters


def _peft(model: nn.Module, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    names = [name for name, _ in model.named_children()]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=False)
    wrapped = get_peft_model(model, config, adapter_name="a")
    wrapped.add_adapter("b", config)
    return wrapped.base_model


def _peft_merge(model: Any) -> None:
    for name in _NAMES:
        model.merge_adapter(adapter_names=[name])
        model.unmerge_adapter()


def _matrices(model: Any) -> list[Tensor]:
    """Return the base weights of either library's model."""
    return [p for n, p in model.named_parameters() if n.endswith("weight") and "lora_" not in n]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def table(result: dict[str, Any]) -> Any:
    """Return times, bytes and what was not restored."""
    from rich.console import Group

    widths = result["widths"]
    names = list(next(iter(widths.values()))["ratios"])
    times, bytes_, changed = [], [], []
    for width, found in widths.items():
        times.append((str(width), *(_spread(found["ratios"][n]) for n in names)))
        bytes_.append((str(width), *(v / 1e6 for v in found["bytes"].values())))
        changed += [(f"{width}, {d}", *(f"{v[n]:.2%}" for n in names)) for d, v in found["changed"].items()]
    what = f"{result['density']:.0%} of the entries against rank {result['rank']}"
    kinds = list(next(iter(widths.values()))["bytes"])
    return Group(
        lines(
            f"In and out, time ratio to scatter, {what}, {result['dtype']}, {result['machine']}",
            ("width", *names),
            times,
        ),
        lines("One way, MB read and written", ("width", *kinds), bytes_),
        lines(
            "Entries that differ from the original weights after two adapters were in and out",
            ("width", *names),
            changed,
        ),
    )


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['ratio']:.1f} ({ratio['least']:.1f} - {ratio['most']:.1f})"


register("switch-fused", run, table, help=__doc__)
