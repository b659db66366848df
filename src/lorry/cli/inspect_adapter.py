"""``lorry inspect``: what an adapter is, site by site, without its base where that is possible."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import Json, adapter_path
from lorry.cli.blocks import By, block_of, by_block, times_of
from lorry.cli.output import facts_table, note, out, print_json, table

if TYPE_CHECKING:
    from lorry.core.method.base import Method
    from lorry.formats.file import AdapterFile

#: Sites of the table that are shown one by one; more are summed by name.
MOST_ROWS = 60


def inspect(
    path: Annotated[
        str,
        typer.Argument(help="Adapter: a folder of Lorry's or PEFT's, a kohya / diffusers file, or a name on the hub."),
    ],
    heatmap: Annotated[
        Path | None, typer.Option("--heatmap", help="Draw norms and singular values into this PNG file.")
    ] = None,
    all_sites: Annotated[bool, typer.Option("--all", help="Show every site, however many there are.")] = False,
    by: Annotated[By, typer.Option("--by", help="Show and draw each site, or the sum of each block.")] = By.site,
    as_json: Json = False,
) -> None:
    """Show method, sites, base fingerprint, and norms and singular values of the update at each site or block."""
    from lorry.cli.spectrum import facts_of
    from lorry.formats.reader import open_adapter

    file = open_adapter(adapter_path(path))
    file.read_all()
    sites = [facts_of(file, name) for name in file.sites]
    drawn = [s for s in sites if s.get("singular_values")]
    if heatmap is not None:
        if drawn:
            from lorry.cli.pictures import heat_map

            title = f"{file.name}: {file.method.info.slug}, {len(drawn)} sites"
            heat_map(drawn, heatmap, title, block_of if by is By.block else None)
            note(f"wrote {heatmap}")
        else:
            note("no heat map: no site has an update that is a product of two factors")
    facts = {**_head(file), "sites": sites}
    if by is By.block:
        facts["blocks"] = by_block(sites)
    if as_json:
        print_json(facts)
    else:
        _print(facts, all_sites)


def _head(file: AdapterFile) -> dict[str, Any]:
    mark = file.fingerprint
    method: Method = file.method
    return {
        "path": str(file.path),
        "format": file.format,
        "name": file.name,
        "method": method.to_dict(),
        "paper": method.info.paper,
        "fuse": method.info.fuse,
        "base": file.base,
        "fingerprint": mark.digest if mark is not None else None,
        "tensors": file.tensor_count,
        "bytes": _bytes(file),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in file.raw_tensors().values()}),
        "notes": list(file.notes),
        "metadata": file.metadata,
    }


def _bytes(file: AdapterFile) -> int:
    """Return the size of an adapter on disk."""
    path = file.path
    if path is None:
        return 0
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.iterdir()) if p.is_file())


def _print(facts: Mapping[str, Any], all_sites: bool) -> None:
    from lorry.cli.output import size

    sites = facts["sites"]
    options = ", ".join(f"{k}={v}" for k, v in facts["method"].items() if k != "method")
    rows = [
        (
            "adapter",
            f"{facts['name']} ({facts['format']} format, {size(facts['bytes'])}, {' '.join(facts['dtypes'])})",
        ),
        ("method", f"{facts['method']['method']} ({options}); {facts['paper']}; fuse: {facts['fuse']}"),
        (
            "sites",
            f"{len(sites)} with {sum(s['parameters'] for s in sites):,} elements in {facts['tensors']} tensors",
        ),
        ("base", facts["base"] or "not said"),
        ("fingerprint", facts["fingerprint"] or "none: the file does not say which base it was made for"),
        *(("note", text) for text in facts["notes"]),
        *_training(facts["metadata"]),
    ]
    if (times := times_of(facts["metadata"])) is not None:
        rows.append(("times", f"trained from {times[0]:g} to below {times[1]:g}"))
    out().print(facts_table("", rows))
    if "blocks" in facts:
        _print_blocks(facts["blocks"])
        return
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
        numbers = [f"{s[k]:.3g}" if k in s else "-" for k in ("norm", "spectral_norm", "stable_rank", "effective_rank")]
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


def _print_blocks(blocks: list[dict[str, Any]]) -> None:
    rows = [
        (
            b["block"],
            b["sites"],
            f"{b['parameters']:,}",
            *((f"{b['norm']:.3g}", f"{b['share']:.1%}", b["largest_at"]) if "norm" in b else ("-", "-", "-")),
        )
        for b in blocks
    ]
    columns = ("block", "sites", "elements", "norm of all", "share of squares", "largest at")
    out().print(table("Update of each block", columns, rows, right=columns[1:5]))


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
