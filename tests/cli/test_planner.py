"""`lorry train` with a planner of passes: by flag and in the YAML, with memory bounded, and what is refused."""

from __future__ import annotations

from lorry.cli.main import MISUSE

PLAN = "{planner: lorafusion, capacity: 128}"


def test_a_planner_by_flag_and_in_the_yaml_trains_what_the_usual_one_trains(base, data, tmp_path, run_json):
    flags = ("--base", base, "--data", data, "--objective", "completion", "--steps", 5, "--batch-size", 6)
    usual = run_json("train", *flags, "--out", tmp_path / "usual", "--name", "a")
    planned = run_json("train", *flags, "--out", tmp_path / "planned", "--name", "a", "--planner", PLAN)
    file = tmp_path / "run.yaml"
    job = f"{{name: a, data: '{data}', objective: completion, steps: 5, batch_size: 6}}"
    text = f"base: '{base}'\nout: {tmp_path}/o\nplanner: {PLAN}\nmax_memory: 2GiB\njobs:\n- {job}\n"
    file.write_text(text, encoding="utf-8")
    written = run_json("train", file)
    losses = [report["jobs"][0]["last_loss"] for report in (usual, planned, written)]
    assert max(losses) - min(losses) < 1e-5
    assert planned["passes"] == 2  # rounds of at most four steps
    assert usual["passes"] == 5


def test_bad_planners_and_capacities_are_refused_with_what_to_do(base, data, tmp_path, lorry):
    flags = ("train", "--base", base, "--data", data, "--objective", "completion", "--out", tmp_path / "o")
    for planner, said in (
        ("lorafuse", "There is no planner 'lorafuse'"),
        ("{planner: lorafusion, capasity: 3}", "capacity"),
        ("{planner: [", "expects a name or a YAML mapping"),
        ("{planner: lorafusion, capacity: 2}", "Set capacity to at least"),
    ):
        result = lorry(*flags, "--planner", planner)
        assert result.exit_code == MISUSE, result.stderr
        assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "o" / "report.json").exists()
