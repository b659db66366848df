"""The check of wheels finds what is missing, strange or too large."""

import zipfile

from check_wheel import main, problems


def test_a_wheel_must_hold_what_the_source_holds(tmp_path, capsys):
    package = tmp_path / "src" / "lorry"
    (package / "__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "weights.bin", "__pycache__/x.pyc"):
        (package / name).write_bytes(b"x")
    wheel = tmp_path / "lorry-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("lorry/__init__.py", "lorry/weights.bin", "lorry-1.dist-info/RECORD"):
            archive.writestr(name, "x")
    assert problems(wheel, tmp_path / "src") == []
    (package / "page.html").write_bytes(b"x")
    (package / "weights.bin").unlink()
    missing, strange = problems(wheel, tmp_path / "src")
    assert "lacks lorry/page.html" in missing and "lorry/weights.bin" in strange
    assert main([str(tmp_path)]) == 1 and "problems" in capsys.readouterr().out
    assert main([str(tmp_path / "src")]) == 2
