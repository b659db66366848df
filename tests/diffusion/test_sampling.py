"""The loop against the pipelines' own calls, and what it promises to samplers that replace its parts."""

import numpy as np
import pytest
import torch
from diffusion import tiny

from lorry.diffusion import sample

NAMES = tuple(tiny.MAKERS)
PROMPTS = ["a photo of a cat", "a red square"]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def own_call(pipeline, name, prompts, seeds, **more):
    """The pictures that the pipeline itself makes, bytes (rows, 3, height, width)."""
    if name in ("flux", "qwen") and more.pop("guided", True):
        more |= {"true_cfg_scale": 3.0, "negative_prompt": ["dog"] * len(prompts)}
    if name not in ("flux", "qwen"):
        more |= {"guidance_scale": 3.0}
    if name in ("flux", "sd3"):
        more |= {"max_sequence_length": 16}  # all that its tokenizer takes
    found = pipeline(
        prompts,
        num_inference_steps=3,
        height=tiny.SIZE,
        width=tiny.SIZE,
        generator=generators(*seeds),
        output_type="np",
        **more,
    ).images
    return torch.tensor(np.round(found * 255).astype("uint8")).permute(0, 3, 1, 2)


def ours(pipeline, name, prompts, seeds, **more):
    negative = "dog" if name in ("flux", "qwen") else None
    more = {"negative": negative, "guidance": 3.0, "distilled": 3.5 if name == "flux" else None, **more}
    return sample(pipeline, prompts, seeds=seeds, steps=3, height=tiny.SIZE, width=tiny.SIZE, **more).pixels


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_what_the_pipeline_itself_makes(name):
    pipeline = tiny.pipeline(name)
    wanted = own_call(pipeline, name, PROMPTS, [3, 4])
    assert wanted.float().std() > 1
    assert torch.equal(ours(pipeline, name, PROMPTS, [3, 4]), wanted)
