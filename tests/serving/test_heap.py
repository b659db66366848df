"""Memory of adapters that were exchanged goes back to the system, whichever threads load them."""

from __future__ import annotations

import gc
import resource
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving.api.running import saved

import lorry
from lorry import pocket
from lorry.serving.engine import Engine
from lorry.serving.options import EngineOptions

NAMES = [f"a{number}" for number in range(48)]
THREADS = 6
#: Without giving back, three exchanges of all add 14 MB here; and 40 MB if the adapters wait for the collector, too.
GROWTH = 8 << 20


def resident() -> int:
    """Return the bytes that this process has in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_exchanging_adapters_from_several_threads_takes_no_more_memory(tmp_path):
    folder = saved(tmp_path / "a", 0)
    engine = Engine(*pocket.load(), EngineOptions(pages=64))
    for name in NAMES:
        engine.load(name, folder)
    before = resident()
    for _ in range(3):
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda name: engine.load(name, folder), NAMES))
    assert resident() - before < GROWTH
    assert len(engine.adapters()) == len(NAMES)
    engine.close()


def test_an_adapter_that_was_exchanged_is_freed_at_once(tmp_path):
    folder = saved(tmp_path / "a", 0)
    model, tokenizer = pocket.load()
    engine = Engine(model, tokenizer, EngineOptions(pages=64))
    engine.load("a", folder)
    (adapter,) = (weakref.ref(each) for each in lorry.adapters(model).values())
    gc.disable()
    try:
        engine.load("a", folder)
        assert adapter() is None
    finally:
        gc.enable()
    engine.close()
