"""Merge recipes: a YAML file that says what is merged, how, and where the result goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from lorry.core.errors import CheckpointError, LorryError, OptionError
from lorry.core.method.registry import method_from
from lorry.core.options import check_options, from_options, option
from lorry.formats.mixture import adopting
from lorry.merging.engine import DTYPES, check_target, merge
from lorry.merging.mixture import Mixture, mix
from lorry.merging.output import MergedAdapter
from lorry.merging.registry import merge_method_named
from lorry.merging.weights import Step, Weight


@dataclass(frozen=True)
class RecipeInput:
    """An adapter in a recipe."""

    path: str = option(MISSING, "Adapter folder or single file, relative to the recipe.")
    weight: Any = option(
        None, "A number, a list spread over the layers, or pattern of sites -> these; 1/n for all if none has one."
    )


@dataclass(frozen=True)
class RecipeStep:
    """A factor on weights at some sites."""

    sites: str = option("*", "Pattern of site paths, as for targets.")
    layers: Any = option(None, "First and last block index, both included.")
    weights: Any = option(1.0, "Adapter -> factor, or one factor for all.")


@dataclass(frozen=True)
class Recipe:
    """The fields of a recipe; `inputs` maps names to paths, or to ``{path, weight}``."""

    inputs: Any = option(MISSING, "Name -> path, or name -> {path, weight}.")
    method: str = option(
        "task-arithmetic", "Slug of a merge method, or of a method that takes other adapters in (a mixture)."
    )
    options: Any = option(None, "Options of the method.")
    schedule: Any = option((), "List of {sites, layers, weights}: factors on the weights at some sites.")
    out: str | None = option(None, "Folder of the result, relative to the recipe.")
    name: str = option("merged", "Name of the result.")
    model: str | None = option(None, "The base, where an input needs it.")
    dtype: str = option("float32", "Of the result.", choices=("float32", "bfloat16", "float16", "float64"))
    whole_modules: str = option(
        "refuse", "Modules that were trained whole: refuse the merge, or drop them.", choices=("refuse", "drop")
    )
    check_base: bool = option(True, "Refuse adapters of different bases.")


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe.

    Raises
    ------
    OptionError
        An unknown field (with near misses), a missing one or a value of the wrong kind, with the file's name.
    CheckpointError
        The file cannot be read.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"The recipe '{path}' cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"The recipe '{path}' is not YAML: {error}.") from None
    if not isinstance(values, dict):
        raise OptionError(f"The recipe '{path}' must be a mapping with 'inputs', found {type(values).__name__}.")
    try:
        return recipe_from(values)
    except OptionError as error:
        raise OptionError(f"The recipe '{path}': {error}") from None


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """Return a recipe from plain data, checked.

    Raises
    ------
    OptionError
        As for `read_recipe`.
    """
    recipe: Recipe = _checked(Recipe, values)
    inputs = _inputs(recipe)
    if not isinstance(recipe.options, dict | None):
        raise OptionError(f"'options' must be a mapping, found {recipe.options!r}.")
    if not _is_mixture(recipe):
        _steps(recipe)
        merge_method_named(recipe.method).parse(recipe.options or {})
        return recipe
    method_from({"method": recipe.method, **(recipe.options or {})})
    if recipe.schedule:
        raise OptionError(f"'{recipe.method}' is made of whole adapters, so it takes no schedule of weights by site.")
    if any(i.weight is not None and not isinstance(i.weight, int | float) for i in inputs.values()):
        raise OptionError(f"'{recipe.method}' is made of whole adapters, so each takes one number as its weight.")
    return recipe


def _is_mixture(recipe: Recipe) -> bool:
    """Whether the method is not one of merging, but one that takes other adapters in.

    Raises
    ------
    OptionError
        It is neither.
    """
    if recipe.method in adopting():
        return True
    try:
        merge_method_named(recipe.method)
    except OptionError as error:
        raise OptionError(
            f"{error} A method that takes adapters in is possible too: {', '.join(adopting())}."
        ) from None
    return False


def merge_recipe(
    path: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    load_model: Callable[[str], nn.Module] | None = None,
) -> MergedAdapter | Mixture:
    """Run a recipe and write its result: a plain adapter, or a mixture where the method is one.

    Parameters
    ----------
    path
        The YAML file.
    out
        Goes before the recipe's own.
    overwrite
        Replace an adapter that lies there.
    load_model
        Loads the base that the recipe names; needed only if it names one.

    Raises
    ------
    LorryError
        As for `read_recipe` and `lorry.merging.merge`; nothing is written then.
    """
    recipe, home = read_recipe(path), Path(path).resolve().parent
    if out is None and recipe.out is None:
        raise OptionError(f"The recipe '{path}' has no 'out', and none was given.")
    try:
        return run_recipe(recipe, home, out=out, overwrite=overwrite, load_model=load_model)
    except LorryError as error:
        raise type(error)(f"The recipe '{path}': {error}") from None


def run_recipe(
    recipe: Recipe,
    home: Path,
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    load_model: Callable[[str], nn.Module] | None = None,
) -> MergedAdapter | Mixture:
    """Run a recipe whose paths are relative to `home`; options and errors as for `merge_recipe`."""
    target = Path(out) if out is not None else home / recipe.out if recipe.out else None
    if target is None:
        raise OptionError("Merging needs a folder for the result, and none was given.")
    inputs = _inputs(recipe)
    model = None
    if recipe.model is not None:
        if load_model is None:
            raise OptionError(f"The recipe names the base '{recipe.model}', but nothing to load it with was given.")
        local = home / recipe.model
        model = load_model(str(local) if local.exists() else recipe.model)
    weights = _weights(inputs)
    paths = {n: home / Path(i.path).expanduser() for n, i in inputs.items()}
    if _is_mixture(recipe):
        method = {"method": recipe.method, **(recipe.options or {})}
        check_target(target, overwrite)
        made = mix(
            paths,
            method,
            weights=cast(Any, weights),
            name=recipe.name,
            model=model,
            check_base=recipe.check_base,
            dtype=DTYPES[recipe.dtype],
        )
        made.save(target, overwrite=overwrite)
        return made
    return merge(
        paths,
        weights=weights,
        method=recipe.method,
        options=recipe.options,
        schedule=_steps(recipe),
        out=target,
        name=recipe.name,
        model=model,
        whole_modules=recipe.whole_modules,  # type: ignore[arg-type]
        check_base=recipe.check_base,
        dtype=recipe.dtype,
        overwrite=overwrite,
    )


def _checked(cls: type[Any], values: Mapping[str, Any]) -> Any:
    made = from_options(cls, values)
    check_options(made)
    return made


def _inputs(recipe: Recipe) -> dict[str, RecipeInput]:
    if not isinstance(recipe.inputs, dict) or not recipe.inputs:
        raise OptionError(f"'inputs' must map names to paths, found {recipe.inputs!r}.")
    found = {}
    for name, value in recipe.inputs.items():
        if not isinstance(value, str | dict):
            raise OptionError(f"Input '{name}' must be a path or {{path, weight}}, found {value!r}.")
        found[str(name)] = _checked(RecipeInput, {"path": value} if isinstance(value, str) else value)
    return found


def _weights(inputs: Mapping[str, RecipeInput]) -> dict[str, Weight] | None:
    given = {n: i.weight for n, i in inputs.items() if i.weight is not None}
    if not given:
        return None
    missing = [n for n in inputs if n not in given]
    if missing:
        raise OptionError(f"Some inputs have a weight, {missing} have none. Give all of them one, or none.")
    return {n: list(w) if isinstance(w, tuple) else w for n, w in given.items()}


def _steps(recipe: Recipe) -> list[Step]:
    if isinstance(recipe.schedule, str) or not isinstance(recipe.schedule, Sequence):
        raise OptionError(f"'schedule' must be a list of steps, found {recipe.schedule!r}.")
    steps = []
    for value in recipe.schedule:
        if not isinstance(value, dict):
            raise OptionError(f"A step of the schedule must be {{sites, layers, weights}}, found {value!r}.")
        step = _checked(RecipeStep, value)
        layers = None
        if step.layers is not None:
            if (
                not isinstance(step.layers, tuple | list)
                or len(step.layers) != 2
                or not all(isinstance(v, int) for v in step.layers)
            ):
                raise OptionError(f"'layers' must be the first and the last index, e.g. [0, 3], found {step.layers!r}.")
            layers = (int(step.layers[0]), int(step.layers[1]))
        weights = step.weights
        if isinstance(weights, str | bool) or not isinstance(weights, int | float | dict):
            raise OptionError(f"'weights' of a step must be a number or adapter -> number, found {weights!r}.")
        steps.append(Step(step.sites, layers, weights))
    return steps
