"""What the engine computes with on a GPU, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_the_kernels_in_the_interpreter():
    here = Path(__file__).with_name("interpreted_pages.py")
    path = os.pathsep.join([str(here.parents[1]), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=here.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]


#: What each argument is, where it is no int32.
POINTERS = {"pages": "*i32", "spans": "*i32", "blocks": "*i32", "row": "*i64", "listed": "*i64", "starts": "*i64"}


def compiled(kernel, pointer, capability, constants):
    """The kernel over tensors of a type, built for a device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    data = dict.fromkeys(("q", "keys", "values", "out", "sinks", "x", "of", "found", "weights"), pointer)
    types = {**POINTERS, **data, **dict.fromkeys(("scaling", "softcap"), "fp32")}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    places = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
    sixteens = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if "*" in signature[n]}
    return compile(ASTSource(kernel, signature, places, sixteens), target=GPUTarget("cuda", capability, 32))


@pytest.mark.parametrize(("kind", "capability"), [("bf16", 90), ("fp32", 80)])
def test_the_kernels_compile_for_gpus(kind, capability):
    import triton.language as tl

    from lorry.kernels import triton_lists, triton_paged

    given = {"WIDTH": 128, "VALUE": 128, "WIDTHS": 128, "VALUES": 128, "QUERIES": triton_paged._QUERIES}
    given |= {"KEYS": triton_paged._KEYS, "MATH": tl.dtype(kind), "SUM": tl.float32}
    given |= dict.fromkeys(("WINDOW", "CAP", "SINKS"), True)
    kernel = compiled(triton_paged._paged, f"*{kind}", capability, given)
    assert kernel.metadata.shared <= 99 << 10  # what a block has on the smallest of these devices
    assert ("mma" in kernel.asm["ptx"]) == (kind == "bf16")  # float32 is exact, without tensor cores
    sizes = {"LISTED": triton_lists._LISTED, "SUM": tl.float32}
    for name, further in (("_dots", {"INNER": triton_lists._INNER}), ("_sums", {"OUTER": triton_lists._OUTER})):
        compiled(getattr(triton_lists, name), f"*{kind}", capability, {**sizes, **further})
