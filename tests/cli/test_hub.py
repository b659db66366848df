"""Bases and adapters by their names on the hub, from a cache in the hub's layout, offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorry.cli.arguments import adapter_reference
from lorry.cli.hub import from_hub, is_hub_name
from lorry.cli.main import MISUSE

SOURCE = Path(__file__).resolve().parents[2] / "src"


def put(cache: Path, name: str, folder: Path, revision: str = "main", commit: str = "0" * 40) -> Path:
    """Lay a folder into a cache as the hub's own library does."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit, encoding="utf-8")
    return Path(shutil.copytree(folder, place / "snapshots" / commit))


@pytest.fixture
def cache(base, adapter, tmp_path, monkeypatch):
    from huggingface_hub import constants

    place = tmp_path / "home" / "hub"
    put(place, "me/tiny", base)
    put(place, "me/next", adapter)
    put(place, "me/next", adapter, "v2", "2" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    from_hub.cache_clear()
    yield place
    from_hub.cache_clear()


def test_a_base_and_an_adapter_by_name_do_what_their_folders_do(run_json, cache, base, adapter):
    flags = ("--max-new-tokens", 3, "--prompt", "red >")
    named = run_json("generate", "me/tiny", "-a", "me/next", *flags)
    assert named["rows"] == run_json("generate", base, "-a", f"next={adapter}", *flags)["rows"]
    assert run_json("inspect", "me/next@v2")["method"] == run_json("inspect", adapter)["method"]
    assert run_json("plan", "me/tiny")["model"] == "me/tiny"


def test_a_revision_is_taken_at_its_word(cache):
    assert adapter_reference("me/next@v2:0.5") == ("next", cache / "models--me--next" / "snapshots" / ("2" * 40), 0.5)
    assert adapter_reference("n=me/next")[1].name == "0" * 40


def test_an_adapter_says_the_name_of_its_base_and_not_the_place_of_the_cache(run_json, cache, data, tmp_path):
    flags = ("--data", data, "--out", tmp_path / "o", "--objective", "completion", "--steps", 1)
    report = run_json("train", "-b", "me/tiny@main", *flags)
    folder = Path(report["jobs"][0]["adapter"])
    assert report["base"] == "me/tiny"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "me/tiny"


@pytest.mark.parametrize("name", ["me/other", "me/tiny@v9"])
def test_offline_says_so_and_how_to_get_it(lorry, cache, name):
    result = lorry("plan", name)
    repo, _, revision = name.partition("@")
    wanted = f"`hf download {repo}" + (f" --revision {revision}`" if revision else "`")
    assert result.exit_code == MISUSE
    assert "HF_HUB_OFFLINE" in result.stderr and wanted in result.stderr and str(cache) in result.stderr
    assert lorry("generate", "pocket", "-a", name, "-p", "x").exit_code == MISUSE


def test_a_mistyped_word_is_no_secret(lorry, cache):
    assert "'pocket'" in lorry("plan", "pokcet").stderr


def test_paths_are_no_names(tmp_path, monkeypatch):
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("me/tiny") and is_hub_name("me/tiny2@refs/pr/1") and is_hub_name("gpt2")
    for text in ("./me/other", "/tmp/other", "~/other", "a/b/c", "a=b"):
        assert not is_hub_name(text)


def test_the_cache_is_the_one_that_hf_home_names(cache):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HOME": str(cache.parent), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "lorry", "inspect", "me/next", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout)["path"].startswith(str(cache))
