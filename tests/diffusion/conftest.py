"""A pipeline that must be as it was when a test is over."""

import pytest
from diffusion import tiny
from diffusion.test_sampling import own_call

import lorry


@pytest.fixture
def clean():
    """Whatever a test attaches is taken off; weights, hooks and gradients are as before."""
    used = []

    def take(name):
        pipeline = tiny.pipeline(name)
        own_call(pipeline, name, ["a photo of a cat"], [1])  # transformers hooks its own layers at the first call
        used.append((pipeline, tiny.facts(pipeline)))
        return pipeline

    yield take
    for pipeline, before in used:
        for bundle in lorry.adapters(pipeline).values():
            bundle.detach()
        assert tiny.facts(pipeline) == before
