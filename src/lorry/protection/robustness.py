"""What is left of a message after somebody worked on the adapter or on its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor, nn

from lorry.core.life.api import activate
from lorry.formats.file import AdapterFile
from lorry.formats.stored import StoredSite
from lorry.protection.codec import Codec
from lorry.protection.distortions import compressed, cropped
from lorry.protection.verify import bit_accuracy

#: Makes pictures ``(rows, channels, h, w)`` from -1 to 1 with whatever is active on the model.
Sample = Callable[[], Tensor]
ROUNDED, PRUNED, MERGED, AVERAGED = "rounded to 8 bits", "pruned by 20 %", "merged at 0.8", "averaged with another"


def rounded(tensor: Tensor, bits: int = 8) -> Tensor:
    """Return a tensor rounded to this many bits, with one scale for each row."""
    most = 2 ** (bits - 1) - 1
    step = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-30) / most
    return (tensor / step).round() * step


def pruned(tensor: Tensor, share: float = 0.2) -> Tensor:
    """Return a tensor whose smallest values, `share` of all, are zero."""
    size = tensor.abs().flatten()
    count = round(share * len(size))
    return tensor if not count else tensor * (tensor.abs() > size.kthvalue(count).values)


def changed(file: AdapterFile, change: Callable[[Tensor], Tensor], name: str) -> AdapterFile:
    """Return a plain LoRA whose A and B went through a function; the file stays as it is."""
    sites = {}
    for path, stored in file.sites.items():
        values = {n: change(t) for n, t in file.tensors(path).items()}
        facts = file.facts(path)
        sites[path] = StoredSite(
            path,
            stored.method,
            kind=facts.kind,
            shape=facts.shape,
            kernel=facts.kernel,
            values=values,
            site=stored.site,
        )
    return AdapterFile(name=name, method=file.method, sites=sites, fingerprint=file.fingerprint, base=file.base)


def curve(
    model: nn.Module,
    signed: AdapterFile,
    codec: Codec,
    message: Tensor,
    sample: Sample,
    *,
    other: AdapterFile | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return the share of bits that are read right after each attack, and without one.

    Parameters
    ----------
    model
        The base; what is loaded here is taken off again.
    signed
        A baked adapter.
    codec, message
        What reads, and what it should read.
    sample
        Makes pictures with what is active; the same noise at each call, so that attacks alone differ.
    other
        Another plain LoRA, for the average; left out if not given.
    seed
        Of the places of crops.
    """
    found: dict[str, float] = {}
    with torch.no_grad():
        for name, pictures in _attacked_adapters(model, signed, other, sample):
            found[name] = bit_accuracy(codec, pictures, message)
            if name == "none":
                for quality in (90, 70, 50):
                    found[f"JPEG {quality}"] = bit_accuracy(codec, compressed(pictures, quality), message)
                for share in (0.9, 0.75):
                    window = cropped(pictures, share, Generator().manual_seed(seed))
                    found[f"cropped to {share:.0%}"] = bit_accuracy(codec, window, message)
    return found


def _attacked_adapters(
    model: nn.Module, signed: AdapterFile, other: AdapterFile | None, sample: Sample
) -> Iterator[tuple[str, Tensor]]:
    own, second = "signed-under-attack", "beside-it"
    yield from (
        (label, _sampled(model, changed(signed, change, own), {own: weight}, sample))
        for label, change, weight in (
            ("none", torch.clone, 1.0),
            (ROUNDED, rounded, 1.0),
            (PRUNED, pruned, 1.0),
            (MERGED, torch.clone, 0.8),
        )
    )
    if other is not None:
        beside = changed(other, torch.clone, second).load(model, name=second, activate=False, trainable=False)
        try:
            yield AVERAGED, _sampled(model, changed(signed, torch.clone, own), {own: 0.5, second: 0.5}, sample)
        finally:
            beside.detach()


def _sampled(model: nn.Module, file: AdapterFile, weights: dict[str, float], sample: Sample) -> Tensor:
    adapter = file.load(model, name=file.name, activate=False, trainable=False)
    try:
        with activate(model, weights):
            return sample()
    finally:
        adapter.detach()
