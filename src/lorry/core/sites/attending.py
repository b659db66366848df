"""What the attention that a layer belongs to looks at, read from the names of modules as diffusers gives them."""

from __future__ import annotations

import re
from collections.abc import Container

#: Kinds of attention that targets may name, as ``attention:cross``.
ATTENTIONS = ("self", "cross", "temporal", "single", "double")
_TEMPORAL = re.compile(r"(^|[._])(temporal|temp|motion)", re.IGNORECASE)
_CROSS = re.compile(
    r"(^|[._])(cross_?att\w*|crossattention|encoder_attn|encdecattention|multihead_attn)([._]|$)", re.IGNORECASE
)
_SECOND = re.compile(r"^(?P<block>.*)\.attn2$")


def attention_kind(module: str, modules: Container[str]) -> str:
    """Return the kind of an attention module.

    Parameters
    ----------
    module
        Its path.
    modules
        Paths of all sites, to see what lies beside it.

    Returns
    -------
    ``temporal`` (over the frames of a video), ``single`` (a block of one stream, in which text and picture lie
    together), ``double`` (two streams with projections of their own), ``cross`` (keys come from another sequence) or
    ``self``.
    """
    if _TEMPORAL.search(module):
        return "temporal"
    if "single_transformer_blocks." in module:
        return "single"
    if f"{module}.add_k_proj" in modules or f"{module}.add_q_proj" in modules:
        return "double"
    second = _SECOND.match(module)
    if second is not None:  # of a block with two streams it is another self-attention
        return "self" if f"{second['block']}.attn.add_k_proj" in modules else "cross"
    return "cross" if _CROSS.search(module) else "self"
