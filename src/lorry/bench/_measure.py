"""Measuring side by side: interleaved rounds, medians, ratios with their spread. Absolute times are never the
result.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorry.core.errors import OptionError

Case = Callable[[], object]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of threads while measuring."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clock(device: str) -> float:
    """Return seconds: of this process's work on the CPU, of the wall after synchronising on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def interleaved(
    cases: Mapping[str, Case], rounds: int, device: str = "cpu", warm_up: int = 2, repeat: int = 1
) -> dict[str, list[float]]:
    """Return seconds of each case by round; every round runs all cases once, so that drift hits them alike."""
    for _ in range(warm_up):
        for case in cases.values():
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, case in cases.items():
                start = clock(device)
                for _ in range(repeat):
                    case()
                seconds[name].append((clock(device) - start) / repeat)
    finally:
        if collecting:
            gc.enable()
    return seconds


def ratios(seconds: Mapping[str, list[float]], to: str) -> dict[str, dict[str, float]]:
    """Return for each case the median, least and greatest ratio to the case `to`, round by round."""
    result = {}
    for name, values in seconds.items():
        each = [a / b for a, b in zip(values, seconds[to], strict=True)]
        result[name] = {"ratio": statistics.median(each), "least": min(each), "most": max(each)}
    return result


def llama(layers: int, hidden: int, inner: int, vocabulary: int = 512, **options: Any) -> nn.Module:
    """Return a `LlamaForCausalLM` with random weights from a fixed seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(hidden // 64, 1)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        **options,
    )
    return LlamaForCausalLM(config)


def integers(given: Sequence[int] | str | int) -> list[int]:
    """Return whole numbers; a text, as the command line passes it, is split at commas."""
    if isinstance(given, int):
        return [given]
    try:
        return [int(part) for part in (given.split(",") if isinstance(given, str) else given)]
    except ValueError:
        raise OptionError(f"Expected whole numbers with commas between, found {given!r}.") from None


def machine(device: str) -> str:
    """Return what the figures were measured on."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.get_num_threads()} CPU thread(s), {capability}, torch {torch.__version__}"


def lines(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Any:
    """Return a rich table."""
    from rich.table import Table

    shown = Table(title=title)
    for column in columns:
        shown.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        shown.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row))
    return shown


def ratio_table(title: str, result: Mapping[str, Mapping[str, float]], against: str) -> Any:
    """Return a rich table of ratios with their spread."""
    rows = [(name, r["ratio"], f"{r['least']:.2f} - {r['most']:.2f}") for name, r in result.items()]
    return lines(title, ("case", f"median ratio to {against}", "least - most"), rows)
