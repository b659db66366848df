"""Prompt replacement: what each block does."""

import pytest
import torch
from diffusion import tiny

from lorry.diffusion import DiffusionError, probe, sample, text_blocks
from lorry.diffusion.probe import moved

SETTINGS = {"steps": 2, "height": 16, "width": 16}


def test_a_share_is_the_projection_on_the_way():
    first, second = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 8.0)
    assert moved(first, first, second) == 0 and moved(second, first, second) == 1
    assert moved((first + second) / 4, first, second) == pytest.approx(0.25)
    assert moved(first, first, first) == 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_all_blocks_together_reach_the_other_prompt(guidance):
    pipeline = tiny.pipeline("sd")
    hooks = tiny.facts(pipeline)["unet"]["hooks"]
    every = list(text_blocks(pipeline.unet))
    seen = {}

    def judge(pictures, first, second):
        seen.setdefault("pairs", []).append((pictures, first, second))
        return moved(pictures, first, second)

    # a pattern that means all blocks replaces the prompt everywhere
    (found,) = probe(
        pipeline, [("a photo of a cat", "red square")], blocks=["*attentions*", every[0]], seeds=[1], judge=judge,
        guidance=guidance, **SETTINGS,
    )  # fmt: skip
    pictures, first, second = seen["pairs"][0]
    assert torch.equal(second, sample(pipeline, "red square", seeds=1, guidance=guidance, **SETTINGS).pixels)
    assert not torch.equal(first, second) and torch.equal(pictures, second)
    assert found.shares["*attentions*"] == 1 and found.shares[every[0]] != 1
    assert tiny.facts(pipeline)["unet"]["hooks"] == hooks


def test_misuse_is_said():
    with pytest.raises(DiffusionError, match="at least one pair"):
        probe(tiny.pipeline("sd"), [])
    with pytest.raises(DiffusionError, match="hands its text on"):
        probe(tiny.pipeline("flux"), [("a cat", "a dog")], seeds=[1], **SETTINGS)
