"""Fleets in a pipeline of several processes equal fleets on one; what cannot be cut is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training import piped
from training.launching import forked
from training.tiny_bases import tiny_llama, token_rows
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from lorry.core.errors import OptionError
from lorry.core.life.api import adapters
from lorry.training import Fleet, Job, train
from lorry.training.pipelined import PipelinedRounds
from lorry.training.processes import Processes
from lorry.training.report import read_metrics
from lorry.training.stages import Stages

JOBS = [job.name for job in piped.jobs()]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train(piped.base(), None, piped.jobs(), folder, planner=piped.PLAN)
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    fleet = Fleet(piped.base(), None, piped.jobs(), tmp_path_factory.mktemp("begun"))
    for adapter in adapters(fleet.model).values():
        adapter.save(fleet.output / adapter.name)
    return fleet.output


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {processes: tmp_path_factory.mktemp(f"pipeline-{processes}") for processes in (2, 4)}
    forked(piped.__name__, *found.items())
    return found


@pytest.fixture(scope="module", params=[2, 4])
def several(request, folders):
    return folders[request.param]


def apart(one, two):
    """How far two adapters on disk lie apart."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_a_pipeline_trains_the_adapters_of_one_process(one, several, begun):
    for name in JOBS:
        assert apart(one / name / "adapter", several / "whole" / name / "adapter") < 1e-12
        assert apart(one / name / "adapter", begun / name) > 1e-4


def test_losses_and_evaluations_are_those_of_one_process(one, several):
    for name in JOBS:
        there, here = (read_metrics(f / name / "metrics.jsonl") for f in (one, several / "whole"))
        by_step = [{(row["step"], "loss" in row): row for row in rows} for rows in (there, here)]
        assert by_step[0].keys() == by_step[1].keys() and len(there) == len(here)
        for key, row in by_step[0].items():
            for column in row.keys() - {"seconds"}:
                assert by_step[1][key][column] == pytest.approx(row[column], rel=1e-9), column


def test_a_pipeline_that_is_resumed_equals_one_that_went_through(one, several):
    found = json.loads((several / "found.json").read_text())
    if found["stages"] == 4:
        pytest.skip("two stages show it")
    for name in JOBS:
        assert apart(one / name / "adapter", several / "resumed" / name / "adapter") < 1e-12


def test_each_process_holds_its_stage_and_the_pipeline_is_filled(several):
    found = json.loads((several / "found.json").read_text())
    held, stages = found["held"], found["stages"]
    assert len(held) == stages
    assert [i for each in held for i in each["blocks"]] == list(range(5))
    assert [each["embedding"] for each in held] == [i in (0, stages - 1) for i in range(stages)]  # a tied head
    assert [each["flights"] for each in held] == list(range(stages, 0, -1))


def test_the_weights_of_other_stages_are_let_go_of():
    model = tiny_llama()
    before = sum(p.numel() for p in model.parameters())
    own = model.model.layers[1].mlp.up_proj.weight.clone()
    Stages(model, 2).keep(1, [])
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, own)
    assert model.model.layers[0].mlp.up_proj.weight.numel() == model.model.embed_tokens.weight.numel() == 0
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(
            vocab_size=97,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        ),
        GPT2Config(vocab_size=97, n_embd=16, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0),
        BloomConfig(vocab_size=97, hidden_size=16, n_layer=4, n_head=2),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_do_more_around_their_blocks_are_cut_as_they_are(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    stages = Stages(model, 3)  # scaled embeddings, added positions, biases of attention: the trial compares them all
    assert stages.bounds == [0, 1, 2, 4]
    assert (stages.width, stages.dtype) == (16, torch.float32)
    assert model.training


def test_models_without_one_stack_and_too_many_stages_are_refused():
    with pytest.raises(OptionError, match="2 blocks.*at most 2"):
        Stages(tiny_llama(), 3)
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(OptionError, match="T5ForConditionalGeneration.*Leave pipeline out"):
        Stages(T5ForConditionalGeneration(config), 2)


def test_a_model_whose_stages_give_something_else_is_refused():
    model = tiny_llama()
    model.model.layers[1].register_forward_pre_hook(lambda m, args: (args[0] + model.model.seen, *args[1:]))
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: setattr(model.model, "seen", out))
    with pytest.raises(OptionError, match="something else than the whole"):
        Stages(model, 2)


def test_what_does_not_fit_a_pipeline_is_refused_by_name(tmp_path):
    job = Job.from_dict({"name": "job", "data": token_rows(6, (3, 9), 1), "steps": 2, "dynamics": "lora-mgpo"})
    with pytest.raises(OptionError, match="--nproc-per-node 2"):
        Fleet(tiny_llama(), None, [job], tmp_path, planner="lorafusion", pipeline={"stages": 2})
    with pytest.raises(OptionError, match="planner: lorafusion"):
        Fleet(tiny_llama(), None, [job], tmp_path, pipeline={"stages": 2}, processes=Processes(0, 2))
    fleet = Fleet(tiny_llama(), None, [job], tmp_path)
    with pytest.raises(OptionError, match="'job'.*'lora-mgpo'"):
        PipelinedRounds(fleet.base, fleet.planner, Processes(0, 2), fleet.runs)
    layer = fleet.runs[0].adapter.sites[0].owner
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(OptionError, match="int8.*Leave pipeline out"):
        PipelinedRounds(fleet.base, fleet.planner, Processes(0, 2), fleet.runs)
