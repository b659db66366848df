"""The thread that drives the engine: clients that go away, steps that fail, an end in good order."""

import asyncio
from contextlib import aclosing

import pytest

from lorry import pocket
from lorry.core.errors import AdapterError, OptionError
from lorry.serving.engine import Engine
from lorry.serving.options import EngineOptions
from lorry.serving.request import Request, Sampling
from lorry.serving.service import Draining, Overloaded, Service


class Stumbling(Engine):
    """An engine of which some steps fail before they do anything."""

    failures = 0

    def step(self):
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the machine stumbled")
        return super().step()


@pytest.fixture
def service():
    model, tokenizer = pocket.load()
    found = Service(Stumbling(model, tokenizer, EngineOptions(pages=64, prefix_cache=False)), max_requests=4)
    yield found
    found.close()


def asked(service, name, most=200, composition=None):
    prompt = tuple(service.engine.tokenizer("reverse:abcde>", add_special_tokens=False)["input_ids"])
    return Request(name, prompt, composition or {}, Sampling(max_tokens=most, ignore_end=True))


async def text_of(service, *requests):
    return "".join([output.text async for output in service.stream(*requests)])


async def free(service):
    """Wait until nothing is left in the engine; return the pages that can be taken."""
    while not service.engine.idle:
        await asyncio.sleep(0.01)
    return service.engine.stats().pages_free


def test_several_streams_end_together(service):
    async def work():
        return await asyncio.gather(text_of(service, asked(service, "a", 6)), text_of(service, asked(service, "b", 3)))

    longer, shorter = asyncio.run(work())
    assert longer.startswith(shorter) and len(longer) > len(shorter)
    assert service.under_way == 0


def test_a_reader_that_goes_away_cancels_its_requests(service):
    async def work():
        async with aclosing(service.stream(asked(service, "a"), asked(service, "b"))) as outputs:
            async for _ in outputs:
                break
        return await free(service)

    assert asyncio.run(work()) == 64
    assert service.under_way == 0 and service.engine.stats().finished == 2


def test_a_task_that_is_cancelled_cancels_its_request(service):
    async def work():
        task = asyncio.ensure_future(text_of(service, asked(service, "a")))
        while not service.engine.stats().tokens_decoded:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return await free(service)

    assert asyncio.run(work()) == 64 and service.under_way == 0


def test_a_step_that_fails_ends_the_requests_and_not_the_service(service):
    async def work():
        service.engine.failures = 1
        outputs = [output async for output in service.stream(asked(service, "a"), asked(service, "b"))]
        return outputs, await free(service), await text_of(service, asked(service, "c", 6))

    outputs, pages, text = asyncio.run(work())
    assert [output.finish for output in outputs] == ["error"] * 2 and "RuntimeError" in outputs[0].error
    assert pages == 64 and text.startswith("edcba")


def test_a_request_that_is_refused_takes_the_others_with_it(service):
    async def work(bad):
        with pytest.raises((AdapterError, OptionError)) as refused:
            await text_of(service, asked(service, "a"), bad)
        return str(refused.value), await free(service)

    for bad, says in ((asked(service, "b", composition={"no": 1.0}), "'no'"), (asked(service, "b", 9999), "9999")):
        message, pages = asyncio.run(work(bad))
        assert says in message and pages == 64 and service.under_way == 0


def test_too_many_are_refused(service):
    async def work():
        with pytest.raises(Overloaded, match="of 4"):
            await text_of(service, *(asked(service, str(n)) for n in range(5)))
        return await text_of(service, *(asked(service, str(n), 1) for n in range(4)))

    assert asyncio.run(work()) == "eeee"


def test_what_runs_is_finished_and_nothing_new_is_taken(service):
    async def work():
        running = asyncio.ensure_future(text_of(service, asked(service, "a", 30)))
        while not service.engine.stats().tokens_decoded:
            await asyncio.sleep(0.01)
        service.drain()
        with pytest.raises(Draining):
            await text_of(service, asked(service, "b"))
        assert await service.drained(60)
        return await running

    assert asyncio.run(work()).startswith("edcba")


def test_functions_run_between_steps_on_the_thread_of_the_engine(service):
    import threading

    async def work():
        running = asyncio.ensure_future(text_of(service, asked(service, "a", 30)))
        names = [await service.call(lambda: threading.current_thread().name) for _ in range(3)]
        with pytest.raises(ZeroDivisionError):
            await service.call(lambda: 1 // 0)
        await running
        return names

    assert asyncio.run(work()) == ["lorry-engine"] * 3


def test_the_end_of_the_service_ends_its_streams():
    model, tokenizer = pocket.load()
    service = Service(Engine(model, tokenizer, EngineOptions(pages=64)))

    async def work():
        outputs = []
        async for output in service.stream(asked(service, "a")):
            outputs.append(output)
            if len(outputs) == 1:
                await asyncio.to_thread(service.close)
        return outputs

    assert asyncio.run(work())[-1].finish == "error"
