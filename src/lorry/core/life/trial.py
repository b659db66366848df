"""One pass over a model's own dummy inputs, to learn which layers it calls before an adapter goes into the base."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lorry.core.life.state import ModelState
from lorry.core.sites.site import Site


def run_once(state: ModelState, name: str, sites: Iterable[Site]) -> None:
    """Run the model once with an adapter, if some of its sites were in no pass yet and the model has inputs of its own.

    Models of transformers have ``dummy_inputs``, a few tokens. Weights, modes and random numbers are as before, and
    nothing is raised: a pass that fails teaches nothing. What the pass taught is in `ModelState.passed_by`.
    """
    root = state.root
    if not state.untried(sites):
        return
    try:
        inputs = getattr(root, "dummy_inputs", None)
        if not isinstance(inputs, Mapping) or any(p.is_meta for p in root.parameters()):
            return
        device = next(root.parameters()).device
        held = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in inputs.items()}
        modes = {module: module.training for module in root.modules()}
        runtime, scope = state.enter(state.composed(name))
        try:
            with torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng():
                warnings.simplefilter("ignore")
                root.eval()
                root(**held)
        finally:
            state.leave(runtime, scope)
            for module, mode in modes.items():
                module.training = mode
    except Exception:  # whatever a model makes of inputs that do not suit it
        return
