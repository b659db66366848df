"""One pass of a job, as the engine runs it: the loss for each example, and the gradients of the adapter."""

import torch

from lorry.training import Fleet
from lorry.training.joint import train_pass


def first_pass(model, tokenizer, job, folder, *, noise=0.1):
    """Return the share of a fleet's first pass, the mean loss, and the gradients by name; the adapter is not zero."""
    fleet = Fleet(model, tokenizer, [job], folder)
    (run,) = fleet.runs
    assert run.adapter is not None, run.progress.status
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * noise)
    run.open_step()
    with fleet.base.mode(training=True):
        share = run.share()
        train_pass(fleet.base, [share], 0)
    assert share.error is None, share.error
    gradients = {n: p.grad.clone() for n, p, _ in run.adapter.named_tensors() if p.grad is not None}
    for parameter in run.adapter.parameters():
        parameter.grad = None
    return share, share.loss * share.weight, gradients, run.adapter
