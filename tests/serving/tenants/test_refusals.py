"""What is refused, how the client understands it, and what one key's clients cannot reach of another's."""

import httpx
import pytest
import tinker
from serving.tenants.clients import datum, service, tokens, training

from lorry import pocket
from lorry.core.errors import CheckpointError
from lorry.serving.http.keys import KeyRule, Keys
from lorry.serving.training.store import Store

ONE, OTHER = "tml-one-secret", "tml-other-secret"


@pytest.fixture(scope="module")
def model(server):
    return service(server.url).create_lora_training_client("pocket", rank=4, seed=1).result()


def example(**inputs):
    return tinker.Datum(model_input=tinker.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=inputs)


TARGETS = {"target_tokens": [2, 3, 4]}


@pytest.mark.parametrize(
    ("given", "loss", "config", "says"),
    [
        (example(target_tokens=[2, 3, 4000]), "cross_entropy", None, "token"),
        (example(target_tokens=[2, 3]), "cross_entropy", None, "one entry for each token"),
        (example(weights=[1.0, 1.0, 1.0]), "cross_entropy", None, "no 'target_tokens'"),
        (example(**TARGETS, weights=[1.0, float("nan"), 1.0]), "cross_entropy", None, "not finite"),
        (example(**TARGETS), "ppo", None, "no 'logprobs'"),
        (example(**TARGETS), "stable_reinforce", None, "no loss 'stable_reinforce'"),
        (example(**TARGETS), "cross_entropy", {"beta": 1.0}, "no option 'beta'"),
    ],
)
def test_a_request_that_is_wrong_is_its_client_s_error_and_the_next_one_is_done(model, given, loss, config, says):
    with pytest.raises(tinker.RequestFailedError, match=says) as error:
        model.forward_backward([given], loss, config).result()
    assert error.value.category == tinker.types.RequestErrorCategory.User
    with pytest.raises(tinker.RequestFailedError, match="incomplete"):  # no step on part of a gradient
        model.optim_step(tinker.AdamParams()).result()
    good = datum(pocket.examples("star", "train", 1, seed=0)[0])
    assert model.forward_backward([good], "cross_entropy").result().metrics["loss:sum"] > 0
    assert model.optim_step(tinker.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base_model": "other"}, "trains and samples 'pocket'"),
        ({"base_model": "pocket", "rank": 10_000}, "between 1 and 256"),
        ({"base_model": "pocket", "optimizer": tinker.types.DimuonOptimizerConfig()}, "AdamW"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(client, options, says):
    with pytest.raises(tinker.BadRequestError, match=says):
        client.create_lora_training_client(**options).result()


@pytest.mark.parametrize("name", ["../../x", "a/b", ".hidden", "/etc", "x" * 300, "a\x00b", "-x"])
def test_names_of_checkpoints_stay_in_the_folder(model, server, name):
    before = sorted(server.trainer.options.folder.rglob("*"))
    for save in (model.save_state, model.save_weights_for_sampler):
        with pytest.raises(tinker.RequestFailedError, match="name of a checkpoint"):
            save(name).result()
    assert [p for p in sorted(server.trainer.options.folder.rglob("*")) if p.is_dir()] == [
        p for p in before if p.is_dir()
    ]


@pytest.mark.parametrize("path", ["../x", "tinker://a/weights/b", "tinker://x:train:0/weights/../../y", "tinker://x"])
def test_paths_that_name_nothing_are_refused(client, path):
    with pytest.raises(tinker.APIStatusError) as error:
        client.create_training_client_from_state(path).result()
    assert error.value.status_code in (400, 404)


def test_bodies_of_any_kind_are_no_failure_of_the_server(server, model):
    bodies = [b"", b"\xff\x00", b"[]", b'{"model_id": 3, "session_id": null}', b'{"request_id": "a:train:0:1"}']
    values = {"run": model.model_id, "kind": "weights", "name": "..", "session": "x", "sampler": "x", "file": "../x"}
    with httpx.Client(base_url=server.url, headers={"X-API-Key": "tml-anyone"}, timeout=30) as client:
        for path, methods in server.app.openapi()["paths"].items():
            if not path.startswith("/api/v1"):
                continue
            for method in methods:
                for body in bodies:
                    answer = client.request(method, path.format(**values), content=body)
                    assert answer.status_code < 500, (method, path, body, answer.text)


def test_a_key_reaches_its_own_alone_and_what_was_published(tmp_path):
    keys = Keys([KeyRule(name=name, key=key) for name, key in (("one", ONE), ("other", OTHER))])
    with training(tmp_path, keys) as server:
        with pytest.raises(tinker.AuthenticationError):
            service(server.url, "tml-unknown").create_lora_training_client("pocket").result()
        one, other = service(server.url, ONE), service(server.url, OTHER)
        model = one.create_lora_training_client("pocket", rank=4, seed=1).result()
        saved = model.save_weights_for_sampler("mine").result().path
        state = model.save_state("mine").result().path
        rest = other.create_rest_client()
        for ask in (
            lambda: other.create_sampling_client(model_path=saved).result(),
            lambda: other.create_training_client_from_state(state).result(),
            lambda: rest.delete_checkpoint_from_tinker_path(saved).result(),
            lambda: rest.get_training_run(model.model_id).result(),
        ):
            with pytest.raises(tinker.NotFoundError):
                ask()
        assert not rest.list_user_checkpoints().result().checkpoints
        prompt = tinker.ModelInput.from_ints(tokens("star:ab>"))
        params = tinker.SamplingParams(max_tokens=3, temperature=0.0)
        expected = one.create_sampling_client(model_path=saved).result().sample(prompt, 1, params).result()
        bearer = {"Authorization": f"Bearer {OTHER}"}
        listed = httpx.get(f"{server.url}/v1/models", headers=bearer).json()["data"]
        assert [each["id"] for each in listed] == ["pocket"]
        for name in {each.name for each in server.trainer.service.engine.adapters()}:
            body = {"model": name, "prompt": "a", "max_tokens": 1}
            assert httpx.post(f"{server.url}/v1/completions", json=body, headers=bearer).status_code == 404
        one.create_rest_client().publish_checkpoint_from_tinker_path(saved).result()
        sampler = other.create_sampling_client(model_path=saved).result()
        assert sampler.sample(prompt, 1, params).result().sequences[0].tokens == expected.sequences[0].tokens


def test_checkpoints_are_listed_kept_and_deleted(client):
    model = client.create_lora_training_client("pocket", rank=4, seed=1, user_metadata={"a": "b"}).result()
    rest = client.create_rest_client()
    state = model.save_state("first", ttl_seconds=7200).result().path
    with pytest.raises(tinker.RequestFailedError, match="There is a checkpoint"):
        model.save_state("first").result()
    model.save_state("first", overwrite=True).result()
    sampler = model.save_weights_for_sampler("s").result().path
    found = rest.list_checkpoints(model.model_id).result().checkpoints
    assert [each.tinker_path for each in found] == [sampler, state] and found[1].expires_at is None
    assert found[0].checkpoint_type == "sampler" and found[0].size_bytes > 1000
    run = rest.get_training_run_by_tinker_path(state).result()
    assert (run.lora_rank, run.user_metadata, run.last_checkpoint.tinker_path) == (4, {"a": "b"}, state)
    assert rest.get_weights_info_by_tinker_path(state).result().lora_rank == 4
    copy = rest.copy_weights(sampler, "anywhere").result()
    rest.delete_checkpoint_from_tinker_path(sampler).result()
    assert [each.tinker_path for each in rest.list_checkpoints(model.model_id).result().checkpoints] == [state]
    with pytest.raises(tinker.NotFoundError):
        client.create_sampling_client(model_path=sampler).result()
    prompt = tinker.ModelInput.from_ints(tokens("star:ab>"))
    client.create_sampling_client(model_path=copy).result().sample(
        prompt, 1, tinker.SamplingParams(max_tokens=2)
    ).result()
    named = [each.model_name for each in rest.get_server_capabilities().result().supported_models]
    assert named == ["pocket"]


def test_weights_are_exported_and_downloaded_by_links(client, server, tmp_path):
    import lorry

    model = client.create_lora_training_client("pocket", rank=4, seed=1).result()
    good = datum(pocket.examples("star", "train", 1, seed=0)[0])
    model.forward_backward([good], "cross_entropy").result()
    model.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    path = model.save_weights_external("out").result().path
    links = client.create_rest_client().get_external_weights_urls(path).result().urls
    assert {"adapter_model.safetensors", "adapter_config.json"} <= links.keys()
    for name, link in links.items():
        (tmp_path / name).write_bytes(httpx.get(link).raise_for_status().content)
    base, _ = pocket.load()
    assert lorry.load(base, tmp_path).receipt.tensors_applied > 0
    forged = httpx.URL(links["adapter_model.safetensors"]).copy_merge_params({"signature": "0" * 64})
    other = str(httpx.URL(links["adapter_model.safetensors"])).replace("adapter_model.safetensors", "..%2Florry.json")
    assert {httpx.get(link).status_code for link in (forged, other)} == {404}


def test_a_folder_has_one_server(tmp_path):
    store = Store(tmp_path / "server.sqlite3")
    with pytest.raises(CheckpointError, match="another server"):
        Store(tmp_path / "server.sqlite3")
    store.close()
    Store(tmp_path / "server.sqlite3").close()
