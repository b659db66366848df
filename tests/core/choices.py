"""Models with adapters, choices among them, and threads that run side by side."""

from __future__ import annotations

import contextlib
import threading

import torch
from core.tiny import llama, off_zero

import lorry

LAYERS = 3


def adapted(*names, method=None, training=False, layers=LAYERS):
    model = llama(layers)
    for name in names or "ab":
        adapter = lorry.attach(model, method or lorry.LoRA(rank=2), name=name, seed=ord(name))
        off_zero(adapter, ord(name), 0.3).train(training)
    lorry.activate(model, None)
    return model


@contextlib.contextmanager
def chosen(model, choice):
    """Rows if there is a list, else one composition for all rows."""
    if isinstance(choice, list):
        with lorry.rows(model, choice):
            yield
    else:
        lorry.activate(model, choice)
        yield


def alone(model, choice, ids):
    """What the choice gives while nobody else runs; the model is bare again afterwards."""
    with torch.no_grad(), chosen(model, choice):
        logits = model(ids).logits
    lorry.activate(model, None)
    return logits


def together(*jobs):
    """Run each job in a thread of its own, and raise what any of them raised."""
    errors: list[BaseException] = []

    def guarded(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    # a barrier that another thread broke says nothing of its own
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
