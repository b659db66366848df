"""Damaged files of every format: Lorry's own error, or the undamaged result; the model is as it was.

``LORRY_FUZZ`` sets how many damaged copies of each form are tried (default 60).
"""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from files.test_old import Tower
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lorry
from lorry.formats.bundle import load_bundle, save_bundle
from lorry.formats.save import sealed

TRIES = int(os.environ.get("LORRY_FUZZ", "60"))
TOKENS = torch.arange(7)[None]
#: What a damaged field may hold instead.
STRANGE = [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), "", "x", "(a+)+b", [], [1], ["x"], {}, {"a": 1}, [[]], "\0"]


def _moved(adapter):
    with torch.no_grad():
        for number, (_, tensor, spec) in enumerate(adapter.named_tensors()):
            if spec.trained:
                tensor.copy_((torch.arange(tensor.numel()) * (number + 2) % 7 - 3).view(tensor.shape) / 16)
    return adapter


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """One adapter, or a like one, in every form that Lorry reads."""
    root = tmp_path_factory.mktemp("forms")

    def adapter(method, **options):
        return _moved(lorry.attach(Tower(), method, targets=["up", "down"], **options))

    lora = {"method": "lora", "rank": 2, "alpha": 5}
    adapter(lora, train_also=["naïve"], site_options={"down": {"rank": 3}}).save(root / "both")
    adapter({"method": "pissa", "rank": 2}).save(root / "own")
    adapter({"method": "vera", "rank": 4}).save(root / "pool")
    adapter({"method": "shira", "rank": 2}).save(root / "sparse")
    adapter({"method": "lora", "rank": 2, "alpha": 5}).save(root / "peft", format="peft")
    (root / "peft" / "lorry.json").unlink()
    adapter(lora).save(root / "kohya.safetensors", format="kohya")
    adapter(lora).save(root / "diffusers.safetensors", format="diffusers")
    shutil.copytree(Path(__file__).parent / "old" / "both", root / "old")
    save_bundle({"one": adapter(lora), "two": adapter({"method": "dora", "rank": 2})}, root / "bundle")
    return root


FORMS = ["both", "own", "pool", "sparse", "peft", "old", "bundle", "kohya.safetensors", "diffusers.safetensors"]


def _load(path, roots):
    if path.name == "bundle":
        load_bundle(roots, path, check_base=False)
    else:
        lorry.load(roots["one"], path, check_base=False)


def _roots():
    return {"one": Tower(), "two": Tower()}


def _seen(roots):
    with torch.no_grad():
        return [m(TOKENS) for m in roots.values()]


def _state(roots):
    """Bytes of the base, and the attributes of every module."""
    return [
        {
            "weights": {n: p.detach().clone() for n, p in m.named_parameters()},
            "flags": {n: p.requires_grad for n, p in m.named_parameters()},
            "attributes": {n: (type(sub), sorted(sub.__dict__), sorted(sub._modules)) for n, sub in m.named_modules()},
        }
        for m in roots.values()
    ]


def _same(a, b):
    return all(
        x["flags"] == y["flags"]
        and x["attributes"] == y["attributes"]
        and x["weights"].keys() == y["weights"].keys()
        and all(torch.equal(x["weights"][n], y["weights"][n]) for n in x["weights"])
        for x, y in zip(a, b, strict=True)
    )


def _leaves(values, at=()):
    yield at
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from _leaves(value, (*at, key))


def _changed_json(values, draw):
    """A copy with one place changed: another value, a missing one, one more, or one under another name."""
    values = copy.deepcopy(values)
    *path, last = draw.choice([at for at in _leaves(values) if at])
    owner = values
    for key in path:
        owner = owner[key]
    what = draw.randrange(4)
    if what == 0 and isinstance(owner, dict):
        del owner[last]
    elif what == 1 and isinstance(owner, dict):
        owner[draw.choice([f"{last}x", "", "rank", "lora_bias", "method", "."])] = owner.pop(last)
    elif what == 2 and isinstance(owner, dict):
        owner[draw.choice(["r", "alpha", "kernel", "new", "readable_by"])] = draw.choice(STRANGE)
    else:
        owner[last] = draw.choice(STRANGE)
    return values


def _damage_bytes(path, draw):
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    what = draw.randrange(5)
    if what == 0:
        content[at] ^= 1 << draw.randrange(8)
    elif what == 1:
        del content[at:]
    elif what == 2:
        del content[at : at + draw.randrange(1, 9)]
    elif what == 3:
        content[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    else:
        content[at : at + 4] = draw.choice([b"null", b"[[[[", b"9999", b"-1,\n", b'"",\0'])
    path.write_bytes(bytes(content))


def _damage_header(path, draw):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = _changed_json(json.loads(content[8 : 8 + size]), draw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def _damage_tensors(folder, draw):
    """Change tensors and seal them anew, so that what guards against accidents does not stand before what guards
    against files that do not fit.
    """
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors" if folder.is_dir() else folder
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    what = draw.randrange(5)
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[draw.choice([name + "x", "", ".", "shared.", "lora_A", "a/b", name.replace("A", "B")])] = tensors.pop(
            name
        )
    elif what == 2:
        shape = draw.choice([(), (0,), (1,), (2, 3, 4), (1, 2, 3, 4, 5, 6)])
        tensors[name] = torch.ones(shape)
    elif what == 3:
        tensors[name] = tensors[name].to(draw.choice([torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64]))
    else:
        tensors[name] = torch.full_like(tensors[name].float(), draw.choice([float("nan"), float("inf"), 3e38]))
    if not (folder / "lorry.json").is_file():
        save_file(tensors, file)
        return
    blob, digest, checksums = sealed(tensors)
    file.write_bytes(blob)
    values = json.loads((folder / "lorry.json").read_text())
    values = {**values, "digest": digest, "tensors": len(tensors)}
    if "checksums" in values:
        values["checksums"] = checksums
    else:
        save_file(tensors, file, {"lorry_digest": digest})
    (folder / "lorry.json").write_text(json.dumps(values))


def _damage(path, draw):
    files = sorted(p for p in path.iterdir()) if path.is_dir() else [path]
    texts = [p for p in files if p.suffix == ".json"]
    what = draw.randrange(5)
    if what == 0 and texts:
        file = draw.choice(texts)
        file.write_text(json.dumps(_changed_json(json.loads(file.read_text()), draw)))
    elif what == 1:
        _damage_tensors(path, draw)
    elif what == 2:
        _damage_header(next(p for p in files if p.suffix == ".safetensors"), draw)
    elif what == 3 and texts and draw.randrange(3) == 0:
        draw.choice(texts).write_text(draw.choice(["", "[]", "null", "[" * 100_000, '{"a": 1, "a": 2}', "1e999"]))
    else:
        _damage_bytes(draw.choice(files), draw)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_give_lorrys_error_or_the_undamaged_result(form, forms, tmp_path):
    fine = _roots()
    _load(forms / form, fine)
    wanted, noticed = _seen(fine), []

    @settings(max_examples=TRIES, derandomize=True, deadline=None, phases=[Phase.generate, Phase.shrink], database=None)
    @given(draw=st.randoms(use_true_random=False))
    def one(draw):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        path = folder / form
        (shutil.copytree if (forms / form).is_dir() else shutil.copy)(forms / form, path)
        _damage(path, draw)
        noticed.append(_tried(form, forms / form, path, wanted))
        shutil.rmtree(folder)

    one()
    assert sum(noticed) > len(noticed) / 4  # most damage is noticed, so this does try something


def _tried(form, whole, path, wanted):
    """Load a damaged copy onto fresh models; whether it was refused."""
    roots = _roots()
    before = _state(roots)
    try:
        _load(path, roots)
    except lorry.LorryError as error:
        assert len(str(error)) > 20
        assert all(lorry.adapters(model) == {} for model in roots.values())
        assert _same(_state(roots), before)
        return True
    seen = _seen(roots)
    for model in roots.values():
        for adapter in lorry.adapters(model).values():
            assert all(bool(torch.isfinite(t.float()).all()) for _, t, _ in adapter.named_tensors())
            adapter.detach()
    assert _same(_state(roots), before)
    if form not in _WITHOUT_SEAL and not _another(whole, path):
        assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    return False


#: Forms of other tools, which carry nothing that tells other values from damage.
_WITHOUT_SEAL = {"peft", "kohya.safetensors", "diffusers.safetensors"}


def _another(old, new):
    """Whether the copy is another valid adapter: options in the manifest, or values that were sealed anew."""
    return (old / "lorry.json").read_bytes() != (new / "lorry.json").read_bytes()
