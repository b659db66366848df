"""Every method with options drawn from their declared ranges, on bases of several precisions, storages and sizes.

Either the options are refused in words, and nothing is changed, or the adapter keeps the laws.
``LORRY_HYPOTHESIS=thorough`` draws many more, and others each time.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import Any

import pytest
import torch
from core.tiny import clear, llama, off_zero, same_bytes, tokens
from hypothesis import given, note
from hypothesis import strategies as st
from laws.drawing import effort, options_of, refused, without_tasks
from laws.fitting import merges
from laws.test_laws import TARGETS, Tiny
from torch import Tensor, nn

import lorry
from lorry.core.life.api import log_probability
from lorry.core.sites.quantized import keep_differentiable

ROWS = 3
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Times the machine's precision: how far two ways of computing the same may lie apart, relative to the outputs.
LOOSENESS = 512
over_methods = pytest.mark.parametrize("slug", lorry.methods())


def identity(method: Any) -> bool:
    """Whether the method says that a fresh adapter changes nothing, these options being what they are."""
    described_otherwise = {
        "lora-xs": lambda: method.core_std > 0,  # "deviation of the core's random start"
        # "an even rank leaves the layer as it is; orthogonal ones start nowhere near it"
        "hra": lambda: method.orthogonal or method.rank % 2 == 1,
        # probabilities "that do not sum to 1", and another activation than the block's own
        "mixlora": lambda: method.routing != "top_k" or method.activation != "own",
    }.get(method.info.slug, lambda: False)()
    return method.info.identity_at_start and not described_otherwise


def steady(adapter: lorry.Adapter) -> bool:
    """Whether the output follows small changes of the input: a choice of experts turns at a rounding error."""
    return merges(adapter) or type(adapter.method).__name__ in ("Full", "CoMoL")


def apart(found: Tensor, wanted: Tensor, adapter: lorry.Adapter) -> float:
    """How far apart, in units of the outputs' size and of the coarsest precision that went into them."""
    exact = wanted.double()
    size = float(exact.square().mean().sqrt()) + 1e-12
    kinds = {wanted.dtype, *(t.dtype for _, t, _ in adapter.named_tensors() if t.is_floating_point())}
    return float((found.double() - exact).square().mean().sqrt()) / size / max(torch.finfo(k).eps for k in kinds)


def bytes_of(model: Any) -> dict[str, Tensor]:
    """Copies of all base tensors by name, and of the scales of quantised ones. The state dict is not asked for those:
    bitsandbytes rounds scales when it writes one.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "lorry_" in name:
            continue
        state = getattr(tensor, "quant_state", None)
        parts = {"qdata": tensor.qdata, "scale": tensor.scale} if hasattr(tensor, "qdata") else {"data": tensor.data}
        parts |= {} if state is None else {"absmax": state.absmax}
        found |= {f"{name}.{key}": part.clone() for key, part in parts.items()}
    return found


def unchanged(model: Any, before: dict[str, Tensor]) -> bool:
    now = bytes_of(model)
    return now.keys() == before.keys() and all(same_bytes(now[k], before[k]) for k in before)


def run(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


def check_laws(model: Any, options: dict[str, Any], targets: Any, ids: Tensor, dtype: torch.dtype, quant: bool) -> None:
    """Attach, and look at everything that holds for every adapter."""
    if quant:  # some processors evaluate 4-bit layers by another product until something is trained on them
        keep_differentiable(model)
    plain = copy.deepcopy(model)
    before, bare = bytes_of(model), run(model, ids)
    thawed = [p.requires_grad for p in model.parameters()]
    try:
        one = lorry.attach(model, options, targets=targets, name="one", seed=1, dtype=dtype)
    except lorry.LorryError as refusal:
        note(f"refused: {refusal}")
        assert len(str(refusal)) > 20 and not lorry.adapters(model)
        assert unchanged(model, before) and [p.requires_grad for p in model.parameters()] == thawed
        return
    if identity(one.method):
        # starts are drawn in float32 whatever the base is, and cancel to that precision
        coarse = torch.float32 if bare.dtype == torch.float64 else bare.dtype
        fresh = run(model, ids).to(coarse)
        assert apart(fresh, bare.to(coarse), one) < LOOSENESS, "a fresh adapter changes the output"
    off_zero(one, 2, 0.1)
    two = off_zero(lorry.attach(model, options, targets=targets, name="two", seed=3, dtype=dtype), 4, 0.1)
    check_rows(model, ids, one)
    lorry.activate(model, "one")
    adapted = run(model, ids)
    assert torch.isfinite(adapted).all()
    check_gradients(model, ids, one)
    check_merging(model, ids, one, before, quant)
    with tempfile.TemporaryDirectory() as folder:
        one.save(folder)
        again = lorry.load(plain, folder, name="one")
        assert again.method == one.method
        values = {n: t.detach() for n, t, _ in one.named_tensors()}
        for name, tensor, _ in again.named_tensors():
            # in PEFT's form one of a packed attention's factors is halved, which costs the last bit of the tiniest
            # numbers of float16
            tiny = (values[name].abs() < 6.2e-5) if tensor.dtype == torch.float16 else torch.zeros(1, dtype=torch.bool)
            assert same_bytes(tensor.detach().masked_fill(tiny, 0), values[name].masked_fill(tiny, 0)), name
        assert apart(run(plain, ids), adapted, one) < LOOSENESS, "the loaded adapter does something else"
    for adapter in (two, one):
        adapter.detach()
    assert unchanged(model, before) and torch.equal(run(model, ids), bare)


def check_rows(model: Any, ids: Tensor, adapter: lorry.Adapter) -> None:
    rows = ["two", None, {"one": 0.5}]
    with lorry.rows(model, rows):
        mixed = run(model, ids)
    assert torch.isfinite(mixed).all()
    for row, composition in enumerate(rows if steady(adapter) or mixed.dtype == torch.float64 else []):
        lorry.activate(model, composition)
        alone = run(model, ids[row : row + 1])
        assert apart(mixed[row : row + 1], alone, adapter) < LOOSENESS, (
            f"row {row} of {rows} differs from that row alone"
        )


def decides(adapter: lorry.Adapter, tensor: str) -> bool:
    """Whether a router has a choice to make in training with options that may be changed later."""
    method: Any = adapter.method
    idle = {
        "remix": lambda: method.constant,  # every expert is active
        "lora-mixer": lambda: method.training_mode == "hard",  # the task is given
    }.get(method.info.slug, lambda: False)()
    return not (idle and "router" in tensor)


def check_gradients(model: Any, ids: Tensor, adapter: lorry.Adapter) -> None:
    """Every trained tensor gets a gradient, of finite numbers."""
    inside = any(not e.site.kind.additive and e.site.kind.name != "block" for e in adapter.entries.values())
    # the input of a weight inside a larger module cannot be dropped out, which is refused
    model.train(not (inside and getattr(adapter.method, "dropout", 0)))
    torch.manual_seed(0)
    with lorry.context(model, task_ids=torch.zeros(ROWS, dtype=torch.long)):
        found = model(ids)
        loss = (found if isinstance(found, Tensor) else found.logits).float().square().mean()
        for extra in (lorry.auxiliary_loss(model, adapter.name), log_probability(model, adapter.name)):
            loss = loss if extra is None else loss + extra.sum()
    if loss.requires_grad or adapter.parameters():
        loss.backward()
    model.eval()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None or not decides(adapter, name), f"'{name}' gets no gradient"
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), f"the gradient of '{name}' is not finite"
    clear(model)


def check_merging(model: Any, ids: Tensor, adapter: lorry.Adapter, before: dict[str, Tensor], quant: bool) -> None:
    adapted = run(model, ids)
    if not merges(adapter):
        with pytest.raises(lorry.AdapterError, match="cannot be fused"):
            adapter.fuse()
        return
    receipt = adapter.fuse()
    assert receipt.sites == len(adapter.sites)
    merged = run(model, ids)
    if quant:
        rounded = receipt.max_error > 0 or adapter.method.info.slug == "bitfit"  # which leaves the weights as they are
        assert torch.isfinite(merged).all() and rounded
    else:
        assert apart(merged, adapted, adapter) < LOOSENESS, "merged and unfused differ"
    adapter.unfuse()
    assert unchanged(model, before) and torch.equal(run(model, ids), adapted)


@over_methods
@effort(20)
@given(data=st.data())
def test_drawn_options_on_dense_bases(slug, data):
    options = without_tasks(data.draw(options_of(slug), "options"))
    kinds = [kind for kind in lorry.methods()[slug].kinds if kind in TARGETS]
    kind = data.draw(st.sampled_from(kinds), "kind")
    base = data.draw(st.sampled_from(DTYPES), "base")
    dtype = data.draw(st.sampled_from((torch.float32, base)), "adapter")
    size = data.draw(st.sampled_from((1.0, 0.01, 4.0)), "size")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SMoRA warns of routers that cannot learn
        if refused(options):
            return
        model = Tiny(kind, seed=data.draw(st.integers(0, 3), "shapes")).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(size)
        ids = torch.randint(0, 32, (ROWS, 5), generator=torch.Generator().manual_seed(7))
        check_laws(model.to(base), options, TARGETS[kind], ids, dtype, quant=False)


def quantized(storage: str, dtype: torch.dtype) -> Any:
    """A Llama whose widths all storages can hold on any processor, since their blocks have 64 values."""
    model = llama(1, dtype=dtype, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    if storage == "ao-int8":
        ao = pytest.importorskip("torchao.quantization")
        ao.quantize_(model.model, ao.Int8WeightOnlyConfig())
        return model
    bnb = pytest.importorskip("bitsandbytes")
    for path, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            shape, weight = (module.in_features, module.out_features), module.weight.data
            if storage == "bnb-8":
                new = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(*shape, bias=False, quant_type="nf4", compress_statistics=False)
                new.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=False, module=new)
            model.model.set_submodule(path, new.to("cpu"))
    run(model.eval(), tokens(ROWS, 4))  # on some processors weights are repacked in the first evaluation
    return model


@over_methods
@effort(8)
@given(data=st.data())
def test_drawn_options_on_quantized_bases(slug, data):
    options = without_tasks(data.draw(options_of(slug), "options"))
    storage = data.draw(st.sampled_from(("bnb-8", "bnb-nf4", "ao-int8")), "storage")
    base = data.draw(st.sampled_from((torch.float32, torch.bfloat16)), "base")
    targets = ["norm", "mlp"] if slug == "full" else "all-linear"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if refused(options):
            return
        check_laws(quantized(storage, base), options, targets, tokens(ROWS, 4), torch.float32, quant=True)
