"""`lorry train`, `eval`, `generate`, `merge`, `convert`, `inspect` on a real tiny model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lorry.cli.arguments import adapter_reference, key_values, layers
from lorry.cli.generate import parse_prompt
from lorry.cli.main import FAILURE, MISUSE
from lorry.cli.spectrum import singular_values, summary
from lorry.core.errors import OptionError

# -- texts into data


def test_key_values_read_numbers_and_lists():
    assert key_values(["rank=4", "a-b=1e-3", "c=[1, 2]", "d=true", "e=x=y"]) == {
        "rank": 4, "a_b": 1e-3, "c": [1, 2], "d": True, "e": "x=y",
    }  # fmt: skip
    for bad in (["rank"], ["=4"], ["a=1", "a=2"], ["a=[1"]):
        with pytest.raises(OptionError):
            key_values(bad)


def test_layers():
    assert layers("0-2,5") == [0, 1, 2, 5]
    assert layers(None) is None
    for bad in ("", "a", "3-1", "1,"):
        with pytest.raises(OptionError):
            layers(bad)


def test_adapter_reference(tmp_path):
    folder = tmp_path / "math"
    folder.mkdir()
    assert adapter_reference(str(folder)) == ("math", folder, 1.0)
    assert adapter_reference(f"m={folder}:0.5") == ("m", folder, 0.5)
    with pytest.raises(OptionError, match="no adapter at"):
        adapter_reference(f"m={tmp_path / 'other'}")


def test_prompts_name_their_adapters():
    loaded = {"math": 1.0, "story": 0.5}
    assert parse_prompt("2+2", loaded).adapters == loaded
    assert parse_prompt("math::2+2", loaded).adapters == {"math": 1.0}
    assert parse_prompt("math:0.7+story::a::b", loaded) == parse_prompt("math:0.7+story:0.5::a::b", loaded)
    assert parse_prompt("none::2+2", loaded).adapters == {}
    assert parse_prompt("::std::map", loaded).text == "std::map"
    for bad in ("maht::2+2", "math:x::2+2"):
        with pytest.raises(OptionError):
            parse_prompt(bad, loaded)


# -- spectra


@pytest.mark.parametrize("lead", [(), (3,)])
def test_singular_values_equal_those_of_the_dense_update(lead):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(*lead, 4, 9, generator=generator)
    b = torch.randn(*lead, 7, 4, generator=generator)
    dense = torch.linalg.svdvals((b @ a * -0.5).double())[..., :4]
    values = singular_values(a, b, -0.5)
    torch.testing.assert_close(values, dense, atol=1e-6, rtol=1e-6)
    facts = summary(values)
    assert facts["norm"] == pytest.approx(float((b @ a * 0.5).norm()), rel=1e-5)
    assert 1 <= facts["stable_rank"] <= facts["effective_rank"] <= 4


def test_a_fresh_update_has_no_rank():
    facts = summary(singular_values(torch.ones(2, 5), torch.zeros(6, 2)))
    assert facts["norm"] == facts["stable_rank"] == facts["effective_rank"] == 0


# -- train


def test_training_from_flags_learns(adapter):
    report = json.loads((adapter.parents[1] / "report.json").read_text(encoding="utf-8"))
    job = report["jobs"][0]
    assert job["status"] == "done" and job["steps"] == 60
    assert job["last_loss"] < 0.3 * job["first_loss"]
    assert (adapter.parents[1] / "losses.png").read_bytes().startswith(b"\x89PNG")


RUN = """
base: {base}
out: {out}
defaults: {{data: {data}, objective: completion, steps: 4, rate: 1e-2, method: {{method: lora, rank: 2}}}}
jobs:
  - name: one
  - {{name: two, method: dora, seed: 1, epochs: 2}}
"""


def test_training_from_yaml(run_json, base, data, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(base=base, data=data, out=tmp_path / "out"), encoding="utf-8")
    report = run_json("train", file)
    assert {j["name"]: (j["method"]["method"], j["steps"]) for j in report["jobs"]} == {
        "one": ("lora", 4),
        "two": ("dora", 4),  # two epochs of ten rows in batches of eight
    }
    assert (tmp_path / "out" / "two" / "adapter" / "lorry.json").is_file()


def test_a_router_over_adapters_from_flags_and_from_yaml(run_json, base, data, adapter, tmp_path):
    """The same job both ways: its method is built from adapters that exist, and its router is trained."""
    common = {"objective": "completion", "steps": 2, "learning_rate": 0.01, "method": "lora-mixer"}
    flags = [part for name, value in common.items() for part in (f"--{name.replace('_', '-')}", value)]
    paths = [shutil.copytree(adapter, tmp_path / name) for name in ("one", "two")]
    built = [part for path in paths for part in ("--built-from", path)]
    first = run_json("train", "--base", base, "--data", data, *flags, *built, "--out", tmp_path / "job")
    experts = {path.name: {"path": str(path)} for path in paths}
    job = {"name": "job", "data": str(data), **common, "built_from": experts}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"base": str(base), "output": str(tmp_path / "yaml"), "jobs": [job]}))
    second = run_json("train", file)
    assert first["jobs"][0]["last_loss"] == second["jobs"][0]["last_loss"]
    assert first["jobs"][0]["method"]["method"] == "lora-mixer" and first["jobs"][0]["status"] == "done"


def test_a_structure_with_a_start_from_flags_and_from_yaml(run_json, base, data, tmp_path):
    common = {"objective": "completion", "steps": 2, "learning_rate": 0.01, "method": "dora", "start": "lora-ga"}
    flags = [part for name, value in common.items() for part in (f"--{name.replace('_', '-')}", value)]
    options = ("--start-options", "stable_gamma=64", "--option", "rank=2")
    first = run_json("train", "--base", base, "--data", data, *flags, *options, "--out", tmp_path / "job")
    start = {"start": "lora-ga", "stable_gamma": 64}
    job = {"name": "job", "data": str(data), **common, "start": start, "rank": 2}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"base": str(base), "output": str(tmp_path / "yaml"), "jobs": [job]}))
    second = run_json("train", file)
    assert first["jobs"][0]["last_loss"] == second["jobs"][0]["last_loss"]
    assert first["jobs"][0]["status"] == "done"
    saved = json.loads((tmp_path / "job" / "job" / "adapter" / "lorry.json").read_text())
    assert saved["method"]["method"] == "offset" and saved["method"]["of"]["method"] == "dora"
    assert saved["metadata"]["start"] == "lora-ga"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("steps: 4", "setps: 4"), ("setps", "'steps'")),
        (("out:", "otu:"), ("otu", "'out'")),
        (("rank: 2", "rnk: 2"), ("rnk", "'rank'")),
        (("rate: 1e-2", "rate: fast"), ("rate", "fast")),
        (("- name: one", "- name: two"), ("Two jobs", "two")),
        (("base: ", "dtype: float12\nbase: "), ("dtype", "float12")),
        (("base: ", "steps: 3\nbase: "), ("steps", "under jobs or defaults")),
        (("base: ", "out: x\nbase: "), ("stands twice", "line")),
        (("jobs:", "jobs: ["), ("is not YAML",)),
    ],
)
def test_bad_yaml_is_misuse_and_trains_nothing(lorry, base, data, tmp_path, change, words):
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(base=base, data=data, out=tmp_path / "out").replace(*change), encoding="utf-8")
    result = lorry("train", file)
    assert result.exit_code == MISUSE, result.output
    assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "out").exists()


def test_the_schema_covers_every_option(run_json, lorry):
    schema = json.loads(lorry("train", "--schema").stdout)
    job = schema["$defs"]["job"]["properties"]
    assert job["batch_size"]["minimum"] == 1 and "Rows" in job["batch_size"]["description"]
    assert job["schedule"]["enum"] and schema["properties"]["jobs"]["items"] == {"$ref": "#/$defs/job"}


def test_finding_a_rate_trains_nothing_and_says_the_best(run_json, lorry, base, data, tmp_path):
    flags = ("train", "--base", base, "--data", data, "--out", tmp_path / "run", "--objective", "completion",
             "--steps", 8, "--batch-size", 5, "--find-rate")  # fmt: skip
    (advice,) = run_json(*flags)["jobs"].values()
    best = min((t for t in advice["trials"] if t["loss"] is not None), key=lambda t: t["loss"])
    assert advice["rate"] == best["rate"] and advice["steps"] == 8
    assert f"--learning-rate {best['rate']:g}" in lorry(*flags).stdout
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["rates"]


def test_flags_that_do_not_go_together(lorry, base, data, tmp_path):
    assert "--data" in lorry("train", "--base", base, "--out", tmp_path / "o").stderr
    (tmp_path / "r.yaml").write_text("{}", encoding="utf-8")
    result = lorry("train", tmp_path / "r.yaml", "--data", data)
    assert result.exit_code == MISUSE and "do not go together" in result.stderr


def test_a_job_that_fails_is_exit_1_and_leaves_the_others(lorry, base, data, tmp_path):
    file = tmp_path / "run.yaml"
    text = RUN.format(base=base, data=data, out=tmp_path / "out")
    text += f"  - {{name: lost, data: {tmp_path}/nothing.jsonl}}\n"
    file.write_text(text, encoding="utf-8")
    result = lorry("train", file)
    assert result.exit_code == FAILURE
    assert "'lost' failed" in result.stderr
    assert (tmp_path / "out" / "one" / "adapter").is_dir()


def test_a_classifier_trains_its_new_head_and_is_measured(run_json, base, tmp_path):
    words = {
        "red": "colour",
        "green": "colour",
        "blue": "colour",
        "cat": "other",
        "dog": "other",
        "sun": "other",
    }
    rows = [{"text": f"{w} {w}", "label": label} for w, label in words.items()]
    file = tmp_path / "colours.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    report = run_json(
        "train", "--base", base, "--data", file, "--out", tmp_path / "out", "--objective", "classification",
        "--steps", 40, "--rate", "2e-2", "--name", "colours",
    )  # fmt: skip
    job = report["jobs"][0]
    assert job["labels"] == ["colour", "other"]
    found = run_json("eval", base, "--adapter", job["adapter"], "--data", file)
    assert found["results"]["adapter"]["accuracy"] == 1.0


def test_resume_needs_nothing_new(run_json, base, data, tmp_path):
    flags = ("--base", base, "--data", data, "--objective", "completion", "--rate", "1e-2")
    flags += ("--out", tmp_path / "out")
    first = run_json("train", *flags, "--steps", 3)
    again = run_json("train", *flags, "--steps", 3, "--resume")
    assert again["jobs"][0]["last_loss"] == first["jobs"][0]["last_loss"]


# -- eval, generate


def test_eval_shows_before_and_after(run_json, lorry, base, adapter, data):
    found = run_json("eval", base, "--adapter", f"next={adapter}", "--data", data)
    before, after = found["results"]["base"], found["results"]["next"]
    assert found["objective"] == "completion"  # as it was trained
    assert after["loss"] < before["loss"] and after["exact_match"] > before["exact_match"]
    assert "exact_match" in lorry("eval", base, "--adapter", adapter, "--data", data).stdout


def test_generate_gives_each_row_its_own_adapter(run_json, base, adapter):
    found = run_json(
        "generate", base, "--adapter", f"next={adapter}", "--max-new-tokens", 3,
        "--prompt", "next::red >", "--prompt", "none::red >", "--prompt", "blue >",
    )  # fmt: skip
    texts = [row["text"] for row in found["rows"]]
    assert [row["adapters"] for row in found["rows"]] == [{"next": 1.0}, {}, {"next": 1.0}]
    assert texts[0] != texts[1]
    alone = run_json("generate", base, "--max-new-tokens", 3, "--prompt", "red >")
    assert texts[1] == alone["rows"][0]["text"]
    assert found["receipts"][0]["tensors_applied"] == found["receipts"][0]["tensors_total"]


def test_generate_refuses_names_that_are_not_given(lorry, base, adapter):
    result = lorry("generate", base, "--adapter", f"next={adapter}", "--prompt", "nxt::red >")
    assert result.exit_code == MISUSE and "'next'" in result.stderr


# -- fuse


def test_fuse_saves_a_model_that_does_the_same(run_json, base, adapter, data, tmp_path):
    out = tmp_path / "merged"
    report = run_json("fuse", base, "--adapter", f"next={adapter}", "--out", out)
    assert report["receipts"][0]["action"] == "fuse"
    assert json.loads((out / "lorry_fuse.json").read_text(encoding="utf-8"))["out"] == str(out)
    unfused = run_json("eval", base, "--adapter", f"next={adapter}", "--data", data)["results"]["next"]
    merged = run_json("eval", out, "--data", data, "--objective", "completion")["results"]["base"]
    assert merged["loss"] == pytest.approx(unfused["loss"], rel=1e-4)
    assert merged["exact_match"] == unfused["exact_match"]


def test_fusing_a_tied_embedding_unties_it(run_json, base, data, tmp_path):
    from transformers import AutoModelForCausalLM

    report = run_json(
        "train", "--base", base, "--data", data, "--objective", "completion", "--targets", "embed_tokens",
        "--option", "rank=2", "--steps", 5, "--rate", "5e-2", "--out", tmp_path / "run",
    )  # fmt: skip
    out = tmp_path / "merged"
    merged = run_json("fuse", base, "--adapter", report["jobs"][0]["adapter"], "--out", out)
    assert merged["untied"] == ["model.embed_tokens"]
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (base, out))
    assert after.config.tie_word_embeddings is False
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert not torch.equal(after.model.embed_tokens.weight, before.model.embed_tokens.weight)


def test_fuse_replaces_only_what_it_wrote(lorry, base, adapter, tmp_path):
    (tmp_path / "precious").write_text("x", encoding="utf-8")
    flags = ("fuse", base, "--adapter", adapter, "--out")
    assert lorry(*flags, tmp_path).exit_code == MISUSE
    assert lorry(*flags, tmp_path, "--overwrite").exit_code == MISUSE
    assert lorry(*flags, base, "--overwrite").exit_code == MISUSE
    assert (tmp_path / "precious").is_file()


def test_a_foreign_base_is_refused_by_name(lorry, base, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    model.save_pretrained(tmp_path / "other")
    result = lorry("fuse", tmp_path / "other", "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == MISUSE and str(tmp_path / "other") in result.stderr
    assert not (tmp_path / "out").exists()


# -- convert, inspect


def test_convert_to_peft_and_back(run_json, lorry, base, adapter, tmp_path):
    pytest.importorskip("peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import lorry as package

    assert run_json("convert", adapter, tmp_path / "peft", "--to", "peft")["goal"] == str(tmp_path / "peft")
    run_json("convert", tmp_path / "peft", tmp_path / "back", "--to", "lorry", "--base", base)
    ids = torch.tensor([[4, 3, 5, 3]])
    peer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft").eval()
    mine = AutoModelForCausalLM.from_pretrained(base)
    package.load(mine, tmp_path / "back")
    with torch.no_grad():
        torch.testing.assert_close(mine(ids).logits, peer(ids).logits)
    assert lorry("convert", adapter, tmp_path / "x", "--to", "lorry").exit_code == MISUSE
    assert lorry("convert", adapter, tmp_path / "peft", "--to", "peft").exit_code == MISUSE
    assert lorry("convert", tmp_path / "nothing", tmp_path / "x", "--to", "peft").exit_code == MISUSE


@pytest.mark.parametrize(
    "to, goal, first",
    [
        ("gguf", "a.gguf", "python convert_hf_to_gguf.py {base} --outfile base.gguf"),
        ("ollama", "out", "ollama create next -f {goal}/Modelfile"),
        ("vllm", "out", "vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules next={goal}"),
        ("plain", "out", "python -c 'from peft import"),
        ("kohya", "a.safetensors", "python -c 'from diffusers import"),
        ("diffusers", "a.safetensors", "python -c 'from diffusers import"),
    ],
)
def test_convert_knows_every_writer_and_says_how_to_use_it(run_json, lorry, base, adapter, tmp_path, to, goal, first):
    if to in ("gguf", "ollama"):
        pytest.importorskip("gguf")
    path = tmp_path / goal
    report = run_json("convert", adapter, path, "--to", to, "--base", base)
    assert path.exists() and report["receipts"][0]["tensors_applied"] > 0
    assert report["commands"][0].startswith(first.format(base=base, goal=path))
    assert report["commands"][0] in lorry("convert", adapter, path, "--to", to, "--base", base, "--overwrite").stdout
    assert lorry("convert", adapter, path, "--to", to, "--base", base).exit_code == MISUSE  # it is there


def test_convert_refuses_another_base_and_unknown_options(lorry, base, adapter, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "other").mkdir()
    config = json.loads((base / "config.json").read_text()) | {"hidden_size": 32}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    goal = tmp_path / "a.gguf"
    result = lorry("convert", adapter, goal, "--to", "gguf", "--base", tmp_path / "other")
    assert result.exit_code == MISUSE and "(out, in) = (16, 16)" in result.stderr
    result = lorry("convert", adapter, goal, "--to", "gguf", "--base", base, "-o", "dtyp=float16")
    assert result.exit_code == MISUSE and "dtype" in result.stderr
    result = lorry("convert", adapter, goal, "--to", "ggfu")
    assert result.exit_code == MISUSE and "gguf" in result.stderr
    assert not goal.exists()


def test_inspect_equals_the_dense_updates(run_json, base, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    import lorry as package

    facts = run_json("inspect", adapter, "--heatmap", tmp_path / "heat.png")
    assert facts["method"]["method"] == "lora" and facts["fingerprint"]
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    loaded = package.load(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert [s["path"] for s in facts["sites"]] == list(loaded.entries)
    for found, (_, delta) in zip(facts["sites"], loaded.deltas(), strict=True):
        assert found["norm"] == pytest.approx(float(delta.norm()), rel=1e-4)
        dense = torch.linalg.svdvals(delta.double())[: found["rank"]].tolist()
        assert found["singular_values"] == pytest.approx(dense, rel=1e-3, abs=1e-6)


def test_inspect_reads_what_other_tools_wrote(run_json, lorry, base, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    facts = run_json("inspect", tmp_path)
    assert facts["format"] == "peft" and facts["fingerprint"] is None
    assert [s["rank"] for s in facts["sites"]] == [3, 3] and facts["sites"][0]["scale"] == 2
    assert "does not say which base" in lorry("inspect", tmp_path).stdout


def test_inspect_refuses_a_pickle(lorry, tmp_path):
    (tmp_path / "adapter.bin").write_bytes(b"\x80\x04.")
    result = lorry("inspect", tmp_path / "adapter.bin")
    assert result.exit_code == MISUSE and "pickle" in result.stderr


def test_merge_with_a_base_is_fuse_for_one_more_release(lorry, base, adapter, tmp_path):
    result = lorry("merge", base, "--adapter", f"next={adapter}", "--out", tmp_path / "fused")
    assert result.exit_code == 0 and "lorry fuse" in result.stderr
    assert (tmp_path / "fused" / "lorry_fuse.json").is_file()
