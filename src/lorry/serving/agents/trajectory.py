"""A growing text on which roles work in turns, and the cache that they share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, OptionError
from lorry.core.forward.weights import BySite
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import adapters
from lorry.core.method.families import Bottleneck
from lorry.serving.composed import composed

from .passing import LayerPart, attention_modules, cache_for, split_values
from .policy import CachePolicy, policy_from
from .store import Growing, Store

#: Where values and keys are made.
VALUES, KEYS = "v_proj", "k_proj"


@dataclass
class Counts:
    """What a trajectory has cost.

    Attributes
    ----------
    forwarded
        Tokens that went through the model, by role.
    projected
        Tokens whose keys and base values were computed.
    """

    forwarded: dict[str, int] = field(default_factory=dict)
    projected: int = 0

    @property
    def total(self) -> int:
        """Tokens that went through the model for all roles together."""
        return sum(self.forwarded.values())


@dataclass(frozen=True)
class Turn:
    """What a role has added.

    Attributes
    ----------
    role
        Which.
    tokens
        Its tokens, a stop token included.
    stopped
        Whether a stop token ended it.
    """

    role: str
    tokens: tuple[int, ...]
    stopped: bool


class Trajectory:
    """One sequence of tokens that roles, tools and users write in turns.

    Token ids are kept, never text: cut or coded anew, a text would not fit its cache.

    Parameters
    ----------
    model
        A causal decoder of transformers with the roles' adapters on it.
    roles
        Role -> name of its adapter, or None for the bare base.
    policy
        What roles share of the cache: a name of `lorry.serving.agents.POLICIES`, or a scheme.

    Raises
    ------
    OptionError
        No roles, or an unknown scheme.
    AdapterError
        An adapter that is not there, or that the scheme cannot share: adapted keys, values that are no plain low-rank
        update, another A than the other roles'.
    """

    def __init__(
        self, model: nn.Module, roles: Mapping[str, str | None], policy: str | CachePolicy = "base-lr-shared"
    ) -> None:
        self.model = model
        self.policy = policy_from(policy)
        if not roles:
            raise OptionError("A trajectory needs at least one role, e.g. roles={'plan': 'planner'}.")
        self.roles = dict(roles)
        # only values in two parts need to know where they are made: other schemes take fused projections, too
        self._attention = attention_modules(model) if self.policy.split else {}
        config: Any = model.config
        self.store = Store(len(self._attention) or config.get_text_config().num_hidden_layers)
        self.tokens: list[int] = []
        self.counts = Counts()
        self._read = dict.fromkeys(self.roles, 0)
        self._factors = {role: self._of(role) for role in self.roles} if self.policy.split else {}
        if self.policy.low_shared:
            self._check_shared()

    # -- writing

    def append(self, tokens: Sequence[int]) -> None:
        """Add what a user or a tool says; it is run when a role takes its turn."""
        self.tokens += [int(token) for token in tokens]

    @torch.no_grad()
    def turn(
        self,
        role: str,
        max_new_tokens: int,
        stop_tokens: Sequence[int] = (),
        choose: Callable[[Tensor], int] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Turn:
        """Let a role go on with the text.

        Parameters
        ----------
        role
            Whose turn it is.
        max_new_tokens
            Most tokens that it adds.
        stop_tokens
            Tokens that end its turn; they stay in the text.
        choose
            Picks a token from logits ``(vocabulary,)``; the likeliest if None.
        on_token
            Called with each token as it comes.

        Raises
        ------
        OptionError
            An unknown role, or no text to go on with.
        """
        choose = choose or (lambda logits: int(logits.argmax()))
        added: list[int] = []
        while len(added) < max_new_tokens:
            token = choose(self.logits(role))
            self.tokens.append(token)
            added.append(token)
            if on_token is not None:
                on_token(token)
            if token in stop_tokens:
                return Turn(role, tuple(added), True)
        return Turn(role, tuple(added), False)

    @torch.no_grad()
    def logits(self, role: str) -> Tensor:
        """Return the role's logits ``(vocabulary,)`` of the next token, after whatever it has to run for them."""
        if role not in self.roles:
            raise OptionError(f"There is no role '{role}' here; there are: {', '.join(self.roles)}.")
        if not self.tokens:
            raise OptionError("There is no text to go on with yet; append tokens first.")
        total = len(self.tokens)
        whole = self.store.whole("" if self.policy.shared else role)
        held, start = whole[0].keys.length, total - self.missing(role)
        known = max(held - start, 0)
        with self.store.whole_or_nothing(), ExitStack() as stack:
            stack.enter_context(self._adapted(role))
            if self.policy.split:
                stack.enter_context(split_values(self.model, self._parts(role), start, known))
            device = next(self.model.parameters()).device
            ids = torch.tensor([self.tokens[start:]], device=device)
            where = torch.arange(start, total, device=device)[None]
            cache = cache_for(whole, start)
            given = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            found: Tensor = self.model(input_ids=ids, position_ids=where, **given).logits[0, -1]
        self._read[role] = total
        self.counts.forwarded[role] = self.counts.forwarded.get(role, 0) + total - start
        self.counts.projected += total - start - known if self.policy.split else total - start
        return found

    def missing(self, role: str) -> int:
        """Return how many tokens the role has to run for its next logits."""
        owner, total = "" if self.policy.shared else role, len(self.tokens)
        held = self.store.whole(owner)[0].keys.length
        return total - min(self._read[role] if self.policy.rereads else held, total - 1)

    @property
    def numbers(self) -> int:
        """How many numbers the cache holds."""
        return self.store.numbers

    # -- adapters

    def factors(self, role: str) -> Mapping[int, tuple[Tensor, Tensor] | None]:
        """Return A ``(rank, in)`` and B with its scale ``(out, rank)`` of the role's values, by layer; None where its
        adapter changes none.
        """
        return self._factors[role] if self.policy.split else self._of(role)

    def _adapter(self, role: str) -> Adapter | None:
        name = self.roles[role]
        if name is None:
            return None
        there = adapters(self.model)
        if name not in there:
            raise AdapterError(
                f"Role '{role}' uses the adapter '{name}', which is not on the model; there are: "
                f"{', '.join(there) or 'none'}."
            )
        return there[name]

    def _adapted(self, role: str) -> AbstractContextManager[object]:
        """Return a context in which the role's adapter applies, but not to values whose part of it lies apart."""
        adapter = self._adapter(role)
        if adapter is None:
            return composed(self.model, {})
        weight = BySite({f"*.{VALUES}": 0.0}, default=1.0) if self.policy.split else 1.0
        return composed(self.model, {adapter.name: weight})

    def _of(self, role: str) -> dict[int, tuple[Tensor, Tensor] | None]:
        """Return each layer's A and scaled B of the role's values."""
        adapter = self._adapter(role)
        attention = self._attention or attention_modules(self.model)
        found: dict[int, tuple[Tensor, Tensor] | None] = dict.fromkeys(attention)
        if adapter is None:
            return found
        for number, (path, _) in attention.items():
            if f"{path}.{KEYS}" in adapter.entries:
                raise AdapterError(
                    f"Adapter '{adapter.name}' of role '{role}' changes keys ('{path}.{KEYS}'), which '"
                    f"{self.policy.name}' shares as the base computes them. Train roles on q_proj and v_proj, or take "
                    "the scheme 'non-shared'."
                )
            entry = adapter.entries.get(f"{path}.{VALUES}")
            if entry is None:
                continue
            method = entry.method
            if not isinstance(method, Bottleneck) or not method.plain:
                raise AdapterError(
                    f"Adapter '{adapter.name}' of role '{role}' has {type(method).__name__} on '{entry.site.path}', "
                    f"and '{self.policy.name}' keeps values in two parts, which only a plain low-rank update has. Take "
                    "the scheme 'non-shared'."
                )
            a, b = method.factors(entry.tensors(), entry.site)
            # copies: an engine may move an adapter's tensors between two turns
            found[number] = a.detach().clone(), b.detach() * method.scale(entry.site)
        return found

    def _parts(self, role: str) -> dict[int, LayerPart]:
        low: list[Growing] = self.store.low("" if self.policy.low_shared else role)
        parts = {}
        for index, number in enumerate(self._attention):
            factors = self._factors[role][number]
            parts[number] = LayerPart(low[index], *factors) if factors is not None else LayerPart(None, None, None)
        return parts

    def _check_shared(self) -> None:
        """Refuse roles whose low-rank values are not of one A."""
        first, *others = self.roles
        for role in others:
            for number, mine in self._factors[first].items():
                theirs = self._factors[role][number]
                if (mine is None) != (theirs is None) or (
                    mine is not None and theirs is not None and not _same(mine[0], theirs[0])
                ):
                    path = self._attention[number][0]
                    raise AdapterError(
                        f"Roles '{first}' and '{role}' have another A at '{path}.{VALUES}', and '{self.policy.name}' "
                        "keeps X A once for all. Train the second with the A of the first (start: shared-down, which "
                        "docs/serving says how to use), or take the scheme 'base-shared'."
                    )


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second.to(first))
