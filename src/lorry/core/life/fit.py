"""Whether a layer computes what its kind of site says: subclasses of known layers may take or give something else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorry.core.sites.site import Site
from lorry.core.sites.storage import DENSE

#: Layers whose own forward is what the kinds say; only a forward of another class is tried.
_KNOWN: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def misfit(site: Site) -> str | None:
    """Return why a site's layer does something else than its kind says, or None.

    A layer with a forward of its own is run once on a small input and compared with its weight's own product.
    Weights that are quantised, or lie on no device, are taken at their word.
    """
    owner = site.owner
    cls = getattr(type(owner), "_lorry_original", type(owner))
    base = next((known for known in _KNOWN if isinstance(owner, known)), None)
    if base is None or cls.forward is base.forward or "forward" in owner.__dict__:
        return None
    if not site.parameter or site.stored.is_meta or not DENSE.keeps(site.stored):
        return None
    training, owner.training = owner.training, False
    try:
        with torch.no_grad():
            x = _input(site)
            found = cls.forward(owner, x)
            expected = site.kind.channels_last(site, site.kind.dense(site, x, site.matrix()))
            bias = site.kind.bias(site)
            expected = expected if bias is None else expected + bias
    except Exception as error:  # whatever a foreign forward makes of it
        return f"{cls.__name__} does not take what a {base.__name__} takes ({type(error).__name__})"
    finally:
        owner.training = training
    if not isinstance(found, Tensor):
        return f"{cls.__name__} returns a {type(found).__name__}, not a tensor as a {base.__name__} does"
    found = site.kind.channels_last(site, found)
    rough = 1e-3 if found.dtype in (torch.float32, torch.float64) else 5e-2
    if found.shape != expected.shape or not torch.allclose(found.float(), expected.float(), atol=rough, rtol=rough):
        return f"{cls.__name__} computes something else than a {base.__name__} with its weight"
    return None


def _input(site: Site) -> Tensor:
    """Return a small input for the layer."""
    weight, owner = site.stored, site.owner
    generator = torch.Generator().manual_seed(0)
    if isinstance(owner, nn.Embedding):
        return torch.tensor([[0, owner.num_embeddings - 1]], device=weight.device)
    shape: tuple[int, ...] = (2, site.in_features)
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        extent = (d * (k - 1) + 2 for k, d in zip(owner.kernel_size, owner.dilation, strict=True))
        shape = (1, owner.in_channels, *extent)
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
