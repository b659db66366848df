"""A base cut into the stages of a pipeline: each process holds a range of the blocks of its stack.

The model's own forward runs in every stage. Blocks before the stage's own hand on what they get; what arrives takes the
place of the input of the first own block; after the last own block the forward is left, except in the last stage. So
whatever a model does around its blocks (masks, positions, scaled embeddings, a head) is done by its own code, and a
trial with the whole model says whether that gives what the model gives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError
from lorry.core.sites.stacks import find_stacks, split_at_number

#: Tokens of the trial.
_TRIED = 6


class _LeftError(Exception):
    """The last own block is done."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("left")
        self.hidden = hidden


class Stages:
    """The stages of a model.

    Parameters
    ----------
    model
        A transformers model of one stack of blocks; no adapter is active.
    count
        Number of stages.

    Attributes
    ----------
    bounds
        First block of each stage, and the number of blocks.
    width, dtype
        Of what goes from stage to stage, ``(rows, positions, width)``.

    Raises
    ------
    OptionError
        The model has no such stack, fewer blocks than stages, or does more between its blocks than handing on one
        tensor.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        path = find_stacks((name for name, _ in model.named_parameters()), model).main
        if path is None:
            raise OptionError(
                f"{type(model).__name__} has no single stack of blocks that could be cut into stages. Leave pipeline "
                "out, which splits the rows of passes instead."
            )
        self.model, self.path, self.count = model, path, count
        self.blocks = list(model.get_submodule(path).children())
        if len(self.blocks) < count:
            raise OptionError(
                f"{type(model).__name__} has {len(self.blocks)} blocks, which is too few for {count} stages. Set "
                f"stages to at most {len(self.blocks)}."
            )
        self.bounds = [stage * len(self.blocks) // count for stage in range(count + 1)]
        modes = [(module, module.training) for module in model.modules()]
        model.eval()  # dropout would be drawn anew
        try:
            self._try()
        finally:
            for module, mode in modes:
                module.training = mode

    def last(self, stage: int) -> bool:
        """Return whether a stage is the last one."""
        return stage == self.count - 1

    def inputs(self, stage: int, inputs: Mapping[str, Any], arrived: Tensor | None) -> dict[str, Any]:
        """Return what the model is called with in a stage: tokens in the first, places for embeddings in the others."""
        if arrived is None:
            return dict(inputs)
        kept = {name: value for name, value in inputs.items() if name != "input_ids"}
        return {**kept, "inputs_embeds": torch.zeros_like(arrived, requires_grad=False)}

    @contextmanager
    def only(self, stage: int, arrived: Tensor | None) -> Iterator[list[Tensor]]:
        """Let the model's forward be that of a stage; what leaves the last own block is in the list afterwards."""
        first, end = self.bounds[stage], self.bounds[stage + 1]
        left: list[Tensor] = []
        with ExitStack() as stack:
            for block in self.blocks[:first]:
                stack.enter_context(_handing_on(block))
            if arrived is not None:
                stack.enter_context(_given(self.blocks[first], arrived))
            if not self.last(stage):
                stack.enter_context(_leaving(self.blocks[end - 1]))
            try:
                yield left
            except _LeftError as done:
                left.append(done.hidden)

    def keep(self, stage: int, besides: Collection[nn.Parameter]) -> None:
        """Let go of all weights that a stage does not need; `besides` are kept everywhere (those of adapters)."""
        own = range(self.bounds[stage], self.bounds[stage + 1])
        kept = set(map(id, besides)) | {id(p) for module in self._used[stage] for p in module.parameters(recurse=False)}
        for name, parameter in self.model.named_parameters():
            place = split_at_number(name)
            inside = place is not None and place[0] == self.path
            wanted = place is not None and place[1] in own if inside else id(parameter) in kept
            if not wanted and id(parameter) not in kept:
                parameter.data = parameter.data.new_empty(0)

    @torch.no_grad()
    def _try(self) -> None:
        """Run a few tokens through the whole model and through its stages; note what the stages use."""
        device = next(self.model.parameters()).device
        tokens = {"input_ids": torch.arange(_TRIED, device=device)[None]}
        self._used: list[set[nn.Module]] = []
        whole = self.model(**tokens).logits
        arrived: Tensor | None = None
        for stage in range(self.count):
            used: set[nn.Module] = set()
            handles = [m.register_forward_pre_hook(lambda m, args, u=used: u.add(m)) for m in self.model.modules()]
            found = None
            try:
                with self.only(stage, arrived) as left:
                    found = self.model(**self.inputs(stage, tokens, arrived)).logits
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise OptionError(self._reason(f"{type(error).__name__}: {error}")) from error
            finally:
                for handle in handles:
                    handle.remove()
            self._used.append(used)
            arrived = left[0] if left else found
            if stage == 0:
                assert arrived is not None
                self.width, self.dtype = arrived.shape[-1], arrived.dtype
        if arrived is None or arrived.shape != whole.shape or not torch.equal(arrived, whole):
            raise OptionError(self._reason("its stages one after another give something else than the whole"))

    def _reason(self, why: str) -> str:
        return (
            f"{type(self.model).__name__} cannot be cut into stages of a pipeline: {why}. Leave pipeline out, which "
            "splits the rows of passes instead."
        )


@contextmanager
def _handing_on(block: nn.Module) -> Iterator[None]:
    """Let a block give what it gets."""
    had = block.__dict__.get("forward")
    block.forward = lambda hidden, *args, **kwargs: hidden
    try:
        yield
    finally:
        if had is None:
            del block.__dict__["forward"]
        else:
            block.forward = had


@contextmanager
def _given(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Give a block another input."""

    def exchange(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

    handle = block.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _leaving(block: nn.Module) -> Iterator[None]:
    """Leave the forward of the model after a block."""

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        raise _LeftError(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()
