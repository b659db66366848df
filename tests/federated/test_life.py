"""What happens to a federation: clients fail and come late, the server stops and goes on, input is bad."""

import json

import pytest
import torch
from federated.digit_clients import clients_of, examples, federation, network, server_of

import lorry
from lorry.core.errors import CheckpointError, FingerprintError, OptionError
from lorry.federated import SPLITS, Client, FederationError, InProcess, Server, aggregate, deal, wire
from lorry.federated.aggregate import State, Update
from lorry.training import Setting


@pytest.mark.parametrize("aggregation", ["average", "stack", "exact", "svd"])
def test_a_resumed_server_ends_where_it_would_have_ended(tmp_path, aggregation):
    def options(out):
        return federation(tmp_path / out, aggregation=aggregation, freeze="none", rounds=4, fraction=0.6)

    whole = server_of(options("whole"))
    whole.run()
    first = server_of(options("parts"))
    for _ in range(2):
        first.round()
    second = server_of(options("parts"), resume=True)
    assert len(second.rounds) == 2
    second.run()
    assert second.rounds == whole.rounds
    one, other = ((tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()


def test_a_folder_is_not_taken_up_by_mistake(tmp_path):
    server_of(federation(tmp_path)).run()
    with pytest.raises(OptionError, match="take it up again"):
        server_of(federation(tmp_path))
    with pytest.raises(OptionError, match="local_steps differ"):
        server_of(federation(tmp_path, local_steps=4), resume=True)
    assert server_of(federation(tmp_path, rounds=3), resume=True).run().report["rounds"][2]["round"] == 3
    assert len(server_of(federation(tmp_path), overwrite=True).rounds) == 0


def test_a_client_that_fails_is_left_out_and_named(tmp_path):
    server = server_of(federation(tmp_path, rounds=3))
    working = server.transport.answers["client-1"]

    def broken(message: bytes) -> bytes:
        raise RuntimeError("the disk is full")

    server.transport.answers["client-1"] = broken
    record = server.round()
    assert record["clients"] == ["client-0", "client-2"] and "the disk is full" in record["failed"]["client-1"]
    server.transport.answers["client-1"] = working
    assert server.round()["clients"] == ["client-0", "client-1", "client-2"]
    assert server.round()["joined"] == []


def test_a_failure_changes_nothing_for_the_others(tmp_path):
    """Two of three clients give what a federation of these two gives."""
    data = {name: {"data": examples(24, seed=i)} for i, name in enumerate("abc")}
    server = server_of(federation(tmp_path / "three", clients=data))
    del server.transport.answers["c"]
    server.run()
    pair = {name: data[name] for name in "ab"}
    other = server_of(federation(tmp_path / "two", clients=pair))
    other.run()
    assert torch.equal(server.state.pairs["0"][1], other.state.pairs["0"][1])


def test_too_few_updates_keep_the_state_and_say_why(tmp_path):
    server = server_of(federation(tmp_path, minimum=2, rounds=3))
    server.round()
    state = (tmp_path / "state.safetensors").read_bytes()
    for name in ("client-0", "client-1"):
        del server.transport.answers[name]
    with pytest.raises(FederationError, match="Round 2 got 1 updates of 1 clients, expected at least 2"):
        server.round()
    assert (tmp_path / "state.safetensors").read_bytes() == state


def test_a_client_may_join_late(tmp_path):
    server = server_of(federation(tmp_path, rounds=3))
    late = server.transport.answers.pop("client-2")
    assert server.round()["joined"] == ["client-0", "client-1"]
    server.transport.answers["client-2"] = late
    record = server.round()
    assert record["joined"] == ["client-2"] and record["clients"] == ["client-0", "client-1", "client-2"]


def test_a_share_of_the_clients_takes_part(tmp_path):
    server = server_of(federation(tmp_path, clients=4, fraction=0.5, rounds=4))
    server.run()
    assert all(len(r["clients"]) == 2 for r in server.rounds)
    assert len({tuple(r["clients"]) for r in server.rounds}) > 1


# -- what is refused


def test_a_client_with_another_a_is_refused_on_both_sides(tmp_path):
    options = federation(tmp_path, minimum=3)
    server = server_of(options)
    stranger = Client(options, "client-0", Setting(network()))
    message = server._message("client-0", 0)
    tensors, facts = wire.unpack(message)
    facts["seed"] += 1  # a client that draws its own start
    server.transport.answers["client-0"] = lambda _: stranger.answer(wire.pack(tensors, facts))
    with pytest.raises(FederationError, match="another frozen A than the server.*same seed"):
        server.round()

    answer, said = wire.unpack(server.transport.answers["client-1"](server._message("client-1", 0)))
    server.transport.answers["client-1"] = lambda _: wire.pack(answer, {**said, "anchor": "0" * 32})
    with pytest.raises(FingerprintError, match="another frozen A"):
        server._taken("client-1", 0, server.transport.answers["client-1"](b""), {"bytes_up": 0, "tensor_bytes_up": 0})


def test_another_base_is_refused(tmp_path):
    options = federation(tmp_path)
    server = server_of(options)
    stranger = clients_of(options, network(seed=1))["client-0"]
    answer = wire.unpack(stranger.answer(server._message("client-0", 0)))[1]
    assert "different bases" in answer["error"]


@pytest.mark.parametrize("name", ["average", "exact"])
def test_ranks_that_differ_need_an_aggregation_that_takes_them(tmp_path, name):
    ranks = {"a": {"rank": 2, "data": []}, "b": {"rank": 4, "data": []}}
    with pytest.raises(OptionError, match="stack or svd"):
        federation(tmp_path, clients=ranks, aggregation=name, freeze="none")
    with pytest.raises(OptionError, match="a frozen A is one for all"):
        federation(tmp_path, clients=ranks, aggregation="stack", freeze="A")


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"aggregation": "svd"}, "set freeze to none"),
        ({"aggregation": "averag"}, "Did you mean 'average'"),
        ({"freeze": "C"}, "must be one of"),
        ({"clients": 0}, "clients"),
        ({"minimum": 4}, "there are 3 clients"),
        ({"privacy": {"delta": 1e-5}}, "give epsilon"),
        ({"privacy": {"epsilon": 1, "noise_multiplier": 1}}, "one of them"),
        ({"job": {"method": "dora"}}, "use lora"),
        ({"job": {"dynamics": "gradient-noise"}}, "does not take the job option 'dynamics'"),
        ({"split": "alphabetical"}, "There is no split"),
        ({"split": {"split": "dirichlet", "beta": 1}}, "does not take these options"),
        ({"clients": 97}, "use fewer clients"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(tmp_path, wrong, says):
    with pytest.raises(OptionError, match=says):
        server_of(federation(tmp_path, **wrong))


def test_uploads_are_checked_before_they_are_used(tmp_path):
    server = server_of(federation(tmp_path))
    good, facts = wire.unpack(server.transport.answers["client-0"](server._message("client-0", 0)))
    record = {"bytes_up": 0, "tensor_bytes_up": 0}

    def take(tensors, **more):
        return server._taken("client-0", 0, wire.pack(tensors, {**facts, **more}), record)

    assert isinstance(take(good)[0], Update)
    name = next(iter(good))
    with pytest.raises(CheckpointError, match="not finite"):
        take({name: good[name] * float("nan")})
    with pytest.raises(CheckpointError, match="expected \\(16, 4\\)"):
        take({name: good[name][:, :2]})
    with pytest.raises(CheckpointError, match="surplus 'x'"):
        take({**good, "x": good[name]})
    with pytest.raises(CheckpointError, match="is of client-1"):
        take(good, client="client-1")
    with pytest.raises(CheckpointError, match="a number from 1"):
        take(good, examples=-5)
    for blob in (b"", b"\x80\x04pickled", b"\xff" * 64, json.dumps(facts).encode()):
        with pytest.raises(CheckpointError, match="cannot be read"):
            server._taken("client-0", 0, blob, record)


# -- splits


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_gives_every_example_to_one_client_and_depends_on_the_seed_alone(name):
    labels = [i % 5 for i in range(200)]
    parts = deal(name, labels, 4, seed=3)
    assert sorted(i for part in parts for i in part) == list(range(200))
    assert parts == deal(name, labels, 4, seed=3) != deal(name, labels, 4, seed=4)


def test_dirichlet_differs_by_label_and_size_by_size():
    labels = [i % 5 for i in range(2000)]

    def skew(parts):  # mean share of a client's most frequent label
        counts = [[[labels[i] for i in part].count(k) for k in range(5)] for part in parts]
        return sum(max(c) / sum(c) for c in counts) / len(counts)

    assert skew(deal({"split": "dirichlet", "alpha": 100}, labels, 4, seed=0)) < 0.3
    assert skew(deal({"split": "dirichlet", "alpha": 0.2}, labels, 4, seed=0)) > 0.45
    assert len({len(part) for part in deal("even", labels, 4, seed=0)}) == 1
    sizes = sorted(map(len, deal({"split": "size", "alpha": 0.5}, labels, 4, seed=0)))
    assert sizes[-1] > 2 * sizes[0]
    assert skew(deal({"split": "size", "alpha": 0.5}, labels, 4, seed=1)) < 0.35


def test_the_dominant_split_is_90_5_5():
    labels = [i % 3 for i in range(300)]
    parts = deal("dominant", labels, 3, seed=0)
    assert [[labels[i] for i in part].count(k) for k, part in enumerate(parts)] == [90, 90, 90]
    assert all([labels[i] for i in part].count((k + 1) % 3) == 5 for k, part in enumerate(parts))


def test_whole_modules_are_averaged_beside_the_factors(tmp_path):
    model = network()
    options = federation(tmp_path, job={"modules_to_save": ["2"]}, aggregation="stack", freeze="none", rounds=3)
    server = server_of(options, model)
    name = next(iter(server.state.extra))
    before = server.state.extra[name].clone()
    server.run()
    assert not torch.equal(server.state.extra[name], before)
    fresh = network()
    adapter = lorry.load(fresh, tmp_path / "adapter")
    assert torch.equal({n: t for n, t, _ in adapter.named_tensors()}[name], server.state.extra[name])
    made = aggregate(
        "average",
        State({}),
        [Update({}, {}, w, {"x": torch.full((2,), v)}) for w, v in ((0.25, 0.0), (0.75, 4.0))],
        frozenset("AB"),
    )
    assert torch.equal(made.extra["x"], torch.full((2,), 3.0))


def test_the_model_is_left_as_it_was(tmp_path):
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    server_of(federation(tmp_path, aggregation="stack", freeze="none"), model).run()
    assert lorry.adapters(model) == {}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_clients_may_be_unknown_to_the_run_file(tmp_path):
    options = federation(tmp_path)
    with pytest.raises(OptionError, match="There is no client 'mallory'"):
        Client(options, "mallory", Setting(network()))
    found = {n: c.answer for n, c in clients_of(options, network()).items()}
    server = Server(options, Setting(network()), InProcess({**found, "mallory": found["client-0"]}))
    assert "mallory" not in server.round()["clients"]
