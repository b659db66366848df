"""Modes of one model: what the sheet of Hydra says must hold, on real decoders."""

import hashlib
import math
import random
import threading

import pytest
import torch
from serving.tiny_engines import adapt, prompt, tiny
from torch import nn

import lorry
from lorry import pocket
from lorry.core.errors import CheckpointError, OptionError
from lorry.serving.modes import GENERATION, Mode, attention_direction, load_mode, maxsim, save_retriever, switched
from lorry.serving.modes.direction import check_direction

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2")


def head(model, width=6):
    torch.manual_seed(3)
    return nn.Linear(model.config.hidden_size, width, bias=False, dtype=next(model.parameters()).dtype)


def retriever(model, **options):
    return Mode(
        "retrieval", **{"adapter": "r", "attention": "bidirectional", "head": head(model), "cache": False} | options
    )


def rows(*lengths):
    tokens, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        tokens[row, :length], mask[row, :length] = torch.tensor(prompt(length, row)), 1
    return tokens, mask.long()


def digest(model):
    tensors = {n: t for n, t in model.state_dict().items()}
    return {n: hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).hexdigest() for n, t in tensors.items()}


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_base_is_recovered_bit_for_bit_after_any_switches(family):
    """Check 1: any sequence of modes, one of which raises, leaves logits and weights of a model that never switched."""
    fresh, model = tiny(family, torch.float32), tiny(family, torch.float32)
    before = digest(model)
    adapt(model, "r")
    hooks = [len(model._forward_pre_hooks), len(model._forward_hooks)]
    modes = [retriever(model), GENERATION, Mode("causal adapter", adapter="r"), retriever(model, attention="causal")]
    tokens, mask = rows(9, 5)
    expected = logits(fresh, tokens)
    draw = random.Random(0)
    for turn in range(12):
        chosen = draw.sample(modes, draw.randint(1, 3))
        try:
            with torch.no_grad(), switched(model, chosen[0]) as outer:
                outer(tokens, mask)
                for each in chosen[1:]:
                    with switched(model, each) as inner:
                        inner(tokens, mask)
                        if turn % 3 == 0:
                            raise KeyError
        except KeyError:
            pass
        assert torch.equal(logits(model, tokens), expected)
        with torch.no_grad(), switched(model, GENERATION) as base:
            assert torch.equal(base(tokens).logits, expected)
    assert digest(model) == before == digest(fresh)
    assert model.config._attn_implementation == fresh.config._attn_implementation
    assert hooks == [len(model._forward_pre_hooks), len(model._forward_hooks)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_is_changed_and_not_a_flag(family):
    """Check 2: the last token is seen by the first in retrieval, and by nobody before it in generation."""
    model = tiny(family)
    adapt(model, "r")
    tokens = torch.tensor([prompt(5)])
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 97
    assert torch.equal(logits(model, tokens)[:, :-1], logits(model, other)[:, :-1])
    with torch.no_grad(), switched(model, retriever(model)) as mode:
        assert (mode(tokens)[0, 0] - mode(other)[0, 0]).abs().max() > 1e-4
        with switched(model, GENERATION) as inner:
            assert torch.equal(inner(tokens).logits[:, :-1], inner(other).logits[:, :-1])
        assert (mode(tokens)[0, 0] - mode(other)[0, 0]).abs().max() > 1e-4
    check_direction(model)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_padding_is_seen_by_nobody_and_has_no_vector(family):
    model = tiny(family)
    adapt(model, "r")
    tokens, mask = rows(9, 4)
    with torch.no_grad(), switched(model, retriever(model)) as mode:
        together, alone = mode(tokens, mask), mode(tokens[1:, :4])
    torch.testing.assert_close(together[1:, :4], alone, rtol=0, atol=1e-10)
    assert together[1, 4:].abs().max() == 0
    torch.testing.assert_close(together[0].norm(dim=-1), torch.ones(9, dtype=together.dtype))


def test_the_direction_belongs_to_the_thread():
    model = tiny()
    tokens = torch.tensor([prompt(6)])
    expected, found = logits(model, tokens), []
    with attention_direction(model, "bidirectional"):
        thread = threading.Thread(target=lambda: found.append(logits(model, tokens)))
        thread.start()
        thread.join()
        assert not torch.equal(logits(model, tokens), expected)
    assert torch.equal(found[0], expected) and torch.equal(logits(model, tokens), expected)


def test_an_untrained_adapter_is_the_bidirectional_base_and_only_it_and_the_head_learn():
    """Check 5."""
    model = tiny()
    adapter = lorry.attach(model, {"method": "lora", "rank": 2}, name="r", activate=False, dtype=torch.float64)
    mode = retriever(model)
    tokens, mask = rows(7, 5)
    with torch.no_grad(), switched(model, mode) as found:
        states = found.states(tokens, mask)
        with switched(model, Mode("bare", attention="bidirectional", cache=False)) as bare:
            assert torch.equal(states, bare.states(tokens, mask))
    with switched(model, mode) as found:
        vectors = found(tokens, mask)
        maxsim(vectors[:1], vectors, mask[:1], mask)[0, 1].backward()
    assert mode.head.weight.grad.abs().max() > 0
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    own = set(adapter.parameters())
    assert all(p.grad is None for p in model.parameters() if p not in own)


def perplexity(model):
    """Of what the pocket model was trained on."""
    _, tokenizer = pocket.load()
    losses = []
    for each in pocket.examples("upper", "test", 16, seed=1):
        start = len(tokenizer(each.prompt, add_special_tokens=False)["input_ids"])
        tokens = torch.tensor([tokenizer(each.prompt + each.answer, add_special_tokens=False)["input_ids"]])
        found = logits(model, tokens)[0, start - 1 : -1]
        losses.append(nn.functional.cross_entropy(found, tokens[0, start:]))
    return math.exp(torch.stack(losses).mean())


def test_what_goes_wrong_is_seen():
    """Check 3: attention left bidirectional, another output head, a cache of the other mode."""
    model, _ = pocket.load()
    own = perplexity(model)
    with attention_direction(model, "bidirectional"):
        assert perplexity(model) > 1.5 * own
    assert perplexity(model) == own
    other, _ = pocket.load()
    torch.manual_seed(0)
    other.lm_head = nn.Linear(*reversed(other.lm_head.weight.shape), bias=False)
    assert perplexity(other) > other.config.vocab_size / 4


def test_caches_do_not_pass_from_mode_to_mode():
    model = tiny()
    adapt(model, "r")
    adapted = Mode("adapted", adapter="r")
    tokens = torch.tensor([prompt(6)])
    with torch.no_grad():
        with switched(model, adapted) as mode:
            kept = mode(tokens, use_cache=True).past_key_values
            mode(tokens[:, :1], past_key_values=kept)
        with switched(model, GENERATION) as mode:
            with pytest.raises(OptionError, match=r"made in mode 'adapted'.*'generation'"):
                mode(tokens[:, :1], past_key_values=kept)
        with switched(model, retriever(model)):
            assert model(tokens, use_cache=True).past_key_values is None
            with pytest.raises(OptionError, match="computes without a cache"):
                model(tokens[:, :1], past_key_values=kept)
    with pytest.raises(OptionError, match="cache=False"):
        Mode("wrong", attention="bidirectional")


def test_cached_decoding_is_recomputation_in_single_tokens():
    """Check 6."""
    model = tiny()
    adapt(model, "r")
    tokens = torch.tensor([prompt(12)])
    widths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    with torch.no_grad():
        with switched(model, retriever(model)) as mode:
            mode(tokens)
        widths.clear()
        with switched(model, GENERATION) as mode:
            found = [mode(tokens[:, :4], use_cache=True)]
            for place in range(4, 12):
                cache = found[-1].past_key_values
                found.append(mode(tokens[:, place : place + 1], past_key_values=cache, use_cache=True))
        assert widths == [4] + [1] * 8
        whole = logits(model, tokens)
    together = torch.cat([each.logits for each in found], dim=1)
    torch.testing.assert_close(together, whole, rtol=0, atol=1e-10)


def test_maxsim_is_the_double_loop_and_its_facts_hold():
    """Check 4."""
    torch.manual_seed(0)
    unit = lambda *shape: nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)  # noqa: E731
    queries, documents = unit(3, 4, 5), unit(6, 7, 5)
    query_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    document_mask = (torch.arange(7) < torch.tensor([7, 3, 1, 5, 2, 6])[:, None]).long()
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for q in range(3):
        for d in range(6):
            for i in range(int(query_mask[q].sum())):
                products = [queries[q, i] @ documents[d, j] for j in range(int(document_mask[d].sum()))]
                expected[q, d] += max(products)
    for most in (1, 60, 200, 1 << 24):
        found = maxsim(queries, documents, query_mask, document_mask, most=most)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    shuffled = documents[:, torch.randperm(7)]
    torch.testing.assert_close(maxsim(queries, shuffled), maxsim(queries, documents))
    assert (maxsim(queries, documents) >= maxsim(queries, documents[:, :4])).all()
    # whatever stands in the padding, of either side
    worst = [torch.cat([t, torch.full((len(t), 2, 5), 9.0, dtype=t.dtype)], dim=1) for t in (queries, documents)]
    masks = [torch.cat([m, torch.zeros(len(m), 2)], dim=1) for m in (query_mask, document_mask)]
    torch.testing.assert_close(maxsim(*worst, *masks), expected, rtol=0, atol=1e-12)
    one = maxsim(queries[:, :1], documents[:, :1])
    torch.testing.assert_close(one, torch.cosine_similarity(queries[:, None, 0], documents[None, :, 0], dim=-1))
    with pytest.raises(OptionError, match="without a token"):
        maxsim(queries, documents, None, torch.zeros(6, 7))
    with pytest.raises(OptionError, match="of one width"):
        maxsim(queries, documents[..., :3])


@pytest.mark.parametrize("bias", [True, False])
def test_a_retriever_is_saved_with_its_head_and_loaded_again(tmp_path, bias):
    model = tiny(dtype=torch.float32)
    adapter = adapt(model, "r")
    projection = nn.Linear(32, 6, bias=bias)
    save_retriever(adapter, projection, tmp_path / "r")
    tokens, mask = rows(6, 4)
    with torch.no_grad(), switched(model, retriever(model, head=projection)) as mode:
        expected = mode(tokens, mask)
    other = tiny(dtype=torch.float32)
    lorry.load(other, tmp_path / "r", name="again", activate=False)
    loaded = load_mode(tmp_path / "r", adapter="again")
    assert loaded.attention == "bidirectional" and not loaded.cache
    with torch.no_grad(), switched(other, loaded) as mode:
        assert torch.equal(mode(tokens, mask), expected)


def test_a_folder_without_a_head_is_no_retriever(tmp_path):
    model = tiny(dtype=torch.float32)
    adapt(model, "r").save(tmp_path / "r")
    with pytest.raises(CheckpointError, match=r"holds no projection.*save_retriever"):
        load_mode(tmp_path / "r")
    with pytest.raises(OptionError, match="is a torch.nn.Linear"):
        save_retriever(lorry.adapters(model)["r"], nn.Identity(), tmp_path / "s")
    import safetensors.torch

    safetensors.torch.save_file({"weight": torch.ones(2, 3)}, tmp_path / "r" / "projection.safetensors")
    with pytest.raises(CheckpointError, match="does not say how its mode attends"):
        load_mode(tmp_path / "r")
    (tmp_path / "r" / "projection.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="truncated"):
        load_mode(tmp_path / "r")
