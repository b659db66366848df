"""Check that a wheel holds every file of the package: ``python tools/check_wheel.py DIST``.

A file that setuptools was not told of (weights, records, pages) is there in an editable installation and missing in the
wheel, where no test looks. Prints a line for each problem and exits 1.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
#: Largest size of a wheel in bytes: the package index takes more, and nobody wants to wait for it.
MOST = 4_000_000


def problems(wheel: Path, source: Path = SOURCE) -> list[str]:
    """Return what is wrong with a wheel of the package below `source`."""
    here = {p.relative_to(source).as_posix() for p in (source / "lorry").rglob("*") if p.is_file()}
    here = {name for name in here if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if name.startswith("lorry/")}
    found = [
        f"{wheel.name} lacks {name}: name it under [tool.setuptools.package-data]" for name in sorted(here - there)
    ]
    found += [f"{wheel.name} has {name}, which is not in the source" for name in sorted(there - here)]
    size = wheel.stat().st_size
    return [*found, *([f"{wheel.name} has {size:,} bytes, limit {MOST:,}"] if size > MOST else [])]


def main(argv: list[str] | None = None) -> int:
    """Check the one wheel of the folder given and return the exit status."""
    given = sys.argv[1:] if argv is None else argv
    wheels = sorted(Path(given[0] if given else "dist").glob("*.whl"))
    if len(wheels) != 1:
        print(f"expected one wheel, found {len(wheels)}; `make wheel` builds it", file=sys.stderr)
        return 2
    found = problems(wheels[0])
    for line in found:
        print(line)
    print(f"wheel: {wheels[0].name}, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
