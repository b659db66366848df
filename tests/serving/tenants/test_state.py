"""What stays: saved weights, models of several clients beside each other, everything over the death of a server."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import tinker
import torch
from serving.tenants.clients import datum, logprobs, losses, service, training
from tinker.proto.request_conv import forward_backward_request_to_proto

from lorry import pocket
from lorry.serving.training.wire import messages

SOURCE = Path(__file__).resolve().parents[3] / "src"


def examples(skill, count=6):
    return [datum(example) for example in pocket.examples(skill, "train", count, seed=0)]


def test_saved_weights_go_on_as_if_nothing_had_been(client):
    data = examples("swap")
    straight = client.create_lora_training_client("pocket", rank=4, seed=5).result()
    first = losses(straight, [data] * 2)
    saved = straight.save_state("half").result().path
    rest = losses(straight, [data] * 2)
    again = client.create_training_client_from_state_with_optimizer(saved).result()
    assert losses(again, [data] * 2) == pytest.approx(rest, rel=1e-5)
    fresh = client.create_training_client_from_state(saved).result()  # the weights, but no optimizer
    other = losses(fresh, [data] * 2)
    assert other[0] == pytest.approx(rest[0], rel=1e-5) and other[1] != pytest.approx(rest[1], rel=1e-5)
    assert rest[0] < first[0]
    onto = client.create_lora_training_client("pocket", rank=4, seed=9).result()
    onto.load_state(saved).result()
    assert losses(onto, [data]) == pytest.approx(rest[:1], rel=1e-5)


def test_two_clients_together_get_what_each_gets_alone(tmp_path):
    skills = {"swap": (4, 1), "star": (8, 2)}
    batches = {name: [examples(name, 3 + n) for n in range(5)] for name in skills}

    with training(tmp_path, gather=0.5) as server:
        clients = {name: service(server.url) for name in skills}

        def trained(name):
            rank, seed = skills[name]
            create = clients[name].create_lora_training_client
            model = create("pocket", rank=rank, seed=seed, train_unembed=name == "star").result()
            return losses(model, batches[name], rate=1e-2), logprobs(model, batches[name][0])

        alone = {name: trained(name) for name in skills}
        before = server.trainer.passes.count
        with ThreadPoolExecutor() as pool:
            together = dict(zip(skills, pool.map(trained, skills), strict=True))
        assert before == 12 and server.trainer.passes.count - before < 10
    for name in skills:
        assert together[name][0] == pytest.approx(alone[name][0], rel=1e-4)
        assert torch.allclose(together[name][1], alone[name][1], atol=1e-4)


def test_requests_that_arrive_in_disorder_are_done_in_order(client, server):
    data = examples("swap", 2)
    made = [client.create_lora_training_client("pocket", rank=4, seed=5).result() for _ in range(2)]
    expected = losses(made[0], [data] * 2)
    url, key = f"{server.url}/api/v1", {"X-API-Key": "tml-anyone"}
    passes = [body_of(made[1].model_id, seq, data) for seq in (1, 3)]
    step = {"adam_params": {"learning_rate": 5e-3}, "model_id": made[1].model_id, "seq_id": 2}
    second = httpx.post(f"{url}/forward_backward", content=passes[1], headers=key).json()["request_id"]
    httpx.post(f"{url}/optim_step", json=step, headers=key)
    httpx.post(f"{url}/forward_backward", content=passes[0], headers=key)
    again = httpx.post(f"{url}/forward_backward", content=passes[0], headers=key)  # as after a lost answer
    assert again.json()["request_id"] == f"{made[1].model_id}:1"
    found = httpx.post(f"{url}/retrieve_future", json={"request_id": second}, headers=key, timeout=30)
    answer = messages()["ForwardBackwardOutput"].FromString(found.content)
    assert answer.metrics["loss:sum"] / count(data) == pytest.approx(expected[1], rel=1e-5)


def count(data):
    return sum(sum(each.loss_fn_inputs["weights"].data) for each in data)


def body_of(model, seq, data):
    given = tinker.types.ForwardBackwardInput(data=data, loss_fn="cross_entropy")
    request = tinker.types.ForwardBackwardRequest(forward_backward_input=given, model_id=model, seq_id=seq)
    return forward_backward_request_to_proto(request).SerializeToString()


def serve(folder, port):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "LORRY_API_KEY": "tml-a-long-secret"}
    command = [sys.executable, "-m", "lorry", "serve", "pocket", "--train", "--train-dir", str(folder)]
    process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stderr:
        if found := re.search(r"serving pocket at http://127\.0\.0\.1:(\d+)", line):
            return process, int(found[1])
    raise AssertionError("The server did not start.")


def test_a_server_that_is_killed_goes_on_where_it_was(tmp_path, client):
    data = [examples("swap", 3 + n) for n in range(4)]
    expected = losses(client.create_lora_training_client("pocket", rank=4, seed=5).result(), data)
    process, port = serve(tmp_path, 0)
    try:
        own = service(f"http://127.0.0.1:{port}", "tml-a-long-secret")
        model = own.create_lora_training_client("pocket", rank=4, seed=5).result()
        found = losses(model, data[:2])
        half = model.forward_backward(data[2], "cross_entropy").result()  # whose gradient is in memory alone
        process.send_signal(signal.SIGKILL)
        process.wait()
        step = model.optim_step(tinker.AdamParams(learning_rate=5e-3))
        process, port = serve(tmp_path, port)
        step.result()
        found += [half.metrics["loss:sum"] / count(data[2]), *losses(model, data[3:])]
        assert found == pytest.approx(expected, rel=1e-4)
        sampler = model.save_weights_and_get_sampling_client().result()
        prompt = tinker.ModelInput.from_ints([3, 4])
        assert sampler.sample(prompt, 1, tinker.SamplingParams(max_tokens=2)).result().sequences[0].tokens
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stderr.close()
