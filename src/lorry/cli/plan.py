"""``lorry plan``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import (
    BASE_HELP,
    Dtype,
    ExcludeOption,
    Head,
    Json,
    LayersOption,
    MethodOption,
    MethodOptions,
    TargetsOption,
    key_values,
    site_selection,
)
from lorry.cli.output import facts_table, out, print_json, size, table

if TYPE_CHECKING:
    from lorry.core.life.plan import Plan


def plan(
    model: Annotated[str, typer.Argument(help=BASE_HELP)],
    method: MethodOption = "lora",
    option: MethodOptions = None,
    targets: TargetsOption = None,
    exclude: ExcludeOption = None,
    layers: LayersOption = None,
    train_also: Annotated[
        list[str] | None,
        typer.Option("--train-also", help="Module to train whole beside the adapter; repeatable."),
    ] = None,
    task: Head = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a micro-batch of each job, in training.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row or of a request.")] = 512,
    jobs: Annotated[int, typer.Option(min=1, help="Adapters of this sort that are trained or served at once.")] = 1,
    requests: Annotated[int, typer.Option(min=1, help="Requests that are served at once.")] = 8,
    memory: Annotated[
        str | None, typer.Option(help="Say the largest batch that fits, e.g. 24GiB; rows in training, requests.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="As of `lorry train`.")] = "adamw",
    dtype: Dtype = "auto",
    flops: Annotated[
        float | None,
        typer.Option(help="Operations a second of a device, e.g. 312e12, for an estimate of time."),
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Bytes a second of the device's memory, e.g. 2.0e12.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Estimate time on this machine; measures it.")] = False,
    as_json: Json = False,
) -> None:
    """Show what an adapter would sit on and what it would cost, without reading any weights."""
    from lorry.cli.arguments import names
    from lorry.cli.bases import dtype_of, skeleton
    from lorry.cli.sizes import Asked, byte_count, estimates, show
    from lorry.core.life.plan import plan as work_out
    from lorry.core.method.registry import method_from

    chosen = method_from({"method": method, **key_values(option)})
    selection = site_selection(targets, exclude, layers)
    base = skeleton(model, task)
    result = work_out(base, chosen, **selection, train_also=names(train_also))
    wanted = dtype_of(dtype)
    kind = None if isinstance(wanted, str) else wanted
    sizes = (batch_size, length, jobs, requests, byte_count(memory), kind, optimizer, flops, bandwidth, calibrate)
    job = {"method": chosen, **selection, "modules_to_save": names(train_also)}
    asked = Asked(*sizes)
    found = estimates(base, job, asked)
    stored = sum(p.numel() * p.element_size() for p in base.parameters())
    if as_json:
        facts = {"model": model, "class": type(base).__name__, "base_bytes": stored, **result.to_dict()}
        facts["estimate"] = found
        print_json(facts)
    else:
        _print(type(base).__name__, result, stored)
        show(found, asked)


def _print(kind: str, result: Plan, stored: int) -> None:
    options = ", ".join(f"{k}={v}" for k, v in result.method.items() if k != "method")
    out().print(f"{kind}, method {result.method['method']} ({options})", highlight=False, soft_wrap=True)
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for site in result.sites:
        groups.setdefault((site.path.rpartition(".")[2], site.kind, site.shape), []).append(site)
    rows = []
    for (name, site_kind, shape), sites in groups.items():
        tied = sorted({t for s in sites for t in s.tied})
        where = sites[0].path if len(sites) == 1 else _common(sites[0].path, sites[-1].path)
        count = sum(s.parameters for s in sites)
        remark = f"shares its weight with {', '.join(tied)}" if tied else ""
        rows.append((name, site_kind, "x".join(map(str, shape)), len(sites), f"{count:,}", where, remark))
    columns = ("name", "kind", "out x in", "sites", "parameters", "where", "")
    out().print(table("Sites", columns, rows, right=("sites", "parameters")))
    reasons = Counter((path.rpartition(".")[2], why) for path, why in result.left_out.items())
    if reasons:
        left = [(name, count, why) for (name, why), count in reasons.items()]
        out().print(table("Left out", ("name", "sites", "why"), left, right=("sites",)))
    share = result.trained / result.base if result.base else 0.0
    facts = [
        ("base", f"{result.base:,} parameters, {size(stored)}"),
        ("trained", f"{result.trained:,} parameters at {len(result.sites)} sites ({share:.2%} of the base)"),
        ("stored, not trained", f"{result.frozen:,} elements"),
        ("checkpoint", f"{size(result.checkpoint_bytes)} in float32"),
    ]
    shown = [f for f in facts if result.frozen or f[0] != "stored, not trained"]
    out().print(facts_table("Cost", shown))


def _common(first: str, last: str) -> str:
    """Return the pattern of paths that differ in their numbers, e.g. ``model.layers.[0..21].mlp.up_proj``."""
    pairs = list(zip(first.split("."), last.split("."), strict=False))
    return ".".join(a if a == b else f"[{a}..{b}]" for a, b in pairs)
