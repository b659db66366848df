"""Merging adapters: inputs are opened and checked, sites streamed through a method, the result measured and rounded
once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorry.core.errors import (
    AdapterError,
    CheckpointError,
    FingerprintError,
    LorryError,
    OptionError,
    near_misses,
    some,
)
from lorry.core.life.adapter import Adapter
from lorry.formats.file import AdapterFile
from lorry.formats.updates import SiteFacts
from lorry.merging.factors import Factors, decompose
from lorry.merging.inputs import Candidate, Pool, SiteInput
from lorry.merging.measure import pair_facts, ratio, squared_errors, total
from lorry.merging.output import MergedAdapter, joined, trial_adapter
from lorry.merging.receipt import InputRecord, MergeReceipt, SiteRecord
from lorry.merging.registry import MergeMethod, merge_method_named
from lorry.merging.sources import AdapterLike, Source, open_source
from lorry.merging.weights import Step, Weight, Weights

Inputs = Sequence[AdapterLike] | Mapping[str, AdapterLike]
Objective = Callable[[nn.Module], float] | Callable[[Candidate], float]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def merge(
    inputs: Inputs,
    *,
    weights: Mapping[str, Weight] | Sequence[Weight] | None = None,
    method: str = "task-arithmetic",
    options: Mapping[str, Any] | None = None,
    schedule: Sequence[Step] = (),
    out: str | os.PathLike[str] | None = None,
    name: str = "merged",
    model: nn.Module | None = None,
    objective: Objective | None = None,
    extras: Mapping[str, Any] | None = None,
    whole_modules: Literal["refuse", "drop"] = "refuse",
    check_base: bool = True,
    dtype: str = "float32",
    overwrite: bool = False,
) -> MergedAdapter:
    """Merge adapters of one base into one; the order in which they are given changes nothing.

    Parameters
    ----------
    inputs, weights
        Folders or live adapters, by name or in order; a number, a list spread over the layers, or pattern of sites ->
        these for each (1/n if not given). Weight 0 leaves an adapter out at a site.
    method, options, schedule
        See `lorry.merging.merge_methods`, and `Step` for factors on the weights at some sites.
    model
        The base: for folders that need it (DoRA, kohya's names), which are loaded onto it meanwhile.
    objective, extras
        A loss of the model that carries a candidate, or without a model of its factors; what a method's `needs` names.
    whole_modules, check_base
        Refuse or drop modules that were trained whole; refuse different base fingerprints.
    out, name, dtype, overwrite
        Of the result, which is written if a folder is given, and only once everything succeeded.

    Raises
    ------
    OptionError, AdapterError, CheckpointError, FingerprintError
    """
    chosen = merge_method_named(method)
    parsed = chosen.parse(options or {})
    if dtype not in DTYPES:
        raise OptionError(
            f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}.{near_misses(str(dtype), DTYPES)}"
        )
    target, named = check_target(out, overwrite), _named(inputs)
    with ExitStack() as stack:
        sources = {n: open_source(item, n, model, stack) for n, item in sorted(named.items())}
        verdict = _same_base(sources, check_base)
        work = _Work(sources, _shapes(sources), whole_modules)
        work.weights = Weights(list(sources), _by_name(weights, named), schedule, list(work.shapes))
        merged = _run(chosen, parsed, work, model, objective, extras or {}, DTYPES[dtype], verdict, name)
    if target is not None:
        merged.save(target, overwrite=overwrite)
    return merged


def _by_name(
    weights: Mapping[str, Weight] | Sequence[Weight] | None, named: Mapping[str, AdapterLike]
) -> Mapping[str, Weight] | None:
    """Return weights by name, given so or in the order of the inputs."""
    if weights is None or isinstance(weights, Mapping):
        return weights
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != len(named):
        raise OptionError(
            f"weights must be name -> weight, or one for each of the {len(named)} adapters, found {weights!r}."
        )
    return dict(zip(named, weights, strict=True))


def check_target(out: str | os.PathLike[str] | None, overwrite: bool) -> Path | None:
    """Refuse a folder that is taken before the work is done."""
    if out is None:
        return None
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"'{path}' is a file; a merged adapter is written as a folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise CheckpointError(f"'{path}' exists. Choose another folder, or pass overwrite=True.")
    return path


def _named(inputs: Inputs) -> dict[str, AdapterLike]:
    """Return the inputs by name; names that come twice get a number."""
    if isinstance(inputs, str | os.PathLike | Adapter | AdapterFile):
        inputs = [inputs]
    if isinstance(inputs, Mapping):
        named = {str(k): v for k, v in inputs.items()}
        bad = [n for n in named if "|" in n or not n]
        if bad:
            raise OptionError(f"Names of adapters in a merge must not be empty or contain '|': {bad}.")
    else:
        named = {}
        for item in inputs:
            own = (
                item.name
                if isinstance(item, Adapter | AdapterFile)
                else Path(item).name.removesuffix(".safetensors").replace("|", "_") or "adapter"
            )
            number = 2
            unique = own
            while unique in named:
                unique, number = f"{own}-{number}", number + 1
            named[unique] = item
    if not named:
        raise AdapterError("A merge needs at least one adapter, found none.")
    return named


def _same_base(sources: Mapping[str, Source], check: bool) -> str:
    """Return the verdict over all pairs, or raise `FingerprintError` naming the two that differ."""
    marks = [(n, s.fingerprint) for n, s in sources.items()]
    known = [(n, m) for n, m in marks if m is not None and m.sites]
    for i, (first, a) in enumerate(known):
        for second, b in known[i + 1 :]:
            if a.compare(b) == "differs":
                if not check:
                    return "ignored"
                wrong = [p for p in a.sites if p in b.sites and a.sites[p] != b.sites[p]]
                raise FingerprintError(
                    f"Adapters of different bases cannot be merged: '{first}' was made for '{a.base or 'unnamed'}' "
                    f"({a.digest}), '{second}' for '{b.base or 'unnamed'}' ({b.digest}); {len(wrong)} sites differ, "
                    f"e.g. {some(wrong, 2)}. "
                    "Pass check_base=False if you know better."
                )
    return "match" if len(known) == len(marks) else "unknown"


def _shapes(sources: Mapping[str, Source]) -> dict[str, SiteFacts]:
    """Return all sites in order; one path with two shapes means different bases."""
    shapes: dict[str, SiteFacts] = {}
    owner: dict[str, str] = {}
    for name, source in sources.items():
        for path, facts in source.sites.items():
            known = shapes.setdefault(path, facts)
            owner.setdefault(path, name)
            if known.shape != facts.shape:
                raise FingerprintError(
                    f"'{path}' is {'x'.join(map(str, known.shape))} for '{owner[path]}' but "
                    f"{'x'.join(map(str, facts.shape))} for '{name}': "
                    "the adapters were made for different bases."
                )
            if facts.kernel and not known.kernel or known.kind == "linear" != facts.kind:
                shapes[path] = SiteFacts(facts.kind, facts.shape, facts.kernel or known.kernel)
    return {p: shapes[p] for p in sorted(shapes, key=_natural)}


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split(".")]


@dataclass
class _Work:
    """The opened inputs, and how a site is read from all of them."""

    sources: Mapping[str, Source]
    shapes: dict[str, SiteFacts]
    whole_modules: str
    weights: Weights = field(init=False)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, source in self.sources.items():
            if source.whole and self.whole_modules != "drop":
                raise AdapterError(
                    f"Adapter '{name}' holds modules that were trained whole ({some(source.whole)}), which are no "
                    "update of a weight. "
                    "Pass whole_modules='drop' to merge the rest and leave them out."
                )
            if source.whole:
                self.dropped.append(f"whole modules of '{name}': {some(source.whole)}")
            missing = [p for p in self.shapes if p not in source.sites]
            if missing:
                self.notes.append(
                    f"'{name}' has no update at {len(missing)} of {len(self.shapes)} sites; it counts as 0 there"
                )
        self._hashes = {n: hashlib.sha256() for n in self.sources}
        self._ranks: dict[str, set[int]] = {n: set() for n in self.sources}
        self._hashed: set[str] = set()
        self._facts: dict[str, dict[str, Any]] = {}
        self.site = lru_cache(maxsize=1)(self._site)

    def slots(self, path: str) -> list[str]:
        """Return the names of the matrices at a site: itself, or one for each expert of a bank."""
        lead = self.shapes[path].shape[:-2]
        count = int(torch.tensor(lead).prod()) if lead else 0
        return [f"{path}#{i}" for i in range(count)] if lead else [path]

    def paths(self) -> Iterator[str]:
        """Yield every matrix of every site that at least one adapter changes."""
        for path in self.shapes:
            if any(self.weights.at(n, path) != 0 and path in s.sites for n, s in self.sources.items()):
                yield from self.slots(path)

    def _site(self, path: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Return all adapters' factors at a site, each with one leading dimension, hashing what is read for the first
        time.
        """
        found = {}
        for name, source in self.sources.items():
            if path not in source.sites:
                continue
            a, b = source.read(path)
            if path not in self._hashed:
                self._hashes[name].update(path.encode())
                for tensor in (a, b):
                    self._hashes[name].update(tensor.contiguous().numpy().data)
            self._ranks[name].add(a.shape[-2])
            found[name] = (a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
        self._hashed.add(path)
        return found

    def read(self, slot: str) -> SiteInput:
        """Return the input of a method at one matrix."""
        path, _, number = slot.partition("#")
        found, index = self.site(path), int(number or 0)
        out, inner = self.shapes[path].shape[-2:]
        names = tuple(self.sources)
        weights = tuple(self.weights.at(n, path) if n in found else 0.0 for n in names)
        factors = tuple(
            Factors(found[n][0][index], found[n][1][index]) if w != 0 else None
            for n, w in zip(names, weights, strict=True)
        )
        return SiteInput(slot, (out, inner), names, factors, weights, self._facts.setdefault(slot, {}))

    def record(self, name: str) -> InputRecord:
        """Return what is said of an input in the receipt, after all its sites were read."""
        source = self.sources[name]
        for path in source.sites:
            if path not in self._hashed:
                self.site(path)
        ranks = self._ranks[name]
        return InputRecord(
            name=name,
            origin=source.origin,
            method=source.method,
            weight=self.weights.given[name],
            digest=self._hashes[name].hexdigest()[:16],
            base=source.base,
            base_digest=source.fingerprint.digest if source.fingerprint is not None else "",
            sites=len(source.sites),
            ranks=(min(ranks), max(ranks)),
            lineage=source.metadata.get("lineage"),
            notes=tuple(source.notes),
        )


def _run(
    method: MergeMethod,
    options: dict[str, Any],
    work: _Work,
    model: nn.Module | None,
    objective: Objective | None,
    extras: Mapping[str, Any],
    dtype: torch.dtype,
    verdict: str,
    name: str,
) -> MergedAdapter:
    """Run a method over all sites and gather result and receipt."""
    needed = [n for n in method.needs if n not in extras and not (n == "objective" and objective is not None)]
    if needed and not _idle(method, options):
        raise OptionError(
            f"Merge method '{method.slug}' needs {', '.join(needed)}: pass objective=... or extras={{...}} in Python."
        )
    paths = tuple(work.paths())
    if not paths:
        raise OptionError("All weights are 0 at every site; there is nothing to merge.")
    pool = Pool(
        tuple(work.sources),
        paths,
        work.read,
        _scored(objective, work, model) if objective is not None else None,
        {"model": model, **extras},
    )
    done: dict[str, tuple[Factors, SiteRecord, dict[str, float]]] = {}
    with torch.no_grad():
        for site, result in _results(method, options, pool):
            done[site.path] = _finished(site, result, dtype)
    missing = [p for p in paths if p not in done]
    if missing:
        raise LorryError(f"Merge method '{method.slug}' gave no result at {len(missing)} sites: {some(missing)}.")
    return _gathered(method, options, work, done, pool.facts, dtype, verdict, name)


def _gathered(
    method: MergeMethod,
    options: dict[str, Any],
    work: _Work,
    done: Mapping[str, tuple[Factors, SiteRecord, dict[str, float]]],
    facts: dict[str, Any],
    dtype: torch.dtype,
    verdict: str,
    name: str,
) -> MergedAdapter:
    """Put the matrices of each site together and write the receipt."""
    tensors = {
        p: _joined([done[s][0] for s in work.slots(p)], work.shapes[p].shape[:-2], dtype)
        for p in work.shapes
        if work.slots(p)[0] in done
    }
    figures = [f for _, _, f in done.values()]
    records = tuple(work.record(n) for n in work.sources)
    notes = ([method.note] if method.note else []) + work.notes
    for source_name, source in work.sources.items():
        if source.approximated:
            worst = max(source.approximated.values())
            notes.append(
                f"'{source_name}' is no product of thin factors at {len(source.approximated)} sites "
                f"({some(source.approximated, 2)}): decomposed with relative error {worst:.1e} at most"
            )
    skipped = [p for p in work.shapes if p not in tensors]
    if skipped:
        work.dropped.append(f"{len(skipped)} sites where all weights are 0: {some(skipped)}")
    receipt = MergeReceipt(
        method=method.slug,
        options=options,
        inputs=records,
        sites=tuple(record for _, record, _ in done.values()),
        base=verdict,
        dtype=str(dtype).removeprefix("torch."),
        error=ratio(total(figures, "error"), total(figures, "exact")),
        rounding=ratio(total(figures, "rounding"), total(figures, "norm")),
        dropped=tuple(work.dropped),
        notes=tuple(dict.fromkeys(notes)),
        facts=facts,
    )
    return MergedAdapter(
        name=name,
        tensors=tensors,
        sites={p: work.shapes[p] for p in tensors},
        fingerprint=joined({n: s.fingerprint for n, s in work.sources.items()}),
        receipt=receipt,
        base=next((s.base for s in work.sources.values() if s.base), ""),
        metadata={"lineage": {"merge": receipt.summary()}},
    )


def _idle(method: MergeMethod, options: Mapping[str, Any]) -> bool:
    """Whether the options switch the search off, so that what it needs is not needed."""
    return bool(method.plain) and all(options[k] == v for k, v in (method.plain or {}).items())


def _results(method: MergeMethod, options: dict[str, Any], pool: Pool) -> Iterator[tuple[SiteInput, Factors]]:
    if method.scope == "adapter":
        for path, result in method.function(pool, **options):
            yield pool.read(path), result
        return
    for site in pool.sites():
        yield site, method.function(site, **options)


def _finished(site: SiteInput, result: Factors, dtype: torch.dtype) -> tuple[Factors, SiteRecord, dict[str, float]]:
    """Check, fit, round and measure the result at one matrix."""
    if result.shape != site.shape:
        raise LorryError(f"The result at '{site.path}' is {result.shape}, expected {site.shape}.")
    if result.rank > min(site.shape):
        result = decompose(result).truncated(min(site.shape))
    if not (torch.isfinite(result.a.sum()) and torch.isfinite(result.b.sum())):
        raise AdapterError(f"The merge gives NaN or infinite values at '{site.path}'; nothing was written.")
    balanced = result.balanced() if dtype == torch.float16 else result  # its range is narrow
    stored = Factors(balanced.a.to(dtype).double(), balanced.b.to(dtype).double())
    if not (torch.isfinite(stored.a.sum()) and torch.isfinite(stored.b.sum())):
        raise AdapterError(
            f"The result at '{site.path}' does not fit into {dtype}; use dtype='float32'. Nothing was written."
        )
    figures = squared_errors(site, result, stored)
    cosine, reads, writes = pair_facts(site)
    rows = site.present()
    record = SiteRecord(
        path=site.path,
        weights={n: w for n, _, w in rows},
        ranks={n: f.rank for n, f, _ in rows},
        rank=stored.rank,
        norm=figures["norm"] ** 0.5,
        exact_norm=figures["exact"] ** 0.5,
        error=ratio(figures["error"], figures["exact"]),
        rounding=ratio(figures["rounding"], figures["norm"]),
        cosines=cosine,
        reads=reads,
        writes=writes,
        facts=site.facts,
    )
    return stored, record, figures


def _joined(parts: list[Factors], lead: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return A and B of a site in the result's dtype; experts are padded to one rank."""
    rank = max(f.rank for f in parts)
    padded = [f.padded(rank) for f in parts]
    a, b = torch.stack([f.a for f in padded]), torch.stack([f.b for f in padded])
    return {
        "A": a.reshape(*lead, *a.shape[1:]).to(dtype).contiguous(),
        "B": b.reshape(*lead, *b.shape[1:]).to(dtype).contiguous(),
    }


def _scored(objective: Objective, work: _Work, model: nn.Module | None) -> Callable[[Candidate], float]:
    """Return the objective as a function of a candidate's factors."""

    def score(candidate: Candidate) -> float:
        if model is None:
            value = float(objective(candidate))  # type: ignore[arg-type]
        else:
            tensors = {}
            for path, facts in work.shapes.items():
                slots = work.slots(path)
                if slots[0] in candidate:
                    tensors[path] = _joined([candidate[s] for s in slots], facts.shape[:-2], torch.float32)
            with trial_adapter(model, tensors), torch.no_grad():
                value = float(objective(model))  # type: ignore[arg-type]
        if value != value:
            raise AdapterError("The objective returned NaN for a candidate; nothing was written.")
        return value

    return score
