"""Watching and editing attention while a model runs."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorry.attention.call import AttentionCall, AttentionError, Editor, Reader, check_want
from lorry.attention.frames import Frame, close_frames, current_frame
from lorry.attention.seams import Functions, leave_interface, watch_interface
from lorry.attention.sites import REGISTRY, AttentionSite, chosen_sites, is_compiled
from lorry.core.method.call import recomputing

#: The watches that are open in this thread or task, outermost first.
_CURRENT: ContextVar[tuple[Watch, ...]] = ContextVar("lorry_attention_watches", default=())


@dataclass
class _Hooked:
    """A module that open watches listen to, in any thread."""

    module: nn.Module
    handles: tuple[Any, ...]
    watches: list[Watch] = field(default_factory=list)


_LOCK = threading.Lock()
_HOOKED: dict[int, _Hooked] = {}


class Watch:
    """An open look at a model's attention; made by `watch`, to be used in a ``with`` statement.

    Attributes
    ----------
    sites
        What is watched, by path.
    counts
        How many products were seen at each site, recomputations aside.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: Reader | None,
        editor: Editor | None,
        chosen: Sequence[tuple[AttentionSite, nn.Module]],
        want: frozenset[str],
        recomputation: bool,
    ) -> None:
        self.sites = {site.path: site for site, _ in chosen}
        self.counts = dict.fromkeys(self.sites, 0)
        self.want = want
        self.replacing: set[str] = set()
        self.closed = True
        self._reader = reader
        self._editor = editor
        self._recomputation = recomputation
        self._modules = {id(module): (site, module) for site, module in chosen}
        self._escorts = {id(m): m for m in model.modules() if isinstance(m, nn.TransformerEncoder)}
        self._interfaces: list[type] = []
        self._since: dict[int, int] = {}
        self._began = False
        self.opener = 0

    def __enter__(self) -> Watch:
        """Begin to watch in this thread or task."""
        if not self.closed:
            raise AttentionError("This watch is open already; make another one with lorry.attention.watch.")
        try:
            for site, module in self._modules.values():
                if site.interface == "transformers":
                    self._interfaces.append(watch_interface(_registry(module)))
            for module in self._listened():
                _listen(module, self)
        except BaseException:
            self._leave()
            raise
        self.closed = False
        self._began = False
        self.opener = threading.get_ident()
        self._since = {self.opener: _graph_number()}
        _CURRENT.set((*_CURRENT.get(), self))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the model as it was; watches may be closed in any order."""
        self.closed = True
        if kind is None and not self._began:
            warnings.warn(
                f"Nothing was seen at {len(self.sites)} attention sites: the model did not run in this thread or task, "
                "or it ran from a graph that torch.compile had made before (run it under "
                "torch.compiler.set_stance('force_eager')).",
                stacklevel=2,
            )
        close_frames(self)
        _CURRENT.set(tuple(other for other in _CURRENT.get() if other is not self))
        self._leave()

    def edit(self, call: AttentionCall) -> Any:
        """Ask the editor; it is asked again in recomputation, which has to compute the same."""
        return None if self._editor is None else self._editor(call)

    def read(self, call: AttentionCall) -> Tensor | None:
        """Tell the reader; of a recomputation only if it changes outputs there, or asked to be told."""
        if self._reader is None or (call.recomputation and not self._rereads(call.site.path)):
            return None
        return self._reader(call)

    def frame(self, module: nn.Module) -> tuple[AttentionSite | None, bool]:
        """Return the site of a module, and whether this watch has to do with it at all."""
        if self.closed:
            return None, False
        found = self._modules.get(id(module))
        return (None, id(module) in self._escorts) if found is None else (found[0], True)

    def begin(self) -> None:
        """Note that a forward begins in this thread."""
        self._since.setdefault(threading.get_ident(), _graph_number())
        self._began = True

    def takes_part_again(self, module: nn.Module) -> bool:
        """Whether the recomputation that runs now is of a pass under this watch, and the watch matters to it."""
        site, mine = self.frame(module)
        if not mine or site is None or not (self._editor is not None or self._rereads(site.path)):
            return False
        node = torch._C._current_autograd_node()
        return node is not None and node._sequence_nr() >= min(self._since.values())

    def _rereads(self, path: str) -> bool:
        return self._recomputation or path in self.replacing

    def _listened(self) -> list[nn.Module]:
        return [*(module for _, module in self._modules.values()), *self._escorts.values()]

    def _leave(self) -> None:
        for module in self._listened():
            _unlisten(module, self)
        while self._interfaces:
            leave_interface(self._interfaces.pop())


def watch(
    model: nn.Module,
    reader: Reader | None = None,
    *,
    editor: Editor | None = None,
    targets: str | Sequence[str] | None = None,
    kinds: str | Iterable[str] | None = None,
    want: str | Sequence[str] = ("q", "k", "v", "probabilities", "output"),
    recomputation: bool = False,
) -> Watch:
    """Watch, and where wanted change, a model's attention.

    ``calls = []``, then ``with watch(model, calls.append): model(x)``.

    The model computes the same, bit for bit, as long as nobody changes anything (torch's own transformer layers take
    their ordinary path, not their fused inference path, which agrees to rounding at tokens that are not padding).
    Afterwards it is what it was: no configuration, processor, attribute or weight is touched. Other models, other
    threads and tasks, and calls outside of the ``with`` block see nothing of a watch.

    Parameters
    ----------
    model
        The model, or any part of it.
    reader
        Called after each product of a chosen site with an `AttentionCall`. It returns None, or a tensor that stands in
        place of the output ``(batch, heads, length, width)``.
    editor
        Called before each product with a call that has no output yet. It returns None, or a mapping with tensors that
        stand in place of the layer's own: ``q``, ``k``, ``v``, ``mask`` (None for none; the causal flag ends with it),
        ``probabilities`` (the output is then probabilities @ v, without dropout), or ``output`` (no product at all).
    targets
        Paths, suffixes, patterns with ``*`` or ``re:REGEX``; every site if left out.
    kinds
        ``self``, ``cross``, ``joint``, ``temporal``; all if left out.
    want
        What readers look at (`lorry.attention.call.FIELDS`). ``gradient`` keeps the gradient of the output.
    recomputation
        Whether readers are called again, with ``call.recomputation`` set, when gradient checkpointing computes a
        segment again. Editors always are, and readers at sites where they replaced an output: both must give the same
        again, and the backward pass must run in the watch's thread before it is closed.

    Returns
    -------
    A context manager. The innermost watch is asked last.

    Raises
    ------
    SiteError
        Nothing matches.
    AttentionError
        Neither a reader nor an editor, an unknown name in `want`, a compiled model; later, in the forward pass: a
        chosen module ran without its attention having been seen.
    """
    if reader is None and editor is None:
        raise AttentionError("Nobody watches: give a reader, which sees each product, or an editor, which changes it.")
    names = check_want(want)
    _refuse_compiled(model)
    return Watch(model, reader, editor, chosen_sites(model, targets, kinds), names, recomputation)


def _refuse_compiled(model: nn.Module) -> None:
    compiled = is_compiled(model)
    if compiled is not None:
        raise AttentionError(
            f"'{compiled or type(model).__name__}' is compiled, and readers cannot be called from a compiled graph. "
            "Watch the model before torch.compile, or the original (model._orig_mod), run under "
            "torch.compiler.set_stance('force_eager')."
        )


def _listen(module: nn.Module, watch: Watch) -> None:
    with _LOCK:
        hooked = _HOOKED.get(id(module))
        if hooked is None:
            # the last to be asked before the forward, the first after it: hooks of others stay outside
            before = module.register_forward_pre_hook(_enter)
            after = module.register_forward_hook(_exit, prepend=True, always_call=True)
            hooked = _HOOKED[id(module)] = _Hooked(module, (before, after))
        hooked.watches.append(watch)


def _unlisten(module: nn.Module, watch: Watch) -> None:
    with _LOCK:
        hooked = _HOOKED.get(id(module))
        if hooked is None or watch not in hooked.watches:
            return
        hooked.watches.remove(watch)
        if not hooked.watches:
            del _HOOKED[id(module)]
            for handle in hooked.handles:
                handle.remove()


def _enter(module: nn.Module, args: Any) -> None:
    """Open a frame around a forward that somebody of this thread watches."""
    if torch.compiler.is_compiling():
        raise AttentionError(
            "Readers cannot be called from a compiled graph: call the model outside of torch.compile while its "
            "attention is watched, or under torch.compiler.set_stance('force_eager')."
        )
    again = recomputing()
    watches = _again(module) if again else tuple(w for w in _CURRENT.get() if w.frame(module)[1])
    if not watches:
        return
    site = watches[0].frame(module)[0]
    for each in watches if not again else ():
        each.begin()
    frame = Frame(module, site, watches, again)
    seen_by_interface = site is not None and site.interface == "transformers"
    frame.open(None if seen_by_interface else Functions(frame))


def _exit(module: nn.Module, args: Any, output: Any) -> None:
    """Close the frame; without an output the forward has failed."""
    frame = current_frame()
    if frame is None or frame.module is not module:
        return
    frame.close()
    if output is None or frame.site is None or frame.parts:
        return
    what = type(getattr(module, "processor", None) or module).__name__
    raise AttentionError(
        f"'{frame.site.path}' ran, but its attention was not seen: {what} computed it in a way of its own or with "
        "another kernel. Choose an implementation on torch's product (attn_implementation='sdpa', diffusers' default "
        "processor, set_attention_backend('native')), or leave this site out through targets= or kinds=."
    )


def _again(module: nn.Module) -> tuple[Watch, ...]:
    """Return the watches that take part in a recomputation, which may run in a thread of autograd's own."""
    if not isinstance(threading.current_thread(), threading._DummyThread):
        return tuple(w for w in _CURRENT.get() if w.takes_part_again(module))
    # a worker of autograd (one for each GPU) knows no context: the watches on the module are asked themselves
    with _LOCK:
        hooked = _HOOKED.get(id(module))
        watches = () if hooked is None else tuple(w for w in hooked.watches if w.takes_part_again(module))
    if len({w.opener for w in watches}) > 1:
        raise AttentionError(
            "Several threads edit the attention of one model inside checkpointed segments, and the recomputation "
            "cannot tell whose turn it is: train without gradient checkpointing, or edit in one thread at a time."
        )
    return watches


def _registry(module: nn.Module) -> object:
    """Return transformers' table of attention functions as the module's own code sees it."""
    for cls in type(module).__mro__:
        registry: object = getattr(sys.modules.get(cls.__module__), REGISTRY, None)
        if registry is not None:
            return registry
    raise AttentionError(f"{type(module).__name__} does not show the attention interface that it uses.")


def _graph_number() -> int:
    """Return the number that the next node of this thread's graph will get."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
