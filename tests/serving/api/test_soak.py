"""The short form of the soak: everything at once, and nothing is wrong or left."""

from serving.api.soak import soak


def test_everything_at_once_leaves_nothing_behind():
    found = soak(actions=160, adapters=10, clients=12, seed=1)
    assert not found["wrong"], found["wrong"][:5]
    assert not any(found["left"].values()), found["left"]
    assert not found["threads"]
    for kind in ("_vanish", "_bad", "_exchange", "_come_and_go", "_crowd", "answer 200", "crowd 503", "load 200"):
        assert found["seen"].get(kind), (kind, found["seen"])
