"""Whatever clients that train send never makes the server fail, neither at once nor in its turn."""

import asyncio
import json
import math

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving.api.anything import NUMBERS, TEXTS, body_of
from serving.api.running import serving_of

from lorry.serving.http.app import create_app
from lorry.serving.http.training import bodies
from lorry.serving.training.options import TrainingOptions
from lorry.serving.training.trainer import Trainer
from lorry.serving.training.wire import messages, raw

pytest.importorskip("google.protobuf")
import torch  # noqa: E402

SESSION, MODEL = "SESSION", "MODEL"
POSTED = {
    "create_session": bodies.NewSession,
    "session_heartbeat": bodies.OfSession,
    "create_model": bodies.NewModel,
    "get_info": bodies.OfModel,
    "optim_step": bodies.OfModel,
    "save_weights": bodies.Save,
    "save_weights_for_sampler": bodies.SaveSampler,
    "save_weights_external": bodies.Save,
    "load_weights": bodies.Load,
    "create_sampling_session": bodies.NewSampler,
    "join_sampling_session": bodies.OfSampler,
    "asample": bodies.Sample,
    "retrieve_future": bodies.Retrieve,
    "cancel_future": bodies.Retrieve,
    "weights_info": bodies.OfPath,
    "copy_weights": bodies.Copy,
    "unload_model": bodies.OfModel,
}
SAVED = f"tinker://{MODEL}/weights/000001"
ADAM = st.dictionaries(st.sampled_from(["learning_rate", "beta1", "eps", "grad_clip_norm"]), NUMBERS, max_size=2)
PATHS = st.sampled_from([SAVED, f"tinker://{MODEL}/sampler_weights/x", "tinker://", "tinker://../weights/..", "a/b"])
LIKELY = {
    "session_id": st.just(SESSION),
    "model_id": st.just(MODEL),
    "seq_id": st.integers(1, 60),
    "model_seq_id": st.integers(1, 4),
    "base_model": st.sampled_from(["pocket", None, "other"]),
    "lora_config": st.fixed_dictionaries({"rank": st.integers(-1, 300)}),
    "adam_params": ADAM,
    "path": st.sampled_from(["one", "", "../x", "a" * 300, "\x00"]) | PATHS,
    "tinker_path": PATHS,
    "source_path": PATHS,
    "model_path": PATHS,
    "optimizer": st.booleans(),
    "ttl_seconds": st.sampled_from([3600, 0, -1, 2**64]),
    "request_id": st.sampled_from([f"{MODEL}:1", f"{MODEL}:{9**30}", f"{SESSION}:sample:0:0", "x", ":::"]),
    "sampling_session_id": st.sampled_from([f"{SESSION}:sample:0", "none"]),
    "sampling_session_seq_id": st.integers(0, 2),
    "prompt": st.fixed_dictionaries(
        {"chunks": st.lists(st.fixed_dictionaries({"tokens": st.lists(st.integers(0, 150), max_size=4)}), max_size=2)}
    ),
    "sampling_params": st.fixed_dictionaries({"max_tokens": st.integers(1, 3), "temperature": NUMBERS}),
    "num_samples": st.integers(0, 3),
    "user_metadata": st.dictionaries(TEXTS, TEXTS, max_size=2),
}


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Send to an app without a network between; a model is there, made anew where it was unloaded."""
    loop, seen = asyncio.new_event_loop(), set()
    with serving_of() as serving:
        folder = tmp_path_factory.mktemp("fuzz")
        trainer = Trainer(serving.service, TrainingOptions(folder=folder, gather=0.0))
        transport = httpx.ASGITransport(create_app(serving, training=trainer))
        client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1/api/v1")

        def send(method, path, **given):
            return loop.run_until_complete(client.request(method, path, **given))

        known = {SESSION: send("POST", "create_session", json={}).json()["session_id"], MODEL: "none"}
        made = iter(range(5, 10_000))

        def ask(method, path, body=None, content=None):
            if trainer.store.model(known[MODEL]) is None or trainer.store.model(known[MODEL]).gone:
                new = {"session_id": known[SESSION], "model_seq_id": next(made), "base_model": "pocket"}
                known[MODEL] = send("POST", "create_model", json={**new, "lora_config": {"rank": 2}}).json()["model_id"]
            if content is None:
                content = json.dumps(body).replace(MODEL, known[MODEL]).replace(SESSION, known[SESSION]).encode()
            else:
                content = content(known[MODEL])
            answer = send(method, path, content=content, headers={"Content-Type": "application/json"})
            seen.add(answer.status_code)
            if answer.status_code == 200 and isinstance(answer.json(), dict) and "request_id" in answer.json():
                model, _, seq = answer.json()["request_id"].rpartition(":")
                queue = trainer._queues.get(model)
                if queue is not None and queue.next >= int(seq):  # its turn has come
                    done = send("POST", "retrieve_future", json={"request_id": answer.json()["request_id"]})
                    assert done.status_code == 200
                    assert b'"category": "server"' not in done.content, done.content
            return answer

        yield ask
        assert seen >= {200, 400, 404}  # both what can be done and what cannot was tried
        loop.run_until_complete(client.aclose())
        trainer.close()
        loop.close()


def fine(answer):
    assert answer.status_code in (200, 204, 400, 403, 404, 408, 409, 410), (answer.status_code, answer.text)


FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize("path", POSTED)
def test_no_body_makes_the_server_fail(ask, path):
    @given(body_of(POSTED[path], LIKELY))
    @FEW
    def answers(body):
        fine(ask("POST", path, body))

    answers()


@FEW
@given(
    st.sampled_from(["forward", "forward_backward"]),
    st.binary(max_size=40),
    st.integers(-2, 50),
    st.sampled_from(["cross_entropy", "ppo", "none", ""]),
    st.lists(st.tuples(st.lists(st.integers(-5, 200), max_size=4), st.binary(max_size=17), st.integers(0, 5),
                       st.lists(st.integers(-2, 4), max_size=3)), max_size=2),
)  # fmt: skip
def test_no_message_makes_the_server_fail(ask, path, noise, seq, loss, data):
    def message(model):
        found = messages()["ForwardBackwardRequest"](model_id=model, seq_id=seq, loss_fn=loss)
        for tokens, values, dtype, shape in data:
            datum = found.data.add()
            datum.model_input.add().encoded_text.tokens = raw(torch.tensor(tokens, dtype=torch.int32)) + noise[:1]
            for name in ("target_tokens", "weights", "logprobs"):
                given = datum.loss_fn_inputs[name]
                given.dense, given.dtype = values, dtype
                given.shape.extend(shape)
        return found.SerializeToString()

    fine(ask("POST", path, content=message))
    fine(ask("POST", path, content=lambda model: noise))


@FEW
@given(
    st.sampled_from(["GET", "DELETE", "PUT", "POST"]),
    st.sampled_from(["training_runs/{}", "training_runs/{}/checkpoints/{}/{}", "sessions/{}", "samplers/{}",
                     "training_runs/{}/checkpoints/weights/{}/publish", "training_runs/{}/checkpoints/weights/{}/ttl",
                     "files/{}/weights/x/adapter_model.safetensors?expires={}&signature=a", "training_runs?limit={}",
                     "checkpoints?offset={}&limit=-{}"]),
    st.lists(st.sampled_from([MODEL, "..", "%00", "%ed%a0%80", "9" * 40, "", "a" * 500, "weights"]), min_size=3,
             max_size=3),
)  # fmt: skip
def test_no_address_makes_the_server_fail(ask, method, path, parts):
    answer = ask(method, path.format(*parts), {"ttl_seconds": math.factorial(20)})
    assert answer.status_code in (200, 204, 400, 404, 405), (answer.status_code, answer.text)
