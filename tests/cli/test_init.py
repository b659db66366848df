"""`lorry init`, short forms of jobs, `--set`, and names of other trainers."""

from __future__ import annotations

import json

import pytest

from lorry.cli.init import STARTERS
from lorry.cli.main import MISUSE
from lorry.cli.overrides import override
from lorry.cli.run_file import JOB_OPTIONS, RUN_OPTIONS, RunFile, read_run_file, schema
from lorry.core.errors import OptionError
from lorry.core.method.registry import method_from
from lorry.training import Job
from lorry.training.aliases import FOREIGN
from lorry.training.short_forms import OTHER_NAMES, method_options

# -- init


@pytest.mark.parametrize("task", STARTERS)
def test_what_init_writes_trains_as_it_stands(run_json, lorry, tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    written = run_json("init", task)
    assert written["file"] == "run.yaml" and len(written["written"]) == 1 + len(STARTERS[task].skills)
    report = run_json("train", "run.yaml")
    assert [job["status"] for job in report["jobs"]] == ["done"] * len(STARTERS[task].skills)
    for job in report["jobs"]:
        assert job["eval"]["end"]["loss"] < job["eval"]["start"]["loss"], job


def test_init_names_the_tasks_and_replaces_nothing_unasked(lorry, tmp_path):
    file = tmp_path / "mine.yaml"
    result = lorry("init", "chta", file)
    assert result.exit_code == MISUSE and "'chat'" in result.stderr
    assert lorry("init", "chat", file, "--data", "d.jsonl", "--base", "some/where").exit_code == 0
    before = file.read_text(encoding="utf-8")
    assert not (tmp_path / "data").exists()
    assert lorry("init", "text", file, "--data", "d.jsonl").exit_code == MISUSE
    assert file.read_text(encoding="utf-8") == before
    run = read_run_file(file)
    assert run.base == "some/where" and run.out == str(tmp_path / "out" / "mine")
    (job,) = run.job_list()
    assert job.data == "d.jsonl" and job.make_method().rank == 8


# -- one spelling


def job(**values):
    return Job.from_dict({"name": "job", "data": "x.jsonl", **values})


@pytest.mark.parametrize(
    "values",
    [
        {"method": {"method": "dora", "rank": 4}},
        {"method": "dora", "rank": 4},
        {"method": "dora", "method_options": {"rank": 4}},
    ],
)
def test_options_of_the_method_mean_the_same_wherever_they_stand(values):
    assert job(**values).make_method() == method_from({"method": "dora", "rank": 4})


def test_options_of_the_objective_and_the_start_may_stand_beside_them():
    short = job(objective="completion", objective_options={"truncation": "left"}, start="orthogonal", start_options={})
    assert short == job(objective={"objective": "completion", "truncation": "left"}, start="orthogonal")


def test_an_option_that_is_given_twice_or_to_nothing_is_refused():
    with pytest.raises(OptionError, match="'rank' of the method is given twice"):
        job(method={"method": "lora", "rank": 4}, rank=8)
    with pytest.raises(OptionError, match="'rank' of the method is given twice"):
        job(method_options={"rank": 4}, rank=8)
    with pytest.raises(OptionError, match="Options of the method cannot be added"):
        job(method=method_from("lora"), rank=8)
    with pytest.raises(OptionError, match="no option 'rnk'.*'rank'"):
        job(rnk=8)


def test_defaults_and_jobs_are_joined_option_by_option():
    shared = {"data": "x.jsonl", "method": {"method": "lora", "alpha": 3.0}, "rank": 4, "steps": 2}
    jobs = [{}, {"rank": 2}, {"method": "dora"}, {"method": {"method": "dora", "rank": 6}, "epochs": 1}]
    made = RunFile("pocket", "out", jobs, shared).job_list()
    options = [(m.info.slug, m.rank, m.alpha) for m in (j.make_method() for j in made)]
    assert options == [("lora", 4, 3.0), ("lora", 2, 3.0), ("dora", 4, None), ("dora", 6, None)]
    assert [(j.steps, j.epochs) for j in made] == [(2, None)] * 3 + [(None, 1)]


def test_flags_and_yaml_give_the_same_job(base, data, tmp_path, monkeypatch):
    from lorry.cli import train as command

    ran = []
    monkeypatch.setattr(command, "execute", lambda run, **_: ran.append(run.job_list()) or {"jobs": []})
    file = tmp_path / "run.yaml"
    job = "{name: o, data: d, method: dora, rank: 4, objective_options: {packing: true}}"
    file.write_text(f"base: b\nout: {tmp_path}/o\njobs:\n- {job}\n", encoding="utf-8")
    from typer.testing import CliRunner

    from lorry.cli.main import app

    flags = ["train", "--base", "b", "--out", f"{tmp_path}/o", "--data", "d", "-m", "dora"]
    for arguments in (
        ["train", str(file)],
        [*flags, "--rank", "4", "--objective-options", "packing=true"],
        [*flags, "-o", "rank=4", "--objective-option", "packing=true"],
        [*flags, "--method-options", "rank=4", "--objective-option", "packing=true"],
    ):
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.stderr
    assert ran[1:] == ran[:1] * 3


def test_the_earlier_name_of_the_output_folder_is_still_read(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("base: pocket\noutput: here\njobs: [{data: x.jsonl}]\n", encoding="utf-8")
    with pytest.warns(DeprecationWarning, match="'output' is called 'out'"):
        assert read_run_file(file).out == "here"


def test_the_schema_knows_short_forms():
    properties = schema()["$defs"]["job"]["properties"]
    assert {"rank", "alpha", "method_options", "objective_options", "start_options"} <= properties.keys()
    assert schema()["properties"]["output"]["deprecated"]


# -- names of other trainers


def test_every_name_of_another_trainer_leads_to_one_that_exists():
    here = JOB_OPTIONS | RUN_OPTIONS | method_options()
    assert {name for name, _ in OTHER_NAMES.values()} <= here
    assert not OTHER_NAMES.keys() & (here | FOREIGN.keys())


@pytest.mark.parametrize("place", ["job", "method", "defaults", "run"])
def test_a_name_of_another_trainer_is_answered_with_the_name_here(lorry, tmp_path, place):
    stray = {name: "lora_r: 8" if name == place else "" for name in ("job", "method", "defaults", "run")}
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base: pocket\nout: {tmp_path}/out\n{stray['run']}\ndefaults: {{{stray['defaults']}}}\njobs:\n- name: a\n"
        f"  data: x.jsonl\n  method: {{{stray['method']}}}\n  {stray['job']}\n",
        encoding="utf-8",
    )
    result = lorry("train", file)
    assert result.exit_code == MISUSE
    assert "'lora_r' (axolotl and TRL) is called 'rank' here." in result.stderr
    assert ("under jobs or defaults" in result.stderr) == (place == "run")


def test_names_of_the_run_and_flags_are_answered_too(lorry, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("base_model: pocket\nout: o\njobs: []\n", encoding="utf-8")
    assert "'base_model' (axolotl) is called 'base' here." in lorry("train", file).stderr
    result = lorry("train", "--lora-alpha", 16)
    assert result.exit_code == MISUSE and "is called 'alpha' here" in result.stderr


# -- set

FILE = {"base": "b", "out": "o", "jobs": [{"name": "a.b", "method": {"method": "lora", "rank": 2}}, {"name": "c"}]}


@pytest.mark.parametrize(
    ("text", "look"),
    [
        ("base=x", lambda run: run["base"] == "x"),
        ("checkpoint_every=5", lambda run: run["checkpoint_every"] == 5),
        ("defaults.method.rank=4", lambda run: run["defaults"] == {"method": {"rank": 4}}),
        ("jobs.1.seed=3", lambda run: run["jobs"][1]["seed"] == 3 and "seed" not in run["jobs"][0]),
        ("jobs.a.b.method.rank=9", lambda run: run["jobs"][0]["method"] == {"method": "lora", "rank": 9}),
        ("jobs.c.method.rank=9", lambda run: run["jobs"][1]["method"] == {"rank": 9}),
        ("learning-rate=5e-3", lambda run: [j["learning_rate"] for j in run["jobs"]] == [5e-3, 5e-3]),
        ("rank=7", lambda run: [run["jobs"][0]["method"]["rank"], run["jobs"][1]["rank"]] == [7, 7]),
        ("targets=[q_proj, v_proj]", lambda run: run["jobs"][1]["targets"] == ["q_proj", "v_proj"]),
        ("data=a=b", lambda run: run["jobs"][1]["data"] == "a=b"),
    ],
)
def test_set_replaces_a_value(text, look):
    before = json.dumps(FILE)
    assert look(override(FILE, [text], RUN_OPTIONS))
    assert json.dumps(FILE) == before


@pytest.mark.parametrize("text", ["base", "=3", "jobs.2.seed=1", "jobs.d.seed=1", "base.x=1", "seed=[1"])
def test_set_refuses_what_leads_nowhere(text):
    with pytest.raises(OptionError, match="--set"):
        override(FILE, [text], RUN_OPTIONS)


def test_set_changes_a_run(run_json, lorry, base, data, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base: {base}\nout: {tmp_path}/out\njobs: [{{data: {data}, objective: completion}}]\n", encoding="utf-8"
    )
    report = run_json("train", file, "--set", "steps=2", "--set", "rank=3", "--set", f"out={tmp_path}/other")
    assert report["jobs"][0]["steps"] == 2 and report["jobs"][0]["method"]["rank"] == 3
    assert (tmp_path / "other").is_dir() and not (tmp_path / "out").exists()
    result = lorry("train", file, "--set", "stepps=2")
    assert result.exit_code == MISUSE and "'steps'" in result.stderr
    assert "none is given" in lorry("train", "--base", base, "--set", "steps=2").stderr
