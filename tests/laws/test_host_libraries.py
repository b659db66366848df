"""Libraries around a model look at it from outside: at signatures, at the names of classes, at pickles of them.

For every registered method, on real models: what they see is what they see of the bare model, so that `generate`
makes the same positions and masks, and a Trainer hands over the same columns.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from core.tiny import clear, llama, off_zero, tokens
from laws.fitting import merges, small, with_dense_updates
from torch import Tensor, nn

import lorry

BASES = ("llama", "gpt2")
NEW_TOKENS = 4
#: DyLoRA is a preset whose sites share a tensor, which its method does not otherwise do.
SLUGS = [*lorry.methods(), "dylora"]
#: These are put elsewhere on one base than on the other, or stand for all the others.
EVERYWHERE = {"lora", "full", "mixlora"}
#: Each of the other methods is on one base, in turn: what a library sees depends on the base and not on the method.
PAIRS = [(b, s) for i, s in enumerate(SLUGS) for j, b in enumerate(BASES) if s in EVERYWHERE or j == i % len(BASES)]
over_methods = pytest.mark.parametrize("slug", SLUGS)
over_bases = pytest.mark.parametrize("base", BASES)
over_pairs = pytest.mark.parametrize("base, slug", PAIRS)


@lru_cache
def built(base: str) -> Any:
    if base == "llama":
        return llama().double()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=50, pad_token_id=0, eos_token_id=2)
    return GPT2LMHeadModel(config).double().eval()


def bare(base: str) -> Any:
    return copy.deepcopy(built(base))


def adapted(base: str, slug: str, dtype: torch.dtype = torch.float64) -> tuple[Any, lorry.Adapter]:
    model = bare(base).to(dtype)
    targets: Any = "all-linear"
    if slug == "full":
        targets = ["model.norm", "model.layers.0"] if base == "llama" else ["transformer.ln_f", "transformer.h.0"]
    elif slug == "mixlora" and base == "gpt2":
        targets = ["h.*.mlp.c_*", "h.*.attn.c_*"]
    adapter = lorry.attach(model, small(slug), targets=targets, name="one", dtype=dtype)
    return model, off_zero(adapter, 3, 0.1)


def left_padded() -> tuple[Tensor, Tensor]:
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
    for row, padding in enumerate((0, 3, 1)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


def generated(model: Any) -> tuple[Tensor, Tensor]:
    """The tokens of a greedy generation, and the logits of every step ``(steps, rows, vocabulary)``."""
    ids, mask = left_padded()
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=49,
            min_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return found.sequences, torch.stack(found.logits)


def by_hand(model: Any) -> tuple[Tensor, Tensor]:
    """The same without a cache and without `generate`, with the positions said outright."""
    (ids, mask), logits = left_padded(), []
    for _ in range(NEW_TOKENS):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            last = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        logits.append(last.float())  # as `generate` gives them
        choice = last.clone()
        choice[:, 49] = -torch.inf  # the token that would end the answer
        ids = torch.cat([ids, choice.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids, torch.stack(logits)


@over_pairs
def test_signatures_names_and_pickles_of_classes_stay(base, slug):
    plain = dict(bare(base).named_modules())
    model, _ = adapted(base, slug)
    for path, module in model.named_modules():
        before, now = type(plain[path]), type(module)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(now, name) == getattr(before, name), f"{path}: {name}"
        for found, wanted in ((module.forward, plain[path].forward), (now.forward, before.forward)):
            assert inspect.signature(found) == inspect.signature(wanted), path
            if not hasattr(before.forward, "__wrapped__"):  # of a decorated forward the signature is the one to go by
                assert inspect.getfullargspec(found) == inspect.getfullargspec(wanted), path
            assert found.__name__ == wanted.__name__ and found.__doc__ == wanted.__doc__, path
        assert isinstance(module, before) and issubclass(now, before)
        assert issubclass(pickle.loads(pickle.dumps(now)), before), path


@over_pairs
def test_generation_of_a_left_padded_batch_with_all_adapters_off_is_that_of_the_bare_model(base, slug):
    wanted_tokens, wanted = generated(bare(base))
    model, _ = adapted(base, slug)
    lorry.activate(model, None)
    found_tokens, found = generated(model)
    assert torch.equal(found_tokens, wanted_tokens) and torch.equal(found, wanted)


@over_pairs
def test_generation_of_a_left_padded_batch_is_that_of_the_dense_model(base, slug):
    """The reference has the update in its weights and has never met Lorry; without such weights it is the adapted
    model, told its positions.
    """
    model, adapter = adapted(base, slug)
    if merges(adapter):
        wanted_tokens, wanted = generated(with_dense_updates(bare(base), adapter))
    else:
        wanted_tokens, wanted = by_hand(model)
    found_tokens, found = generated(model)
    assert (wanted - generated(bare(base))[1]).abs().max() > 1e-4, "the adapter does nothing"
    assert torch.equal(found_tokens, wanted_tokens)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@over_bases
def test_by_hand_is_what_generate_does(base):
    (found_tokens, found), (wanted_tokens, wanted) = by_hand(bare(base)), generated(bare(base))
    assert torch.equal(found_tokens, wanted_tokens)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def labels_of(ids: Tensor, mask: Tensor) -> Tensor:
    """Labels at all real tokens but the first of the batch, which has none before it to be told by: some models count
    it in the mean that a Trainer asks for.
    """
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return labels


def seen_by_trainer(model: Any, folder: Any) -> dict[str, Any]:
    """What one step of the Hugging Face Trainer shows of a model: columns, labels, losses."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    ids, mask = left_padded()
    rows = {
        "input_ids": ids.tolist(),
        "attention_mask": mask.tolist(),
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0).tolist(),
        "labels": labels_of(ids, mask).tolist(),
        "text": ["one", "two", "three"],
        "weight": [0.5, 1.0, 2.0],
    }
    columns: set[str] = set()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=3,
        logging_steps=1,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = Dataset.from_dict(rows)
    collate = partial(noting, columns, default_data_collator)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collate)
    first = trainer.evaluate()
    trainer.train()
    return {
        "columns": columns,
        "labels": trainer.label_names,
        "returns a loss": trainer.can_return_loss,
        "takes the number of labels": trainer.model_accepts_loss_kwargs,
        "first loss": first.get("eval_loss"),
    }


def noting(columns: set[str], collate: Any, rows: list[dict[str, Any]]) -> Any:
    columns.update(rows[0])
    return collate(rows)


@pytest.fixture(scope="module")
def plain_trainer_view(tmp_path_factory):
    return {base: seen_by_trainer(bare(base).float(), tmp_path_factory.mktemp(base)) for base in BASES}


@over_pairs
def test_a_trainer_sees_the_columns_and_losses_that_it_sees_of_the_bare_model(base, slug, tmp_path, plain_trainer_view):
    wanted = plain_trainer_view[base]
    assert {"input_ids", "attention_mask", "position_ids", "labels"} == wanted["columns"]
    model, adapter = adapted(base, slug, torch.float32)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids, mask = left_padded()
    with torch.no_grad():
        labels = labels_of(ids, mask)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        loss = model(ids, attention_mask=mask, position_ids=positions, labels=labels).loss
    found = seen_by_trainer(model, tmp_path)
    assert found.pop("first loss") == pytest.approx(float(loss), rel=1e-5)
    assert found == {k: v for k, v in wanted.items() if k != "first loss"}
    own = {id(p) for p in adapter.parameters()}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, kept[n])}
    assert moved and all(id(p) in own for n, p in model.named_parameters() if n in moved)


@over_methods
def test_a_model_that_is_cast_after_attaching_runs_and_trains(slug):
    """``model.double()`` casts what PyTorch knows of: the parameters of adapters in training, not what they freeze."""
    model, adapter = adapted("llama", slug, torch.float32)
    ids, _ = left_padded()
    with torch.no_grad():
        wanted = model(ids).logits
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.3)):
        model.to(dtype)
        logits = model(ids).logits
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.detach().float(), wanted, atol=tolerance, rtol=tolerance)
        logits.float().square().mean().backward()
        assert any(p.grad is not None and p.grad.any() for p in adapter.parameters())
        adapter.train(False)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits.float(), wanted, atol=tolerance, rtol=tolerance)
        adapter.train()


def test_a_module_that_is_no_transformer_keeps_its_signature_too():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor, *, scale: float = 1.0, note: str | None = None) -> Tensor:
            return self.inner(x) * scale

    wanted = inspect.signature(Own().forward)
    for slug in ("lora", "vera"):
        model = Own()
        lorry.attach(model, small(slug), targets=["inner"])
        assert inspect.signature(model.forward) == wanted and inspect.signature(type(model).forward).parameters
        assert inspect.signature(model.inner.forward) == inspect.signature(nn.Linear(1, 1).forward)
        torch.testing.assert_close(model(x=torch.ones(1, 8), scale=2.0), 2 * model(torch.ones(1, 8)))


def four_bit_layer(nested: bool) -> Any:
    """A layer of two blocks of 64 in every row, whose scales differ by row and by block."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(64, 128) * torch.rand(64, 1) * torch.cat([torch.ones(64), 3 * torch.ones(64)])
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=nested)
    layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=nested, module=layer)
    return nn.Sequential(nn.Linear(64, 128), layer.to("cpu"), nn.Linear(64, 8))


@pytest.mark.parametrize("nested", [True, False])
def test_an_evaluation_does_not_change_what_is_read_of_a_four_bit_weight(nested):
    """On some processors bitsandbytes repacks the weight and its scales in the first evaluation."""
    model = four_bit_layer(nested)
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets=["1"]), 1, 0.1)
    site = adapter.sites[0]
    before = site.matrix().float().clone()
    model.eval()
    with torch.no_grad():
        layer = model[1](torch.eye(128)).T - adapter.entries["1"].delta()
        found = site.matrix().float()
        torch.testing.assert_close(layer, before, atol=0.02, rtol=0.02)
        torch.testing.assert_close(found, before, atol=0.02, rtol=0.02)
        wanted = model(torch.ones(1, 64))
        adapter.fuse()
        merged = model(torch.ones(1, 64))
    assert (merged - wanted).norm() < 0.3 * wanted.norm()


@pytest.mark.parametrize("nested", [True, False])
def test_an_evaluation_does_not_change_the_gradients_of_training_on_a_four_bit_base(nested):
    """Runs evaluate between their steps; the gradient to earlier layers passes through the repacked weight."""
    model = four_bit_layer(nested)
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2)), 1, 0.1)
    results = []
    for _ in range(2):
        clear(model)
        model.train()
        model(torch.ones(3, 64)).square().mean().backward()
        results.append({n: p.grad.clone() for n, p in adapter.named_parameters()})
        model.eval()
        with torch.no_grad():
            model(torch.ones(3, 64))
    for name, gradient in results[0].items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(results[1][name], gradient, atol=0.05 * size, rtol=0.05)
