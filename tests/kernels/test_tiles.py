"""Tables of tiles, and the kernels that read them: run in Triton's interpreter, compiled for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorry.kernels.dropout import keep_mask
from lorry.kernels.segments import Segment
from lorry.kernels.tiles import fitting_height, kept_table, tile_table

pytest.importorskip("triton")
CPU = torch.device("cpu")
#: Shared memory that a block can have: compute capability, bytes.
DEVICES = {80: 163 * 1024, 90: 227 * 1024}


def test_the_kernels_in_the_interpreter():
    here = Path(__file__).with_name("interpreted_tiles.py")
    path = os.pathsep.join([str(here.parents[1]), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=here.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]


def test_every_token_is_in_one_tile_of_its_segment():
    weights = torch.tensor([1.0, -2.0])
    segments = [
        Segment(torch.tensor([4, 0]), 0.5, weights=weights),
        Segment(slice(1, 3), 3.0),
        Segment(slice(3, 3), 1.0),
    ]
    table = tile_table(6, 10, segments, CPU, height=16)
    rows = table.token.view(-1, 10)
    assert [row[0] // 10 for row in rows.tolist()] == [4, 0, 1, 2, 3, 5]
    assert sorted(table.token.tolist()) == list(range(60))
    assert table.scale.view(-1, 10)[:, 3].tolist() == [0.5, -1.0, 3.0, 3.0, 1.0, 1.0]
    assert table.begin == (0, 20, 40, 40)
    assert table.tiles().tolist() == [[0, 0, 16], [0, 16, 20], [1, 20, 36], [1, 36, 40]]
    assert table.tiles(bare=True).tolist()[4:] == [[3, 40, 56], [3, 56, 60]]
    assert table.tiles(0).tolist() == [[0, 0, 20], [1, 20, 40]]


def test_rows_in_two_segments_and_tiles_filled_badly_have_no_table():
    assert tile_table(256, 1, [Segment(None, 1.0), Segment(slice(3, 4), 1.0)], CPU) is None
    shared = [Segment(slice(0, 100), 1.0), Segment(torch.tensor([99, 101]), 1.0)]
    assert tile_table(256, 1, shared, CPU) is None
    assert tile_table(256, 1, [Segment(slice(i, i + 8), 1.0) for i in range(0, 256, 8)], CPU) is None


@pytest.mark.parametrize(
    ("lengths", "height"),
    [([4096], 128), ([128, 128], 128), ([70, 58], None), ([64, 64], 64), ([52], 64), ([51], None), ([1], None)],
)
def test_the_height_is_the_greatest_that_is_filled(lengths, height):
    assert fitting_height(lengths) == height


def test_a_table_is_made_once_for_a_composition_and_not_kept_for_ever():
    plans, rows = {"another": 1}, torch.arange(64)
    made = kept_table(plans, 128, 2, [Segment(rows, 1.0, 0.1, 5)], CPU)
    assert made is not None and kept_table(plans, 128, 2, [Segment(rows, 1.0, 0.1, 6)], CPU) is made
    assert kept_table(plans, 128, 2, [Segment(rows.clone(), 1.0)], CPU) is not made
    for positions in range(3, 300):
        kept_table(plans, 128, positions, [Segment(None, 1.0)], CPU)
    assert len(plans) < 80 and plans["another"] == 1


def test_masks_depend_on_seed_row_and_position_alone():
    wide = keep_mask((5, 7, 33), 0.5, 1 << 40, CPU)
    assert torch.equal(wide[:3, :4], keep_mask((3, 4, 33), 0.5, 1 << 40, CPU))
    assert not torch.equal(wide, keep_mask((5, 7, 33), 0.5, 0, CPU))


def compiled(name, config, capability):
    """The kernel of one choice of sizes for bfloat16 with float32 factors of rank 16, built for a device."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lorry.kernels import triton_tiles

    kernel = getattr(triton_tiles, f"_{name}").fn
    turned = name == "product"
    constants = {
        "HEIGHT": 128, "RANK": 16, "KIND": tl.float32, "MATH": tl.bfloat16, "SUM": tl.float32, "PRECISION": "ieee",
        "SAME": 16, "ALIGNED": True, "TURNED": turned, "DROP": not turned, "SCALED": turned, "BIAS": turned,
        "inner_stride": 1, **config.kwargs,
    }  # fmt: skip
    pointers = dict.fromkeys(("x", "dy", "y", "weight", "bias", "units"), "*bf16")
    pointers |= dict.fromkeys(("grad_units", "grad_b", "grads"), "*fp32")
    pointers |= dict.fromkeys(("tiles", "spans", "token"), "*i32") | {"scale": "*fp64", "table": "*i64"}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    places = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
    sixteens = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in pointers}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile(
        ASTSource(kernel, signature, places, sixteens), target=GPUTarget("cuda", capability, 32), options=options
    )


@pytest.mark.parametrize(
    ("name", "capability"),
    [("project", 90), ("product", 90), ("gradients", 90), ("outer", 90), ("product", 80), ("gradients", 80)],
)
def test_kernels_compile_for_gpus_with_tensor_cores_and_fit_their_memory(name, capability):
    from lorry.kernels.triton_tuning import CONFIGS, shared_bytes

    largest = max(CONFIGS[name], key=lambda config: shared_bytes(name, config, 2))
    kernel = compiled(name, largest, capability)
    assert kernel.metadata.shared <= min(DEVICES.values())
    assert "wgmma.mma_async" in kernel.asm["ptx"] or "mma.sync" in kernel.asm["ptx"]


def test_all_sizes_are_powers_of_two_from_sixteen_and_the_small_ones_fit_older_devices():
    from lorry.kernels.triton_tuning import CONFIGS, shared_bytes

    for name, configs in CONFIGS.items():
        for config in configs:
            sizes = [n for key, n in config.kwargs.items() if key not in ("GROUP", "BLOCKS")]
            assert all(n >= 16 and n & (n - 1) == 0 for n in sizes)
            assert shared_bytes(name, config, 2) <= min(DEVICES.values())
        assert min(shared_bytes(name, config, 4) for config in configs) <= 99 * 1024, "of an RTX 3090"
