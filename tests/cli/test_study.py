"""`lorry study`: what `lorry init study` writes runs, results stay, and misuse is said in a sentence."""

import json

import pytest

from lorry.cli.main import MISUSE

FILE = """
base: {base}
out: {out}
job: {{data: {data}, objective: completion, targets: q_proj, steps: 2, hold_out: 0.4, alpha: 4}}
variants: {{plain: lora, both: {{method: dora, dynamics: lora-plus}}}}
rates: [1e-3, 1e-2]
ranks: [2]
seeds: [0]
timed_steps: 0
"""


@pytest.fixture
def file(base, data, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(FILE.format(base=base, data=data, out=tmp_path / "out"), encoding="utf-8")
    return path


def test_a_study_runs_and_goes_on_with_a_larger_grid(run_json, lorry, file, tmp_path):
    report = run_json("study", file)
    assert {s["variant"] for s in report["standings"]} == {"plain", "both"} and len(report["records"]) == 4
    assert report["score"] == "loss" and (tmp_path / "out" / "report.html").is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    result = lorry("study", file, "--set", "seeds=[0, 1]")
    assert result.exit_code == 0 and "8 runs; lower is better" in result.stdout
    assert "learning rate" in result.stdout and "4 of 4" in result.stdout and "report.html" in result.stderr
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert len(after) == 8 and before.items() <= after.items()
    changed = lorry("study", file, "--set", "steps=3")
    assert changed.exit_code == MISUSE and "holds another study" in changed.stderr
    replaced = run_json("study", file, "--set", "steps=3", "--overwrite")
    assert {r["steps"] for r in replaced["records"]} == {3}


def test_the_classes_of_the_data_make_the_head(run_json, file, tmp_path):
    lines = [
        {"text": f"{word} sun moon", "label": ("a", "b", "c")[i % 3]} for i, word in enumerate(("red", "green") * 9)
    ]
    (tmp_path / "classes.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    text = file.read_text(encoding="utf-8").replace("objective: completion", "objective: classification")
    file.write_text(text, encoding="utf-8")
    report = run_json("study", file, "--set", f"job.data={tmp_path}/classes.jsonl", "--set", "variants=[lora]")
    assert report["score"] == "accuracy" and report["better"] == "max"
    assert report["records"][0]["parameters"] > 3 * 16  # the new head is trained beside the adapter


def test_init_writes_a_study_that_runs(run_json, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = run_json("init", "study")
    assert written["file"] == "study.yaml"
    fewer = ("--set", "steps=1", "--set", "seeds=[0]", "--set", "targets=q_proj", "--set", "rates=[1e-3, 1e-2]")
    report = run_json("study", "study.yaml", *fewer, "--set", "timed_steps=1", "--out", "other")
    assert [s["variant"] for s in sorted(report["standings"], key=lambda s: s["variant"])] == [
        "dora", "lora", "lora-plus", "pissa",
    ]  # fmt: skip
    assert (tmp_path / "other" / "rates.png").is_file() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("rates=[1e-3]", "at least two values"),
        ("variants=[lroa]", "'lora'"),
        ("ratez=[1]", "Variant 'plain' of rank 2"),
        ("job.data=nowhere.jsonl", "nowhere.jsonl"),
        ("max_memory=lots", "size such as 24GiB"),
    ],
)
def test_misuse_is_said_before_anything_is_loaded(lorry, file, tmp_path, change, says):
    result = lorry("study", file, "--set", change, "--set", "base=/nowhere")
    assert result.exit_code == MISUSE and says in result.stderr, result.stderr
    assert not (tmp_path / "out" / "cells").exists()


def test_a_variant_twice_and_a_file_that_is_none_are_refused(lorry, file, tmp_path):
    file.write_text(file.read_text().replace("both:", "plain:"), encoding="utf-8")
    assert "the key 'plain' stands twice" in lorry("study", file).stderr
    assert lorry("study", tmp_path / "none.yaml").exit_code == MISUSE
    file.write_text("[1]", encoding="utf-8")
    assert "must hold a mapping" in lorry("study", file).stderr
