"""``lorry inspect``: what an adapter is, site by site, without its base where that is possible."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import Json
from lorry.cli.output import facts_table, note, out, print_json, table

if TYPE_CHECKING:
    from torch import Tensor

    from lorry.core.files.info import AdapterFile
    from lorry.core.method import Method

#: Sites of the table that are shown one by one; more are summed by name.
MOST_ROWS = 60


def inspect(
    path: Annotated[
        Path, typer.Argument(help="Adapter: a folder of Lorry's or PEFT's, or a kohya / diffusers file.")
    ],
    heatmap: Annotated[
        Path | None, typer.Option("--heatmap", help="Draw norms and singular values into this PNG file.")
    ] = None,
    all_sites: Annotated[
        bool, typer.Option("--all", help="Show every site, however many there are.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show method, sites, base fingerprint, and norms and singular values of the update at each site."""
    from lorry.core.files.info import read_info

    file = read_info(path, eager=True)
    sites = [facts_of(file, name) for name in file.sites]
    drawn = [s for s in sites if s.get("singular_values")]
    if heatmap is not None:
        if drawn:
            from lorry.cli.pictures import heat_map

            heat_map(drawn, heatmap, f"{file.name}: {file.method.info.slug}, {len(drawn)} sites")
            note(f"wrote {heatmap}")
        else:
            note("no heat map: no site has an update that is a product of two factors")
    facts = {**_head(file), "sites": sites}
    if as_json:
        print_json(facts)
    else:
        _print(facts, all_sites)


def site_facts(path: Path) -> list[dict[str, Any]]:
    """Return the facts of every site of an adapter file that has a spectrum."""
    from lorry.core.files.info import read_info

    file = read_info(path, eager=True)
    return [s for s in (facts_of(file, name) for name in file.sites) if s.get("singular_values")]


def facts_of(file: AdapterFile, path: str) -> dict[str, Any]:
    """Return what a file says of one site, with norms and singular values where they follow from the file alone."""
    from lorry.cli.spectrum import singular_values, summary
    from lorry.core.families import Bottleneck

    part = file.sites[path]
    tensors: Mapping[str, Tensor] = {
        **{name: file.read(key) for name, key in file.shared.items() if key in file.file.places},
        **file.tensors(path),
    }
    method = part.method
    site = _stand_in(path, part.kind, part.shape, tensors)
    facts: dict[str, Any] = {
        "path": path,
        "layer": site.layer,
        "kind": part.kind or "linear",
        "shape": list(part.shape or site.shape),
        "method": method.to_dict(),
        "parameters": sum(t.numel() for t in tensors.values()),
        "tensors": {
            name: {"shape": list(t.shape), "norm": float(t.double().norm())} for name, t in tensors.items()
        },
    }
    if isinstance(method, Bottleneck) and method.constant:
        try:
            a, b = method.factors(tensors, site)
        except (KeyError, AttributeError):
            facts["note"] = "the update needs the base weight too"
            return facts
        facts |= {"rank": int(a.shape[-2]), "scale": method.scale(site)}
        facts |= summary(singular_values(a, b, method.scale(site)))
        if not method.plain:
            facts["note"] = "low-rank part alone; its output gain needs the base weight"
    return facts


def _stand_in(
    path: str, kind: str | None, shape: tuple[int, ...] | None, tensors: Mapping[str, Tensor]
) -> Any:
    """Return a site without a model, which tells a method the sizes."""
    from torch import nn

    from lorry.core.kinds import KINDS
    from lorry.core.sites import Site

    if shape is None:
        a, b = tensors.get("A"), tensors.get("B")
        known = a is not None and b is not None and a.ndim > 1 and b.ndim > 1
        shape = (
            (*b.shape[:-2], b.shape[-2], a.shape[-1]) if known and a is not None and b is not None else (0, 0)
        )
    module = nn.Module()
    found = next((k for k in KINDS if k.name == (kind or "linear")), KINDS[0])
    return Site(path, found, module, module, "", shape[-2], shape[-1], tuple(shape[:-2]))


def _head(file: AdapterFile) -> dict[str, Any]:
    mark = file.fingerprint
    method: Method = file.method
    return {
        "path": str(file.path),
        "format": file.format,
        "name": file.name,
        "method": method.to_dict(),
        "paper": method.info.paper,
        "merge": method.info.merge,
        "base": file.base,
        "fingerprint": mark.digest if mark is not None else None,
        "tensors": len(file.file.places),
        "bytes": file.path.stat().st_size
        if file.path.is_file()
        else sum(p.stat().st_size for p in file.path.iterdir() if p.is_file()),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in file.file.places.values()}),
        "notes": list(file.notes),
        "metadata": file.metadata,
    }


def _print(facts: Mapping[str, Any], all_sites: bool) -> None:
    from lorry.cli.output import size

    sites = facts["sites"]
    options = ", ".join(f"{k}={v}" for k, v in facts["method"].items() if k != "method")
    rows = [
        (
            "adapter",
            f"{facts['name']} ({facts['format']} format, {size(facts['bytes'])}, {' '.join(facts['dtypes'])})",
        ),
        ("method", f"{facts['method']['method']} ({options}); {facts['paper']}; merge: {facts['merge']}"),
        (
            "sites",
            f"{len(sites)} with {sum(s['parameters'] for s in sites):,} elements in {facts['tensors']} tensors",
        ),
        ("base", facts["base"] or "not said"),
        ("fingerprint", facts["fingerprint"] or "none: the file does not say which base it was made for"),
        *(("note", text) for text in facts["notes"]),
        *_training(facts["metadata"]),
    ]
    out().print(facts_table("", rows))
    measured = [s for s in sites if "norm" in s]
    if len(measured) <= MOST_ROWS or all_sites:
        _print_sites(sites)
    else:
        _print_groups(measured)
        note(f"{len(sites)} sites, summed by name; --all shows each")


def _training(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = metadata.get("training")
    if not isinstance(facts, Mapping):
        return []
    loss = facts.get("last_loss")
    text = (
        f"{facts.get('steps')} steps, {facts.get('tokens'):,} tokens"
        if facts.get("tokens")
        else f"{facts.get('steps')} steps"
    )
    return [("training", text + (f", last loss {loss:.4f}" if isinstance(loss, float) else ""))]


def _print_sites(sites: list[dict[str, Any]]) -> None:
    rows = []
    for s in sites:
        values = s.get("singular_values") or []
        shown = " ".join(f"{v:.3g}" for v in values[:4]) + (" ..." if len(values) > 4 else "")
        numbers = [
            f"{s[k]:.3g}" if k in s else "-"
            for k in ("norm", "spectral_norm", "stable_rank", "effective_rank")
        ]
        rows.append(
            (
                s["path"],
                "x".join(map(str, s["shape"])),
                s.get("rank", "-"),
                *numbers,
                shown or s.get("note", ""),
            )
        )
    columns = ("site", "shape", "rank", "norm", "largest", "stable rank", "effective rank", "singular values")
    out().print(table("Update at each site", columns, rows, right=columns[2:7]))


def _print_groups(sites: list[dict[str, Any]]) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for s in sites:
        groups.setdefault(s["path"].rpartition(".")[2], []).append(s)
    rows = []
    for name, members in groups.items():
        norms = [s["norm"] for s in members]
        most = max(members, key=lambda s: s["norm"])
        total = sum(n * n for n in norms) ** 0.5
        rank = sum(s["effective_rank"] for s in members) / len(members)
        rows.append(
            (
                name,
                len(members),
                f"{total:.3g}",
                f"{min(norms):.3g}",
                f"{max(norms):.3g}",
                most["path"],
                f"{rank:.2f}",
            )
        )
    columns = ("name", "sites", "norm of all", "smallest", "largest", "largest at", "mean effective rank")
    out().print(
        table(
            "Updates by name",
            columns,
            rows,
            right=("sites", "norm of all", "smallest", "largest", "mean effective rank"),
        )
    )
