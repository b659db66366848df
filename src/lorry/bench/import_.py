"""`import lorry` and its first use against `import torch` and `import peft`, as whole processes in turn."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Any

from lorry.bench._measure import machine, ratio_table, ratios
from lorry.bench._registry import register


def run(rounds: int = 7, peer: bool = True) -> dict[str, Any]:
    """Measure CPU seconds of fresh interpreters."""
    loads = {"lorry": "import lorry; lorry.attach"}  # the first name that is asked for imports the library
    names = ["torch", "lorry", *(["peft"] if peer else [])]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names:
            used = _cpu_seconds(loads.get(name, f"import {name}"))
            if turn:
                seconds[name].append(used)
    return {"machine": machine("cpu"), "ratios": ratios(seconds, "torch")}


def _cpu_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(result: dict[str, Any]) -> Any:
    """Return the ratios."""
    return ratio_table(f"Import, {result['machine']}", result["ratios"], "torch")


register("import", run, table, help=__doc__)
