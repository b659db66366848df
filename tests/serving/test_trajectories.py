"""Roles that share the cache of one text: the facts of LRAgent's sheet, on real decoders."""

import threading

import pytest
import torch
from serving.tiny_engines import adapt, tiny
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import lorry
from lorry.core.errors import AdapterError, OptionError
from lorry.serving.agents import POLICIES, Trajectory

NAMES = ("plan", "act", "reflect")
TARGETS = ["*.q_proj", "*.v_proj"]
SCRIPT = ("plan", "plan", "act", "reflect", "act", "plan")


def base(layers=2, kind=LlamaForCausalLM):
    config = {LlamaForCausalLM: LlamaConfig, Qwen3ForCausalLM: Qwen3Config}[kind]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return kind(config(num_hidden_layers=layers, vocab_size=64, head_dim=8, **sizes)).eval().double()


def with_roles(model, shared=True, names=NAMES, targets=TARGETS, **options):
    """Adapters of random factors, with one A at v_proj or each with its own."""
    first = None
    for seed, name in enumerate(names):
        method = {"method": "lora", "rank": 3, "alpha": 6.0, **options}
        adapter = lorry.attach(model, method, targets=targets, name=name, dtype=torch.float64)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, tensor, _ in adapter.named_tensors():
                tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=torch.float64) * 0.3)
            for path, entry in adapter.entries.items() if shared and first is not None else ():
                if path.endswith("v_proj"):
                    entry.tensors()["A"].copy_(first.entries[path].tensors()["A"])
        first = first or adapter
    return model


def play(model, policy, script=SCRIPT, names=NAMES):
    """Roles and a tool in turns over a fixed text; returns the logits of each turn."""
    text = torch.randint(0, 64, (60,), generator=torch.Generator().manual_seed(5)).tolist()
    trajectory = Trajectory(model, {name: name for name in names}, policy)
    trajectory.append(text[:8])
    found = []
    for turn, role in enumerate(script):
        found.append(trajectory.logits(role))
        trajectory.append(text[8 + 5 * turn : 13 + 5 * turn])
    return torch.stack(found), trajectory


def alone(model, script=SCRIPT):
    """The same text, read whole by each role without a cache."""
    text = torch.randint(0, 64, (60,), generator=torch.Generator().manual_seed(5))
    found = []
    for turn, role in enumerate(script):
        with torch.no_grad(), lorry.activate(model, role):
            found.append(model(text[None, : 8 + 5 * turn]).logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen3ForCausalLM])
def test_a_cache_of_ones_own_is_exact(kind):
    model = with_roles(base(kind=kind))
    found, _ = play(model, "non-shared")
    torch.testing.assert_close(found, alone(model), rtol=0, atol=1e-10)


def test_a_fused_projection_has_a_cache_of_its_own():
    model = tiny("gpt2")
    for seed, name in enumerate(NAMES):
        adapt(model, name, seed=seed, targets=["c_attn"])
    found, _ = play(model, "non-shared")
    torch.testing.assert_close(found, alone(model), rtol=0, atol=1e-10)


@pytest.mark.parametrize("policy", ["base-shared", "base-lr-shared"])
def test_one_role_is_ordinary_cached_decoding(policy):
    model = with_roles(base())
    found, _ = play(model, policy, script=("act",) * 6)
    torch.testing.assert_close(found, alone(model, ("act",) * 6), rtol=0, atol=1e-10)
    trajectory = Trajectory(model, {"act": "act"}, policy)
    prompt = [3, 1, 4, 1, 5]
    trajectory.append(prompt)
    turn = trajectory.turn("act", 9)
    with lorry.activate(model, "act"):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, 5:].tolist()
    assert list(turn.tokens) == expected and not turn.stopped


def test_with_one_layer_the_three_statements_hold_exactly():
    model = with_roles(base(layers=1))
    exact = alone(model)
    for policy in ("base-shared", "base-lr-shared"):
        torch.testing.assert_close(play(model, policy)[0], exact, rtol=0, atol=1e-10)
    assert (play(model, "full-shared")[0] - exact).abs().max() > 1e-2
    apart = with_roles(base(layers=1), shared=False)
    torch.testing.assert_close(play(apart, "base-shared")[0], alone(apart), rtol=0, atol=1e-10)
    with pytest.raises(AdapterError, match=r"another A at .*v_proj.*shared-down.*base-shared"):
        play(apart, "base-lr-shared")


def test_without_updates_all_schemes_are_the_base():
    model = base()
    for name in NAMES:
        lorry.attach(model, {"method": "lora", "rank": 3}, targets=["*.v_proj"], name=name, dtype=torch.float64, seed=1)
    expected = alone(model)
    for policy in POLICIES:
        torch.testing.assert_close(play(model, policy)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("roles", [1, 2, 3])
def test_sizes_and_counts_are_those_of_the_formulas(roles):
    layers, width, rank = 2, 2 * 8, 3  # heads of keys times their width
    names = NAMES[:roles]
    script = [names[turn % roles] for turn in range(2 * roles + 2)]
    model = with_roles(base(layers), names=names)
    found = {policy: play(model, policy, script, names)[1] for policy in POLICIES}
    length = {role: 8 + 5 * max(t for t, r in enumerate(script) if r == role) for role in names}
    longest, every = max(length.values()), sum(length.values())
    assert found["non-shared"].numbers == layers * 2 * width * every
    assert found["full-shared"].numbers == layers * 2 * width * longest
    assert found["base-shared"].numbers == layers * (2 * width * longest + rank * every)
    assert found["base-lr-shared"].numbers == layers * (2 * width + rank) * longest
    for policy, trajectory in found.items():
        whole = policy in ("non-shared", "base-shared")
        assert trajectory.counts.total == (every if whole else longest)
        assert trajectory.counts.projected == (every if policy == "non-shared" else longest)


def test_projections_run_for_new_tokens_only():
    model = with_roles(base())
    seen = []
    key = model.model.layers[1].self_attn.k_proj
    key.register_forward_hook(lambda _, args, output: seen.append(args[0].shape[1]))
    _, trajectory = play(model, "base-shared")
    assert sum(seen) == trajectory.counts.projected < trajectory.counts.total


def test_a_turn_ends_at_a_stop_token_and_its_last_token_is_run_by_the_next_role():
    model = with_roles(base())
    trajectory = Trajectory(model, {name: name for name in NAMES}, "base-lr-shared")
    trajectory.append([1, 2, 3])
    first = trajectory.turn("plan", 1).tokens[0]
    other = Trajectory(model, {name: name for name in NAMES}, "base-lr-shared")
    other.append([1, 2, 3])
    turn = other.turn("plan", 20, stop_tokens=[first])
    assert turn.stopped and turn.tokens == (first,)
    other.turn("act", 2)
    assert other.store.whole("")[0].keys.length == len(other.tokens) - 1 == 5
    # logits that are asked for twice write nothing twice
    other.logits("act")
    size = other.numbers
    torch.testing.assert_close(other.logits("reflect"), other.logits("reflect"))
    assert other.numbers == size


def test_a_pass_that_fails_leaves_the_cache_as_it_was():
    model = with_roles(base())
    trajectory = Trajectory(model, {name: name for name in NAMES}, "base-lr-shared")
    trajectory.append([1, 2, 3])
    trajectory.turn("plan", 2)
    size, attention = trajectory.numbers, model.config._attn_implementation

    def fails(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        trajectory.turn("act", 2)
    handle.remove()
    assert trajectory.numbers == size and model.config._attn_implementation == attention
    assert not model.model.layers[0].self_attn.v_proj._forward_pre_hooks
    undisturbed = Trajectory(model, {name: name for name in NAMES}, "base-lr-shared")
    undisturbed.append([1, 2, 3])
    undisturbed.turn("plan", 2)
    assert trajectory.turn("act", 3) == undisturbed.turn("act", 3)


def test_what_cannot_be_shared_is_refused():
    model = with_roles(base(), targets=["*.k_proj", "*.v_proj"])
    with pytest.raises(AdapterError, match="changes keys"):
        Trajectory(model, {"plan": "plan"})
    play(model, "non-shared")
    model = base()
    lorry.attach(model, {"method": "dora", "rank": 3}, targets=TARGETS, name="plan")
    with pytest.raises(AdapterError, match="DoRA on .*only a plain low-rank update"):
        Trajectory(model, {"plan": "plan"}, "base-shared")
    with pytest.raises(OptionError, match="no scheme 'base-share'.*base-shared"):
        Trajectory(model, {"plan": "plan"}, "base-share")
    with pytest.raises(OptionError, match="at least one role"):
        Trajectory(model, {})
    with pytest.raises(AdapterError, match="'planner', which is not on the model"):
        Trajectory(model, {"plan": "planner"}, "base-shared")
    trajectory = Trajectory(model, {"plan": None})
    with pytest.raises(OptionError, match="no role 'act'"):
        trajectory.turn("act", 1)
    with pytest.raises(OptionError, match="no text"):
        trajectory.turn("plan", 1)
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(AdapterError, match="GPT2LMHeadModel has none"):
        Trajectory(gpt, {"plan": None})


def test_another_thread_may_use_the_model_in_the_middle_of_a_pass():
    model = with_roles(base())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), lorry.activate(model, None):
        expected = model(ids).logits
    found = []

    def meanwhile(*_):
        if not found:
            found.append(None)  # the pass below comes through here, too

            def other():
                with torch.no_grad(), lorry.activate(model, None):
                    found.append(model(ids).logits)

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    trajectory = Trajectory(model, {name: name for name in NAMES}, "base-lr-shared")
    trajectory.append([1, 2, 3])
    trajectory.turn("plan", 2)
    trajectory.append([4, 4])
    handle = model.lm_head.register_forward_pre_hook(meanwhile)
    trajectory.logits("act")
    handle.remove()
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-10)
