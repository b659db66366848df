"""Servers of the pocket model that run in a thread of the test process, and what they are held against."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lorry
from lorry import pocket
from lorry.serving.engine import Engine
from lorry.serving.http.app import create_app
from lorry.serving.http.keys import Keys
from lorry.serving.http.prompts import Prompts
from lorry.serving.http.server import DrainingServer
from lorry.serving.http.state import Serving
from lorry.serving.options import EngineOptions
from lorry.serving.service import Service

#: Renders tools as Hermes' does, in the pocket model's few characters.
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }};{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}"
    "{% endfor %}{% if not (loop.last and m.role == 'assistant') %}>{% endif %}{% endfor %}"
)


@dataclass
class Running:
    """A server that listens."""

    url: str
    serving: Serving
    server: DrainingServer


def saved(folder: Path, seed: int) -> Path:
    """Write an adapter of the pocket model with random tensors, strong enough to change what it says."""
    model, _ = pocket.load()
    adapter = lorry.attach(model, {"method": "lora", "rank": 4, "alpha": 8}, name="a", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.08)
    adapter.save(folder)
    return folder


@contextmanager
def serving_of(
    folders: tuple[Path, ...] = (), keys: Keys | None = None, max_requests: int = 4096, pages: int = 256
) -> Iterator[Serving]:
    """An engine with a service and what HTTP needs, in a thread that ends."""
    model, tokenizer = pocket.load()
    service = Service(Engine(model, tokenizer, EngineOptions(pages=pages)), max_requests=max_requests)
    try:
        yield Serving.over(service, Prompts(tokenizer, TEMPLATE), keys or Keys(), "pocket", folders)
    finally:
        service.close()
        service.engine.close()


@contextmanager
def running(serving: Serving, **options: Any) -> Iterator[Running]:
    """A real server in a thread, on a free port of loopback."""
    listening, address = threading.Event(), []

    def ready(url: str) -> None:
        address.append(url)
        listening.set()

    server = DrainingServer(create_app(serving, **options), "127.0.0.1", 0, serving.service, patience=5, ready=ready)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert listening.wait(30)
    try:
        yield Running(address[0], serving, server)
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def offline(folders: dict[str, Path], prompts: list[str], composition: dict[str, float], most: int) -> list[str]:
    """Return what transformers itself generates greedily with adapters that are attached to a fresh model."""
    model, tokenizer = pocket.load()
    for name in composition:
        lorry.load(model, folders[name], name=name, activate=False)
    if composition:
        lorry.activate(model, composition)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts
