"""Each bench at a tiny size: its structure, and facts that do not depend on time."""

import io
import json
from functools import partial

import pytest
import torch

import lorry
from lorry.bench import (
    BENCHES,
    _serve_load,
    _serve_peers,
    agents,
    decode,
    diffusion_step,
    fleet,
    fuse,
    kernels,
    limits,
    load,
    merge_adapters,
    methods,
    rows,
    schedule,
    serve,
    step,
    switch,
    switch_fused,
    tenants,
)
from lorry.bench._cases import options, targets
from lorry.bench._count import flops, kept, peak, training_memory
from lorry.bench._measure import integers, interleaved, llama, ratios
from lorry.bench._step import frozen
from lorry.bench._step import step as one_step
from lorry.cli.output import plain

TINY = {"layers": 1, "hidden": 64, "inner": 96}


def shown(module, result):
    """Render the table, and check that the result is plain data."""
    from rich.console import Console

    (bench,) = (one for one in BENCHES.values() if one.function is module.run)
    json.dumps(plain(result))
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(bench.table(result))
    return console.export_text()


def test_a_bench_registers_itself_and_knows_its_options():
    assert {"import", "merge-adapters", "step"} <= set(BENCHES)
    assert all(one.name == name and one.help.endswith(".") and "\n" not in one.help for name, one in BENCHES.items())
    with pytest.raises(lorry.OptionError, match="bench 'switch' has no option 'round'.*'rounds'"):
        BENCHES["switch"].run({"round": 1})
    with pytest.raises(lorry.OptionError, match="no bench 'swich'.*'switch'"):
        BENCHES.find("swich")


def test_rounds_and_ratios():
    seen = []
    cases = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    seconds = interleaved(cases, 3, warm_up=1, repeat=2)
    assert seen == ["a", "b"] + ["a", "a", "b", "b"] * 3
    assert {n: len(v) for n, v in seconds.items()} == {"a": 3, "b": 3}
    found = ratios({"a": [1.0, 2.0, 9.0], "b": [1.0, 1.0, 3.0]}, "b")["a"]
    assert found == {"ratio": 2.0, "least": 1.0, "most": 3.0}
    assert integers("128,256") == [128, 256] and integers(7) == [7] and integers([1, 2]) == [1, 2]
    with pytest.raises(lorry.OptionError, match="'wide'"):
        integers("wide")


def test_switching_in_the_weights_restores_every_byte_and_adding_does_not():
    result = switch_fused.run(rounds=1, widths="64", layers=2, density=0.05, rank=4)
    found = result["widths"][64]
    for dtype in ("float32", "bfloat16"):
        assert found["changed"][dtype]["scatter"] == 0
        assert found["changed"][dtype]["lorry fuse, unfuse"] == 0
        assert 0 < found["changed"][dtype]["add, subtract"] < 1
        assert 0 < found["changed"][dtype]["peft merge, unmerge"] < 1
    entries = 2 * round(0.05 * 64 * 64)
    assert found["bytes"]["scatter"] == entries * (8 + 4 + 4)
    assert found["bytes"]["fuse"] == 2 * (2 * 64 * 64 + 2 * 4 * 64) * 4
    assert found["bytes"]["scatter"] < found["bytes"]["scatter, whole cache lines"]
    assert "add, subtract" in shown(switch_fused, result)


def test_flops_of_lora_are_those_of_its_products():
    tokens = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(0))
    base, model = (frozen(llama(1, 64, 96)) for _ in range(2))
    lorry.attach(model, {"method": "lora", "rank": 4})
    floor, whole = (flops(partial(one_step, m, tokens)) for m in (base, model))
    sites = lorry.adapters(model)["default"].entries.values()
    # down and up, forward, and backward for input and factor each
    assert whole - floor == sum(3 * 2 * 16 * 4 * (e.site.in_features + e.site.out_features) for e in sites)
    products = 4 * 64 * 64 + 3 * 64 * 96 + 512 * 64
    assert floor > 2 * 2 * 16 * products


def test_flops_of_sparse_products_count_stored_entries():
    tokens = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(0))
    base, model = (frozen(llama(1, 64, 96)) for _ in range(2))
    adapter = lorry.attach(model, {"method": "shira", "rank": 2})
    floor, whole = (flops(partial(one_step, m, tokens)) for m in (base, model))
    # forward and the gradient of the input go through W + S; what is left are the gradients of the entries
    assert whole - floor == 2 * 16 * sum(p.numel() for p in adapter.parameters())


def test_memory_is_counted():
    weight = torch.zeros(256, 256)

    def four():
        first = weight + 1
        second = first + 1
        del first
        return (second + 1).view(-1)

    assert peak(four) == 2 * weight.nbytes
    layer = torch.nn.Linear(256, 256, bias=False)
    x = torch.zeros(8, 256, requires_grad=True)
    assert kept(layer, lambda: layer(x.exp()).sum().backward()) == 2 * x.nbytes - x.nbytes
    found = training_memory(layer, lambda: layer(x.exp()).sum().backward())
    assert found["trained"] == 256 * 256
    assert found["parameters"] == found["gradients"] == weight.nbytes
    assert found["optimizer"] == 2 * weight.nbytes + 4
    assert found["peak"] >= found["parameters"] + found["gradients"] + found["optimizer"]


def test_methods_side_by_side():
    result = methods.run("shira,mos,vera", rounds=1, batch=1, length=16, rank=2, **TINY)
    found = result["methods"]
    assert list(found) == ["lora", "shira", "mos", "vera"]
    assert found["lora"]["time_to_lora"] == found["lora"]["flops_to_lora"] == found["lora"]["over"] == 1
    assert found["shira"]["memory"]["trained"] == found["lora"]["memory"]["trained"]
    assert found["vera"]["memory"]["trained"] < found["lora"]["memory"]["trained"]
    assert all(f["flops"] > 1 for f in found.values())
    assert "vera" in shown(methods, result)
    assert "allow rank 2" in methods.run("mos", rounds=1, batch=1, length=4, rank=8, **TINY)["left_out"]["mos"]
    with pytest.raises(lorry.OptionError, match="Did you mean"):
        methods.run("shirra", rounds=1, **TINY)


@pytest.mark.parametrize("method", ["mixlora", "mixdora", "full"])
def test_a_method_of_whole_blocks_is_measured_on_feed_forward_blocks(method):
    model = llama(2, 64, 96)
    adapter = lorry.attach(model, options(method, 2), targets=targets(method))
    assert [e.site.kind.name for e in adapter.entries.values()] == ["block", "block"]
    assert all(path.endswith(".mlp") for path in adapter.entries)


def test_step_with_one_method():
    result = step.run("dora", rounds=1, batch=1, length=16, rank=2, **TINY)
    assert set(result["ratios"]) == {"floor", "lora", "dora", "peft lora"} == set(result["kept_mb"])
    assert result["kept_mb"]["floor"] <= result["kept_mb"]["lora"] < result["kept_mb"]["dora"]
    assert "dora" in shown(step, result)


def test_rows_beside_peft():
    result = rows.run(rounds=1, batch=4, steps=2, prefill=4, rank=2, **TINY)
    for phase in ("decode", "prefill"):
        assert set(result[phase]) == {"base", "1 adapters", "peft 1 adapters", "4 adapters", "peft 4 adapters"}
    assert "decode" in shown(rows, result)


def test_decoding_beside_a_floor_written_by_hand():
    result = decode.run(rounds=1, steps=2, rank=2, **TINY)
    assert list(result["dtypes"]) == ["float32", "bfloat16"]
    for found in result["dtypes"].values():
        assert set(found["base"]) == {"base", "floor", "dora floor", "lora", "dora", "peft lora", "peft dora"}
        assert set(found["floor"]) == {"lora", "peft lora"} and set(found["dora floor"]) == {"dora", "peft dora"}
    assert "dora floor" in shown(decode, result)


@pytest.mark.parametrize("module", [load, switch], ids=["load", "switch"])
def test_many_adapters(module):
    result = module.run(rounds=1, rank=2, most=10, peer_most=1, **TINY)
    assert list(result["loaded"]) == [1, 10]
    assert any("peft" in key for key in result["loaded"][1])
    assert not any("peft" in key for key in result["loaded"][10])
    assert "10" in shown(module, result)


def test_fleet_over_widths():
    result = fleet.run(rounds=1, jobs=2, length=4, layers=1, widths=[64, 128], rank=2)
    assert list(result["widths"]) == [64, 128]
    assert result["widths"][64]["lorry, one joint step"]["ratio"] == 1
    assert "job after job" in shown(fleet, result)


def test_fusing_into_the_base_and_merging_of_adapters():
    result = fuse.run(rounds=1, rank=2, **TINY)
    assert {"addmm", "lorry keep=False", "lorry fuse", "lorry unfuse", "peft fuse"} <= set(result["ratios"])
    assert "addmm" in shown(fuse, result)
    result = merge_adapters.run(widths="64", rank=2, repeats=1, memory=False)
    assert [c["type"] for c in result["cases"]] == ["svd", "cat", "linear"]
    assert all(c["difference"] < 1e-5 for c in result["cases"])
    assert "svd" in shown(merge_adapters, result)


def test_the_simulated_schedule_is_the_shortest_and_the_same_every_time():
    options = {"seeds": 2, "jobs": 3, "stages": 3, "steps": 2, "batch": 4, "capacity": 1024, "multiple": 64}
    result = schedule.run(**options, median=200)
    assert result == schedule.run(**options, median=200)
    times = {name: way["milliseconds"] for name, way in result["ways"].items()}
    assert min(times, key=times.get) == "lorafusion"
    assert all(way["least"] <= way["ratio"] <= way["most"] for way in result["ways"].values())
    assert "pad-concat" in shown(schedule, result)
    with pytest.raises(lorry.OptionError, match="at least 1"):
        schedule.run(jobs=0)


def test_limits_measures_growth_and_the_same_gradients():
    result = limits.run(lengths="64,128,256", rounds=1)
    assert list(result["lengths"]) == ["64", "128", "256"]
    for row in result["lengths"].values():
        assert row["relative error"] < 1e-6 and row["ratio to torch"]["ratio"] > 0
    memory = result["slopes"]["bytes"]
    assert memory["factors"] < 1.1 < 1.8 < memory["matrix"]
    assert set(result["slopes"]["seconds"]) == {"factors", "torch", "matrix"}
    assert "Growth with the length" in shown(limits, result)
    assert limits.slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    with pytest.raises(lorry.OptionError, match="at least two numbers"):
        limits.run(lengths="64")


def test_kernels_without_a_gpu_says_so_and_measures_the_forms_for_the_cpu():
    result = kernels.run(rounds=1, widths="32", tokens=96, rank=4, adapters=3, device="cpu")
    found = result["widths"][32]
    assert set(found["to base"]) == set(found["kept"]) and "of roofline" not in found
    assert found["kept"]["fused, dropout"] == found["kept"]["fused"] == 4 * (96 * 32 + 96 * 4)
    assert found["kept"]["fused, packed"] < found["kept"]["plain, packed"]
    assert 0 < found["traffic"]["with dropout"] < found["traffic"]["without dropout"] < 1
    assert "There is no GPU here" in shown(kernels, result)
    if not torch.cuda.is_available():
        with pytest.raises(lorry.OptionError, match="device=cuda"):
            kernels.run(device="cuda")


SERVE = {"layers": 1, "hidden": 64, "inner": 96, "ranks": (2, 8), "requests": 6, "inputs": (4, 9), "answers": (2, 5)}


def test_serving_counts_and_one_memory_runs_no_fewer_at_once_than_halves():
    texts = {"ranks": "2,8", "inputs": "4,9", "answers": "2,5", "adapters": "2,5", "requests": 8}
    result = serve.run(rounds=1, **TINY, **texts, batch=4, peers=False, pool_bytes=8 << 20, held=2)
    assert set(result["adapters"]) == {"bare base", "2 adapters", "5 adapters"} and "peers" not in result
    assert result["adapters"]["2 adapters"] == {"ratio": 1.0, "least": 1.0, "most": 1.0}
    for burst, ways in result["pools"].items():
        assert ways["unified"]["at most"] >= ways["halves"]["at most"] > 0, burst
    assert ways["unified"]["steps"] <= ways["halves"]["steps"]
    assert result["pools"]["small ranks"]["unified"]["at most"] > result["pools"]["small ranks"]["halves"]["at most"]
    assert "mixed ranks" in shown(serve, result)
    with pytest.raises(lorry.OptionError, match="least and most tokens"):
        serve.run(inputs="9,4")


def test_peers_of_serving_do_the_same_work_as_the_engine():
    shape = _serve_load.Shape(**SERVE, batch=4)
    base = _serve_load.asked(shape, 0, 3)
    expected = [list(each.tokens) for each in _serve_load.Served(shape, 0).answer(base)]
    assert [len(tokens) for tokens in expected] == [each.answer for each in base]
    assert _serve_peers.batched_generate(shape).answer(base) == expected
    with _serve_peers.continuous_batching(shape) as peer:
        assert peer.answer(base) == expected
    named = _serve_load.asked(shape, 3, 3)
    assert [each.prompt for each in named] == [each.prompt for each in base]
    assert len({each.adapter for each in named}) > 1
    torch.manual_seed(0)
    rows = _serve_peers.peft_names(shape, 3).answer(named)
    for way in (_serve_peers.peft_switch, _serve_peers.peft_merge):
        torch.manual_seed(0)
        assert way(shape, 3).answer(named) == rows


def test_agents():
    """Sizes of caches and tokens that are run are those of LRAgent's formulas."""
    result = agents.run(rounds=1, roles=2, turns=4, prompt=8, observation=5, answer=2, rank=2, lengths="16,32", **TINY)
    schemes = result["schemes"]
    assert result["tokens"] == 36 and list(schemes) == ["non-shared", "full-shared", "base-shared", "base-lr-shared"]
    # what the last role has read, and the other one a turn before; the last token is run by nobody
    last, before = 35, 28
    width = 2 * 64
    assert schemes["full-shared"]["numbers"] == width * last
    assert schemes["non-shared"]["numbers"] == width * (last + before)
    assert schemes["base-shared"]["numbers"] == width * last + 2 * (last + before)
    assert schemes["base-lr-shared"]["numbers"] == (width + 2) * last
    assert [each["forwarded"] for each in schemes.values()] == [last + before, last, last + before, last]
    text = shown(agents, result)
    assert "base-lr-shared" in text and "expanding to reordered" in text
    with pytest.raises(lorry.OptionError, match="turns"):
        agents.run(turns=0)


def test_clients_that_train_together_share_passes():
    pytest.importorskip("google.protobuf")
    result = tenants.run(rounds=1, widths="64", layers=1, tenants=3, steps=2, tokens=6)
    passes = result["widths"]["64"]["passes"]
    assert passes["one after another"] == 6 and passes["together"] < 6
    assert "3 clients" in shown(tenants, result)


@pytest.mark.parametrize("network", ["unet", "flux"])
def test_a_step_on_pictures_is_that_of_diffusers_and_peft(network):
    """The same losses step after step, so the same gradients and the same optimizer, from the same draws."""
    sides = diffusion_step.trainers(network, "tiny")
    losses = {name: [side.step() for _ in range(3)] for name, side in sides.items()}
    assert losses[diffusion_step.OURS] == pytest.approx(losses[diffusion_step.PEER], rel=1e-5)
    assert len(set(losses[diffusion_step.PEER])) == 3
    ours, peer = (sides[name] for name in (diffusion_step.OURS, diffusion_step.PEER))
    assert sum(p.numel() for p in ours.trained) == sum(p.numel() for p in peer.trained)
    assert kept(ours.network, ours.backward) <= 1.01 * kept(peer.network, peer.backward)


def test_the_table_of_steps_on_pictures():
    result = diffusion_step.run(networks="flux", sizes="tiny", rounds=1)
    assert set(result["cases"]) == {"flux, tiny"} and result["cases"]["flux, tiny"]["difference"] < 1e-5
    assert "flux, tiny" in shown(diffusion_step, result)
    with pytest.raises(lorry.OptionError, match="no size"):
        diffusion_step.trainers("unet", "huge")
