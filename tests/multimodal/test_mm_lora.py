"""MM-LoRA: what each kind of token gets, its gradients, and that kinds survive padding and a cache."""

import random

import pytest
import torch

import lorry
from lorry.multimodal.kinds import seeing, token_kinds
from lorry.pocket import load
from lorry.pocket.vision.answering import coded
from lorry.pocket.vision.networks import clip_network, vlm_network, vlm_processor
from lorry.pocket.vision.questions import skill

TARGETS = "language_model.*_proj"
METHOD = {"method": "mm-lora", "rank": 8, "vision_share": 0.25}


@pytest.fixture(scope="module")
def batch():
    rng = random.Random(0)
    rows = [[skill(name).question(rng, skill(name).picture(rng, "train"))] for name in ("colour", "is", "line")]
    return {name: value for name, value in coded(vlm_processor(), rows).items() if name != "labels"}


@pytest.fixture(scope="module")
def base():
    return vlm_network(clip_network(0), load()[0], 0).eval()


@pytest.fixture
def model(base):
    yield base
    for adapter in list(lorry.adapters(base).values()):
        adapter.detach()


def attached(model, method=METHOD, name="mm"):
    """An adapter whose tensors are all random."""
    adapter = lorry.attach(model, method, targets=TARGETS, name=name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapter.parameters():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return adapter


def logits(model, batch, kinds=None, **more):
    with torch.no_grad(), lorry.context(model, token_kinds=kinds):
        return model(**{**batch, **more}).logits


def plain(model, adapter, kind, rank):
    """A LoRA of the tensors of one kind."""
    lora = lorry.attach(model, {"method": "lora", "rank": rank, "alpha": 2 * rank}, targets=TARGETS, name="plain")
    values = dict(adapter.named_parameters())
    with torch.no_grad():
        for name, value in lora.named_parameters():
            value.copy_(values[f"{name}_{kind}"])
    return lora


def test_kinds_are_read_from_the_placeholders(model, batch):
    kinds = token_kinds(model, batch["input_ids"])
    assert torch.equal(kinds, (batch["input_ids"] == 98).long()) and kinds.sum(1).tolist() == [36] * 3
    assert token_kinds(model, batch["input_ids"], more=2)[:, :2].all()
    with pytest.raises(lorry.LorryError, match="names no placeholder"):
        token_kinds(load()[0], batch["input_ids"])


def test_a_fresh_adapter_changes_nothing_whatever_the_kinds(model, batch):
    before = logits(model, batch) if lorry.adapters(model) else model(**batch).logits
    lorry.attach(model, METHOD, targets=TARGETS)
    kinds = torch.randint(0, 2, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(model, batch, kinds), before)


@pytest.mark.parametrize(("kind", "value", "rank"), [("text", 0, 6), ("vision", 1, 2)])
def test_tokens_of_one_kind_get_a_plain_lora(model, batch, kind, value, rank):
    adapter = attached(model)
    found = logits(model, batch, torch.full_like(batch["input_ids"], value))
    plain(model, adapter, kind, rank)
    lorry.activate(model, "plain")
    assert torch.allclose(found, logits(model, batch), atol=1e-4)
    lorry.activate(model, "mm")
    if kind == "text":  # where nothing is told
        assert torch.allclose(found, logits(model, batch), atol=1e-5)


def test_each_token_has_the_matrix_of_its_kind(model, batch):
    adapter = attached(model)
    site = next(path for path in adapter.entries if path.endswith("q_proj"))
    layer, values = model.get_submodule(site), dict(adapter.named_parameters())
    kinds = token_kinds(model, batch["input_ids"])
    seen = {}
    handle = layer.register_forward_hook(lambda module, given, output: seen.update(x=given[0], y=output))
    logits(model, batch, kinds)
    handle.remove()
    for kind, value in (("text", 0), ("vision", 1)):
        delta = 2 * values[f"{site}.B_{kind}"] @ values[f"{site}.A_{kind}"]
        wanted = torch.nn.functional.linear(seen["x"], layer.weight + delta)
        assert torch.allclose(seen["y"][kinds == value], wanted[kinds == value], atol=1e-4)


def test_a_lora_sees_the_gradients_of_its_own_tokens_alone(model, batch):
    adapter = attached(model)
    for value, other in ((0, "vision"), (1, "text")):
        for parameter in adapter.parameters():
            parameter.grad = None
        with lorry.context(model, token_kinds=torch.full_like(batch["input_ids"], value)):
            model(**batch).logits.square().mean().backward()
        found = {name: parameter.grad for name, parameter in adapter.named_parameters()}
        assert all(gradient is not None for gradient in found.values())
        assert all((gradient == 0).all() == name.endswith(other) for name, gradient in found.items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_equals_the_whole_pass(model, batch, side):
    """Several pictures in a row, padding on either side: what was told at the prompt holds for what follows."""
    attached(model)
    processor, width = vlm_processor(), 120
    image, text = [98] * 36, processor.tokenizer.encode("colour:ring>", add_special_tokens=False)
    rows = [text[:3] + image + text + image + text, image + text]
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for place, row in enumerate(rows):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[place, part], mask[place, part] = torch.tensor(row), 1
    later = torch.tensor([[40, 41, 42], [43, 44, 45]])
    given = {"pixel_values": batch["pixel_values"], "attention_mask": torch.cat([mask, torch.ones(2, 3).long()], 1)}
    whole_ids = torch.cat([ids, later], 1)
    places = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), seeing(model, whole_ids):
        whole = model(input_ids=whole_ids, position_ids=places, **given).logits[:, -3:]
    found = []
    with torch.no_grad(), seeing(model, ids):
        first = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places[:, :width],
            pixel_values=given["pixel_values"],
            use_cache=True,
        )
        for step in range(3):
            end = width + step + 1
            found.append(
                model(
                    input_ids=later[:, step : step + 1],
                    attention_mask=given["attention_mask"][:, :end],
                    position_ids=places[:, end - 1 : end],
                    past_key_values=first.past_key_values,
                    use_cache=True,
                ).logits
            )
    if side == "right":  # its last prompt position is padding, which is text as well
        assert (token_kinds(model, ids)[:, -1] == 0).all()
    assert torch.allclose(torch.cat(found, 1), whole, atol=1e-4)
    with torch.no_grad():
        untold = model(input_ids=whole_ids, position_ids=places, **given).logits[:, -3:]
    assert (untold - whole).abs().max() > 1e-2


def test_layers_that_see_other_tokens_are_refused(model, batch):
    lorry.attach(model, METHOD, targets="vision_tower.*.q_proj")
    with pytest.raises(lorry.SiteError, match="does not see the"):
        logits(model, batch, token_kinds(model, batch["input_ids"]))
