"""Readers and writers of others: one file each, found by the registry."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from files.tiny_models import llama, output, stir

import lorry
from lorry.core.life.writers import WRITERS
from lorry.formats.reader import READERS

#: What a third party writes: one module, which registers a reader and a writer of its own form.
PLUGIN = '''
"""Adapters as JSON: path -> {"A": rows, "B": rows}."""

import json

import torch

from lorry.core.life.writers import WRITERS
from lorry.core.method.declared import plain_lora
from lorry.core.receipt import Receipt
from lorry.formats.file import AdapterFile
from lorry.formats.reader import READERS, Reader
from lorry.formats.snapshot import as_file
from lorry.formats.stored import StoredSite


class JsonReader(Reader):
    precedence = 1

    def recognises(self, location):
        return location.path.is_file() and location.path.suffix == ".json"

    def read(self, location):
        sites = {}
        for path, rows in json.loads(location.path.read_text()).items():
            values = {name: torch.tensor(value) for name, value in rows.items()}
            shape = (values["B"].shape[0], values["A"].shape[1])
            method = plain_lora(values["A"].shape[0])
            sites[path] = StoredSite(path, method, kind="linear", shape=shape, values=values)
        return AdapterFile(location.path.stem, method, sites, format="json", path=location.path)


def write(adapter, path, **options):
    file = as_file(adapter)
    rows = {}
    for site in file:
        a, b, _ = file.factors(site)
        rows[site] = {"A": a.float().tolist(), "B": b.float().tolist()}
    path.write_text(json.dumps(rows))
    return Receipt("save", file.name, 2 * len(rows), 2 * len(rows), len(rows))


READERS.add("json", JsonReader())
WRITERS.add("json", write)
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package of another author, whose folder the registry is told of."""
    package = tmp_path / "others"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from lorry.formats.reader import READERS\nREADERS.source(__name__, __path__)\n"
    )
    (package / "as_json.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    import others

    yield others
    for registry in (READERS, WRITERS):
        registry._items.pop("json", None)
    for name in [n for n in sys.modules if n.partition(".")[0] == "others"]:
        del sys.modules[name]


def test_a_reader_and_a_writer_of_another_package(plugin, tmp_path):
    model = llama()
    adapter = stir(lorry.attach(model, lorry.LoRA(rank=2, alpha=3), targets=["q_proj"]))
    assert "json" in READERS
    assert adapter.save(tmp_path / "a.json", format="json").sites == 3
    fresh = llama()
    loaded = lorry.load(fresh, tmp_path / "a.json")
    assert loaded.name == "a" and torch.allclose(output(fresh), output(model), atol=1e-6)
    with lorry.open(tmp_path / "a.json") as file:
        assert file.format == "json"
        file.rescale(2)
        file.save(tmp_path / "folder", format="peft")
    assert json.loads((tmp_path / "folder" / "adapter_config.json").read_text())["lora_alpha"] == 4
    from lorry.merging import merge

    assert len(merge([tmp_path / "a.json", adapter]).sites) == 3


def test_without_its_reader_the_file_is_refused_by_what_it_is(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(lorry.CheckpointError, match="neither a folder nor a .safetensors file"):
        lorry.open(tmp_path / "a.json")
    adapter = lorry.attach(llama(), lorry.LoRA(rank=2), targets=["q_proj"])
    with pytest.raises(lorry.OptionError, match="format must be one of auto, peft, lorry, .*kohya.*found 'jsn'"):
        adapter.save(tmp_path / "b", format="jsn")


def test_every_format_has_its_reader_and_no_other_takes_its_files(tmp_path):
    pytest.importorskip("peft")
    from files.tiny_models import peft_folder

    from lorry.formats.reader import Location

    adapter = stir(lorry.attach(llama(), lorry.LoRA(rank=2), targets=["q_proj"]))
    adapter.save(tmp_path / "lorry")
    peft_folder(llama(), tmp_path / "peft", r=2, target_modules=["q_proj"])
    adapter.save(tmp_path / "kohya.safetensors", format="kohya")
    adapter.save(tmp_path / "diffusers.safetensors", format="diffusers")
    for name in ("lorry", "peft", "kohya.safetensors", "diffusers.safetensors"):
        location = Location(tmp_path / name)
        found = [n for n, reader in READERS.items() if reader.recognises(location)]
        location.close()
        assert found == [name.partition(".")[0]]


def test_asking_for_a_format_imports_no_extra(tmp_path):
    lorry.attach(llama(), lorry.LoRA(rank=2), targets=["q_proj"]).save(tmp_path / "a")
    code = textwrap.dedent(f"""
        import sys
        import lorry
        lorry.open({str(tmp_path / "a")!r})
        assert not {{"peft", "diffusers", "transformers"}} & sys.modules.keys()
    """)
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**__import__("os").environ, "PYTHONPATH": ":".join(sys.path)}
    )
