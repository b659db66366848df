"""The kernels of the engine against their definitions, and the engine over them. Run by `test_kernels.py` in a process
with Triton's interpreter, which is chosen when Triton is imported.
"""

import random

import pytest
import torch
from serving.tiny_engines import adapt, alone, engine, prompt, request, tiny

from lorry.kernels import triton_lists, triton_paged, triton_rows, triton_split
from lorry.kernels.lists import RowLists
from lorry.serving.paging.batch import Batch, Part
from lorry.serving.paging.kernels import Attention, attend, reference

CPU = torch.device("cpu")
#: Of results of about 1.
NEAR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


class Case:
    """A batch of random sequences, whose keys and values lie on pages all over a pool that else holds no numbers."""

    def __init__(self, seed, dtype, heads, kv_heads, widths, page_tokens):
        draw, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        # one token after none and after many, chunks that begin, go on and end on a page
        spans = [(0, 1), (37, 1), (0, 9), (page_tokens, page_tokens), (5, 23), (0, 40), (18, 1)]
        draw.shuffle(spans)
        counts = [-(-(start + count) // page_tokens) for start, count in spans]
        free = draw.sample(range(sum(counts) + 7), sum(counts))
        self.parts, self.sequences = [], []
        for (start, count), pages in zip(spans, counts, strict=True):
            own, free = free[:pages], free[pages:]
            self.parts.append(Part([0] * count, start, own))
        total = sum(count for _, count in spans)
        self.batch = Batch.of(self.parts, page_tokens, CPU)
        self.stored = [
            torch.full((sum(counts) + 7, page_tokens, kv_heads * width), float("nan"), dtype=dtype) for width in widths
        ]
        self.q = self.random(total, heads, widths[0]).to(dtype)
        own = []
        for part in self.parts:
            k, v = (self.random(part.stop, kv_heads, width).to(dtype) for width in widths)
            for place in range(part.stop):
                for stored, given in zip(self.stored, (k, v), strict=True):
                    stored[part.pages[place // page_tokens], place % page_tokens] = given[place].flatten()
            self.sequences.append((k, v))
            own.append((k[part.start :], v[part.start :]))
        self.k, self.v = (torch.cat(each).transpose(0, 1)[None] for each in zip(*own, strict=True))

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def expected(self, how):
        rows = self.q.double().split([len(part.tokens) for part in self.parts])
        each = zip(rows, self.sequences, self.parts, strict=True)
        return torch.cat([reference(q, k.double(), v.double(), part.start, how) for q, (k, v), part in each])


SHAPES = [
    (torch.float64, 4, 2, (8, 8), 4, None),
    (torch.float64, 6, 2, (20, 12), 3, 7),
    (torch.float64, 8, 1, (5, 3), 1, 1),
    (torch.float32, 6, 2, (20, 12), 3, None),
    (torch.bfloat16, 4, 4, (16, 16), 16, 7),
]


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "widths", "page_tokens", "window"), SHAPES)
def test_attention_over_pages_is_the_definition(dtype, heads, kv_heads, widths, page_tokens, window):
    case = Case(heads + page_tokens, dtype, heads, kv_heads, widths, page_tokens)
    changed = page_tokens % 2 == 0
    sinks = case.random(heads).to(dtype) if changed else None
    how = Attention(0.4, window, 1.5 if changed else None, sinks)
    found = attend(case.q.transpose(0, 1)[None], case.k, case.v, *case.stored, case.batch, how)
    double = Attention(0.4, window, how.softcap, None if sinks is None else sinks.double())
    torch.testing.assert_close(found[0].double(), case.expected(double), atol=NEAR[dtype], rtol=NEAR[dtype])


@pytest.mark.parametrize(("dtype", "seed"), zip(NEAR, range(3), strict=True), ids=str)
def test_listed_rows_are_the_definition(dtype, seed):
    """Ranks from 0 to 40 beside each other, and widths that no block divides."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    width, out = draw.choice([(33, 130), (64, 128), (1, 7)])
    counts = torch.tensor([draw.choice([0, 0, 1, 3, 16, 40]) for _ in range(9)] + [0, 5])
    listed = torch.randint(0, 50, (int(counts.sum()),), generator=generator)
    x, a, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((len(counts), width), (50, width), (50, out)))
    lists = RowLists(counts, listed, dtype)
    row = torch.arange(len(counts)).repeat_interleave(counts)
    found = lists.dots(x, a)
    expected = (x.double()[row] * a.double()[listed]).sum(-1)
    torch.testing.assert_close(found.double(), expected, atol=NEAR[dtype] * 8, rtol=NEAR[dtype])
    found_sums = lists.sums(found, b)
    expected = torch.zeros(len(counts), out, dtype=torch.float64)
    expected.index_add_(0, row, found.double()[:, None] * b.double()[listed])
    torch.testing.assert_close(found_sums.double(), expected, atol=NEAR[dtype] * 40, rtol=NEAR[dtype])
    assert found_sums[counts == 0].eq(0).all()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_engine_answers_as_the_model_does(family, monkeypatch):
    calls = []
    for module, name in ((triton_paged, "paged_attention"), (triton_lists, "listed_dots")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, it=kernel, by=name: (calls.append(by), it(*given))[1])
    model = tiny(family)
    for rank in (1, 3):
        adapt(model, f"r{rank}", {"method": "lora", "rank": rank, "alpha": 2}, seed=rank)
    asked = [request("0", prompt(9), "r1", 4), request("1", prompt(3), None, 3)]
    asked += [request("2", prompt(6), {"r3": 1.0, "r1": -0.5}, 3)]
    with monkeypatch.context() as without:
        without.delenv("TRITON_INTERPRET")
        expected = [alone(model, each) for each in asked]
    machine = engine(model, max_batch_tokens=7)
    assert [each.tokens for each in machine.generate(asked)] == expected
    assert {*calls} == {"paged_attention", "listed_dots"}
    machine.close()


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which need not be the one where the tensors lie."""
    entered, launched = [], []

    class Entered(torch.cuda.device_of):
        def __enter__(self):
            entered.append(True)
            return super().__enter__()

        def __exit__(self, *given):
            entered.pop()
            return super().__exit__(*given)

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(bool(entered))
            return self.kernel[grid]

    monkeypatch.setattr(torch.cuda, "device_of", Entered)
    names = {triton_paged: ["_paged"], triton_lists: ["_dots", "_sums"], triton_split: ["_split"],
             triton_rows: ["_shrink", "_expand", "_outer"]}  # fmt: skip
    for module, each in names.items():
        for name in each:
            monkeypatch.setattr(module, name, Watched(getattr(module, name)))
    case = Case(0, torch.float32, 2, 1, (4, 4), 4)
    attend(case.q.transpose(0, 1)[None], case.k, case.v, *case.stored, case.batch, Attention(1.0))
    lists = RowLists(torch.tensor([2]), torch.tensor([0, 1]), torch.float32)
    lists.sums(lists.dots(torch.ones(1, 3), torch.ones(2, 3)), torch.ones(2, 3))
    kept = torch.ones(1, 1, 2, 4)
    triton_split.triton_split_attention(kept, kept, kept, torch.ones(1, 2, 3), torch.ones(4, 3), 1.0)
    x, y, factor = torch.ones(2, 4), torch.zeros(2, 4), torch.ones(3, 4)
    plan = triton_rows.plan_rows([torch.tensor([0, 1])], [1.0], 1, CPU)
    rows = triton_rows.GroupedRows(plan, [factor], [factor.t().contiguous()])
    rows.backward(torch.zeros(2, 4), y, x, rows.forward(y, x))
    assert launched == [True] * 10
