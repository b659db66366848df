"""`lorry push`, `pull` and `doctor`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lorry.cli.doctor import OPTIONAL
from lorry.cli.main import MISUSE

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_pushed_into_a_folder_is_what_the_hub_takes_and_what_pull_gives_back(run_json, adapter, base, tmp_path):
    pushed, pulled = tmp_path / "next-words", tmp_path / "back"
    report = run_json("push", adapter, "--to", pushed, "--license", "apache-2.0")
    assert report["receipt"]["tensors_applied"] == report["receipt"]["tensors_total"] > 0
    card = ModelCard.load(pushed / "README.md")
    trained = json.loads((adapter / "lorry.json").read_text(encoding="utf-8"))
    assert card.data.license == "apache-2.0" and card.data.library_name == "peft" and "lora" in card.data.tags
    assert trained["fingerprint"]["digest"] in card.text and str(base) in card.text
    run_json("pull", pushed, pulled)
    for name in ("adapter_model.safetensors", "lorry.json", "adapter_config.json"):
        assert (pulled / name).read_bytes() == (adapter / name).read_bytes()
    assert (pulled / "README.md").read_bytes() == (pushed / "README.md").read_bytes()


def test_a_card_has_the_metrics_and_the_base_by_its_name(run_json, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_json("init", "completion")
    report = run_json("train", "run.yaml", "--set", "steps=2")
    folder = Path(report["jobs"][0]["adapter"])
    for name in ("adapter_config.json", "lorry.json"):  # as if the base had come from the hub
        file = folder / name
        file.write_text(file.read_text(encoding="utf-8").replace('"pocket"', '"owner/pocket"'), encoding="utf-8")
    run_json("push", folder, "--to", "card")
    card = ModelCard.load(tmp_path / "card" / "README.md")
    end = report["jobs"][0]["eval"]["end"]
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found == pytest.approx({k: end[k] for k in ("loss", "perplexity", "token_accuracy")})
    assert card.data.base_model == "owner/pocket" and card.data.base_model_relation == "adapter"
    assert f"{end['loss']:.4g}" in card.text


def test_without_a_network_push_says_how_to_do_it_later(lorry, adapter, tmp_path):
    result = lorry("push", adapter, "me/next")
    assert result.exit_code == MISUSE and "--to FOLDER" in result.stderr and "HF_HUB_OFFLINE" in result.stderr
    for wrong in (("push", adapter), ("push", adapter, "me/next", "--to", tmp_path / "x"), ("push", adapter, "next")):
        assert lorry(*wrong).exit_code == MISUSE
    assert lorry("pull", "me/next", tmp_path / "x").exit_code == MISUSE


def test_a_damaged_adapter_is_neither_pushed_nor_pulled(lorry, adapter, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in adapter.iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            content[-1] ^= 1
        (damaged / file.name).write_bytes(content)
    for command in ("push", "pull"):
        arguments = (damaged, "--to", tmp_path / command) if command == "push" else (damaged, tmp_path / command)
        assert lorry(command, *arguments).exit_code == MISUSE
        assert not (tmp_path / command).exists()


def test_a_folder_is_replaced_only_when_asked_for(lorry, adapter, tmp_path):
    assert lorry("push", adapter, "--to", tmp_path / "a").exit_code == 0
    assert lorry("push", adapter, "--to", tmp_path / "a").exit_code == MISUSE
    assert lorry("push", adapter, "--to", tmp_path / "a", "--overwrite").exit_code == 0
    assert lorry("push", adapter, "--to", adapter, "--overwrite").exit_code == MISUSE


# -- doctor


def test_doctor_names_versions_machine_and_what_is_missing(run_json, lorry):
    import torch

    report = run_json("doctor")
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["optional"]["transformers"]["version"]
    text = lorry("doctor").stdout
    missing = [name for name, entry in report["optional"].items() if entry["version"] is None]
    assert all(name in text for name in report["optional"]) and text.count("missing") == len(missing)


def test_doctor_knows_the_extras_that_bring_each_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for package, (extra, adds) in OPTIONAL.items():
        assert any(line.startswith(package) for line in extras[extra]) and adds
