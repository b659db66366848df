"""A server under everything at once: many adapters, loads, exchanges, clients that vanish, bad input and overload.

``PYTHONPATH=tests python -m serving.api.soak --requests 10000 --adapters 1000`` runs the long form; a short one is
among the tests (``make soak`` is the long one). Every answer is held against what transformers generates offline; the
answer of an adapter that is exchanged meanwhile against each version that it had while the answer was under way. At the
end nothing may be left: no page in use, no request, no thread. Memory is what the process has resident after each fifth
of the run; from the first fifth, when every pool and cache has been used, to the end it may grow by `GROWTH` at most.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import resource
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from serving.api.running import Running, running, serving_of

import lorry
from lorry import pocket

#: Of one length, so that the offline answers are one batch without padding.
PROMPTS = ("reverse:abcde>", "upper:lorries>", "vowels:banana>")
TOKENS = 5
#: Parts of a run after each of which memory is looked at.
PARTS = 5
#: Bytes by which a process may grow after the first of these parts.
GROWTH = 16 << 20
#: Ends the name of a second file for an adapter that changes.
OTHER = "-other"
BAD: tuple[tuple[str, Any], ...] = (
    ("/v1/completions", b"{"),
    ("/v1/completions", {"prompt": "a", "model": "nobody"}),
    ("/v1/completions", {"prompt": "a" * 400}),
    ("/v1/completions", {"prompt": "a", "temperature": -1}),
    ("/v1/completions", {"prompt": []}),
    ("/v1/completions", {"prompt": [99999999]}),
    ("/v1/completions", {"prompt": "a", "model": "base+nobody:0.5"}),
    ("/v1/completions", {"prompt": "a", "model": "base+:"}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10**9}),
    ("/v1/completions", {"prompt": "a", "max_tokens": "many"}),
    ("/v1/completions", {"prompt": "a", "top_p": 7}),
    ("/v1/completions", {"prompt": "a", "n": 0}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"99999999": 1}}),
    ("/v1/completions", b"[" * 2000),
    ("/v1/completions", b"\xff\xfe\x00"),
    ("/v1/chat/completions", {"messages": [{"role": "nobody"}]}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "nothing"}}),
    ("/v1/nothing", {}),
    ("/tokenize", {"prompt": 7}),
    ("/v1/load_lora_adapter", {"lora_name": "thief", "lora_path": "/etc"}),
    ("/v1/unload_lora_adapter", {"lora_name": "nobody"}),
)


def shelf(folder: Path, names: list[str]) -> dict[str, Path]:
    """Write adapters of several ranks, all of which change what the model says."""
    found, model = {}, pocket.load()[0]
    for number, name in enumerate(names):
        rank = 1 + number % 6
        adapter = lorry.attach(model, {"method": "lora", "rank": rank, "alpha": 2 * rank}, name=name, seed=number)
        generator = torch.Generator().manual_seed(number)
        for parameter in adapter.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.08)
        found[name] = folder / name
        adapter.save(found[name])
        adapter.detach()
    return found


def references(folders: dict[str, Path], mixtures: list[dict[str, float]]) -> dict[tuple[str, str], str]:
    """Return what transformers generates greedily: by model, as a client names it, and prompt."""
    model, tokenizer = pocket.load()
    found = {}
    for composition in [{}, *({name: 1.0} for name in folders), *mixtures]:
        adapters = [lorry.load(model, folders[name], name=name, activate=False) for name in composition]
        lorry.activate(model, composition or None) if adapters else None
        ids = torch.tensor(tokenizer(list(PROMPTS), add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        for prompt, row in zip(PROMPTS, out, strict=True):
            found[named(composition), prompt] = tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
        for adapter in adapters:
            adapter.detach()
    return found


def named(composition: dict[str, float]) -> str:
    """Return what clients call a composition."""
    return "+".join(["base", *(f"{name}:{weight}" for name, weight in composition.items())])


@dataclass
class Version:
    """Whose file was loaded under a name, from when to when at most (seconds of a clock)."""

    source: str
    begin: float = 0.0
    end: float = float("inf")


@dataclass
class Soak:
    """What clients do to one server, and what came of it.

    Attributes
    ----------
    steady
        Names that stay loaded from the beginning to the end.
    changing
        Names that come and go, and whose file is exchanged for another.
    versions, changes
        Of these: what was loaded, and a lock so that one client at a time changes it.
    """

    server: Running
    folders: dict[str, Path]
    expected: dict[tuple[str, str], str]
    steady: list[str]
    changing: list[str]
    draw: random.Random
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    versions: dict[str, list[Version]] = field(init=False)
    changes: dict[str, asyncio.Lock] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with the versions that were loaded."""
        self.versions = {name: [Version(name)] for name in self.changing}
        self.changes = {}

    async def run(self, actions: int, clients: int) -> None:
        """Do so many things, by so many clients at once."""
        async with httpx.AsyncClient(base_url=self.server.url, timeout=120, limits=httpx.Limits()) as client:
            left = iter(range(actions))

            async def one() -> None:
                for _ in left:
                    await self._act(client)

            await asyncio.gather(*(one() for _ in range(clients)))

    async def _act(self, client: httpx.AsyncClient) -> None:
        kinds = {self._ask: 70, self._ask_changing: 8, self._vanish: 6, self._bad: 6, self._exchange: 4,
                 self._come_and_go: 3, self._crowd: 3}  # fmt: skip
        action = self.draw.choices(list(kinds), list(kinds.values()))[0]
        self.seen[action.__name__] += 1
        try:
            await action(client)
        except httpx.TransportError as error:
            self.wrong.append(f"{action.__name__}: {type(error).__name__}: {error}")

    async def _post(self, client: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await client.post(path, content=content, headers={"Content-Type": "application/json"})

    def _body(self, model: str, prompt: str) -> dict[str, Any]:
        return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}

    def _note(self, what: str, answer: httpx.Response) -> None:
        self.seen[f"{what} {answer.status_code}"] += 1
        if answer.status_code == 500:
            self.wrong.append(f"{what}: {answer.text[:300]}")

    async def _compare(self, client: httpx.AsyncClient, model: str, may_be: tuple[int, ...], name: str = "") -> None:
        """Ask for a completion, streamed or whole, and hold it against what may be the answer."""
        prompt = self.draw.choice(PROMPTS)
        body, sent = self._body(model, prompt), time.monotonic()
        if self.draw.random() < 0.3:
            async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                lines = [line async for line in answer.aiter_lines()]
            said = (
                "".join(
                    choice["text"]
                    for line in lines
                    if line.startswith("data: {")
                    for choice in json.loads(line[6:])["choices"]
                )
                if answer.status_code == 200
                else "".join(lines)
            )
        else:
            answer = await self._post(client, "/v1/completions", body)
            said = answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text
        self.seen[f"answer {answer.status_code}"] += 1
        if answer.status_code == 200:
            now = time.monotonic()
            sources = [v.source for v in self.versions.get(name, ()) if v.begin <= now and v.end >= sent]
            models = [named({source: 1.0}) for source in sources] if name else [model]
            if said not in {self.expected[each, prompt] for each in models}:
                self.wrong.append(f"{model} {prompt}: {said!r}, not {[self.expected[m, prompt] for m in models]}")
        elif answer.status_code not in may_be:
            self.wrong.append(f"{model}: {answer.status_code} {said[:300]}")

    async def _ask(self, client: httpx.AsyncClient) -> None:
        """A power law over the adapters that stay, the base and mixtures."""
        steady = {named({name: 1.0}) for name in self.steady}
        models = [m for m in dict.fromkeys(model for model, _ in self.expected) if m in steady or m.count(":") != 1]
        place = min(int(self.draw.paretovariate(0.8)) - 1, len(models) - 1)
        await self._compare(client, models[place], (503,))

    async def _ask_changing(self, client: httpx.AsyncClient) -> None:
        name = self.draw.choice(self.changing)
        await self._compare(client, named({name: 1.0}), (404, 503), name)

    async def _vanish(self, client: httpx.AsyncClient) -> None:
        model = named({self.draw.choice(self.steady): 1.0})
        body = self._body(model, PROMPTS[0]) | {"max_tokens": 200, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_raw():
                break

    async def _bad(self, client: httpx.AsyncClient) -> None:
        path, body = self.draw.choice(BAD)
        answer = await self._post(client, path, body)
        self._note("bad", answer)
        if not 400 <= answer.status_code < 500 and answer.status_code != 503:
            self.wrong.append(f"{path} {body!r}: {answer.status_code} {answer.text[:300]}")

    async def _exchange(self, client: httpx.AsyncClient) -> None:
        """Load a name again: answers under way keep theirs, and the file is the same."""
        name = self.draw.choice(self.steady)
        body = {"lora_name": name, "lora_path": str(self.folders[name]), "load_inplace": True}
        answer = await self._post(client, "/v1/load_lora_adapter", body)
        self._note("exchange", answer)
        if answer.status_code != 200:
            self.wrong.append(f"exchange {name}: {answer.text[:300]}")

    async def _come_and_go(self, client: httpx.AsyncClient) -> None:
        """Unload a name and load it again, or load another file under it while it is in use."""
        name = self.draw.choice(self.changing)
        async with self.changes.setdefault(name, asyncio.Lock()):
            before = self.versions[name][-1]
            if self.draw.random() < 0.5:
                out = await self._post(client, "/v1/unload_lora_adapter", {"lora_name": name})
                self._note("unload", out)
                before.end = time.monotonic()
                if out.status_code != 200:
                    self.wrong.append(f"unload {name}: {out.text[:300]}")
            after = Version(name + OTHER if before.source == name else name, time.monotonic())
            self.versions[name].append(after)
            body = {"lora_name": name, "lora_path": str(self.folders[after.source]), "load_inplace": True}
            back = await self._post(client, "/v1/load_lora_adapter", body)
            self._note("load", back)
            before.end = min(before.end, time.monotonic())
            if back.status_code != 200:
                self.wrong.append(f"load {name}: {back.text[:300]}")

    async def _crowd(self, client: httpx.AsyncClient) -> None:
        """More at once than the server takes."""
        body = self._body("base", PROMPTS[0]) | {"n": 40, "max_tokens": 2, "temperature": 1}
        answers = await asyncio.gather(*(self._post(client, "/v1/completions", body) for _ in range(3)))
        for answer in answers:
            self._note("crowd", answer)
            if answer.status_code not in (200, 503):
                self.wrong.append(f"crowd: {answer.status_code} {answer.text[:300]}")


def memory() -> int:
    """Return the bytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * resource.getpagesize()


def soak(actions: int, adapters: int, clients: int, seed: int = 0, pages: int = 160) -> dict[str, Any]:
    """Run everything and return what was counted; `wrong` says what is not as it must be."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as text:
        few = min(adapters // 4 + 1, 20)
        names = [f"a{number}" for number in range(adapters)]
        steady, changing = names[:-few], names[-few:]
        folders = shelf(Path(text), [*names, *(name + OTHER for name in changing)])
        mixtures = [{a: 0.7, b: 0.3} for a, b in zip(steady, steady[1 : 1 + few], strict=False)]
        expected = references(folders, mixtures)
        gc.collect()
        threads = set(threading.enumerate())
        resident = []
        with serving_of((Path(text),), max_requests=96, pages=pages) as serving:
            for name in names:
                serving.engine.load(name, folders[name])
            with running(serving) as server:
                work = Soak(server, folders, expected, steady, changing, draw)
                began = time.monotonic()
                for _ in range(PARTS):
                    asyncio.run(work.run(actions // PARTS, clients))
                    work.changes.clear()  # locks belong to a loop
                    gc.collect()
                    resident.append(memory())
                seconds = time.monotonic() - began
                serving.engine._pool.check()
                stats = serving.engine.stats()
                left = {"pages": stats.pages - stats.pages_free, "requests": serving.service.under_way,
                        "running": stats.running, "waiting": stats.waiting,
                        "retired": len(serving.engine.adapters()) - len(names),
                        "used": sum(each.in_use for each in serving.engine.adapters())}  # fmt: skip
        gc.collect()
        more = sorted(thread.name for thread in set(threading.enumerate()) - threads if thread.is_alive())
    return {"seen": dict(work.seen), "wrong": work.wrong, "left": left, "threads": more, "resident": resident,
            "grown": resident[-1] - resident[0], "seconds": round(seconds, 1)}  # fmt: skip


def main() -> None:
    """Run the long form and print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=1_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = soak(given.requests, given.adapters, given.clients, given.seed)
    print(json.dumps({**found, "wrong": found["wrong"][:20], "wrong_count": len(found["wrong"])}, indent=2))
    rising = found["grown"] > GROWTH
    raise SystemExit(bool(found["wrong"] or found["threads"] or any(found["left"].values()) or rising))


if __name__ == "__main__":
    main()
