"""Methods: the mathematics of a parametrisation as a frozen dataclass of options and a few pure functions.

A method belongs to a family, and everything else is derived from the family once: forward, rows of a batch, fusing,
saving, exporting, counting. See `Bottleneck`, `WeightDelta` and `Block` in `lorry.core.method.families`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from torch import Generator, Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.method.call import Call
from lorry.core.method.forms import PeftForm
from lorry.core.method.spec import Layout, Observed, Places, Tensors, TensorSpec
from lorry.core.options import check_options, from_options
from lorry.core.sites.kinds import kinds_in_order
from lorry.core.sites.site import Kind, Site

FuseClass = Literal["exact", "approximate", "never"]
#: What the rest of Lorry may rely on; families derive it from what a method overrides, and nothing else is asked.
#:
#: - ``plain``: the update is ``scale · B A`` and nothing else
#: - ``gained``: ``g ⊙ (W + scale · B A)`` with a factor for each output channel
#: - ``gated``: the update depends on the token, so there is no weight that does the same
#: - ``delta``: there is an update of the weight
#: - ``sparse``: the update of the weight is zero but at few places
#: - ``stored``: A and B are the method's own tensors, not made from others at each call
#: - ``summed``: the update is applied as one product with ``W + ΔW`` where that is possible
#: - ``block``: it runs a whole module
#: - ``combined``: it makes one update of those of other adapters
Capability = Literal["plain", "gained", "gated", "delta", "sparse", "stored", "summed", "block", "combined"]


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of a method."""

    slug: str
    cls: type[Method]
    paper: str
    family: str
    takes: Callable[[Kind], bool]
    identity_at_start: bool
    fuse: FuseClass
    linear_in_scale: bool
    preset_of: str | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of sites that the method can sit on, the most common first."""
        return tuple(kind.name for kind in reversed(kinds_in_order()) if self.takes(kind))

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain data, with the options and their help."""
        fields = dataclasses.fields(self.cls)  # type: ignore[arg-type]
        options = {f.name: {"default": f.default, "help": f.metadata.get("help", "")} for f in fields}
        plain = {k: v for k, v in vars(self).items() if k not in ("cls", "takes")}
        return {**plain, "kinds": list(self.kinds), "class": self.cls.__name__, "options": options}


class Method(ABC):
    """Base of all methods. Subclasses are frozen dataclasses whose fields are the user's options."""

    info: ClassVar[MethodInfo]
    family: ClassVar[str]
    #: How the family fuses into a base weight, unless a registration says otherwise.
    fuses: ClassVar[FuseClass] = "exact"
    #: Further kinds of sites that `place` makes something of (the layers of a block).
    gathers: ClassVar[tuple[str, ...]] = ()
    #: Parameter-free knobs that the training engine reads: learning-rate factors by tensor name (LoRA+).
    rate_factors: ClassVar[Mapping[str, float]] = {}
    #: How PEFT's LoRA config says the method, or None. A class declares its own; it is not inherited.
    peft_form: ClassVar[PeftForm | None] = None
    #: Whether its tensors are a copy of all parameters of a module, by their own names.
    whole: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass, whose mathematics differ, start without its parent's declarations."""
        super().__init_subclass__(**kwargs)
        if "peft_form" not in cls.__dict__:
            cls.peft_form = None

    def __post_init__(self) -> None:
        """Check every option against its declared range, then the rules between options."""
        check_options(self)
        self.check()

    def check(self) -> None:
        """Check rules between options; raise `OptionError` with the rule and the values."""
        return

    def check_site(self, site: Site) -> None:
        """Check that the options fit a site; raise `SiteError` with the rule and the values."""
        return

    def check_model(self, root: nn.Module, site: Site) -> None:
        """Check that the options fit the model around a site; raise `SiteError` with the rule and the values."""
        return

    def for_site(self, site: Site) -> Method | None:
        """Return the method to use at `site`: itself, another one (a mixture), or None to leave the site out."""
        return self

    def place(self, sites: Sequence[Site], root: nn.Module) -> Sequence[tuple[Site, Method]]:
        """Return where the method sits, of the selected sites, and as which method; a method may give other sites of
        `root`.
        """
        return [(site, self) for site in sites]

    @property
    def fusing(self) -> FuseClass:
        """How this method fuses with these options; the registration says it for the method as such."""
        return self.info.fuse

    @cached_property
    def capabilities(self) -> frozenset[Capability]:
        """What may be relied on with these options; see `Capability`."""
        return frozenset()

    @property
    def scaled_by_alpha(self) -> bool:
        """Whether the update is proportional to an option ``alpha``."""
        return self.info.linear_in_scale and "alpha" in {f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @property
    def alpha_rank(self) -> int | None:
        """The rank by which ``alpha`` is divided in the scale of the update; None if no alpha over a rank scales it."""
        rank = getattr(self, "rank", None)
        has = "alpha" in {f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return rank if has and isinstance(rank, int) else None

    @property
    def members(self) -> tuple[str, ...]:
        """Names of other adapters whose updates this one reads (`Call.update_of`)."""
        return ()

    def bases(self, site: Site) -> Sequence[Site]:
        """Return the sites whose weights the method builds on, by which the base is recognised."""
        return [site]

    @property
    def row_draws(self) -> int:
        """How many copies of each row a training step needs, each with routes of its own.

        Above 1, the training engine repeats the rows and adds the policy term of
        `lorry.methods.parts.routing.leave_one_out`, with the log-probability that the method leaves as
        ``log_probability`` (`Call.leave`), one for each row.
        """
        return 1

    @classmethod
    def adopts(cls) -> bool:
        """Whether the method can be made from other adapters; see `with_experts` and `adopt`."""
        return cls.adopt is not Method.adopt

    def with_experts(self, experts: Sequence[Expert]) -> Self:
        """Return the method with the options that fit it to other adapters at a site, of which it is made.

        Raises
        ------
        AdapterError
            It is not made from other adapters, or not from these.
        """
        raise AdapterError(f"{type(self).__name__} cannot be made from other adapters.")

    def adopt(self, tensors: Tensors, site: Site, experts: Sequence[Expert]) -> float:
        """Fill tensors in place from other adapters at `site`; return the relative error of doing so.

        See `lorry.formats.mixture`.
        """
        raise AdapterError(f"{type(self).__name__} cannot be made from other adapters.")

    @abstractmethod
    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the tensors that the method owns at `site`, by name."""

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return all tensors of an adapter on `sites`. Override to share tensors across sites."""
        return Layout({site.path: self.tensors(site) for site in sites})

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Fill tensors that depend on the base weight (``site.matrix()``) in place, after their plain start."""
        return

    @property
    def calibration(self) -> Literal["none", "gradients", "inputs"]:
        """What the method wants to see of calibration batches before training; see `lorry.core.life.calibrate`."""
        return "none"

    def allocate(self, seen: Mapping[str, Observed]) -> dict[str, Method | None]:
        """Return the sites whose options calibration changes (ranks), with the method to use there; None leaves a site
        out.
        """
        return {}

    def prepare(self, tensors: Tensors, site: Site, seen: Observed, generator: Generator) -> None:
        """Set tensors in place from what calibration saw at the site, once before training."""
        return

    def after_step(self, tensors: Tensors, site: Site, record: Mapping[str, Tensor]) -> None:
        """Update state outside the gradient once after an optimizer step, from what `Call.record` kept."""
        return

    def adjust(self, places: Places, step: int, total: int) -> None:
        """Update state that spans sites (a rank budget, a drawn rank) once after an optimizer step.

        It is called for all sites of an adapter together, after step number `step` (from 1) of `total`, while the
        gradients of that step are still in the parameters' ``grad``.
        """
        return

    def penalty(self, places: Places) -> Tensor | None:
        """Return a loss on the tensors alone (orthogonality), which `lorry.auxiliary_loss` adds; None if there is
        none.
        """
        return None

    def joint_loss(self, left: Mapping[str, Mapping[str, Tensor]]) -> Tensor | None:
        """Return a loss made of what all places left in a pass (`Call.leave`): place -> name -> tensor; None if there
        is none.
        """
        return None

    @abstractmethod
    def apply(self, call: Call, tensors: Tensors) -> Tensor:
        """Return the update of the layer's output for one call, not yet weighted by the active set."""

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the update of the weight as ``(*lead, out, in)``; raises `AdapterError` if there is none."""
        raise AdapterError(
            f"{type(self).__name__} has no weight update: it depends on the input, so it cannot be fused."
        )

    def bias_delta(self, tensors: Tensors, site: Site) -> Tensor | None:
        """Return the update of the layer's bias ``(out,)`` that goes with `delta`; None if the bias stays."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return slug and options as plain data for a checkpoint or a YAML file."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        return {"method": self.info.slug, **{k: _plain(v) for k, v in options.items()}}

    def with_options(self, **options: Any) -> Self:
        """Return a copy with some options changed, checked anew."""
        current = {k: v for k, v in self.to_dict().items() if k != "method"}
        return from_options(type(self), {**current, **options})


@dataclass(frozen=True)
class Expert:
    """An adapter at one site, of which another method is made (`Method.with_experts`, `Method.adopt`).

    Attributes
    ----------
    name
        Of the adapter.
    method, tensors, site
        What it is there.
    weight
        Its weight times the number of adapters: 1 in an average.
    """

    name: str
    method: Method
    tensors: Tensors
    site: Site
    weight: float = 1.0


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
