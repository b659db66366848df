"""One server without keys for all tests that do not need one of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.api.running import Running, running, saved, serving_of


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters in one folder."""
    folder = tmp_path_factory.mktemp("shelf")
    return {name: saved(folder / name, seed) for seed, name in enumerate(("math", "story"), 1)}


@pytest.fixture(scope="session")
def server(shelf: dict[str, Path]) -> Iterator[Running]:
    """A server of the pocket model and both adapters."""
    with serving_of((shelf["math"].parent,)) as serving:
        for name, path in shelf.items():
            serving.engine.load(name, path)
        with running(serving) as found:
            yield found


@pytest.fixture
def client(server: Running):
    """OpenAI's own client."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found
