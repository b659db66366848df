"""Where the rows of a batch lie in what a layer sees: in the first dimension, in the second, or nowhere.

Most layers see the rows first. Some models put the length first and swap the two for their layers; tables of relative
positions are looked up once for all rows. What the modules say of themselves decides; where they say nothing, a shape
that fits one way only does, and is remembered for passes in which both dimensions are equal.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.method.layout import BatchLayout, Pass

#: Modules of transformers inside which the length lies first, by where their class is defined and its name.
_LENGTH_FIRST = {
    ("transformers.models.xlnet.modeling_xlnet", "XLNetModel"),
    ("transformers.models.fsmt.modeling_fsmt", "EncoderLayer"),
    ("transformers.models.fsmt.modeling_fsmt", "DecoderLayer"),
}
#: Names of tables that are indexed by pairs of positions, and not by what the rows contain.
_TABLES = re.compile(r"relative_(attention|position)|distance_embedding|rel_pos")


def length_first(root: nn.Module, path: str) -> bool:
    """Whether the modules around a site say that its layer sees the length before the rows."""
    module = root
    for name in ("", *path.split(".")):
        module = getattr(module, name, module) if name else module
        cls = getattr(type(module), "_lorry_original", type(module))
        if (cls.__module__, cls.__name__) in _LENGTH_FIRST:
            return True
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            return not module.self_attn.batch_first
    return False


def without_rows(path: str) -> bool:
    """Whether an embedding is a table of relative positions by its name, so that what it looks up has no rows."""
    return bool(_TABLES.search(path.rpartition(".")[2]))


def rows_second(x: Tensor, entries: int, known: bool, seen: Pass | None) -> bool:
    """Return whether the second dimension of a layer's input counts the rows.

    Parameters
    ----------
    x
        The input.
    entries
        Entries of the root's batch.
    known
        Whether the layer is known to see the length first.
    seen
        What the root was given in this pass.
    """
    lead = x.shape[:-1] if x.is_floating_point() else x.shape
    if len(lead) < 2 or lead[1] != entries:
        return False
    return known or (lead[0] != entries and seen is not None and lead[0] == seen.length)


def check_first(x: Tensor, layout: BatchLayout, path: str, seen: Pass | None) -> None:
    """Raise `AdapterError` where rows may lie in the first dimension as well as in the second."""
    lead = x.shape[:-1] if x.is_floating_point() else x.shape
    if len(lead) < 2 or lead[0] <= layout.entries or lead[0] % layout.entries:
        return
    swapped = lead[1] == layout.entries
    positions = not x.is_floating_point() and seen is not None and lead[0] == seen.length
    if layout.lengths is None and layout.counted(path) is None and (swapped or positions):
        raise AdapterError(
            f"lorry.rows was given {layout.rows} rows, and '{path}' sees {lead[0]} x {lead[1]} entries: it may see "
            f"each row {lead[0] // layout.entries} times, or the positions before the rows. Say how many entries each "
            f"row has there (lorry.rows(..., counts={{'{path}': [...]}})), or leave the site out."
        )
