"""Another prompt for single blocks of a network, and times told to a pipeline's own call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import near_misses, some
from lorry.core.forward.around import around_calls
from lorry.core.life import api
from lorry.core.sites.targets import matches
from lorry.diffusion.errors import DiffusionError
from lorry.diffusion.families import family_of

#: What blocks call the text that they are given.
_TEXT = "encoder_hidden_states"


def text_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a network that are given the text, by path: transformers of a U-Net, blocks of a
    transformer.
    """
    found: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        name = type(module).__name__
        if path and (name.startswith("Transformer2DModel") or path.rpartition(".")[0].endswith("transformer_blocks")):
            if not any(path.startswith(f"{outer}.") for outer in found):
                found[path] = module
    return found


@contextmanager
def prompted(network: nn.Module, texts: Mapping[str, Tensor], *, guided: bool = False) -> Iterator[None]:
    """Give blocks another text than the rest of a network while the context lasts.

    For networks whose blocks each read the text as it was encoded, as those of a U-Net do. Blocks of a transformer with
    two streams hand the text on, changed, so that another one would have no place there.

    Parameters
    ----------
    network
        A U-Net.
    texts
        Path of a block, as a target (`text_blocks`) -> hidden states ``(rows, tokens, width)``; one row goes for all.
    guided
        Whether the network sees the batch twice, first without the prompt; those rows keep their text.

    Raises
    ------
    DiffusionError
        A pattern that is no block, or a network whose blocks hand the text on.
    """
    blocks = text_blocks(network)
    chosen: dict[str, Tensor] = {}
    for pattern, text in texts.items():
        paths = [path for path in blocks if matches(path, pattern)]
        if not paths:
            raise DiffusionError(
                f"There is no block '{pattern}' that is given a text.{near_misses(pattern, blocks)} There are "
                f"{some(blocks, 8)}."
            )
        chosen |= dict.fromkeys(paths, text)
    handing = [path for path in chosen if not type(blocks[path]).__name__.startswith("Transformer2DModel")]
    if handing:
        raise DiffusionError(
            f"'{handing[0]}' hands its text on to the next block, so that no block has a prompt of its own in "
            f"{type(network).__name__}. Give another prompt from a step on instead."
        )
    with ExitStack() as stack:
        for path, text in chosen.items():
            handle = blocks[path].register_forward_pre_hook(_swap(text, guided), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def given_text(args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor:
    """Return the text that a block is called with."""
    found: Tensor = options[_TEXT] if _TEXT in options else args[1]
    return found


def with_text(args: tuple[Any, ...], options: dict[str, Any], text: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block's call with another text."""
    if _TEXT in options:
        return args, {**options, _TEXT: text}
    return (args[0], text, *args[2:]), options


def _swap(text: Tensor, guided: bool) -> Any:
    def swap(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        given = given_text(args, options)
        kept = given[: len(given) // 2] if guided else given[:0]
        rows = len(given) - len(kept)
        other = text.to(given.device, given.dtype)
        if rows % len(other):
            raise DiffusionError(
                f"A block sees {rows} rows, but its prompt has {len(other)}; give one row, or one for each."
            )
        return with_text(args, options, torch.cat([kept, other.repeat(rows // len(other), 1, 1)]))

    return swap


@contextmanager
def following(pipeline: Any) -> Iterator[None]:
    """Tell adapters step and time in the calls that a pipeline itself makes of its network, while the context lasts.

    Weights that depend on them (`within`, `lorry.ByStep`) need it around ``pipeline(...)``; `sample` does it by itself.
    """
    family = family_of(pipeline)
    network = family.network(pipeline)
    seen: list[float] = []

    def enter(args: tuple[Any, ...], options: dict[str, Any]) -> AbstractContextManager[Any]:
        found = options.get("timestep", args[1] if len(args) > 1 else None)
        if found is None or not api.adapters(network):
            return nullcontext()
        time = torch.as_tensor(found, dtype=torch.float32).reshape(-1)[0]
        time = time * 1000 if family.times_to_one else time
        if float(time) not in seen:
            seen.append(float(time))
        return api.context(network, step=seen.index(float(time)), timestep=time)

    with around_calls(network, enter):
        yield
