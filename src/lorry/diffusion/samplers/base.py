"""What a sampler is: a way to compose several adapters while pictures are made, found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from lorry.core.errors import OptionError, near_misses
from lorry.core.forward.weights import Weight
from lorry.core.options import check_options, from_options
from lorry.core.registry import Registry
from lorry.diffusion.errors import DiffusionError
from lorry.diffusion.sampling import Step


class Wanted(Protocol):
    """What a sampler asks of one picture that is wanted (`lorry.diffusion.making.Order`)."""

    @property
    def prompt(self) -> str:
        """What it is to show."""

    @property
    def negative(self) -> str | None:
        """What it is not to show."""

    @property
    def composition(self) -> Any:
        """Its adapters, by name with weights."""


class Course(Protocol):
    """One batch of pictures under way."""

    def predict(self, step: Step) -> Tensor:
        """Return the prediction that the scheduler's step is made with; `step.latents` may be replaced."""

    def reports(self) -> list[dict[str, Any]]:
        """Return what there is to say of each picture: counts, who was dominant, masks."""


class Sampler:
    """A way to compose. Subclasses are frozen dataclasses, whose fields are the options."""

    name: ClassVar[str]
    #: Reference of what published it, e.g. ``arXiv 2402.16843``.
    paper: ClassVar[str] = ""
    #: Options that belong together, by the name of the preset.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        """Check every option against its declared range, then the rules between options."""
        check_options(self)
        self.check()

    def check(self) -> None:
        """Check rules between options; raise `OptionError` with the rule and the values."""
        return

    def described(self) -> dict[str, Any]:
        """Return the sampler as plain data: its name, and the options that are not at their defaults."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}  # type: ignore[arg-type]
        return {"sampler": self.name, **changed}

    def begin(self, pipeline: Any, orders: Sequence[Wanted]) -> AbstractContextManager[Course]:
        """Begin with a batch of pictures; whatever happens until the block ends, the pipeline is as before then.

        Parameters
        ----------
        pipeline
            Of diffusers, with adapters.
        orders
            The pictures, each with its composition.

        Raises
        ------
        DiffusionError
            A picture whose composition cannot be composed in this way.
        """
        raise NotImplementedError


S = TypeVar("S", bound=type[Sampler])
SAMPLERS: Registry[type[Sampler]] = Registry("sampler", error=DiffusionError)


def register_sampler(name: str, *, paper: str = "") -> Callable[[S], S]:
    """Return a decorator that registers a sampler under a name, with the reference of what published it."""
    return SAMPLERS.named(name, paper=paper)


def sampler_from(given: Sampler | str | Mapping[str, Any]) -> Sampler:
    """Return a sampler of its name, or of ``{"sampler": name, **options}``.

    Parameters
    ----------
    given
        Among the options may be ``preset``, the name of one of the sampler's presets, which other options change.

    Raises
    ------
    OptionError
        There is no such sampler, preset or option.
    """
    if isinstance(given, Sampler):
        return given
    values = {"sampler": given} if isinstance(given, str) else dict(given)
    cls = SAMPLERS.find(str(values.pop("sampler", "")))
    preset = values.pop("preset", None)
    if preset is not None and preset not in cls.presets:
        raise OptionError(
            f"The sampler '{cls.name}' has no preset '{preset}'.{near_misses(str(preset), cls.presets)} "
            f"There are: {', '.join(cls.presets) or 'none'}."
        )
    return from_options(cls, {**(cls.presets[preset] if preset else {}), **values})


def adapters_of(composition: Any) -> dict[str, Weight]:
    """Return the adapters of a picture with their weights.

    Raises
    ------
    DiffusionError
        Nobody said which adapters there are, or they differ by kind of token.
    """
    if composition is None:
        return {}
    if isinstance(composition, str):
        return {composition: 1.0}
    if not isinstance(composition, Mapping) or not all(isinstance(name, str) for name in composition):
        raise DiffusionError(
            "A sampler composes adapters that it is told of by name. Give each picture a composition such as "
            f"{{'a': 1.0, 'b': 0.8}}; found {composition!r}."
        )
    return dict(composition)


def compositions_of(step: Step) -> list[dict[str, Weight]]:
    """Return the adapters of each picture of a batch at the network that makes it; as `adapters_of`."""
    if step.compositions is None:
        raise DiffusionError(
            "A sampler composes adapters that it is told of by name, but no compositions were given. Give one for all "
            "pictures or one for each, such as {'a': 1.0, 'b': 0.8}."
        )
    return [adapters_of(composition) for composition in step.compositions]
