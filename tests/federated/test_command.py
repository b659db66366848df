"""``lorry federate`` as a program: simulated, and over a real SuperLink with two SuperNodes on this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lorry
from lorry import pocket
from lorry.cli.main import app
from lorry.core.errors import CheckpointError

RUN = """
base: pocket
out: {out}
clients:
  a: {{data: {folder}/a.jsonl}}
  b: {{data: {folder}/b.jsonl}}
rounds: 1
local_steps: 2
minimum: 2
job: {{objective: completion, method: lora, rank: 2, targets: attention, optimizer: sgd, learning_rate: 0.5}}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    for name, skill in (("a", "star"), ("b", "opens")):
        lines = [{"prompt": e.prompt, "completion": e.answer} for e in pocket.examples(skill, "train", 16, seed=0)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(out=tmp_path / "out", folder=tmp_path))
    return path


def program(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["federate", *map(str, arguments)])
    return found.exit_code, found.output


def test_a_simulation_writes_an_adapter_that_loads(run_file, tmp_path):
    code, said = program(run_file, "--json", "--set", "rounds=2", "--set", "rank=4")
    assert code == 0, said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["rounds"]) == 2 and report["rounds"][0]["clients"] == ["a", "b"]
    model, _ = pocket.load()
    adapter = lorry.load(model, tmp_path / "out" / "adapter")
    assert adapter.method.rank == 4 and adapter.metadata["federated"]["rounds"] == 2
    assert program(run_file)[0] == 2
    assert program(run_file, "--overwrite")[0] == 0


def test_a_private_simulation_that_is_replaced_begins_with_its_whole_budget(run_file, tmp_path):
    pytest.importorskip("opacus", reason="the extra federated is not installed")
    private = ["--set", "privacy={epsilon: 8, delta: 0.001}", "--set", "batch_size=4"]
    assert program(run_file, *private)[0] == 0
    code, said = program(run_file, "--overwrite", *private)
    assert code == 0 and "epsilon" in said
    spent = json.loads((tmp_path / "out" / "report.json").read_text())["privacy"]
    assert {name: facts["steps"] for name, facts in spent.items()} == {"a": 2, "b": 2}


def test_misuse_says_what_to_do(run_file, tmp_path):
    code, said = program(run_file, "--set", "clients.b.rank=4")
    assert code == 2 and "stack or svd" in said.replace("\n", " ")
    code, said = program(run_file, "--set", "round=4")
    assert code == 2 and "no option 'round'" in said
    code, said = program(run_file, "--set", "optimiser=sgd")
    assert code == 2 and "optimizer" in said
    code, said = program(tmp_path / "nowhere.yaml")
    assert code == 2 and "Cannot read" in said


def test_a_flower_app_is_written_where_there_is_room(run_file, tmp_path):
    assert program(run_file, "--flower", tmp_path / "app")[0] == 0
    assert program(run_file, "--flower", tmp_path / "app")[0] == 0  # it may be written again
    assert str(run_file) in (tmp_path / "app" / "pyproject.toml").read_text()
    code, said = program(run_file, "--flower", tmp_path)
    assert code == 2 and "choose another folder" in said.replace("\n", " ")


def test_messages_pass_through_flowers_records():
    pytest.importorskip("flwr", reason="Flower is not installed")
    from flwr.app import RecordDict

    from lorry.federated.flower import blob_of, carried

    assert blob_of(carried(b"\x00\x01lorry")) == b"\x00\x01lorry"
    with pytest.raises(CheckpointError, match="no message of Lorry"):
        blob_of(RecordDict({}))


# -- the real thing


def flower(name: str) -> str | None:
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(log: Path, env: dict[str, str], *command: str):
    """Run a program with its children while the context lasts."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, cwd=log.parent, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.skipif(find_spec("flwr") is None or flower("flower-superlink") is None, reason="Flower is not installed")
def test_a_superlink_with_two_supernodes_gives_what_the_simulation_gives(run_file, tmp_path):
    home, link = tmp_path / "home", free_port()
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loop"\n[superlink.loop]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    path = os.pathsep.join([str(Path(lorry.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": path, "PATH": programs}
    assert program(run_file, "--flower", tmp_path / "app")[0] == 0
    server = [flower("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(link)]
    with running(tmp_path / "link.log", env, *server, "--disable-runtime-dependency-installation"):
        until = time.monotonic() + 60
        while not answers(link) and time.monotonic() < until:
            time.sleep(0.2)

        def node(name: str):
            config = f'run="{run_file}" client="{name}"'
            own = ["--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(free_port())]
            command = [flower("flower-supernode"), *own, "--node-config", config]
            return running(tmp_path / f"{name}.log", env, *command)

        with node("a"), node("b"):
            command = [flower("flwr"), "run", str(tmp_path / "app"), "loop", "--stream"]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    adapter = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    assert adapter.exists(), done.stdout + done.stderr
    assert program(run_file, "--set", f"out={tmp_path / 'simulated'}")[0] == 0
    assert adapter.read_bytes() == (tmp_path / "simulated" / "adapter" / "adapter_model.safetensors").read_bytes()
