"""The code of a claim: wide enough for a change of the method to be noticed, not so wide that any change is one."""

import shutil

import pytest

from lorry.claims import code
from lorry.claims.ledger import CLAIMS, Record, Setting, changed_since, claims, run
from lorry.claims.page import markdown, table_rows
from lorry.core.method.registry import METHODS
from lorry.merging import merge_methods

EVERY = claims()


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_the_code_of_a_claim_has_its_study_its_method_and_nothing_of_the_core(one):
    files = code.code_of(one.study)
    assert one.study.__module__.partition(".")[2].replace(".", "/") + ".py" in files
    assert {"claims/verdicts.py"} <= set(files)
    for registry, thing in ((METHODS, "cls"), (merge_methods(), "function")):
        if one.slug in registry:
            home = getattr(registry[one.slug], thing).__module__
            assert home.partition(".")[2].replace(".", "/") + ".py" in files
    rooms = {path.split("/")[0] for path in files}
    assert rooms <= {"claims", "methods", "merging", "training", "pocket"}
    assert not code.HOUSEKEEPING & set(files)


def files_of(name):
    return set(code.code_of(CLAIMS[name].study))


def test_methods_are_found_by_class_by_slug_and_by_registry():
    assert "methods/mos.py" in files_of("mos/differentiation")  # imported
    assert "methods/lora_mixer.py" in files_of("ept/values")  # named in {"method": ...}
    assert {"merging/methods/lion.py", "methods/lora.py"} <= files_of("lion-lora/norm-consistency")
    assert "merging/methods/lora_lego.py" not in files_of("lion-lora/norm-consistency")
    every = {getattr(m.function, "func", m.function).__module__ for m in merge_methods().values()}
    assert {f"{module.partition('.')[2].replace('.', '/')}.py" for module in every} <= files_of("merging/pocket-skills")
    # parts that methods share, and what a study takes from training and from the pocket model
    assert "methods/parts/kronecker.py" in files_of("ept/pyramid")
    assert "training/routing.py" in files_of("remix/draws")
    assert "pocket/world.py" in files_of("lora-mixer/routed")
    # tests hold that a fleet changes no job's result, so its files age no record, also not one that lists them
    assert not code.PROMISED & files_of("lora-mixer/routed")
    assert code.changed({"training/fleet.py": "then", "a.py": "then"}, {"a.py": "now"}) == ["a.py"]


@pytest.fixture
def package(tmp_path):
    """A copy of what the code of claims is read from."""
    for room in ("claims", "methods", "merging", "training", "pocket"):
        shutil.copytree(code.ROOT / room, tmp_path / room, ignore=lambda _, names: [n for n in names if "json" in n])
    return tmp_path


STUDY = "claims/studies/mos.py"
EDITS = {
    "methods/mos.py": ("self.budget * count", "count * self.budget", [STUDY]),
    "methods/lora.py": ("rank: int = option(8", "rank: int = option(9", [STUDY, "claims/studies/comol.py"]),
    "claims/digits.py": ("WIDTH = 128", "WIDTH = 127", [STUDY]),
    "claims/verdicts.py": ("min(differences)", "max(differences)", [STUDY, "claims/studies/comol.py"]),
    STUDY: ("STEPS = 300", "STEPS = 301", [STUDY]),
}


@pytest.mark.parametrize("path", EDITS)
def test_a_change_reaches_the_claims_that_it_decides(package, path):
    old, new, reached = EDITS[path]
    before = {study: code.code_from(study) for study in (STUDY, "claims/studies/comol.py")}
    text = (package / path).read_text(encoding="utf-8")
    assert old in text
    (package / path).write_text(text.replace(old, new), encoding="utf-8")
    after = {study: code.code_from(study, package) for study in before}
    assert {study: code.changed(before[study], after[study]) for study in before} == {
        study: [path] if study in reached else [] for study in before
    }


def test_comments_docstrings_and_layout_do_not_count(tmp_path):
    texts = {
        "one": 'def f(a, b=1):\n    """Say."""\n    return a + b  # sum\n',
        "same": "def f(\n    a,\n    b=1,\n):\n    return (a + b)\n",
        "other": "def f(a, b=2):\n    return a + b\n",
    }
    found = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        found[name] = code.digest(tmp_path / f"{name}.py")
    assert found["one"] == found["same"] != found["other"]


@pytest.fixture(scope="module")
def record():
    return run(CLAIMS["ept/values"], Setting(seeds=(0,)))


def but(record, **values):
    return Record(**{**{name: getattr(record, name) for name in Record.__dataclass_fields__}, **values})


def test_a_fresh_record_is_not_older_than_the_code(record):
    assert record.code == code.code_of(CLAIMS["ept/values"].study) and changed_since(record) == []
    assert "Older than the code" not in markdown([record])
    assert table_rows([record])[0][1] == record.finding.verdict


def test_the_page_names_what_changed_since(record):
    old = but(record, code={**record.code, "methods/ept.py": "0" * code.DIGITS})
    assert changed_since(old) == ["methods/ept.py"]
    assert "**Older than the code.** Changed since: `methods/ept.py`." in markdown([old])
    assert table_rows([old])[0][1].endswith("(older than the code)")


def test_a_record_without_its_code_is_older(record):
    assert "before records kept the code" in markdown([but(record, code={})])
    assert changed_since(but(record, key="gone")) == sorted(record.code)
