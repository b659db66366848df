"""Adapters on tiny pipelines, taken off again, and what a pipeline is apart from what it computes."""

from contextlib import contextmanager

import torch
from diffusion import tiny

import lorry
from lorry.core.life import api
from lorry.diffusion.families import family_of

TARGETS = ("attn*.to_q", "attn*.to_k", "attn*.to_v", "conv1", "proj_in")


def network(pipeline):
    return family_of(pipeline).network(pipeline)


@contextmanager
def adapted(name, *names, size=0.3, targets=TARGETS):
    """A tiny pipeline (or its name) with random LoRAs on its network, detached at the end."""
    pipeline = tiny.pipeline(name) if isinstance(name, str) else name
    target = [t for t in targets if any(_fits(p, t) for p, _ in network(pipeline).named_modules())]
    adapters = [
        lorry.attach(network(pipeline), {"method": "lora", "rank": 2}, targets=target, name=n, seed=7) for n in names
    ]
    try:
        for index, adapter in enumerate(adapters):
            generator = torch.Generator().manual_seed(index)
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        lorry.activate(network(pipeline), None)
        yield pipeline
    finally:
        for adapter in adapters:
            adapter.detach()


def _fits(path, target):
    from lorry.core.sites.targets import matches

    return matches(path, target)


def traits(model):
    """Everything of a model that a sampler could leave changed."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {f"{n}.{k}": t for n, a in api.adapters(model).items() for k, t in enumerate(a.parameters())}
    modules = dict(model.named_modules())
    return {
        "tensors": {n: t.detach().clone() for n, t in {**tensors, **own}.items()},
        "grads": {n: (t.requires_grad, t.grad is None) for n, t in {**tensors, **own}.items()},
        "forwards": {n: m.__dict__.get("forward") for n, m in modules.items()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()},
        "processors": {n: m.__dict__.get("processor") for n, m in modules.items()},
        "training": {n: m.training for n, m in modules.items()},
    }


def same_traits(before, after):
    tensors = [before["tensors"].keys() == after["tensors"].keys()]
    tensors += [torch.equal(t, after["tensors"][n]) for n, t in before["tensors"].items()]
    return all(tensors) and all(before[key] == after[key] for key in before if key != "tensors")


def pixels(pipeline, prompts="a red square", compositions=None, **more):
    from lorry.diffusion import sample

    more = {"steps": 4, "guidance": 3.0, "height": tiny.SIZE, "width": tiny.SIZE, **more}
    return sample(pipeline, prompts, compositions=compositions, **more)


def latents_of(
    pipeline,
    prompts=("a red square",),
    compositions=None,
    *,
    steps=4,
    guidance=3.0,
    sampler=None,
    size=tiny.SIZE,
    **more,
):
    """Latents and reports of a run, without the decoder's rounding to bytes."""
    from lorry.diffusion import denoise
    from lorry.diffusion.making import Order, encoded
    from lorry.diffusion.samplers import sampler_from

    family = family_of(pipeline)
    orders = [Order(prompt, None, composition) for prompt, composition in zip(prompts, compositions, strict=True)]
    with torch.no_grad():
        conditions, negative = encoded(pipeline, orders, [None] * len(orders), guided=guidance > 1)
    rows, side = len(orders), (size, size)
    conditions, negative = (c and family.sized(c, [side] * rows, [(0, 0)] * rows, side) for c in (conditions, negative))
    shape = family.latents_shape(pipeline, *side)
    noise = torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(s)) for s in range(rows)])
    options = {"negative": negative, "guidance": guidance, "steps": steps, "compositions": list(compositions), **more}
    if sampler is None:
        return denoise(pipeline, noise, conditions, **options)
    with sampler_from(sampler).begin(pipeline, orders) as course:
        return denoise(pipeline, noise, conditions, predict=course.predict, **options), course.reports()
