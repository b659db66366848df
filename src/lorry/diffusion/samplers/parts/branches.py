"""Branches of a picture: each with an adapter, a prompt, and the places of its words (CLoRA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorry.core.forward.weights import Weight
from lorry.diffusion.conditions import Conditions
from lorry.diffusion.families import family_of
from lorry.diffusion.making import text_rows
from lorry.diffusion.words import replaced, word_positions


@dataclass(frozen=True)
class Branch:
    """One of the predictions that a picture is put together from.

    Attributes
    ----------
    adapter
        Whose concept it shows; None for the branch of the base, which has what no concept claims.
    prompt
        With the adapter's trigger words in the place of the concept's.
    composition
        What applies: the adapter and those of style.
    styles
        Those of style alone.
    words
        Adapter of a concept -> positions of its words in this branch's prompt.
    """

    adapter: str | None
    prompt: str
    composition: dict[str, Weight]
    styles: dict[str, Weight]
    words: dict[str, tuple[int, ...]]

    @property
    def claims(self) -> tuple[int, ...]:
        """Positions of the words whose maps make this branch's mask."""
        return () if self.adapter is None else self.words[self.adapter]


def branches_of(
    pipeline: Any,
    prompt: str,
    adapters: Mapping[str, Weight],
    concepts: Mapping[str, str],
    triggers: Mapping[str, str],
) -> tuple[Branch, ...]:
    """Return the branches of a picture: the base first, then one for each of its adapters that has a concept.

    Parameters
    ----------
    pipeline
        With its tokenizers.
    prompt
        Of the picture; the words of every concept stand in it.
    adapters
        Of the picture, with weights; those without a concept are styles, and apply in every branch.
    concepts, triggers
        Adapter -> words of its concept in the prompt, and words in their place in its own branch.

    Raises
    ------
    DiffusionError
        Words that do not stand in the prompt.
    """
    own = [name for name in concepts if name in adapters]
    styles = {name: weight for name, weight in adapters.items() if name not in concepts}
    found = []
    for adapter in (None, *own):
        said = {name: triggers.get(name, concepts[name]) if name == adapter else concepts[name] for name in own}
        text = prompt
        if adapter is not None:
            word_positions(pipeline, prompt, concepts[adapter])
            text = replaced(prompt, concepts[adapter], said[adapter])
        words = {name: word_positions(pipeline, text, said[name]) for name in own}
        applies = {**({} if adapter is None else {adapter: adapters[adapter]}), **styles}
        found.append(Branch(adapter, text, applies, styles, words))
    return tuple(found)


@torch.no_grad()
def encoded_branches(
    pipeline: Any, branches: Sequence[Branch], negative: str | None, *, own_text: bool, guided: bool
) -> tuple[Conditions, Conditions | None]:
    """Return the conditions of branches, and of what they keep away from.

    Parameters
    ----------
    pipeline
        With its text encoders; adapters of style apply in them.
    branches
        Of one picture.
    negative
        What all of them keep away from.
    own_text
        Whether a branch's own adapter applies in the text encoders, too.
    guided
        Whether anything is wanted to keep away from.
    """
    family = family_of(pipeline)
    applies = [(branch.composition if own_text else branch.styles) or None for branch in branches]
    with text_rows(pipeline, applies):
        wanted = family.encode(pipeline, [branch.prompt for branch in branches])
        unwanted = family.negative(pipeline, [negative] * len(branches), wanted) if guided else None
    return wanted, unwanted
