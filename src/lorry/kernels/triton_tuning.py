"""Sizes of tiles for the kernels of `lorry.kernels.triton_tiles`, among which Triton chooses by trying them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton

#: Whether Triton's interpreter runs the kernels, on the CPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def _config(warps: int, stages: int, **sizes: int) -> triton.Config:
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


#: For each kernel: what is tried on a device.
CONFIGS: dict[str, list[triton.Config]] = {
    "project": [
        _config(4, 3, ROWS=16, INNER=256),
        _config(4, 3, ROWS=32, INNER=128),
        _config(4, 4, ROWS=64, INNER=64),
        _config(8, 3, ROWS=64, INNER=128),
        _config(4, 2, ROWS=16, INNER=64),
    ],
    "product": [
        _config(8, 3, OUTER=256, INNER=64, GROUP=8),
        _config(8, 3, OUTER=128, INNER=64, GROUP=8),
        _config(4, 4, OUTER=128, INNER=64, GROUP=8),
        _config(4, 4, OUTER=128, INNER=32, GROUP=8),
        _config(4, 3, OUTER=64, INNER=64, GROUP=8),
        _config(4, 2, OUTER=64, INNER=32, GROUP=8),
    ],
    "gradients": [
        _config(4, 2, ROWS=64, OUTER=128, BLOCKS=8),
        _config(8, 2, ROWS=64, OUTER=128, BLOCKS=16),
        _config(4, 3, ROWS=64, OUTER=64, BLOCKS=16),
        _config(4, 3, ROWS=32, OUTER=128, BLOCKS=8),
        _config(4, 2, ROWS=32, OUTER=32, BLOCKS=16),
    ],
    "outer": [
        _config(4, 3, ROWS=64, OUTER=128),
        _config(4, 3, ROWS=64, OUTER=64),
        _config(8, 3, ROWS=128, OUTER=64),
        _config(4, 2, ROWS=32, OUTER=32),
    ],
}
#: The interpreter takes as long for a large block as for a small one, and blocks that divide nothing test the masks.
_INTERPRETED = {
    "project": _config(4, 1, ROWS=16, INNER=32),
    "product": _config(4, 1, OUTER=32, INNER=32, GROUP=2),
    "gradients": _config(4, 1, ROWS=16, OUTER=16, BLOCKS=2),
    "outer": _config(4, 1, ROWS=16, OUTER=32),
}
#: Kernels that add to what is there, and the argument that must be zero before each try.
_ADDED = {"gradients": ["grad_units", "grad_b"], "outer": ["grads"]}
#: What a choice holds for, beside the types of the tensors.
_KEYS = {
    "project": ["width", "HEIGHT", "RANK", "TURNED", "DROP"],
    "product": ["inner", "outer", "HEIGHT", "TURNED"],
    "gradients": ["outer", "HEIGHT", "RANK"],
    "outer": ["width", "RANK", "TURNED", "DROP"],
}


def shared_bytes(name: str, config: triton.Config, itemsize: int, height: int = 128, rank: int = 32) -> int:
    """Return the shared memory that the tiles of a kernel take at most, all stages of its loop.

    Parameters
    ----------
    name
        A kernel in `CONFIGS`.
    config
        Sizes of its tiles.
    itemsize
        Bytes of an element.
    height, rank
        Tokens of a tile of the table, and rank units of a block.
    """
    size: Mapping[str, int] = config.kwargs
    if name == "project":
        stage = (size["ROWS"] + rank) * size["INNER"]
    elif name == "product":
        stage = (height + size["OUTER"]) * size["INNER"]
    elif name == "gradients":
        stage = (size["ROWS"] + rank) * size["OUTER"]
    else:
        stage = (size["OUTER"] + rank) * size["ROWS"]
    return config.num_stages * stage * itemsize


def _fitting(name: str) -> Callable[..., list[triton.Config]]:
    """Return how to leave out the sizes that a device has no memory for, and tiles higher than the table's."""

    def prune(configs: Sequence[triton.Config], arguments: Mapping[str, Any], **constants: Any) -> list[triton.Config]:
        known = {**arguments, **constants}
        x = known["dy" if name == "gradients" else "x"]
        limit = triton.runtime.driver.active.utils.get_device_properties(x.device.index)["max_shared_mem"]
        height, rank = known.get("HEIGHT", 128), known["RANK"]
        low = [c for c in configs if c.kwargs.get("ROWS", 16) <= height]
        need = {c: shared_bytes(name, c, x.itemsize, height, rank) for c in low}
        return [c for c, bytes_ in need.items() if bytes_ <= limit] or [min(need, key=lambda c: need[c])]

    return prune


def tuned(name: str) -> Callable[[Any], Any]:
    """Let Triton choose the sizes of a kernel's tiles for each width, at the first call; kept on disk for later runs.

    The interpreter has one choice.
    """
    choose: Callable[[Any], Any] = triton.autotune(
        configs=[_INTERPRETED[name]] if INTERPRETED else CONFIGS[name],
        key=_KEYS[name],
        reset_to_zero=_ADDED.get(name),
        prune_configs_by={"early_config_prune": _fitting(name)},
        cache_results=not INTERPRETED,
    )
    return choose
