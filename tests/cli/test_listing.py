"""`lorry --help`, `methods`, `plan`, `version`, `bench`: what reads no weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorry.cli.main import MISUSE

COMMANDS = (
    "plan",
    "train",
    "eval",
    "generate",
    "merge",
    "convert",
    "inspect",
    "limits",
    "methods",
    "bench",
    "demo",
    "version",
    "init",
    "chat",
    "push",
    "pull",
    "doctor",
    "completion",
)
SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(lorry, command):
    result = lorry(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert command in lorry("--help").stdout


def test_help_needs_no_library_beyond_torch():
    """`lorry --help` must not wait for transformers or matplotlib."""
    code = (
        "import sys, lorry.cli.main as m\n"
        "print([n for n in ('transformers', 'matplotlib', 'datasets', 'diffusers', 'peft', 'pandas') if n "
        "in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_version(run_json):
    import lorry as package

    assert run_json("version")["lorry"] == package.__version__


def test_methods_lists_the_registry(lorry, run_json):
    import lorry as package

    listed = run_json("methods")
    assert listed["methods"].keys() == package.methods().keys()
    assert listed["methods"]["lora"]["options"]["rank"]["default"] == 8
    assert listed["presets"]["rslora"] == {
        "of": "lora",
        "paper": "arXiv 2312.03732",
        "options": {"rank_stabilized": True},
    }
    shown = lorry("methods").stdout
    assert all(slug in shown for slug in package.methods())


def test_one_method_shows_its_options(lorry):
    assert "Rank of the update." in lorry("methods", "rslora").stdout
    wrong = lorry("methods", "lorra")
    assert wrong.exit_code == MISUSE and "'lora'" in wrong.stderr


def test_plan_counts_parameters(run_json, base):
    found = run_json("plan", base, "--option", "rank=4", "--targets", "q_proj,v_proj")
    assert found["class"] == "LlamaForCausalLM"
    assert len(found["sites"]) == 4
    assert found["trained"] == 4 * 4 * (16 + 16)
    assert {s["path"].rpartition(".")[2] for s in found["sites"]} == {"q_proj", "v_proj"}
    assert found["left_out"]["model.layers.0.self_attn.k_proj"] == "not targeted"
    assert "head" in found["left_out"]["lm_head"]


def test_plan_reads_no_weights(run_json, base, tmp_path):
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    assert run_json("plan", tmp_path) == {**run_json("plan", base), "model": str(tmp_path)}


def test_plan_agrees_with_attaching(run_json, base):
    from transformers import AutoModelForCausalLM

    import lorry as package

    found = run_json("plan", base, "-m", "dora", "-o", "rank=2", "--layers", "1", "--exclude", "k_proj")
    attached = package.attach(
        AutoModelForCausalLM.from_pretrained(base), package.DoRA(rank=2), layers=[1], exclude=["k_proj"]
    )
    assert [s["path"] for s in found["sites"]] == list(attached.entries)
    assert found["trained"] == attached.count()


def test_plan_estimates_memory_and_the_largest_batch(run_json, lorry, base):
    flags = ("--batch-size", 2, "--length", 16, "--requests", 3, "--dtype", "float32")
    found = run_json("plan", base, *flags, "--memory", "2MB", "--flops", "1e12", "--bandwidth", "1e11")["estimate"]
    for given in found.values():
        parts = dict(given["bytes"])
        assert parts.pop("total") == sum(parts.values()) and parts["weights"] == 4 * (14 * 16 + 2 * 2592 + 16) + 32
    kept, recomputed = (found[n]["bytes"]["total"] for n in ("training", "training, checkpointing"))
    assert recomputed < kept and found["serving"]["bytes"]["cache"] == 3 * 16 * 2 * 2 * 16 * 4
    assert found["training"]["seconds"] > 0 and found["serving"]["token_seconds"] > 0
    most = found["training"]["largest_batch"]
    fits, over = (
        run_json("plan", base, *flags[2:], "--batch-size", n)["estimate"]["training"]["bytes"]["total"]
        for n in (most, most + 1)
    )
    assert fits <= 2_000_000 < over
    assert f"up to {most} rows" in lorry("plan", base, *flags, "--memory", "2MB").stdout
    assert "24GiB" in lorry("plan", base, "--memory", "much").stderr
    assert "belong together" in lorry("plan", base, "--flops", "1e12").stderr


def test_plan_says_why_it_cannot_estimate(run_json, base):
    found = run_json("plan", base, "-m", "shira")["estimate"]
    assert "cannot be estimated" in found["training"]["not_estimated"]


def test_plan_table_groups_sites(lorry, base):
    shown = lorry("plan", base).stdout
    assert "model.layers.[0..1].self_attn.q_proj" in shown
    assert "the output head; name it to adapt it" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--targets", "q_prj"), ("q_prj", "q_proj")),
        (("--option", "rnk=4"), ("rnk", "rank")),
        (("--option", "rank"), ("KEY=VALUE",)),
        (("--option", "rank=0"), ("at least 1",)),
        (("--method", "lroa"), ("lroa", "lora")),
        (("--layers", "3-1"), ("3-1",)),
        (("--task", "casual-lm"), ("causal-lm",)),
        (("--no-such-flag",), ("--no-such-flag",)),
    ],
)
def test_misuse_is_exit_2_on_one_line(lorry, base, arguments, words):
    result = lorry("plan", base, *arguments)
    assert result.exit_code == MISUSE
    assert result.stdout == ""
    assert all(word in result.stderr for word in words)
    assert "Traceback" not in result.stderr


def test_missing_and_foreign_folders(lorry, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        result = lorry("plan", folder)
        assert result.exit_code == MISUSE and str(folder) in result.stderr


def test_a_damaged_config_is_misuse(lorry, tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    result = lorry("plan", tmp_path)
    assert result.exit_code == MISUSE and "config.json" in result.stderr


def test_debug_shows_the_traceback(lorry, base):
    assert "Traceback" in lorry("--debug", "plan", base, "-t", "nothing").stderr


def test_bench_lists_and_refuses(lorry, run_json):
    listed = run_json("bench")["benches"]
    assert listed["step"].endswith("PEFT.") and "merge-adapters" in listed
    wrong = lorry("bench", "no-such-bench")
    assert wrong.exit_code == MISUSE and "no-such-bench" in wrong.stderr


def test_as_a_program(base):
    """The real thing: a process, its exit codes and its two streams."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "lorry", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)

    good = call("plan", base, "--json")
    assert good.returncode == 0
    assert json.loads(good.stdout)["trained"] > 0
    bad = call("plan", base, "--targets", "q_prj")
    assert bad.returncode == MISUSE
    assert bad.stdout == ""
    assert bad.stderr.startswith("error: ") and len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["start", "scaling", "dynamics"])
def test_methods_lists_the_other_choices_of_a_job(kind, lorry, run_json):
    from lorry.training.hooks import DYNAMICS
    from lorry.training.scalings import SCALINGS
    from lorry.training.starts import STARTS

    registry = {"start": STARTS, "scaling": SCALINGS, "dynamics": DYNAMICS}[kind]
    listed = run_json("methods", "--kind", kind)[kind]
    assert listed.keys() == registry.keys()
    assert all(facts["is"] for facts in listed.values())
    name = next(iter(registry))
    assert run_json("methods", name, "--kind", kind)[kind] == {name: listed[name]}


def test_methods_lists_presets_of_methods_and_of_combinations(lorry, run_json):
    listed = run_json("methods", "--kind", "preset")["preset"]
    assert listed["rslora"]["method"] == {"method": "lora", "rank_stabilized": True}
    assert listed["lora-ga"]["start"] == "lora-ga" and listed["lora-ga"]["scaling"] == "rslora"
    assert run_json("methods", "dude", "--kind", "preset")["preset"] == {"dude": listed["dude"]}
    assert "lora-ggpo:beta=0.0" in lorry("methods", "flat-lora", "--kind", "preset").stdout


def test_methods_of_a_kind_that_there_is_not(lorry):
    failed = lorry("methods", "--kind", "strat")
    assert failed.exit_code == MISUSE and "structure, start, scaling, dynamics, preset" in failed.stderr
