"""The engine: many requests, each with its own composition of adapters or none, in one pass at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorry.core.errors import OptionError
from lorry.core.life.state import kept_state
from lorry.core.receipt import Receipt
from lorry.formats.file import AdapterFile
from lorry.serving.hot import HotAdapter
from lorry.serving.options import EngineOptions
from lorry.serving.paging.batch import Batch, Part
from lorry.serving.paging.hooks import PagedModel
from lorry.serving.paging.pool import made_pool
from lorry.serving.paging.shelf import Shelf
from lorry.serving.paging.store import Store
from lorry.serving.request import Composition, Output, Request, TokenLogprob
from lorry.serving.results import Completed, Served, Stats
from lorry.serving.runner import Runner
from lorry.serving.sampling import Vocabulary, check_sampling, choose, report
from lorry.serving.schedule import Scheduler, Share, passes
from lorry.serving.sequence import Sequence
from lorry.serving.served import Catalogue

#: What is said where a pass gives logits that are no numbers.
_NOT_NUMBERS = (
    "The model's logits are not numbers in this request. Its adapters, or their weights in the composition, may be too "
    "large for the type of the base; use smaller weights or another type."
)


class Engine:
    """Serves requests on one base, batched anew at every step.

    One thread calls `step`; every other method may be called from any thread.

    Parameters
    ----------
    model
        A causal language model of transformers, quantised or not. Adapters that it carries already are served under
        their names. It is left in evaluation mode, and must not be trained meanwhile.
    tokenizer
        Gives the texts of answers; None for answers without text.
    options
        Memory and limits.

    Raises
    ------
    OptionError
        The model does not go through transformers' attention interface and cache, or the pool is too small for a page.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, options: EngineOptions | None = None) -> None:
        self.options = options if options is not None else EngineOptions()
        self.tokenizer = tokenizer
        model.eval()
        paged = PagedModel(model)
        shape = paged.shape()
        self._pool = made_pool(self.options, shape.page_bytes(self.options.page_tokens), shape.device)
        self._runner = Runner(paged, Store(self._pool.tokens, shape, self.options.page_tokens))
        self._passes = threading.RLock()  # held while the model runs, and while its adapters are changed
        self._lock = threading.Lock()  # guards what has arrived
        self._shelf = Shelf(self.options.host_bytes, self.options.folder)
        self._catalogue = Catalogue(model, self._passes, self._pool, self._shelf)
        self._scheduler = Scheduler(self._pool, self._shelf, self.options)
        self._arrived: list[Sequence] = []
        self._known: dict[str, Sequence] = {}
        config: Any = model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._context: int | None = getattr(text, "max_position_embeddings", None)
        self._tokens = Vocabulary.of(model, tokenizer)
        self._decoded = self._steps = self._finished = 0
        self._pool.dropped = self._runner.dropped
        self._pool.blocks.clean = not self._runner.store.listed
        self._hot = HotAdapter(self.options.fuse_hot)

    # -- requests

    def submit(self, request: Request) -> None:
        """Take a request in; its outputs come from `step`.

        Raises
        ------
        AdapterError
            Its composition names an adapter that is not served.
        OptionError
            A prompt that is empty, has tokens that the model does not know, or is too long for the model or for the
            pool together with the answer; a weight or a number out of range; an id that is under way.
        """
        self._check(request)
        resolved = self._catalogue.acquire(request.composition)
        try:
            sequence = Sequence(request, resolved, self._tokens, self.tokenizer)
            self._check_room(sequence)
        except BaseException:
            self._catalogue.give_back(resolved)
            raise
        with self._lock:
            taken = request.id in self._known
            if not taken:
                self._known[request.id] = sequence
                self._arrived.append(sequence)
        if taken:
            self._catalogue.give_back(resolved)
            raise OptionError(f"A request '{request.id}' is under way already. Give each request an id of its own.")

    def cancel(self, id: str) -> bool:
        """End a request at the next step; returns whether it was under way."""
        with self._lock:
            sequence = self._known.get(id)
            if sequence is not None:
                sequence.cancelled = True
            return sequence is not None

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        with self._lock:
            return not self._known

    def generate(self, requests: Iterable[Request]) -> list[Completed]:
        """Submit requests and step until they are done; returns what became of them, in their order.

        Raises
        ------
        AdapterError, OptionError
            As for `submit`; nothing of these requests is under way then.
        """
        asked: list[Request] = []
        try:
            for request in requests:
                self.submit(request)
                asked.append(request)
        except BaseException:
            with self._passes:
                for request in asked:
                    self._end(self._known[request.id], Output(request.id, finish="cancelled"))
            raise
        outputs: dict[str, list[Output]] = {request.id: [] for request in asked}
        left = set(outputs)
        while left:
            for output in self.step():
                if output.id in outputs:
                    outputs[output.id].append(output)
                if output.finish is not None:
                    left.discard(output.id)
        return [Completed.of(outputs[request.id]) for request in asked]

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together, at most: what the model sees, and what the pool holds."""
        held = self._pool.capacity(()) * self.options.page_tokens
        return held if self._context is None else min(self._context, held)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self._tokens.size

    # -- adapters

    def load(self, name: str, source: Path | str | AdapterFile, pinned: bool = False) -> Receipt:
        """Load an adapter under a name while requests run.

        Requests under way keep the version that they began with; it is unloaded when the last of them ends.

        Parameters
        ----------
        name
            Under which requests name it; may be served already.
        source
            A folder or file that `lorry.load` takes, or an opened adapter.
        pinned
            Keep it where it is used.

        Raises
        ------
        CheckpointError, FingerprintError, AdapterError, SiteError
            As for `lorry.load`; what was served under the name goes on being served.
        """
        with self._passes:
            self._cool()
        return self._catalogue.load(name, source, pinned)

    def unload(self, name: str) -> None:
        """Serve an adapter no more; requests under way end on it.

        Raises
        ------
        AdapterError
            An unknown name.
        """
        with self._passes:
            self._cool()
            self._catalogue.unload(name)

    def adapters(self) -> list[Served]:
        """Return the adapters that requests may name, and versions that requests under way still use."""
        return self._catalogue.list()

    def stats(self) -> Stats:
        """Return what the engine holds and has done."""
        with self._passes:
            return self._stats()

    def _stats(self) -> Stats:
        with self._lock:
            arrived = len(self._arrived)
        count = self._scheduler.counts
        places: dict[str, int] = {}
        for served in self._catalogue.list():
            places[served.place] = places.get(served.place, 0) + 1
        return Stats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + arrived,
            pages=self._pool.tokens.pages,
            pages_free=self._pool.free,
            pages_kept=self._pool.blocks.kept,
            pages_adapters=sum(resident.pages for resident in tuple(self._pool.held)),
            adapters=places,
            tokens_prefilled=count.prefilled,
            tokens_cached=count.cached,
            tokens_decoded=self._decoded,
            prefix_hits=count.hits,
            prefix_misses=count.misses,
            preemptions=count.preemptions,
            steps=self._steps,
            finished=self._finished,
        )

    def close(self) -> None:
        """Give the model's adapters their tensors back and end the side thread; requests under way are dropped."""
        with self._passes:
            self._cool()
            with self._lock:
                left = list(self._known.values())
            for sequence in left:
                self._end(sequence, Output(sequence.request.id, finish="cancelled"))
            self._catalogue.close()
            self._shelf.close()

    @contextmanager
    def holding(self, composition: Composition) -> Iterator[tuple[nn.Module, dict[str, str]]]:
        """Give the model and the names on it of adapters in their present versions, which stay until the end; the
        model may be run, and its adapters read, inside of `applied` alone.

        Raises
        ------
        AdapterError, OptionError
            As for `submit`.
        """
        resolved = self._catalogue.acquire(composition)
        try:
            yield self._runner.model.model, {version.name: version.adapter.name for version, _ in resolved}
        finally:
            self._catalogue.give_back(resolved)

    @contextmanager
    def applied(self, composition: Composition) -> Iterator[nn.Module]:
        """Give the model with a composition, for passes that generate nothing; steps wait meanwhile.

        Raises
        ------
        AdapterError, OptionError
            As for `submit`.
        """
        resolved = self._catalogue.acquire(composition)
        model = self._runner.model.model
        try:
            with self._passes, ExitStack() as scope:
                self._cool()
                state = kept_state(model)
                if state is not None:
                    active = state.composed({version.adapter.name: weight for version, weight in resolved} or None)
                    scope.callback(state.leave, *state.enter(active))
                yield model
        finally:
            self._catalogue.give_back(resolved)

    def _cool(self) -> None:
        """Take whatever adapter is in the base weights out of them."""
        if self._hot.leave():
            self._runner.forget()

    # -- a step

    def step(self) -> list[Output]:
        """Compute one pass for all running requests, after taking in those that fit; returns what it adds to each."""
        with self._passes:
            with self._lock:
                arrived, self._arrived = self._arrived, []
                gone = [sequence for sequence in self._known.values() if sequence.cancelled]
            for sequence in arrived:
                self._scheduler.arrive(sequence)
            outputs = [self._end(each, Output(each.request.id, finish="cancelled")) for each in gone]
            shares, ended = self._scheduler.shares()
            outputs += [self._end(sequence, output) for sequence, output in ended]
            compositions, tokens = {s.sequence.resolved for s in shares}, sum(s.count for s in shares)
            if shares and self._hot.settle(compositions, tokens):
                self._runner.forget()
            start = self._hot.clock()
            for group in passes(shares):
                outputs += self._pass(group)
            if shares:
                self._hot.measured(compositions, tokens, self._hot.clock() - start)
            self._steps += bool(shares)
            return outputs

    def _pass(self, shares: list[Share]) -> list[Output]:
        """Run the model over shares of sequences and return what it adds to each."""
        shares = [shares[n] for n in self._runner.arranged([(s.sequence.resolved, s.count) for s in shares])]
        parts = [
            Part(
                share.sequence.tokens[share.sequence.stored : share.sequence.stored + share.count],
                share.sequence.stored,
                [block.page for block in share.sequence.blocks],
                wanted="all" if share.sequence.reads_prompt else share.whole,
            )
            for share in shares
        ]
        try:
            batch = Batch.of(parts, self.options.page_tokens, self._pool.tokens.device)
            logits = self._runner.logits(batch, [share.sequence.resolved for share in shares])
        except Exception as error:
            return self._failed(shares, error)
        whole: list[tuple[Sequence, int]] = []  # those that get a token, with the row of their logits
        row = 0
        for share, part in zip(shares, parts, strict=True):
            if part.wanted == "all":
                _read_prompt(share.sequence, logits[row : row + share.count])
            row += share.count if part.wanted == "all" else bool(part.wanted)
            if share.whole:
                whole.append((share.sequence, row - 1))
            share.sequence.stored += share.count
        return self._choose(logits, whole)

    def _choose(self, logits: Tensor, whole: list[tuple[Sequence, int]]) -> list[Output]:
        """Choose the next token of sequences from their rows of logits, and return what that adds to each."""
        if not whole:
            return []
        outputs = []
        rows = logits if len(whole) == len(logits) else logits[[row for _, row in whole]]
        broken = rows.amax(-1).isnan()
        if broken.any():
            for (sequence, _), wrong in zip(whole, broken.tolist(), strict=True):
                if wrong:
                    self._pool.blocks.withdraw(sequence.blocks)
                    outputs.append(self._end(sequence, _error(sequence, _NOT_NUMBERS)))
            rows, whole = rows[~broken], [each for each, wrong in zip(whole, broken.tolist(), strict=True) if not wrong]
        found = choose(rows, [sequence.chooser for sequence, _ in whole])
        return outputs + [self._chosen(sequence, each) for (sequence, _), each in zip(whole, found, strict=True)]

    def _failed(self, shares: list[Share], error: Exception) -> list[Output]:
        """Let the composition at which a pass fails go under alone."""
        roots = {share.sequence.root for share in shares}
        if len(roots) > 1:
            groups = [[share for share in shares if share.sequence.root == root] for root in roots]
            return [output for group in groups for output in self._pass(group)]
        outputs = []
        for share in shares:
            sequence = share.sequence
            self._pool.blocks.withdraw(sequence.blocks[sequence.stored // self.options.page_tokens :])
            text = f"The model failed in its pass: {type(error).__name__}: {error}"
            outputs.append(self._end(sequence, _error(sequence, text)))
        return outputs

    def _chosen(self, sequence: Sequence, found: TokenLogprob) -> Output:
        """Add a token to an answer and return what that makes known."""
        output = sequence.chosen(found)
        self._decoded += len(output.tokens)
        self._scheduler.used(sequence)
        return output if output.finish is None else self._end(sequence, output)

    def _end(self, sequence: Sequence, output: Output) -> Output:
        """Let go of a request, and return its last output."""
        with self._lock:
            if self._known.pop(sequence.request.id, None) is None:
                return output
            if sequence in self._arrived:
                self._arrived.remove(sequence)
        self._scheduler.leave(sequence)
        if self._hot.version is not None and self._hot.version.retired:
            self._cool()
        self._catalogue.give_back(sequence.resolved)
        self._finished += 1
        return Output(**{**vars(output), "usage": sequence.usage})

    def _check(self, request: Request) -> None:
        """Raise `OptionError` unless a request can be served at all."""
        what, prompt, most = f"Request '{request.id}'", request.prompt, request.sampling.max_tokens
        if not prompt:
            raise OptionError(f"{what} has an empty prompt; give at least one token, such as the beginning of text.")
        wrong = next((token for token in prompt if not 0 <= token < self._tokens.size), None)
        if wrong is not None:
            raise OptionError(f"{what} has the token {wrong}, but the model knows tokens 0 to {self._tokens.size - 1}.")
        check_sampling(request.sampling, self._tokens)
        if request.sampling.stop and self.tokenizer is None:
            raise OptionError(f"{what} has stop texts, but the engine has no tokenizer. Give it one, or stop tokens.")
        if self._context is not None and len(prompt) + most > self._context:
            raise OptionError(
                f"{what} has {len(prompt)} tokens of prompt and asks for {most} more, but the model sees "
                f"{self._context} at most. Shorten the prompt, or ask for fewer tokens."
            )

    def _check_room(self, sequence: Sequence) -> None:
        """Raise `OptionError` unless a request fits into the pool with its adapters and those that never leave it."""
        need = self._scheduler.need(sequence)
        room = self._pool.capacity(self._pool.pinned | set(sequence.residents))
        if need > room:
            raise OptionError(
                f"Request '{sequence.request.id}' needs {need} pages of {self.options.page_tokens} tokens, but the "
                f"pool has {max(room, 0)} beside its adapters. Ask for fewer tokens or adapters, or give the engine a "
                "larger pool."
            )


def _error(sequence: Sequence, text: str) -> Output:
    return Output(sequence.request.id, finish="error", error=text)


def _read_prompt(sequence: Sequence, logits: Tensor) -> None:
    """Take note of the log-probabilities of a prompt's tokens that follow those that were just computed."""
    known, prompt, top = sequence.prompt_logprobs, sequence.request.prompt, sequence.request.sampling.prompt_logprobs
    assert known is not None and top is not None
    coming = prompt[sequence.stored + 1 : sequence.stored + 1 + len(logits)]
    fresh = report(logits[: len(coming)], coming, top)
    known += fresh[len(known) - 1 - sequence.stored :]  # those before were known when it was preempted
