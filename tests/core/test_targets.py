"""Which sites a user means, and what is said where nothing is meant."""

import pytest
import torch
from core.tiny import llama, unet
from torch import nn

import lorry
from lorry.core.options import check_options, from_options, option
from lorry.core.sites.kinds import catalogue
from lorry.core.sites.targets import select

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
EVERY = ("linear", "conv", "embedding", "qkv", "experts", "block")


@pytest.fixture(scope="module")
def model():
    return llama(3)


def chosen(model, targets, **more):
    return [s.path for s in select(model, catalogue(model), targets, kinds=more.pop("kinds", EVERY[:-1]), **more).sites]


def names(paths):
    return {p.rpartition(".")[2] for p in paths}


@pytest.mark.parametrize(
    "targets, count, expected",
    [
        ("all-linear", 21, ATTENTION | MLP),
        ("attention", 12, ATTENTION),
        ("mlp", 9, MLP),
        ("embeddings", 1, {"embed_tokens"}),
        ("all", 22, ATTENTION | MLP | {"embed_tokens"}),
        ("q_proj", 3, {"q_proj"}),
        ("mlp.down_proj", 3, {"down_proj"}),
        (["q_proj", "v_proj"], 6, {"q_proj", "v_proj"}),
        (["q_proj", "q_proj", "attention"], 12, ATTENTION),
        ("model.layers.1.mlp.up_proj", 1, {"up_proj"}),
        ("*.1.*_proj", 7, ATTENTION | MLP),
        ("layers.[02].*.k_proj", 2, {"k_proj"}),
        ("re:.*layers\\.(0|2)\\..*(q|k)_proj", 4, {"q_proj", "k_proj"}),
        ("kind:embedding", 1, {"embed_tokens"}),
        ("kind:linear", 22, ATTENTION | MLP | {"lm_head"}),
        ("lm_head", 1, {"lm_head"}),
        (["all-linear", "lm_head"], 22, ATTENTION | MLP | {"lm_head"}),
    ],
)
def test_targets(model, targets, count, expected):
    found = chosen(model, targets)
    assert len(found) == count and names(found) == expected
    order = list(catalogue(model))
    assert found == sorted(found, key=order.index), "in the order of the model"


def test_a_suffix_is_a_whole_component(model):
    with pytest.raises(lorry.SiteError):
        chosen(model, "proj")


@pytest.mark.parametrize(
    "exclude, prefix",
    [("layers.1", "model.layers.1."), ("model.layers.1.mlp", "model.layers.1.mlp."), ("self_attn", None)],
)
def test_a_block_is_left_out_with_all_that_is_in_it(model, exclude, prefix):
    every, left = chosen(model, "all-linear"), chosen(model, "all-linear", exclude=exclude)
    inside = [p for p in every if p.startswith(prefix)] if prefix else [p for p in every if ".self_attn." in p]
    assert inside and left == [p for p in every if p not in inside]


def test_what_targets_can_say_can_be_left_out(model):
    assert names(chosen(model, "all-linear", exclude="attention")) == MLP
    left = chosen(model, "all-linear", exclude="attention in layers.0")
    assert [p for p in left if ".0." in p] == [f"model.layers.0.mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")]
    assert len(left) == 21 - 4
    net = unet()
    blocks = chosen(net, ["all-linear", "kind:conv"], exclude="mid_block")
    assert blocks and not any(p.startswith("mid_block.") for p in blocks)
    assert any(p.startswith("mid_block.") and "conv" in p for p in chosen(net, "kind:conv"))


def test_exclude_and_layers(model):
    assert len(chosen(model, "all-linear", exclude="mlp.*")) == 12
    assert len(chosen(model, "all", exclude=["kind:embedding", "q_proj"])) == 18
    assert len(chosen(model, "all-linear", layers=[0, 2])) == 14
    assert chosen(model, "q_proj", layers=[1]) == ["model.layers.1.self_attn.q_proj"]
    selection = select(model, catalogue(model), "q_proj", kinds=EVERY, exclude="layers.0.*", layers=[0, 1])
    assert selection.left_out["model.layers.0.self_attn.q_proj"] == "excluded"
    assert selection.left_out["model.layers.2.self_attn.q_proj"] == "in another layer"
    assert selection.left_out["model.embed_tokens"] == "not targeted"
    assert "output head" in selection.left_out["lm_head"]


@pytest.mark.parametrize(
    "targets, said",
    [
        ("q_porj", "q_proj"),
        ("all_linear", "all-linear"),
        ("attentoin", "attention"),
        ("model.layers.0.self_attn.q_prj", "model.layers.0.self_attn.q_proj"),
        (["q_proj", "v_porj"], "v_proj"),
        ("kind:lnear", "linear"),
    ],
)
def test_no_match_names_near_misses(model, targets, said):
    with pytest.raises(lorry.SiteError, match=f"Did you mean .*'{said}'"):
        chosen(model, targets)


def test_no_match_lists_what_there_is(model):
    with pytest.raises(lorry.SiteError, match="22 sites|23 sites") as error:
        chosen(model, "zzz")
    assert "down_proj" in str(error.value) and "all-linear" in str(error.value)
    with pytest.raises(lorry.SiteError, match="No targets"):
        chosen(model, [])
    with pytest.raises(lorry.SiteError, match="no layer that an adapter can sit on"):
        chosen(nn.LayerNorm(4), "all-linear")
    with pytest.raises(lorry.SiteError, match="left out: excluded"):
        chosen(model, "q_proj", exclude="q_proj")
    with pytest.raises(lorry.SiteError, match="exclude: .*Did you mean 'q_proj'"):
        chosen(model, "all-linear", exclude="q_porj")
    with pytest.raises(lorry.SiteError, match="does not sit on embedding sites"):
        chosen(model, "embed_tokens", kinds=("linear",))
    with pytest.raises(lorry.SiteError, match="not a regular expression"):
        chosen(model, "re:((")


def test_an_error_changes_nothing():
    model = llama(1)
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    for arguments in (
        {"targets": "nothing"},
        {"method": lorry.LoRA(rank=65)},
        {"site_options": {"nothing": {"rank": 2}}},
        {"site_options": {"q_proj": {"rnk": 2}}},
        {"train_also": ["nothing"]},
        {"name": "a b"},
        {"name": "shared"},
        {"name": ""},
        {"method": "loar"},
    ):
        with pytest.raises(lorry.LorryError):
            lorry.attach(model, **arguments)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert not lorry.adapters(model) and not any("lorry" in k for m in model.modules() for k in m.__dict__)


def test_tied_weights_are_said_in_the_plan_and_in_the_receipt():
    model = llama(1, tied=True)
    plan = lorry.plan(model, "lora", ["lm_head", "q_proj"])
    assert {s.path: s.tied for s in plan.sites}["lm_head"] == ("model.embed_tokens.weight",)
    receipt = lorry.attach(model, "lora", targets="embed_tokens").receipt
    assert "lm_head.weight" in receipt.notes[0] and receipt.sites == 1
    assert not lorry.attach(llama(1), "lora", targets="embed_tokens").receipt.notes


def test_presets_leave_output_heads_alone():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config)
    assert "score" not in names(chosen(model, "all-linear")) and chosen(model, "score") == ["score"]


def test_a_bert_encoder_by_presets():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=20)
    model = BertModel(config)
    attention, mlp = chosen(model, "attention"), chosen(model, "mlp")
    assert len(attention) == 8 and len(mlp) == 4 and not set(attention) & set(mlp)
    assert {"word_embeddings", "position_embeddings", "token_type_embeddings"} == names(chosen(model, "embeddings"))


def test_site_options_give_single_sites_other_options():
    model = llama(2)
    adapter = lorry.attach(
        model,
        lorry.LoRA(rank=4, alpha=8),
        site_options={"mlp.*": {"rank": 2}, "layers.0.mlp.up_proj": {"alpha": 1.0}},
    )
    ranks = {p: e.method.rank for p, e in adapter.entries.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 4 and ranks["model.layers.1.mlp.up_proj"] == 2
    both = adapter.entries["model.layers.0.mlp.up_proj"].method
    assert (both.rank, both.alpha) == (2, 1.0), "two patterns that meet at a site both count"


def test_plan_is_what_attach_does_and_runs_on_the_meta_device():
    with torch.device("meta"):
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(llama(2).config)
    assert isinstance(model.config, LlamaConfig)
    plan = lorry.plan(model, lorry.DoRA(rank=4), "mlp", train_also=["norm"])
    adapter = lorry.attach(llama(2), lorry.DoRA(rank=4), targets="mlp", train_also=["norm"])
    assert plan.trained == adapter.count() == sum(p.numel() for p in adapter.parameters())
    assert [s.path for s in plan.sites] == list(adapter.entries) and sum(
        s.parameters for s in plan.sites
    ) == plan.trained
    assert plan.base == sum(p.numel() for p in llama(2).parameters())
    assert plan.training_bytes == 16 * plan.trained and plan.left_out["model.embed_tokens"] == "not targeted"
    assert "6 sites" in str(plan).replace("7 sites", "6 sites") and plan.to_dict()["trained"] == plan.trained


@pytest.mark.parametrize(
    "values, said",
    [
        ({"rank": 0}, "at least 1"),
        ({"rank": 2.0}, "must be int"),
        ({"rank": "8"}, "must be int"),
        ({"rank": True}, "must be int"),
        ({"rank": None}, "must not be None"),
        ({"alpha": 0}, "above 0"),
        ({"alpha": float("nan")}, "must be float"),
        ({"dropout": 1.0}, "below 1"),
        ({"dropout": -0.1}, "at least 0"),
        ({"rank_stabilized": 1}, "must be bool"),
        ({"rnak": 4}, "Did you mean 'rank'"),
    ],
)
def test_options_out_of_range_say_what_was_expected_and_found(values, said):
    with pytest.raises(lorry.OptionError, match=said):
        lorry.method_from({"method": "lora", **values})


def test_method_from_names_presets_and_round_trips():
    assert lorry.method_from("rslora") == lorry.LoRA(rank_stabilized=True)
    assert lorry.method_from({"method": "lora-plus", "rank": 2}) == lorry.LoRA(rank=2, rate_ratio=16.0)
    with pytest.raises(lorry.OptionError, match="Did you mean .*'dora'"):
        lorry.method_from("doraa")
    for info in lorry.methods().values():
        method = lorry.method_from(info.slug)
        assert lorry.method_from(method.to_dict()) == method and info.cls.__doc__


def test_options_know_choices_and_missing_values():
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Settings:
        size: int = option(dataclasses.MISSING, "Size.", at_least=1)
        mode: str = option("fast", "Mode.", choices=("fast", "exact"))

        def __post_init__(self):
            check_options(self)

    assert from_options(Settings, {"size": 2}).size == 2
    with pytest.raises(lorry.OptionError, match="Did you mean 'exact'"):
        from_options(Settings, {"size": 2, "mode": "exakt"})
    with pytest.raises(lorry.OptionError, match="needs a value for 'size'"):
        from_options(Settings, {})


def test_a_module_is_one_kind_of_site_for_all_adapters():
    model = llama()
    lorry.attach(model, lorry.LoRA(rank=2), targets=["lm_head"], name="low-rank")
    with pytest.raises(lorry.SiteError, match="as linear and as block"):
        lorry.attach(model, lorry.LoRA(rank=2), targets="attention", train_also=["lm_head"], name="whole")
    assert list(lorry.adapters(model)) == ["low-rank"]
    with pytest.raises(lorry.SiteError, match="as linear and as block"):
        lorry.attach(model, lorry.LoRA(rank=2), targets=["q_proj", "lm_head"], train_also=["lm_head"], name="both")


def small_gpt2():
    import transformers as tf

    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=20, n_positions=16))


def small_t5(encoder=2, decoder=2):
    import transformers as tf

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "vocab_size": 20}
    return tf.T5ForConditionalGeneration(tf.T5Config(num_layers=encoder, num_decoder_layers=decoder, **sizes))


def small_bert():
    import transformers as tf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 20}
    return tf.BertModel(tf.BertConfig(num_hidden_layers=3, **sizes))


def small_unet():
    return unet(cross=8, head=2)


def small_flux(double=1, single=3):
    from diffusers import FluxTransformer2DModel

    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    widths = {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    return FluxTransformer2DModel(num_layers=double, num_single_layers=single, **heads, **widths)


def small_sd3():
    from diffusers import SD3Transformer2DModel

    heads = {"attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 8}
    widths = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "pooled_projection_dim": 8}
    return SD3Transformer2DModel(num_layers=3, **heads, **widths)


STACKS = {
    "Llama": (lambda: llama(3), "model.layers"),
    "GPT-2": (small_gpt2, "transformer.h"),
    "BERT": (small_bert, "encoder.layer"),
    "SD3": (small_sd3, "transformer_blocks"),
    "Flux": (small_flux, "single_transformer_blocks"),
    "T5 with a longer encoder": (lambda: small_t5(3, 2), "encoder.block"),
}


@pytest.mark.parametrize("make, stack", STACKS.values(), ids=STACKS)
def test_layers_are_blocks_of_the_main_stack(make, stack):
    model = make()
    everything = chosen(model, "all-linear")
    wanted = [p for p in everything if p.startswith((f"{stack}.0.", f"{stack}.2."))]
    assert wanted and chosen(model, "all-linear", layers=[0, 2]) == wanted
    assert chosen(model, "all-linear", layers={stack: [0, 2]}) == wanted
    sites = catalogue(model)
    for path, site in sites.items():
        inside = path.startswith(f"{stack}.")
        assert site.layer == (int(path[len(stack) + 1 :].partition(".")[0]) if inside else None)
    outside = next((p for p in everything if not p.startswith(f"{stack}.")), None)
    if outside is not None:
        left_out = select(model, sites, "all-linear", kinds=EVERY, layers=[0]).left_out
        assert left_out[outside] == f"outside the blocks of '{stack}'"


@pytest.mark.parametrize("make, stack", [(small_unet, "up_blocks"), (small_t5, "decoder.block")], ids=["U-Net", "T5"])
def test_layers_of_a_model_with_several_stacks_are_named_with_their_stack(make, stack):
    model = make()
    assert all(site.layer is None for site in catalogue(model).values())
    with pytest.raises(lorry.SiteError, match=rf"several stacks: .*'{stack}' \(2 blocks\).*layers={{'") as error:
        chosen(model, "all-linear", layers=[0])
    hint = str(error.value).split("layers={'")[1].split("'")[0]
    assert chosen(model, "all-linear", layers={hint: [0]}), "what the error proposes works"
    assert chosen(model, f"{hint}.0.*")
    wanted = [p for p in chosen(model, "all") if p.startswith((f"{stack}.1.", f"{hint}.0."))]
    assert chosen(model, "all", layers={stack: [1], hint: [0]}) == wanted
    with pytest.raises(lorry.SiteError, match=f"no stack of blocks '{stack}s'. Did you mean .*'{stack}'"):
        chosen(model, "all", layers={f"{stack}s": [1]})


def test_a_stack_may_be_named_by_the_end_of_its_path():
    assert chosen(small_gpt2(), "all", layers={"h": (1,)}) == chosen(small_gpt2(), "all", layers=[1])
    both = chosen(small_t5(), "all", layers={"block": [1]})
    assert {p.split(".block.")[0] for p in both} == {"encoder", "decoder"} and all(".block.1." in p for p in both)


def test_layers_of_a_model_without_a_stack():
    with pytest.raises(lorry.SiteError, match="One has no stack of blocks"):
        chosen(One(nn.Linear(3, 3)), "layer", layers=[0])
    sequence = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    assert chosen(sequence, "all-linear", layers=[2]) == ["2"]
    with_head = One(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]))
    with_head.out = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    assert chosen(with_head, "all-linear", layers=[1]) == ["layer.1"], (
        "a sequence of unlike layers is no stack of blocks"
    )


def test_a_former_name_of_a_kind_is_understood():
    model = One(nn.MultiheadAttention(8, 2))
    assert chosen(model, "kind:packed") == chosen(model, "kind:qkv") == ["layer.in_proj_weight", "layer.out_proj"]
    with pytest.raises(lorry.SiteError, match="left out: excluded"):
        chosen(model, "all-linear", exclude="kind:packed")


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
