"""What a layer with LoRA reads, writes and keeps: formulas against counted runs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorry.kernels.lowrank import low_rank_linear
from lorry.kernels.segments import LowRankPair, Segment
from lorry.kernels.traffic import Layer

SIZES = (96, 40, 56, 4)


class Moved(TorchDispatchMode):
    """Counts the elements of floating-point tensors that operations read and write; views move nothing."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returned = [r.alias_info for r in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in returned) or func is torch.ops.aten.empty_like:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self.elements += sum(t.numel() for t in tensors)
        return out


def plain(x, weight, segment, pair):
    """The layer by plain operations."""
    part = torch.native_dropout(x, segment.p, True)[0] if segment.p else x
    return F.linear(x, weight) + F.linear(F.linear(part, pair.a), pair.b) * segment.scale


def node(x, weight, segment, pair):
    return low_rank_linear(x, weight, None, None, [segment], [pair])


def problem():
    generator = torch.Generator().manual_seed(0)
    m, k, n, r = SIZES
    x, weight, a, b = (torch.randn(s, generator=generator) for s in ((m, k), (n, k), (r, k), (n, r)))
    return x.requires_grad_(), weight, LowRankPair(a.requires_grad_(), b.requires_grad_())


def counted(form, p):
    x, weight, pair = problem()
    grad = torch.ones(SIZES[0], SIZES[2])
    with Moved() as forward:
        out = form(x, weight, Segment(None, 2.0, p, 3), pair)
    with Moved() as backward:
        torch.autograd.grad(out, (x, pair.a, pair.b), grad)
    return forward.elements, backward.elements


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_plain_operations_move_what_the_formula_says(p):
    found, wanted = counted(plain, p), Layer(*SIZES, drops=p > 0).plain()
    assert found == (wanted.forward, wanted.backward)


def test_the_node_moves_what_the_formula_says():
    found, wanted = counted(node, 0.0), Layer(*SIZES).node()
    assert found == (wanted.forward, wanted.backward)


@pytest.mark.parametrize("drops", [False, True])
def test_each_form_moves_less_than_the_one_before(drops):
    layer = Layer(8192, 4096, 4096, 16, drops)
    forms = [layer.plain(), layer.tiled(), layer.least()]
    assert forms[0].forward > forms[1].forward > forms[2].forward
    assert forms[0].backward > forms[1].backward > forms[2].backward
    saved = forms[0].forward - forms[1].forward
    m, k, n = 8192, 4096, 4096
    assert saved == 6 * m * n + (2 * m * k if drops else 0), "of scale and sum, a written update and a dropped copy"


def kept(form, p, layers):
    """Bytes that the graph of some layers of one input saves."""
    x, weight, _ = problem()
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = [form(x, weight, Segment(None, 2.0, p, seed), problem()[2]) for seed in range(layers)]
    assert len(outs) == layers
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("layers", [1, 3])
def test_less_is_kept_than_by_plain_operations(layers):
    m, k, n, r = SIZES
    shared, own = 4 * (m * k + k * n), 4 * (r * (k + n) + m * r)
    ours = shared + layers * own
    assert kept(node, 0.1, layers) == kept(node, 0.0, layers) == kept(plain, 0.0, layers) == ours
    # a mask in bytes for each layer, and a dropped copy of the input in the place of the input
    assert kept(plain, 0.1, layers) == ours + layers * m * k + (layers - 1) * 4 * m * k


def test_operations_are_those_of_all_products():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, pair = problem()
    with FlopCounterMode(display=False) as counter:
        out = plain(x, weight, Segment(None, 2.0), pair)
        torch.autograd.grad(out.sum(), (x, pair.a, pair.b))
    assert counter.get_total_flops() == Layer(*SIZES).operations()
