"""Check that the wheels hold every file of their packages: ``python tools/check_wheel.py DIST``.

A file that setuptools was not told of (weights, records, pages) is there in an editable installation and missing in the
wheel, where no test looks. Prints a line for each problem and exits 1.
"""

from __future__ import annotations

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Package:
    """A package of this repository that has a wheel of its own.

    Attributes
    ----------
    name
        The folder below `source` and the first part of the wheel's name.
    source
        The folder that holds the package.
    most
        Largest size of its wheel in bytes: the package index takes more, and nobody wants to wait for it.
    """

    name: str
    source: Path
    most: int


PACKAGES = (
    Package("lorry", ROOT / "src", 4_000_000),
    # at most 12 MB of pipelines that draw, and 12 MB of models that see
    Package("lorry_pocket", ROOT / "lorry-pocket" / "src", 24_000_000),
)


def problems(wheel: Path, package: Package) -> list[str]:
    """Return what is wrong with a wheel of a package."""
    here = {p.relative_to(package.source).as_posix() for p in (package.source / package.name).rglob("*") if p.is_file()}
    here = {name for name in here if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if name.startswith(f"{package.name}/")}
    found = [
        f"{wheel.name} lacks {name}: name it under [tool.setuptools.package-data]" for name in sorted(here - there)
    ]
    found += [f"{wheel.name} has {name}, which is not in the source" for name in sorted(there - here)]
    size = wheel.stat().st_size
    return [*found, *([f"{wheel.name} has {size:,} bytes, limit {package.most:,}"] if size > package.most else [])]


def main(argv: list[str] | None = None) -> int:
    """Check the wheels of the folder given, one of each package, and return the exit status."""
    given = sys.argv[1:] if argv is None else argv
    folder = Path(given[0] if given else "dist")
    status = 0
    for package in PACKAGES:
        wheels = sorted(folder.glob(f"{package.name}-*.whl"))
        if len(wheels) != 1:
            print(f"expected one wheel of {package.name}, found {len(wheels)}; `make wheel` builds it", file=sys.stderr)
            return 2
        found = problems(wheels[0], package)
        for line in found:
            print(line)
        print(f"wheel: {wheels[0].name}, {len(found)} problems")
        status = max(status, 1 if found else 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
