"""The check of wheels finds what is missing, strange or too large."""

import zipfile

from check_wheel import Package, main, problems


def test_a_wheel_must_hold_what_the_source_holds(tmp_path, capsys):
    package = tmp_path / "src" / "lorry"
    (package / "__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "weights.bin", "__pycache__/x.pyc"):
        (package / name).write_bytes(b"x")
    wheel = tmp_path / "lorry-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("lorry/__init__.py", "lorry/weights.bin", "lorry-1.dist-info/RECORD"):
            archive.writestr(name, "x")
    kept = Package("lorry", tmp_path / "src", 1_000_000)
    assert problems(wheel, kept) == []
    (only,) = problems(wheel, Package("lorry", tmp_path / "src", 10))
    assert "limit 10" in only
    (package / "page.html").write_bytes(b"x")
    (package / "weights.bin").unlink()
    missing, strange = problems(wheel, kept)
    assert "lacks lorry/page.html" in missing and "lorry/weights.bin" in strange


def test_there_must_be_one_wheel_of_each_package(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "one wheel of lorry" in capsys.readouterr().err
    for name in ("lorry", "lorry_pocket"):
        with zipfile.ZipFile(tmp_path / f"{name}-1-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/strange.py", "x")
    assert main([str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "lorry/strange.py" in shown and "lorry_pocket/strange.py" in shown
