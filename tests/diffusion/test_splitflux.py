"""SplitFlux against its sheet: counts, gates, reductions, the complementary loss, locality, the prompt's switch."""

import pytest
import torch
from torch import nn

import lorry
from lorry.diffusion import splitflux
from lorry.methods.parts.saliency import gated as gated_blocks
from lorry.methods.parts.saliency import saliency
from lorry.methods.splitflux import SplitFlux

SMALL = splitflux.Split(content=(0, 1), boundary=(2,), style=(3, 4, 5), rank=8, residual=2)


@pytest.fixture
def flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return (
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=6,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(4, 4, 8),
        )
        .double()
        .eval()
    )


def inputs(rows=2, seed=0, text=5, side=4):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    places = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(side), torch.arange(side), indexing="ij"), -1)
    return {
        "hidden_states": normal(rows, side * side, 16),
        "encoder_hidden_states": normal(rows, text, 24),
        "pooled_projections": normal(rows, 16),
        "timestep": torch.full((rows,), 0.5, dtype=torch.float64),
        "img_ids": places.reshape(-1, 3).double(),
        "txt_ids": torch.zeros(text, 3, dtype=torch.float64),
    }


def run(model, given):
    with torch.no_grad():
        return model(**given).sample


def fill(adapter, seed=1):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=draw))
    return adapter


def test_totals_of_flux():
    """44,826,624 for plain LoRA and 43,646,976 with the constrained boundary, as the paper's table has them."""
    from diffusers import FluxTransformer2DModel

    assert splitflux.Split().parameters(3072) == 43_646_976
    assert splitflux.Split(constraint=1).parameters(3072) == 44_826_624
    with torch.device("meta"):
        whole = FluxTransformer2DModel()
    paths = [f"single_transformer_blocks.{k}.attn.{p}" for k in range(38) for p in splitflux.PROJECTIONS]
    plan = lorry.plan(whole, {"method": "lora", "rank": 64}, targets=paths)
    assert plan.trained == 44_826_624


def test_counts_on_a_small_network(flux):
    contents, styles = splitflux.attach(flux, "content", SMALL), splitflux.attach(flux, "style", SMALL)
    width = 32
    count = sum(p.numel() for adapter in (contents, styles) for p in adapter.parameters())
    assert count == SMALL.parameters(width) == 3 * 2 * width * (5 * 8 + 1 * 4)
    assert {path.split(".")[1] for path in contents.entries} == {"0", "1", "2"}
    assert {path.split(".")[1] for path in styles.entries} == {"3", "4", "5"}


@pytest.mark.parametrize("branches", [True, False])
def test_the_start_is_the_base_bit_for_bit(flux, branches):
    given = inputs()
    bare = run(flux, given)
    split = splitflux.Split(**{**vars(SMALL), "branches": branches})
    splitflux.attach(flux, "content", split)
    splitflux.attach(flux, "style", split)
    lorry.activate(flux, {"content": 1.0, "style": 1.0})
    with splitflux.gated(flux):
        assert torch.equal(run(flux, given), bare)


def test_constrained_rank_is_a_lora_of_smaller_rank_and_larger_alpha():
    torch.manual_seed(0)
    x = torch.randn(3, 16, dtype=torch.float64)

    def updated(method):
        torch.manual_seed(1)
        layer = nn.Sequential(nn.Linear(16, 24)).double()
        adapter = lorry.attach(layer, method, targets=["0"], dtype=torch.float64)
        fill(adapter)
        return layer(x), adapter.entries["0"].tensors()

    found, tensors = updated({"method": "splitflux", "rank": 4, "residual": 0, "gate": "none", "alpha": 8.0})
    layer = nn.Sequential(nn.Linear(16, 24)).double()
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(16, 24)).double()
    torch.testing.assert_close(found, layer(x) + 2.0 * (x @ tensors["A"].mT @ tensors["B"].mT))
    torch.testing.assert_close(found, updated({"method": "lora", "rank": 4, "alpha": 8.0})[0])


def test_gate_facts():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 9, 4, generator=draw, dtype=torch.float64)
    gate = saliency(tokens)
    assert bool(((gate > 0) & (gate < 1)).all())
    torch.testing.assert_close(saliency(7.5 * tokens), gate)
    order = torch.randperm(9, generator=draw)
    torch.testing.assert_close(saliency(tokens[:, order]), gate[:, order])
    norms = tokens.norm(dim=-1, keepdim=True)
    assert torch.equal(saliency(tokens / norms), torch.full((2, 9), 0.5, dtype=torch.float64))
    assert torch.equal(saliency(torch.zeros(1, 3, 4)), torch.full((1, 3), 0.5))
    torch.testing.assert_close(saliency(torch.cat([tokens[:1], tokens[:1] * 3]))[0], gate[0])  # of each row alone
    values = norms[..., 0]
    by_hand = torch.sigmoid((values - values.mean(1, keepdim=True)) / values.std(1, unbiased=False, keepdim=True))
    torch.testing.assert_close(gate, by_hand)
    large = torch.full((1, 2, 4), 6e4, dtype=torch.float16) * torch.tensor([1.0, 0.5], dtype=torch.float16)[:, None]
    assert bool(saliency(large).isfinite().all())


class Block(nn.Module):
    """What a single block is to its layers: text and image one after another."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 12)

    def forward(self, hidden_states, encoder_hidden_states):
        return self.to_q(torch.cat([encoder_hidden_states, hidden_states], 1))


@pytest.fixture
def block():
    torch.manual_seed(2)
    made = Block().double()
    adapter = fill(lorry.attach(made, SplitFlux(rank=6, residual=2), targets=["to_q"], dtype=torch.float64))
    return made, adapter


def test_a_tokens_update_is_the_mixture_of_the_sheet(block):
    model, adapter = block
    draw = torch.Generator().manual_seed(3)
    image, text = (torch.randn(2, n, 8, generator=draw, dtype=torch.float64) for n in (7, 3))
    tensors = adapter.entries["to_q"].tensors()
    (a, c), (b, d) = tensors["A"].split([4, 2]), tensors["B"].split([4, 2], 1)
    with gated_blocks([model]):
        found = model(image, text)
        moved = model(image * torch.tensor([[[1.0]], [[0.1]]]), text)
    gate = torch.cat([torch.ones(2, 3, dtype=torch.float64), saliency(image)], 1)[..., None]
    x = torch.cat([text, image], 1)
    base = nn.functional.linear(x, *list(model.to_q.parameters())[:2])
    torch.testing.assert_close(found, base + gate * (x @ a.mT @ b.mT) + (1 - gate) * (x @ c.mT @ d.mT))
    torch.testing.assert_close(moved[:, :3], found[:, :3])  # text knows nothing of the image


def test_even_norms_are_half_of_both_branches(block):
    model, adapter = block
    draw = torch.Generator().manual_seed(4)
    image = nn.functional.normalize(torch.randn(1, 5, 8, generator=draw, dtype=torch.float64), dim=-1)
    tensors = adapter.entries["to_q"].tensors()
    with gated_blocks([model]):
        found = model(image, image[:, :0])
    base = nn.functional.linear(image, *list(model.to_q.parameters())[:2])
    torch.testing.assert_close(found, base + 0.5 * image @ tensors["A"].mT @ tensors["B"].mT)


def test_rows_of_a_batch_are_each_row_alone(block):
    model, _ = block
    draw = torch.Generator().manual_seed(5)
    image, text = (torch.randn(3, n, 8, generator=draw, dtype=torch.float64) for n in (4, 2))
    with gated_blocks([model]):
        with lorry.rows(model, ["default", None, "default"]):
            together = model(image, text)
        for row, name in enumerate(["default", None, "default"]):
            with lorry.rows(model, [name]):
                torch.testing.assert_close(model(image[row : row + 1], text[row : row + 1])[0], together[row])


def test_it_never_fuses_with_a_gate_and_does_without(block):
    _, adapter = block
    with pytest.raises(lorry.AdapterError, match="fuse"):
        adapter.fuse()
    plain = nn.Sequential(nn.Linear(8, 8)).double()
    narrow = fill(lorry.attach(plain, {"method": "splitflux", "residual": 0, "gate": "none", "rank": 4}, targets=["0"]))
    x = torch.randn(2, 8, dtype=torch.float64)
    before = plain(x)
    narrow.fuse()
    torch.testing.assert_close(plain(x), before)


def test_the_complementary_loss_is_zero_for_branches_apart_and_only_then():
    method = SplitFlux(rank=4, residual=2)
    a, b = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64)
    a[:2, :3] = a[2:, 3:] = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).double()
    b[:3, :2] = b[3:, 2:] = torch.randn(3, 2, generator=torch.Generator().manual_seed(2)).double()
    assert float(method.overlap(a, b)) == 0.0
    assert float(method.overlap(a + a.roll(3, 1), b)) > 0
    assert float(method.overlap(a, b + b.roll(3, 0))) > 0
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 6, generator=draw).double(), torch.randn(6, 4, generator=draw).double()
    shared = ((b[:, :2] @ a[:2]) * (b[:, 2:] @ a[2:])).abs().mean()
    by_hand = (a[:2] @ a[2:].T).square().sum() + (b[:, :2].T @ b[:, 2:]).square().sum() + shared
    torch.testing.assert_close(method.overlap(a, b), by_hand)


def test_at_the_start_the_complementary_loss_reaches_a_alone_and_drives_it_apart(flux):
    contents = splitflux.attach(flux, "content", SMALL)
    flux.train()
    with splitflux.gated(flux), lorry.context(flux) as seen:
        flux(**inputs())
    assert len(seen.losses) == 2 * 3  # of the layers with two branches
    torch.stack(list(seen.losses.values())).sum().backward()
    entry = contents.entries["single_transformer_blocks.0.attn.to_q"]
    grads = {name: tensor.grad for name, tensor in entry.tensors().items()}
    assert bool(grads["A"].any()) and (grads["B"] is None or not bool(grads["B"].any()))

    tensors = [entry.tensors()[n].detach().clone().requires_grad_() for n in ("A", "B")]
    optimizer = torch.optim.Adam(tensors, lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        entry.method.overlap(*tensors).backward()
        optimizer.step()
    rows = nn.functional.normalize(tensors[0].detach(), dim=1)
    assert float((rows[:6] @ rows[6:].T).abs().max()) < 1e-2


def test_where_an_adapter_acts(flux):
    given, seen = inputs(), {}

    def watch(label):
        hooks = [
            block.register_forward_hook(lambda m, a, out, k=k: seen.setdefault((label, k), out))
            for k, block in enumerate([flux.transformer_blocks[0], *flux.single_transformer_blocks])
        ]
        run(flux, given)
        for hook in hooks:
            hook.remove()

    watch("bare")
    fill(splitflux.attach(flux, "content", SMALL))
    fill(splitflux.attach(flux, "style", SMALL), seed=2)
    with splitflux.gated(flux):
        for label in ("content", "style"):
            lorry.activate(flux, label)
            watch(label)

    def same(label, k):
        return all(torch.equal(x, y) for x, y in zip(seen["bare", k], seen[label, k], strict=True))

    assert same("content", 0) and not same("content", 1)
    assert all(same("style", k) for k in range(4)) and not same("style", 4)


def test_without_gates_it_refuses_instead_of_being_wrong(flux):
    given = inputs()
    fill(splitflux.attach(flux, "content", SMALL))
    with pytest.raises(lorry.AdapterError, match="splitflux.gated"):
        run(flux, given)
    with splitflux.gated(flux):
        run(flux, given)
    with pytest.raises(lorry.AdapterError, match="splitflux.gated"):
        run(flux, given)


def test_checkpointed_blocks_have_the_same_gradients(flux):
    adapter = fill(splitflux.attach(flux, "content", SMALL))

    def gradients():
        for tensor in adapter.parameters():
            tensor.grad = None
        with splitflux.gated(flux):
            flux(**inputs()).sample.square().mean().backward()
        return [t.grad.clone() for t in adapter.parameters()]

    plain = gradients()
    flux.train()
    flux.enable_gradient_checkpointing()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_main_branch_alone(flux):
    contents = fill(splitflux.attach(flux, "content", SMALL))
    alone = splitflux.without_rest(contents, "scene")
    with torch.no_grad():
        for entry in contents.entries.values():
            if entry.method.residual:
                entry.tensors()["B"][:, 6:] = 0
    with splitflux.gated(flux):
        lorry.activate(flux, "content")
        expected = run(flux, inputs())
        lorry.activate(flux, "scene")
        torch.testing.assert_close(run(flux, inputs()), expected)
    assert all(e.method.residual == 0 for e in alone.entries.values())


def test_saved_and_loaded_is_the_same(flux, tmp_path):
    contents = fill(splitflux.attach(flux, "content", SMALL))
    with splitflux.gated(flux):
        expected = run(flux, inputs())
        contents.save(tmp_path / "content")
        contents.detach()
        lorry.load(flux, tmp_path / "content")
        assert torch.equal(run(flux, inputs()), expected)


def test_the_text_switches_at_the_boundary(flux):
    first, second = inputs(), inputs() | {"encoder_hidden_states": inputs(seed=9)["encoder_hidden_states"]}
    seen = {}

    def keep(label):
        def hook(module, arguments, named):
            seen[label] = named["encoder_hidden_states"]

        return hook

    def watched(given, label):
        hooks = [
            flux.single_transformer_blocks[k].register_forward_pre_hook(keep((label, k)), with_kwargs=True)
            for k in (2, 3)
        ]
        found = run(flux, given)
        for hook in hooks:
            hook.remove()
        return found

    plain, other = watched(first, "first"), watched(second, "second")
    with splitflux.text_from(flux, 3, lambda: run(flux, second)):
        mixed = watched(first, "mixed")
    assert torch.equal(seen["mixed", 2], seen["first", 2]) and torch.equal(seen["mixed", 3], seen["second", 3])
    assert not torch.equal(mixed, plain) and not torch.equal(mixed, other)
    with splitflux.text_from(flux, 3, lambda: run(flux, first)):
        assert torch.equal(run(flux, first), plain)
    assert torch.equal(run(flux, first), plain)
    with pytest.raises(RuntimeError, match="in the middle"), splitflux.text_from(flux, 3, lambda: run(flux, second)):
        raise RuntimeError("in the middle")
    assert torch.equal(run(flux, first), plain)


def test_misuse_is_said(flux):
    with pytest.raises(lorry.SiteError, match=r"has 6 single blocks.*block 6"):
        splitflux.attach(flux, "content")
    with pytest.raises(lorry.OptionError, match="Block 2 stands for two"):
        splitflux.Split(content=(0, 2), boundary=(2,), style=(3,))
    with pytest.raises(lorry.OptionError, match="multiple of constraint"):
        splitflux.Split(rank=9, constraint=2)
    with pytest.raises(lorry.SiteError, match="no single_transformer_blocks"):
        splitflux.attach(nn.Linear(3, 3), "content")
    with pytest.raises(lorry.OptionError, match="residual"):
        SplitFlux(rank=4, residual=4)
    plain = splitflux.attach(flux, "style", SMALL)
    with pytest.raises(lorry.SiteError, match="no second branch"):
        splitflux.without_rest(plain, "scene")
