import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.training.batches import BatchCursor, BatchPlan, block_mask, collate
from lorry.training.data import DataError
from lorry.training.rows import IGNORE, Encoded, ints, pack_fit, pack_stream

plans = st.builds(
    lambda rows, batch_size, seed, shuffle, window, drop, epochs: BatchPlan(
        examples=rows,
        batch_size=min(batch_size, rows),
        seed=seed,
        shuffle=shuffle,
        bucket_window=window,
        drop_last=drop,
        epochs=epochs,
        lengths=tuple((i * 7919) % 13 + 1 for i in range(rows)),
    ),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 2**40),
    st.booleans(),
    st.integers(0, 4),
    st.booleans(),
    st.integers(1, 4),
)


@given(plans, st.integers(0, 5))
def test_an_epoch_holds_every_row_once(plan, epoch):
    batches = plan.epoch(epoch)
    seen = [row for batch in batches for row in batch]
    assert len(batches) == plan.batches_per_epoch
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(plan.examples))
    assert len(seen) == (plan.examples - plan.examples % plan.batch_size if plan.drop_last else plan.examples)
    if not plan.shuffle and not plan.bucket_window:
        assert seen == list(range(len(seen)))


@given(plans, st.data())
def test_resume_equals_a_straight_run(plan, data):
    straight = list(BatchCursor(plan))
    assert len(straight) == plan.epochs * plan.batches_per_epoch
    stop = data.draw(st.integers(0, len(straight)))
    cursor = BatchCursor(plan)
    first = [next(cursor) for _ in range(stop)]
    assert cursor.batches_seen == stop
    other = BatchCursor(plan)
    other.restore(json.loads(json.dumps(cursor.state())))
    assert first + list(other) == straight


def test_epochs_and_seeds_differ_and_seeds_do_not_share_epochs():
    orders = {BatchPlan(examples=50, batch_size=5, seed=s).epoch(e) for s in range(4) for e in range(4)}
    assert len(orders) == 16


def test_order_is_the_same_in_another_process():
    plan = BatchPlan(examples=30, batch_size=4, seed=3, bucket_window=2, lengths=tuple(range(30)))
    code = (
        "from lorry.training.batches import BatchPlan\n"
        "p = BatchPlan(examples=30, batch_size=4, seed=3, bucket_window=2, lengths=tuple(range(30)))\n"
        "print([list(b) for e in range(3) for b in p.epoch(e)])"
    )
    env = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "77", "PATH": "", "OMP_NUM_THREADS": "2"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert json.loads(out) == [list(b) for e in range(3) for b in plan.epoch(e)]


def test_an_infinite_plan_goes_on():
    cursor = BatchCursor(BatchPlan(examples=3, batch_size=2))
    assert len([next(cursor) for _ in range(101)]) == 101 and cursor.epoch == 50


def test_bucketing_saves_padding():
    lengths = tuple(torch.randint(1, 200, (640,), generator=torch.Generator().manual_seed(0)).tolist())

    def padded(window):
        plan = BatchPlan(examples=640, batch_size=8, bucket_window=window, lengths=lengths)
        return sum(max(lengths[i] for i in b) * len(b) for b in plan.epoch(0))

    assert padded(20) < 1.1 * sum(lengths) < 1.5 * sum(lengths) < padded(0)


def test_bad_plans_and_states():
    for bad, message in [
        (dict(examples=0, batch_size=1), "no rows"),
        (dict(examples=3, batch_size=0), "at least 1"),
        (dict(examples=3, batch_size=4, drop_last=True), "leaves nothing of 3 rows"),
        (dict(examples=3, batch_size=1, bucket_window=2), "lengths of all 3 rows, found none"),
        (dict(examples=3, batch_size=1, epochs=0), "epochs"),
    ]:
        with pytest.raises(DataError, match=f"(?i){message}"):
            BatchPlan(**bad)
    cursor = BatchCursor(BatchPlan(examples=6, batch_size=2, seed=1))
    with pytest.raises(DataError, match="(?i)seed was 2, now 1"):
        cursor.restore(BatchCursor(BatchPlan(examples=6, batch_size=2, seed=2)).state())
    with pytest.raises(DataError, match="(?i)lacks plan, position"):
        cursor.restore({"epoch": 1})
    with pytest.raises(DataError, match="(?i)epoch 0, batch 9"):
        cursor.restore({**cursor.state(), "position": 9})
    longer = BatchCursor(BatchPlan(examples=6, batch_size=2, seed=1, epochs=9))
    longer.restore(cursor.state())


def row(ids, positions=None):
    tokens = ints(ids)
    labels = tokens.clone()
    labels[0] = IGNORE
    return Encoded(tokens, labels, ints(positions) if positions else None)


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_pads_and_masks(side):
    batch = collate([row([5, 6, 7]), row([8, 9])], pad_id=0, pad_to_multiple=4, side=side)
    pads = {"right": [[0], [0, 0]], "left": [[0], [0, 0]]}[side]
    expected = [[5, 6, 7] + pads[0], [8, 9] + pads[1]] if side == "right" else [pads[0] + [5, 6, 7], pads[1] + [8, 9]]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == [[int(t > 0) for t in r] for r in expected]
    assert (batch["labels"] != IGNORE).sum() == 3
    assert batch["labels"][batch["attention_mask"] == 0].tolist() == [IGNORE] * 3
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(v.dtype == torch.int64 for v in batch.values())


def test_collate_classes_and_bad_input():
    rows = [Encoded(ints([1, 2]), label=1), Encoded(ints([1, 2, 3]), label=0, token_type_ids=ints([0, 1, 1]))]
    batch = collate(rows, pad_id=0)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 1, 1]]
    with pytest.raises(DataError, match="(?i)not both"):
        collate([rows[0], row([1, 2])], pad_id=0)
    with pytest.raises(DataError, match="(?i)no padding token"):
        collate(rows, pad_id=None)
    with pytest.raises(DataError, match="(?i)no rows"):
        collate([], pad_id=0)


documents = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=12)


@given(documents, st.integers(2, 10))
def test_stream_packing_neither_loses_nor_repeats_a_token(docs, length):
    rows = pack_stream([ints(d) for d in docs], length)
    assert [t for r in rows for t in r.input_ids.tolist()] == [t for d in docs for t in d]
    assert all(len(r) == length for r in rows[:-1]) and len(rows[-1]) <= length
    inside = [(d, i) for d in docs for i in range(len(d))]  # (document, place in it) of each token of the stream
    for number, r in enumerate(rows):
        places = [i for _, i in inside[number * length : (number + 1) * length]]
        for t, (place, position) in enumerate(zip(places, r.position_ids.tolist(), strict=True)):
            start = place == 0 or t == 0
            assert position == (0 if start else r.position_ids[t - 1] + 1)
            assert r.labels[t] == (IGNORE if start else r.input_ids[t])


@given(documents, st.integers(12, 20))
def test_fit_packing_keeps_every_example_whole(docs, length):
    rows = pack_fit([row(d) for d in docs], length)
    found = []
    for r in rows:
        assert len(r) <= length
        starts = [t for t in range(len(r)) if r.position_ids[t] == 0] + [len(r)]
        found += [r.input_ids[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)]
        assert all(r.labels[a] == IGNORE for a in starts[:-1])
        assert sum(r.labels.tolist()) == sum(r.input_ids.tolist()) - sum(
            r.input_ids[a].item() - IGNORE for a in starts[:-1]
        )
    assert sorted(found) == sorted(docs)


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@settings(max_examples=10, deadline=None)
@given(
    docs=st.lists(st.lists(st.integers(1, 63), min_size=2, max_size=8), min_size=2, max_size=4),
    left=st.booleans(),
)
def test_packed_documents_are_computed_as_if_alone(llama, docs, left):
    rows = [*pack_fit([row(d) for d in docs], 40), row([3, 4, 5])]
    batch = collate(rows, pad_id=0, side="left" if left else "right")
    ids, positions = batch["input_ids"], batch["position_ids"]
    masked = block_mask(positions, batch["attention_mask"])
    with torch.no_grad():
        out = llama(input_ids=ids, position_ids=positions, attention_mask=masked).logits
        ways = [out]
        if not left:
            ways.append(llama(input_ids=ids, position_ids=positions, use_cache=False).logits)
        for logits in ways:
            for r, tokens in enumerate(rows):
                offset = ids.shape[1] - len(tokens) if left else 0
                place = tokens.position_ids if tokens.position_ids is not None else torch.arange(len(tokens))
                starts = [t for t in range(len(tokens)) if place[t] == 0] + [len(tokens)]
                for a, b in zip(starts, starts[1:], strict=False):
                    alone = llama(input_ids=tokens.input_ids[None, a:b].long()).logits[0]
                    torch.testing.assert_close(logits[r, offset + a : offset + b], alone, atol=1e-5, rtol=1e-4)


def test_block_mask_in_a_float_dtype_is_the_same_mask():
    batch = collate(pack_fit([row([1, 2]), row([3, 4, 5])], 8), pad_id=0, pad_to_multiple=8)
    boolean = block_mask(batch["position_ids"], batch["attention_mask"])
    additive = block_mask(batch["position_ids"], batch["attention_mask"], torch.bfloat16)
    assert additive.dtype == torch.bfloat16 and torch.equal(additive == 0, boolean)
    assert boolean.any(-1).all()
