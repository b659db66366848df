"""How a batch lies: repeated, tiled, packed, by kind of token; what was not stated and is not unique is refused."""

import pytest
import torch
from core.tiny import close, llama, off_zero, tokens

import lorry


def loaded(names="ab", method=None, **more):
    model = llama(**more).double()
    for number, name in enumerate(names):
        adapter = lorry.attach(model, method or lorry.LoRA(rank=2), name=name, seed=number, dtype=torch.float64)
        off_zero(adapter, number + 1, 0.3).train(False)
    lorry.activate(model, None)
    return model


def alone(model, composition, ids, **more):
    with torch.no_grad(), lorry.activate(model, composition):
        return model(ids, **more).logits


@pytest.mark.parametrize("method", [lorry.LoRA(rank=2), lorry.DoRA(rank=2), lorry.LoHa(rank=2)], ids=str)
@pytest.mark.parametrize(
    "layout, order",
    [
        ({"tile": 2}, [0, 1, 2, 0, 1, 2]),
        ({"repeat": 2}, [0, 0, 1, 1, 2, 2]),
        ({"repeat": 2, "tile": 2}, [0, 0, 1, 1, 2, 2] * 2),
        ({"tile": 1}, [0, 1, 2]),
    ],
    ids=str,
)
def test_copies_of_rows_keep_their_compositions(layout, order, method):
    """Guidance is cat([x, x]): rows 2 and 3 of two are a and b again."""
    model, ids = loaded(method=method), tokens(3)
    batch = ["a", {"a": 0.5, "b": -1.0}, None]
    with torch.no_grad(), lorry.rows(model, batch, **layout):
        mixed = model(ids[order]).logits
    for entry, row in enumerate(order):
        close(mixed[entry : entry + 1], alone(model, batch[row], ids[row : row + 1]))


def test_a_factor_whose_layout_nobody_stated_is_refused_and_both_layouts_are_named():
    model, ids = loaded(), tokens(2)
    with lorry.rows(model, ["a", "b"]):
        with pytest.raises(lorry.AdapterError, match="2 rows.*batch of 4") as error:
            model(torch.cat([ids, ids]))
    assert "repeat=2" in str(error.value) and "tile=2" in str(error.value)
    with lorry.rows(model, ["a", "b"], repeat=2), pytest.raises(lorry.AdapterError, match="batch of 6"):
        model(torch.cat([ids] * 3))
    for wrong in ({"repeat": 0}, {"tile": -1}, {"repeat": True}, {"lengths": [3]}, {"lengths": [1, 2], "tile": 2}):
        with pytest.raises(lorry.AdapterError):
            lorry.rows(model, ["a", "b"], **wrong).__enter__()


def test_a_layer_called_by_itself_takes_rows_or_a_stated_layout_only():
    model = loaded()
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(4, 3, 64, dtype=torch.float64)
    with lorry.rows(model, ["a", "b"]), pytest.raises(lorry.AdapterError, match="batch of 4"):
        layer(x)
    with torch.no_grad(), lorry.rows(model, ["a", "b"], tile=2):
        mixed = layer(x)
    for entry, name in enumerate("abab"):
        with torch.no_grad(), lorry.activate(model, name):
            close(mixed[entry : entry + 1], layer(x[entry : entry + 1]))


def test_tokens_that_a_block_flattens_lie_row_after_row_under_every_layout():
    """A mixture flattens (batch, length); its experts see tokens."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=50, num_local_experts=3,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    for number, name in enumerate("ab"):
        adapter = lorry.attach(model, "lora", targets="all-linear", name=name, activate=False)
        off_zero(adapter, number, 0.3).train(False)
    ids = tokens(2)
    with torch.no_grad(), lorry.rows(model, ["a", "b"], tile=2):
        mixed = model(torch.cat([ids, ids])).logits
    for entry, name in enumerate("abab"):
        wanted = alone(model, name, ids[entry % 2 : entry % 2 + 1])
        torch.testing.assert_close(mixed[entry : entry + 1], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [lorry.LoRA(rank=2), lorry.DoRA(rank=2), "smora"], ids=str)
def test_rows_packed_into_one_sequence(method):
    """Every layer of a sequence ``(1, tokens)`` gives each row's tokens their own composition."""
    model = loaded(method=method)
    lengths, batch = [4, 1, 3], ["a", None, {"a": 0.5, "b": 2.0}]
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(1, 8, 64, dtype=torch.float64, requires_grad=True)
    with lorry.rows(model, batch, lengths=lengths):
        packed = layer(x)
        (grad,) = torch.autograd.grad(packed.square().sum(), x)
    assert packed.shape == (1, 8, layer.out_features)
    for part, of_grad, row, composition in zip(
        packed.split(lengths, 1), grad.split(lengths, 1), x.split(lengths, 1), batch, strict=True
    ):
        with lorry.activate(model, composition):
            own = row.detach().requires_grad_()
            wanted = layer(own)
            close(part, wanted)
            close(of_grad, torch.autograd.grad(wanted.square().sum(), own)[0])


def test_a_packed_batch_through_the_whole_model():
    model, ids = loaded(), tokens(2, 5)
    packed = ids.reshape(1, -1)
    positions = torch.arange(5).repeat(2)[None]
    with torch.no_grad(), lorry.rows(model, ["a", "b"], lengths=[5, 5]):
        mixed = model(packed, position_ids=positions, use_cache=False).logits.view(2, 5, -1)
    for row, name in enumerate("ab"):
        close(mixed[row : row + 1], alone(model, name, ids[row : row + 1]))
    with lorry.rows(model, ["a", "b"], lengths=[5, 4]), pytest.raises(lorry.AdapterError, match="9 tokens.*10"):
        model(packed, position_ids=positions)


KINDS = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]])


def by_kind_reference(model, ids, kinds, pair):
    """Every linear layer run with either adapter, and each token taken from its own."""
    handles, modules = [], dict(model.named_modules())
    state = {}
    for site in next(iter(lorry.adapters(model).values())).sites:

        def hook(module, args, output):
            if state.get("inside"):
                return None
            state["inside"] = True
            results = []
            for name in pair:
                with lorry.activate(model, name):
                    results.append(module(*args))
            state["inside"] = False
            return torch.where(kinds[..., None] == 0, results[0], results[1])

        handles.append(modules[site.path].register_forward_hook(hook))
    with torch.no_grad():
        wanted = model(ids).logits
    for handle in handles:
        handle.remove()
    return wanted


def test_two_adapters_for_two_kinds_of_tokens_in_one_layer():
    model, ids = loaded(), tokens(2, 6)
    wanted = by_kind_reference(model, ids, KINDS, ["a", "b"])
    with torch.no_grad(), lorry.context(model, token_kinds=KINDS), lorry.activate(model, {0: "a", 1: {"b": 1.0}}):
        found = model(ids).logits
    close(found, wanted)
    with lorry.activate(model, {0: "a"}), pytest.raises(lorry.AdapterError, match="token_kinds"):
        model(ids)


def test_kinds_and_rows_together():
    model, ids = loaded("abc"), tokens(2, 6)
    first = by_kind_reference(model, ids, KINDS, ["a", "b"])[:1]
    second = alone(model, "c", ids[1:])
    with torch.no_grad(), lorry.context(model, token_kinds=KINDS):
        with lorry.rows(model, [{0: "a", 1: "b"}, {0: "c", 1: "c"}]):
            found = model(ids).logits
    close(found[:1], first)
    close(found[1:], second)


@pytest.mark.parametrize("chunks", [[6], [4, 1, 1], [1] * 6, [2, 4]], ids=str)
def test_kinds_follow_positions_through_a_cache(chunks):
    model, ids = loaded(), tokens(2, 6)
    with torch.no_grad(), lorry.context(model, token_kinds=KINDS), lorry.activate(model, {0: "a", 1: "b"}):
        whole = model(ids).logits
        cache, parts = None, []
        for part in ids.split(chunks, 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    close(torch.cat(parts, 1), whole)


def test_positions_after_those_that_were_told_continue_the_last_kind():
    model, ids = loaded(), tokens(2, 6)
    longer = torch.cat([KINDS[:, :4], KINDS[:, 3:4].expand(-1, 2)], 1)
    with torch.no_grad(), lorry.activate(model, {0: "a", 1: "b"}):
        with lorry.context(model, token_kinds=longer):
            whole = model(ids).logits
        with lorry.context(model, token_kinds=KINDS[:, :4]):
            out = model(ids[:, :4], use_cache=True)
            rest = [out.logits]
            for position in (4, 5):
                step = model(ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
                rest.append(step.logits)
    close(torch.cat(rest, 1), whole)


@pytest.mark.parametrize("name", ["task_ids", "padding_mask"])
def test_what_a_context_tells_of_rows_follows_their_copies(name):
    """A gate by task (LoRA-Mixer's hard mode) and a pooled one (EPT) read rows and positions."""
    from lorry.core.life.state import state_of
    from lorry.core.method.call import Call

    model, ids = loaded(), tokens(2, 5)
    values = torch.tensor([3, 7]) if name == "task_ids" else torch.tensor([[1, 1, 1, 0, 0], [1] * 5]).bool()
    found = []

    def reader(tap):
        runtime = state_of(model).runtimes.current()
        call = Call(
            tap.site, tap.x, tap.output, "a", None, False, lambda: 0, runtime.context, len(tap.x), False,
            runtime.active.layout, runtime.passing,
        )  # fmt: skip
        found.append(call.of_rows(values) if name == "task_ids" else call.of_tokens(values))

    with torch.no_grad(), lorry.rows(model, ["a", "b"], repeat=2, tile=2), lorry.tap(model, reader, "q_proj"):
        model(ids[[0, 0, 1, 1, 0, 0, 1, 1]])
    assert found and all(torch.equal(f, values[[0, 0, 1, 1, 0, 0, 1, 1]]) for f in found)


def vision_language_model():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2,
        projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=40,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    config.image_token_id = 39
    return LlavaForConditionalGeneration(config).eval()


def test_pictures_are_counted_where_rows_have_several():
    """Two rows of text, one with three pictures: four entries in the vision tower, which need not be two each."""
    model = vision_language_model()
    for number, name in enumerate("ab"):
        off_zero(lorry.attach(model, lorry.LoRA(rank=2), name=name, seed=number, activate=False), number + 1, 0.3)
    pictures = torch.randn(4, 3, 4, 4)
    ids = torch.randint(0, 38, (2, 16))
    ids[0, :4], ids[1, :12] = 39, 39
    mask = torch.ones_like(ids)

    def run(rows, of_pictures):
        return model(input_ids=ids[rows], attention_mask=mask[rows], pixel_values=pictures[of_pictures]).logits

    with torch.no_grad():
        with lorry.rows(model, ["a", "b"]), pytest.raises(lorry.AdapterError, match="counts="):
            run([0, 1], [0, 1, 2, 3])
        tower = next(p for p, _ in model.named_modules() if p.endswith("vision_tower"))
        projector = next(p for p, _ in model.named_modules() if p.endswith("multi_modal_projector"))
        with lorry.rows(model, ["a", "b"], counts={tower: [1, 3], projector: [1, 3]}):
            mixed = run([0, 1], [0, 1, 2, 3])
        for row, (name, own) in enumerate([("a", [0]), ("b", [1, 2, 3])]):
            with lorry.activate(model, name):
                torch.testing.assert_close(mixed[row : row + 1], run([row], own), atol=1e-5, rtol=1e-4)
        with lorry.rows(model, ["a", "b"], counts={tower: [1, 2], projector: [1, 3]}):
            with pytest.raises(lorry.AdapterError, match="add up"):
                run([0, 1], [0, 1, 2, 3])
