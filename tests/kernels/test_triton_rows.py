"""The grouped kernels in Triton's interpreter on the CPU, against the definition. The interpreter is chosen when Triton
is imported, so they run in a process of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, torch
from lorry.kernels.lowrank import low_rank_linear, reference
from lorry.kernels.segments import LowRankPair, Segment

results = {}
for seed, (rows, tokens, inner, outer) in enumerate([(6, 7, 70, 90), (5, 1, 33, 17), (7, 20, 64, 128), (4, 3, 9, 8)]):
    for p in (0.0, 0.3):
        for base in (False, True):
            generator = torch.Generator().manual_seed(seed)
            draw = lambda *shape: torch.randn(*shape, generator=generator)
            x, w, bias = draw(rows, tokens, inner), draw(outer, inner) / inner**0.5, draw(outer)
            where = [torch.tensor([0, 3]), slice(1, 2), torch.tensor([2, rows - 1])]
            ranks = [3, 8, 20]
            scales = [0.5, 2.0, 1.5]
            a, b = [draw(r, inner) / inner**0.5 for r in ranks], [draw(outer, r) for r in ranks]
            weights = [None, None, torch.tensor([1.0, -3.0])]
            segments = [Segment(r, s, p, 11 + i, w) for i, (r, s, w) in enumerate(zip(where, scales, weights))]
            grad, both = draw(rows, tokens, outer), []
            for form in (reference, low_rank_linear):
                xs = x.clone().requires_grad_()
                As, Bs = ([t.clone().requires_grad_() for t in group] for group in (a, b))
                y = torch.nn.functional.linear(xs, w, bias) if base else None
                args = (None, None, y) if base else (w, bias, None)
                out = form(xs, *args, segments, [LowRankPair(q, r) for q, r in zip(As, Bs)])
                out.backward(grad)
                both.append([out, xs.grad, *(t.grad for t in As + Bs)])
            error = max(float((q - r).norm() / r.norm()) for r, q in zip(*both))
            results[f"{rows}x{tokens} p={p} base={base}"] = (error, out.grad_fn.make is not None)
print(json.dumps(results))
"""


def test_the_grouped_kernels_are_the_definition():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(results) == 16
    for case, (error, grouped) in results.items():
        # of four rows, the last is in two segments: blocks that run at the same time must not add to it
        assert grouped == (not case.startswith("4x")), case
        assert error < 1e-5, (case, error)


LAYERS = """
import json, torch, lorry
from core.tiny import llama, off_zero, tokens
from lorry.core.life.state import state_of

model, ids = llama(layers=3), tokens(5)
for number, name in enumerate("abc"):
    off_zero(lorry.attach(model, {"method": "lora", "rank": 2 + number}, targets="attention", name=name), number)
rows = [{"a": 0.5}, {"b": 2.0}, {"a": 1.5}, {"c": 1.0}, {"b": 0.25}]
wanted = []
for row, composition in enumerate(rows):
    lorry.activate(model, composition)
    wanted.append(model(ids[row : row + 1]).logits)
found = []
with lorry.rows(model, rows):
    active = state_of(model).active
    for _ in range(2):
        error = float((model(ids).logits - torch.cat(wanted)).abs().max())
        found.append((len(active.plans), error))
print(json.dumps(found))
"""


def test_layers_of_one_batch_share_a_plan():
    """Every row has a weight of its own; what is laid out once serves all layers and all passes."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", LAYERS], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for plans, error in json.loads(done.stdout.strip().splitlines()[-1]):
        assert plans == 1
        assert error < 1e-5
