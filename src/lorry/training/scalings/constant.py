"""A constant scaling: the same factor whatever the rank is."""

from __future__ import annotations

from dataclasses import dataclass

from lorry.core.errors import OptionError
from lorry.core.method.base import Method
from lorry.core.options import option
from lorry.training.scalings import Scaling, register_scaling


@register_scaling("constant", paper="arXiv 2410.09692")
@dataclass(frozen=True)
class Constant(Scaling):
    """A factor that depends on neither alpha nor rank; 1 leaves the update as the product of its factors, as ALLoRA
    does (section 3), which has done away with alpha.
    """

    value: float = option(1.0, "The factor of the update.", above=0)

    def factor(self, alpha: float, rank: int) -> float:
        """Return the factor."""
        return self.value

    def of(self, method: Method) -> Method:
        """Return the method with the alpha that makes this factor, which nobody may have given otherwise."""
        rank = self._rank(method)
        given, wanted = getattr(method, "alpha"), self.value * rank  # noqa: B009
        if given is not None and given != wanted and given != type(method)().alpha:  # type: ignore[attr-defined]
            raise OptionError(
                f"The scaling 'constant' does away with alpha, found alpha {given}. Leave alpha out, or take the "
                "scaling 'lora' or 'rslora'."
            )
        return method.with_options(alpha=wanted)
