"""Adapters and keys and values share a memory, come and go, and nothing is lost, taken twice or mistaken."""

import random

import pytest
import torch
from serving.tiny_engines import adapt, alone, engine, prompt, request, tiny

import lorry
from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.life.page_pool import PagePool
from lorry.serving.paging.batch import Batch, Part
from lorry.serving.paging.kernels import Attention, attend, reference
from lorry.serving.paging.pool import SlotPool, UnifiedPool
from lorry.serving.paging.shape import CacheShape, LayerShape
from lorry.serving.paging.store import Store

RANKS = (1, 3, 4, 8, 16)


def crowd(count=7):
    """Return a tiny Llama with adapters of mixed ranks."""
    model = tiny()
    for number in range(count):
        rank = RANKS[number % len(RANKS)]
        adapt(model, f"a{number}", {"method": "lora", "rank": rank}, seed=number, targets=["q_proj", "v_proj"])
    return model


def mixed(count, seed=0, names=7):
    """Return requests of mixed lengths, compositions and bare ones."""
    draw = random.Random(seed)
    asked = []
    for number in range(count):
        chosen = draw.sample(range(names), draw.choice([0, 1, 1, 1, 2]))
        weights = {f"a{n}": draw.choice([1.0, 0.5, -0.7]) for n in chosen}
        asked.append(request(str(number), prompt(draw.randint(1, 20), seed=number % 5), weights, draw.randint(1, 12)))
    return asked


def run(machine, asked):
    """Run requests that arrive one at a time, with the invariant checked after every step."""
    tokens, queue = {}, list(asked)
    while queue or not machine.idle:
        if queue:
            machine.submit(queue.pop(0))
        for output in machine.step():
            tokens[output.id] = tokens.get(output.id, ()) + output.tokens
        machine._pool.check()
    return [tokens[each.id] for each in asked]


@pytest.mark.parametrize(
    "options",
    [
        {"pages": 40, "max_batch_tokens": 16, "max_running": 6},
        {"pages": 40, "prefix_cache": False},
        {"pages": 90, "pool": "slots", "slots": 3, "slot_share": 0.6},
    ],
)
def test_a_tight_pool_changes_no_answer(options):
    model = crowd()
    asked = mixed(24)
    expected = [alone(model, each) for each in asked]
    machine = engine(model, **options)
    assert run(machine, asked) == expected
    assert machine.stats().adapters.get("host"), "nothing ever had to make room"
    machine.close()
    assert [alone(model, each) for each in asked] == expected


def test_adapters_beyond_the_host_memory_lie_on_disk(tmp_path):
    model = crowd()
    asked = mixed(12)
    expected = [alone(model, each) for each in asked]
    machine = engine(model, pages=40, host_bytes=40_000, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) > 3
    assert run(machine, asked) == expected
    names = [served.name for served in machine.adapters()]
    for name in names:
        machine.unload(name)
    assert not list(tmp_path.iterdir())
    machine.close()


def test_a_damaged_file_ends_its_own_request_alone(tmp_path):
    model = crowd(2)
    fine = request("1", prompt(4), "a1")
    expected = alone(model, fine)
    machine = engine(model, pages=40, host_bytes=0, folder=tmp_path)
    cold = next(iter(tmp_path.iterdir()))  # of one of them; the other lies in host memory
    lost = cold.name.split(".")[0]
    cold.write_bytes(b"nothing")
    asked = [request("0", prompt(4), lost), request("1", prompt(4), "a1" if lost == "a0" else "a0")]
    found = machine.generate(asked)
    assert found[0].finish == "error" and "damaged" in found[0].error
    assert found[1].finish == "length" and (lost == "a1" or found[1].tokens == expected)
    machine._pool.check()
    with pytest.raises(CheckpointError):
        machine._catalogue.acquire({lost: 1.0})[0][0].resident.page_in()


@pytest.mark.parametrize("kind", ["unified", "slots"])
def test_adapters_in_pages_are_bit_for_bit_what_they_were(kind):
    """Pages are taken and given back in random order between keys and values; any number up to the free ones is got."""
    model = crowd()
    adapters = list(lorry.adapters(model).values())
    before = {a.name: {n: t.clone() for _, h in a.homes() for n, t in [(id(h), h.tensors()["A"])]} for a in adapters}
    if kind == "unified":
        pool = UnifiedPool(PagePool(60, 2048), 4)
    else:
        pool = SlotPool(PagePool(30, 2048), PagePool(3, 40960), 4)
    residents = [pool.adopt(adapter) for adapter in adapters]
    draw, used, blocks = random.Random(1), [], []
    for _ in range(200):
        choice = draw.random()
        if choice < 0.3 and (fits := [r for r in residents if pool.capacity(pool.in_use | {r}) >= len(blocks)]):
            used.append(draw.choice(fits))
            pool.use(used[-1])
        elif choice < 0.5 and used:
            pool.leave(used.pop(draw.randrange(len(used))))
        elif choice < 0.8:
            free = pool.capacity(pool.in_use) - len(blocks)
            blocks += pool.take(draw.randint(0, min(free, 6)))
        elif blocks:
            draw.shuffle(blocks)
            pool.release([blocks.pop() for _ in range(draw.randint(1, len(blocks)))])
        pool.check()
        for resident in pool.held:
            for _, home in resident.adapter.homes():
                assert torch.equal(home.ready()["A"], before[resident.adapter.name][id(home)])
    pool.tokens.memory[[page for page, taken in enumerate(pool.tokens._taken) if not taken]] = 0xFF  # no numbers
    free = pool.capacity(pool.in_use) - len(blocks)
    blocks += (fresh := pool.take(free))
    assert not pool.tokens.memory[[block.page for block in fresh]].any()
    with pytest.raises(AdapterError, match="free"):
        pool.take(1)


@pytest.mark.parametrize("value", [5, 8])  # of another width than keys they are copied, else read where they lie
@pytest.mark.parametrize("how", [Attention(0.3), Attention(0.3, window=3), Attention(0.3, softcap=2.0), None])
def test_attention_over_scattered_pages_is_plain_attention(how, value):
    """Decoding rows and chunks, with and without what came before, against the definition in float64."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    how = how if how is not None else Attention(0.3, sinks=draw(6))
    layer = LayerShape(heads=2, key=8, value=value)
    shape = CacheShape({3: layer, 4: layer}, torch.float64, torch.device("cpu"))
    pool = PagePool(64, shape.page_bytes(4))
    pool.memory.fill_(0x3F)  # whatever lies on other pages must not matter
    store = Store(pool, shape, 4)
    assert store.listed == (value == 8)
    spans = [(0, 1), (9, 10), (2, 7), (0, 6), (20, 21), (5, 13), (3, 4)]  # from, to
    numbers = torch.randperm(64, generator=generator).tolist()
    parts, expected, news = [], [], []
    for start, stop in spans:
        pages = [numbers.pop() for _ in range(-(-stop // 4))]
        part = Part([0] * (stop - start), start, pages)
        k, v, q = draw(stop, 2, 8), draw(stop, 2, value), draw(stop - start, 6, 8)
        if start:
            old = torch.arange(start)
            at = torch.tensor(pages)[old // 4]
            store.write(4, k[:start].transpose(0, 1)[None], v[:start].transpose(0, 1)[None], at, old % 4)
        parts.append(part)
        news.append((q, k[start:], v[start:]))
        expected.append(reference(q, k, v, start, how))
    batch = Batch.of(parts, 4, torch.device("cpu"))
    q, k, v = (torch.cat(each).transpose(0, 1)[None] for each in zip(*news, strict=True))
    store.write(4, k, v, batch.pages, batch.offsets)
    found = attend(q, k, v, store.keys[4], store.values[4], batch, how, listed=store.listed)
    torch.testing.assert_close(found[0], torch.cat(expected), atol=1e-6 if how.window is None else 1e-12, rtol=1e-12)
