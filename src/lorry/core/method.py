"""Methods: the mathematics of a parametrisation as a frozen dataclass of options and a few pure functions.

A method belongs to a family, and everything else is derived from the family once: forward, rows of a batch, merging,
saving, exporting, counting. See `Bottleneck`, `WeightDelta` and `Block` in `lorry.core.families`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Generator, Tensor, nn

from lorry.core.call import Call
from lorry.core.errors import AdapterError, OptionError, near_misses
from lorry.core.kinds import KIND_NAMES
from lorry.core.options import check_options, from_options
from lorry.core.sites import Site

Init = Callable[[Tensor, Generator], object]
Tensors = Mapping[str, Tensor]
MergeClass = Literal["exact", "approximate", "never"]
#: Sites with the tensors there, for what a method does to all of its sites together.
Places = Sequence[tuple[Site, Tensors]]


def zeros(tensor: Tensor, generator: Generator) -> None:
    """Fill with zeros."""
    tensor.zero_()


def ones(tensor: Tensor, generator: Generator) -> None:
    """Fill with ones."""
    tensor.fill_(1)


def kaiming(tensor: Tensor, generator: Generator) -> None:
    """Fill uniformly in ±1/√fan_in (Kaiming with a=√5), fan_in being the last dimension."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    tensor.uniform_(-bound, bound, generator=generator)


def normal(std: float = 1.0) -> Init:
    """Return an initialiser that draws from N(0, std²)."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def constant(value: float) -> Init:
    """Return an initialiser that fills with `value`."""
    return lambda tensor, generator: tensor.fill_(value)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a method owns: its shape, how it starts, whether it is trained.

    `dtype` None means the adapter's own; indices and masks name theirs and keep it through every cast. Tensors with
    ``saved=False`` are rebuilt from the seed and not written to the checkpoint.
    """

    shape: tuple[int, ...]
    init: Init = zeros
    trained: bool = True
    dtype: torch.dtype | None = None
    saved: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Observed:
    """What calibration saw at one site, on the CPU in float32; only what the method asked for is there.

    Attributes
    ----------
    gradient
        Mean over batches of the gradient of the weight, ``(*lead, out, in)``.
    inputs
        Rows ``(k, in)`` with ``inputsᵀ inputs = Σ (x - mean)(x - mean)ᵀ``: exact if k is not less than the rank of the
        inputs, else the principal part.
    mean
        Of the inputs, ``(in,)``.
    count, variance
        Number of inputs, and ``Σ ‖x - mean‖²``, of which `inputs` explains a part.
    """

    gradient: Tensor | None = None
    inputs: Tensor | None = None
    mean: Tensor | None = None
    count: int = 0
    variance: float = 0.0


@dataclass(frozen=True)
class Layout:
    """All tensors of an adapter: those of each site by path, and those that sites share.

    Where an adapter has sites of several methods, `sharing` are the paths of those whose method shares.
    """

    sites: dict[str, dict[str, TensorSpec]]
    shared: dict[str, TensorSpec] = field(default_factory=dict)
    sharing: set[str] = field(default_factory=set)

    def specs(self) -> Iterator[TensorSpec]:
        """Yield every spec once."""
        yield from self.shared.values()
        for specs in self.sites.values():
            yield from specs.values()

    def count(self, trained: bool = True) -> int:
        """Return the number of elements, of trained tensors only unless told otherwise."""
        return sum(s.numel for s in self.specs() if s.trained or not trained)


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of a method."""

    slug: str
    cls: type[Method]
    paper: str
    family: str
    kinds: tuple[str, ...]
    identity_at_start: bool
    merge: MergeClass
    linear_in_scale: bool
    preset_of: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain data, with the options and their help."""
        fields = dataclasses.fields(self.cls)  # type: ignore[arg-type]
        options = {f.name: {"default": f.default, "help": f.metadata.get("help", "")} for f in fields}
        plain = {k: v for k, v in vars(self).items() if k != "cls"}
        return {**plain, "kinds": list(self.kinds), "class": self.cls.__name__, "options": options}


class Method(ABC):
    """Base of all methods. Subclasses are frozen dataclasses whose fields are the user's options."""

    info: ClassVar[MethodInfo]
    family: ClassVar[str]
    #: How the family merges into a base weight, unless a registration says otherwise.
    merges: ClassVar[MergeClass] = "exact"
    #: Further kinds of sites that `place` makes something of (the layers of a block).
    gathers: ClassVar[tuple[str, ...]] = ()
    #: Parameter-free knobs that the training engine reads: learning-rate factors by tensor name (LoRA+).
    rate_factors: ClassVar[Mapping[str, float]] = {}

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

    def for_site(self, site: Site) -> Method | None:
        """Return the method to use at `site`: itself, another one (a mixture), or None to leave the site out."""
        return self

    def place(self, sites: Sequence[Site], root: nn.Module) -> Sequence[tuple[Site, Method]]:
        """Return where the method sits, of the selected sites, and as which method; a method may give other sites of
        `root`.
        """
        return [(site, self) for site in sites]

    @property
    def merging(self) -> MergeClass:
        """How this method merges with these options; the registration says it for the method as such."""
        return self.info.merge

    def bases(self, site: Site) -> Sequence[Site]:
        """Return the sites whose weights the method builds on, by which the base is recognised."""
        return [site]

    @property
    def row_draws(self) -> int:
        """How many copies of each row a training step needs, each with routes of its own.

        Above 1, the training engine repeats the rows and adds the policy term of `lorry.core.routing.leave_one_out`,
        with the log-probability that the method leaves as ``log_probability`` (`Call.leave`), one for each row.
        """
        return 1

    def with_experts(self, ranks: Sequence[int]) -> Self:
        """Return the method with options that fit low-rank adapters of these ranks as its experts; see `adopt`."""
        raise AdapterError(f"{type(self).__name__} cannot be made from other adapters.")

    def adopt(self, tensors: Tensors, site: Site, experts: Sequence[tuple[Tensor, Tensor, float]]) -> float:
        """Fill tensors in place from the ``(A, B, scale)`` of other adapters at `site`; return the relative error of
        doing so.

        See `lorry.core.experts.from_adapters`.
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
        """What the method wants to see of calibration batches before training; see `lorry.core.calibrate`."""
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

    def balance(self, places: Places, step: int, total: int) -> None:
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
            f"{type(self).__name__} has no weight update: it depends on the input, so it cannot be merged."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return slug and options as plain data for a checkpoint or a YAML file."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        return {"method": self.info.slug, **{k: _plain(v) for k, v in options.items()}}

    def with_options(self, **options: Any) -> Self:
        """Return a copy with some options changed, checked anew."""
        current = {k: v for k, v in self.to_dict().items() if k != "method"}
        return from_options(type(self), {**current, **options})


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


M = TypeVar("M", bound=type[Method])
_REGISTRY: dict[str, MethodInfo] = {}
_LOADED = False


def register(
    slug: str,
    *,
    paper: str,
    kinds: Iterable[str] = ("linear", "conv", "embedding", "packed", "experts"),
    identity_at_start: bool = True,
    merge: MergeClass | None = None,
    linear_in_scale: bool = True,
) -> Callable[[M], M]:
    """Register a method under a slug. This is the only thing a new method does besides its mathematics.

    Parameters
    ----------
    slug
        Lower-case name used on the command line, in YAML and in checkpoints.
    paper
        Reference, e.g. ``arXiv 2106.09685``.
    kinds
        Kinds of sites that the method can sit on.
    identity_at_start
        Whether a fresh adapter leaves the model's output unchanged.
    merge
        Overrides the family's way of merging.
    linear_in_scale
        Whether weight k in the active set gives k times the update.
    """
    unknown = set(kinds) - set(KIND_NAMES)
    if unknown:
        raise OptionError(f"Method '{slug}' names unknown site kinds {sorted(unknown)}; there are {list(KIND_NAMES)}.")

    def decorate(cls: M) -> M:
        if slug in _REGISTRY and _REGISTRY[slug].cls.__qualname__ != cls.__qualname__:
            raise OptionError(f"Two methods are called '{slug}': {_REGISTRY[slug].cls.__name__} and {cls.__name__}.")
        merges = merge or cls.merges
        info = MethodInfo(slug, cls, paper, cls.family, tuple(kinds), identity_at_start, merges, linear_in_scale)
        cls.info = info
        _REGISTRY[slug] = info
        return cls

    return decorate


@dataclass(frozen=True)
class Preset:
    """A published name for a method with certain options."""

    slug: str
    of: str
    options: Mapping[str, Any]
    paper: str


_PRESETS: dict[str, Preset] = {}


def preset(slug: str, of: str, *, paper: str, **options: Any) -> Preset:
    """Register a published variant that differs from a method by options only."""
    _PRESETS[slug] = Preset(slug, of, options, paper)
    return _PRESETS[slug]


def presets() -> dict[str, Preset]:
    """Return all presets by slug."""
    methods()
    return dict(sorted(_PRESETS.items()))


def methods() -> dict[str, MethodInfo]:
    """Return every registered method by slug, importing the files of `lorry.methods` at the first call."""
    global _LOADED
    if not _LOADED:
        _LOADED = True
        package = importlib.import_module("lorry.methods")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"lorry.methods.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def method_from(values: Mapping[str, Any] | str) -> Method:
    """Build a method from its slug, or from plain data with the key ``method`` and its options.

    Raises
    ------
    OptionError
        Unknown slug or option (with near misses), or a value out of range.
    """
    values = {"method": values} if isinstance(values, str) else dict(values)
    slug = values.pop("method", "lora")
    known = methods()
    if slug in _PRESETS:
        values = {**_PRESETS[slug].options, **values}
        slug = _PRESETS[slug].of
    if slug not in known:
        names = [*known, *_PRESETS]
        raise OptionError(
            f"There is no method '{slug}'.{near_misses(str(slug), names)} `lorry methods` lists {len(names)} of them."
        )
    return from_options(known[slug].cls, values)
