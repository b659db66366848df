"""Federation on Flower: the server as a ServerApp, a client as a ClientApp, over any SuperLink.

Flower finds the nodes, carries the messages, encrypts and authenticates; what is in a message is the same safetensors
blob as in a simulation, carried as one array of bytes, so neither side ever opens a pickle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorry.core.errors import CheckpointError, OptionError

from .client import Client
from .server import Server
from .transport import Transport

_RECORD, _BLOB, _STYPE = "lorry", "message", "safetensors"

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "lorry-federation"
version = "1.0.0"
description = "A federation of Lorry"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "local"

[tool.flwr.app.components]
serverapp = "lorry_federation:server"
clientapp = "lorry_federation:client"

[tool.flwr.app.config]
run = "{run}"
resume = false
overwrite = false
wait = {wait}
"""

_MODULE = '''\
"""The two apps; the run file is named by `flwr run --run-config` and by each node's `--node-config`."""

from lorry.cli.federate import flower_client, flower_server

server = flower_server()
client = flower_client()
'''


def write_app(folder: Path, run: Path, wait: float = 300.0) -> None:
    """Write a Flower app that ``flwr run`` can start.

    Parameters
    ----------
    folder
        Where to.
    run
        The run file at the server; a client names its own by ``--node-config``.
    wait
        Seconds that a round waits for clients.

    Raises
    ------
    OptionError
        The folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "lorry_federation.py").is_file():
        raise OptionError(f"{folder} holds something else than a Flower app of Lorry; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    text = _PROJECT.format(run=run.resolve().as_posix(), wait=float(wait))
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    (folder / "lorry_federation.py").write_text(_MODULE, encoding="utf-8")


class GridTransport:
    """Clients behind a Flower grid, by the names that they give when they are asked.

    Parameters
    ----------
    grid
        Flower's, as a ServerApp gets it.
    wait
        Seconds to wait for the answers of a round.
    least
        Clients to wait for, as long, before a round begins.
    """

    def __init__(self, grid: Any, wait: float, least: int) -> None:
        self.grid, self.wait, self.least = grid, wait, least
        self.nodes: dict[str, int] = {}

    def names(self) -> list[str]:
        """Return the clients that are there now; new nodes are asked who they are."""
        until = time.monotonic() + self.wait
        while True:
            here = set(self.grid.get_node_ids())
            self.nodes = {name: node for name, node in self.nodes.items() if node in here}
            new = [node for node in here if node not in self.nodes.values()]
            for node, answer in self._ask(dict.fromkeys(new, b""), "query").items():
                name = answer.decode() if isinstance(answer, bytes) else ""
                if name:  # of two that give one name the first is asked, as long as it is there
                    self.nodes.setdefault(name, node)
            if len(self.nodes) >= self.least or time.monotonic() > until:
                return list(self.nodes)
            time.sleep(1)

    def exchange(self, messages: Mapping[str, bytes]) -> dict[str, bytes | Exception]:
        """Send each client its message, and wait for the answers."""
        answers = self._ask({self.nodes[name]: blob for name, blob in messages.items()}, "train")
        return {name: answers[self.nodes[name]] for name in messages if self.nodes[name] in answers}

    def _ask(self, blobs: Mapping[int, bytes], kind: str) -> dict[int, bytes | Exception]:
        from flwr.app import Message

        if not blobs:
            return {}
        sent = [Message(content=carried(blob), dst_node_id=node, message_type=kind) for node, blob in blobs.items()]
        found: dict[int, bytes | Exception] = {}
        for reply in self.grid.send_and_receive(sent, timeout=self.wait):
            node = reply.metadata.src_node_id
            try:
                failed = CheckpointError(f"Flower reports {reply.error.reason}.") if reply.has_error() else None
                found[node] = blob_of(reply.content) if failed is None else failed
            except CheckpointError as error:
                found[node] = error
        return found


def carried(blob: bytes) -> Any:
    """Return Flower's record of a message."""
    from flwr.app import Array, ArrayRecord, RecordDict

    array = Array(dtype="uint8", shape=(len(blob),), stype=_STYPE, data=blob)
    return RecordDict({_RECORD: ArrayRecord({_BLOB: array})})


def blob_of(content: Any) -> bytes:
    """Return the message in Flower's record.

    Raises
    ------
    CheckpointError
        There is none.
    """
    try:
        return bytes(content[_RECORD][_BLOB].data)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("A Flower message holds no message of Lorry; run Lorry's app at every node.") from error


def server_app(make: Callable[[Mapping[str, Any], Callable[[int], Transport]], Server]) -> Any:
    """Return Flower's ServerApp; `make` makes the server of the run's configuration and of its transport's maker."""
    flower = _flower("serverapp")
    app = flower.ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        wait = float(context.run_config.get("wait", 300.0))
        server = make(context.run_config, lambda least: GridTransport(grid, wait, least))
        print(server.run().receipt, flush=True)

    return app


def client_app(make: Callable[[Mapping[str, Any]], tuple[str, Callable[[], Client]]]) -> Any:
    """Return Flower's ClientApp; `make` makes a client's name, and what builds it, of the node's configuration."""
    flower = _flower("clientapp")
    from flwr.app import Message

    app = flower.ClientApp()

    @app.query()  # type: ignore[untyped-decorator]
    def query(message: Any, context: Any) -> Any:
        name, _ = make(context.node_config)
        return Message(content=carried(name.encode()), reply_to=message)

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        _, build = make(context.node_config)
        return Message(content=carried(build().answer(blob_of(message.content))), reply_to=message)

    return app


def _flower(part: str) -> Any:
    try:
        import flwr.clientapp
        import flwr.serverapp
    except ImportError as error:
        raise OptionError("A federation over a network needs Flower: pip install 'lorry[federated]'.") from error
    return getattr(flwr, part)
