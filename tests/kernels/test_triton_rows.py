"""The grouped kernels in Triton's interpreter on the CPU, against the definition. The interpreter is chosen when Triton
is imported, so they run in a process of their own.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, torch
from lorry.kernels.lowrank import low_rank_linear, reference
from lorry.kernels.segments import Factors, Segment

results = {}
for seed, (rows, tokens, inner, outer) in enumerate([(6, 7, 70, 90), (5, 1, 33, 17), (7, 20, 64, 128), (4, 3, 9, 8)]):
    for p in (0.0, 0.3):
        for base in (False, True):
            generator = torch.Generator().manual_seed(seed)
            draw = lambda *shape: torch.randn(*shape, generator=generator)
            x, w, bias = draw(rows, tokens, inner), draw(outer, inner) / inner**0.5, draw(outer)
            where = [torch.tensor([0, 3]), slice(1, 2), torch.tensor([2, rows - 1])]
            ranks = [3, 8, 20]
            scales = [0.5, 2.0, torch.tensor([1.0, -3.0])]
            a, b = [draw(r, inner) / inner**0.5 for r in ranks], [draw(outer, r) for r in ranks]
            segments = [Segment(r, s, p, 11 + i) for i, (r, s) in enumerate(zip(where, scales))]
            grad, both = draw(rows, tokens, outer), []
            for form in (reference, low_rank_linear):
                xs = x.clone().requires_grad_()
                As, Bs = ([t.clone().requires_grad_() for t in group] for group in (a, b))
                y = torch.nn.functional.linear(xs, w, bias) if base else None
                args = (None, None, y) if base else (w, bias, None)
                out = form(xs, *args, segments, [Factors(q, r) for q, r in zip(As, Bs)])
                out.backward(grad)
                both.append([out, xs.grad, *(t.grad for t in As + Bs)])
            error = max(float((q - r).norm() / r.norm()) for r, q in zip(*both))
            results[f"{rows}x{tokens} p={p} base={base}"] = (error, type(out.grad_fn).__name__)
print(json.dumps(results))
"""


def test_the_grouped_kernels_are_the_definition():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(results) == 16
    for case, (error, node) in results.items():
        # of four rows, the last is in two segments: blocks that run at the same time must not add to it
        assert node == ("_LowRankLinearBackward" if case.startswith("4x") else "_GroupedLinearBackward"), case
        assert error < 1e-5, (case, error)
