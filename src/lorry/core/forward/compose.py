"""What a user asks for, as an active set: a name, weights by name, compositions by row or by kind of token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lorry.core.errors import AdapterError, near_misses, some
from lorry.core.forward.active import Active, Portion
from lorry.core.forward.entry import Member
from lorry.core.forward.weights import Weight, check_weight
from lorry.core.method.layout import BatchLayout
from lorry.kernels.segments import Rows

#: ``{name: weight}``, or ``{kind of token: name or {name: weight}}``.
Composition = Mapping[str, Weight] | Mapping[int, "str | Mapping[str, Weight] | None"]
#: An adapter's name, its weight, and the kind of tokens that it is for (None for all).
Asked = tuple[str, Weight, int | None]


def compose(composition: str | Composition | None, adapters: Mapping[str, Member]) -> list[Asked]:
    """Return a composition as a list of names, weights and kinds, with members of weight 0 left out.

    Raises
    ------
    AdapterError
        A name that is not loaded (with near misses), or a weight that is none.
    """
    if composition is None:
        return []
    if isinstance(composition, str):
        return [(_known(composition, adapters), 1.0, None)]
    asked: list[Asked] = []
    for key, value in composition.items():
        if isinstance(key, int) and not isinstance(key, bool):
            asked += [(n, w, key) for n, w, _ in compose(value, adapters)]  # type: ignore[arg-type]
            continue
        name, weight = _known(key, adapters), check_weight(str(key), value)
        if not (isinstance(weight, float) and weight == 0.0):
            asked.append((name, weight, None))
    if len({kind is None for _, _, kind in asked}) > 1:
        raise AdapterError("A composition is given by name, or by kind of token (whole numbers), not by both at once.")
    return asked


def _known(name: object, adapters: Mapping[str, Member]) -> str:
    if not isinstance(name, str) or name not in adapters:
        raise unknown_adapter(str(name), adapters)
    return name


def unknown_adapter(name: str, adapters: Mapping[str, Member]) -> AdapterError:
    """Return the error for a name that is not loaded."""
    loaded = some(adapters, 6) if adapters else "none"
    return AdapterError(f"No adapter '{name}' is loaded on this model.{near_misses(name, adapters)} Loaded: {loaded}.")


def for_all(composition: str | Composition | None, adapters: Mapping[str, Member]) -> Active | None:
    """Return the active set in which all rows have the same composition; None for the bare base."""
    asked = compose(composition, adapters)
    return Active([Portion(adapters[n], w, kind=kind) for n, w, kind in asked]) if asked else None


def for_rows(
    compositions: Sequence[str | Composition | None],
    adapters: Mapping[str, Member],
    seeds: Mapping[str, int] | None = None,
    layout: BatchLayout | None = None,
) -> Active:
    """Return the active set in which each row has its own composition."""
    members: dict[tuple[str, int | None], list[tuple[int, Weight]]] = {}
    for row, composition in enumerate(compositions):
        for name, weight, kind in compose(composition, adapters):
            members.setdefault((name, kind), []).append((row, weight))
    portions = []
    for (name, kind), pairs in members.items():
        seed = None if seeds is None else seeds.get(name)
        for chosen in _alike(pairs):
            indices = [row for row, _ in chosen]
            contiguous = indices[-1] - indices[0] + 1 == len(indices)
            rows: Rows = slice(indices[0], indices[-1] + 1) if contiguous else torch.tensor(indices)
            portions.append(_portion(adapters[name], [w for _, w in chosen], rows, kind, seed))
    return Active(portions, layout if layout is not None else BatchLayout(len(compositions)))


def _alike(pairs: list[tuple[int, Weight]]) -> list[list[tuple[int, Weight]]]:
    """Split rows by weights that can stand in one tensor: numbers and scalar tensors, and each function by itself."""
    values: list[tuple[int, Weight]] = [(row, w) for row, w in pairs if isinstance(w, float | torch.Tensor)]
    functions: dict[int, list[tuple[int, Weight]]] = {}
    for row, w in pairs:
        if not isinstance(w, float | torch.Tensor):
            functions.setdefault(id(w), []).append((row, w))
    return [*([values] if values else []), *functions.values()]


def _portion(adapter: Member, weights: list[Weight], rows: Rows, kind: int | None, seed: int | None) -> Portion:
    if callable(weights[0]):
        return Portion(adapter, weights[0], rows, None, kind, seed)
    if all(isinstance(w, float) for w in weights):
        if len(set(weights)) == 1:
            return Portion(adapter, weights[0], rows, None, kind, seed)
        return Portion(adapter, 1.0, rows, torch.tensor(weights), kind, seed)
    tensors = [w if isinstance(w, torch.Tensor) else torch.tensor(w) for w in weights]
    wrong = next((t for t in tensors if t.ndim), None)
    if wrong is not None:
        raise AdapterError(
            f"The weight of adapter '{adapter.name}' in one row must be a scalar, found a tensor {tuple(wrong.shape)}."
        )
    like = next(w for w in weights if isinstance(w, torch.Tensor))
    return Portion(adapter, 1.0, rows, torch.stack([t.to(like.device, like.dtype) for t in tensors]), kind, seed)
