"""One server that trains for all tests that do not need one of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serving.tenants.clients import Training, service, training

pytest.importorskip("tinker")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """A server of the pocket model."""
    with training(tmp_path_factory.mktemp("training")) as found:
        yield found


@pytest.fixture
def client(server: Training) -> Any:
    """The public client with a session of its own."""
    return service(server.url)
