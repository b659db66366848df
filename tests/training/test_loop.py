"""A loop of one's own: two lines give methods what they need, and without them the first steps say what is missing."""

import warnings

import pytest
import torch
from training.tiny_bases import tiny_llama, token_rows

import lorry
from lorry.core.errors import AdapterError
from lorry.core.life import duties
from lorry.core.life.calibrate import calibrate
from lorry.training.loop import Companion

ROWS = token_rows(8, (12, 12), 1).examples
IDS = torch.stack([r.input_ids.long() for r in ROWS])


def run(model, adapter, steps=3, companion=None):
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        if companion is None:
            loss.backward()
            optimizer.step()
        else:
            companion.loss(loss).backward()
            companion.step(optimizer)
        optimizer.zero_grad()


def fresh(method):
    model = tiny_llama().train()
    adapter = lorry.attach(model, method, name="a", seed=1)
    duties.watch(adapter)
    return model, adapter


NEEDY = {
    "mixer": ({"method": "lora-mixer", "experts": 3, "rank": 2}, "auxiliary losses"),
    "smora": ({"method": "smora", "rate": 0.01}, "after each optimizer step"),
    "adalora": ({"method": "adalora"}, "auxiliary losses"),
    "eva": ({"method": "eva", "rank": 2}, "calibration"),
    "remix": ({"method": "remix", "experts": 4, "top_k": 2, "rank": 2}, "several draws"),
}


@pytest.mark.parametrize("case", NEEDY)
def test_a_loop_that_forgets_is_told_once(case):
    method, words = NEEDY[case]
    model, adapter = fresh(method)
    with pytest.warns(duties.UnattendedWarning, match=words) as said:
        run(model, adapter)
    assert len([w for w in said if issubclass(w.category, duties.UnattendedWarning)]) == 1
    assert "Companion" in str(said[0].message) and "'a'" in str(said[0].message)


@pytest.mark.parametrize("case", ["mixer", "smora", "adalora"])
def test_two_lines_give_what_is_needed(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error", duties.UnattendedWarning)
        model, adapter = fresh(NEEDY[case][0])
        run(model, adapter, companion=Companion(model, total=3))
        plain, lora = fresh({"method": "lora", "rank": 2})
        run(plain, lora)


def test_a_calibrated_adapter_lacks_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", duties.UnattendedWarning)
        model, adapter = fresh(NEEDY["eva"][0])
        calibrate(adapter, [IDS[:4], IDS[4:]], lambda model, ids: model(input_ids=ids, labels=ids).loss)
        run(model, adapter)


def test_the_companion_does_what_the_parts_do_by_hand():
    from lorry.core.life.api import auxiliary_loss, context
    from lorry.core.life.calibrate import finish_step

    for case in ("mixer", "smora"):
        found = []
        for by_hand in (True, False):
            model, adapter = fresh(NEEDY[case][0])
            if by_hand:
                optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
                for step in range(3):
                    with context(model) as facts:
                        loss = model(input_ids=IDS, labels=IDS).loss
                        extra = auxiliary_loss(model, "a")
                        (loss if extra is None else loss + extra).backward()
                    optimizer.step()
                    records = {}
                    for (_, path, name), value in facts.records.items():
                        records.setdefault(path, {})[name] = value
                    finish_step(adapter, step + 1, 3, records)
                    optimizer.zero_grad()
            else:
                run(model, adapter, companion=Companion(model, total=3))
            found.append({n: t.detach().clone() for n, t, _ in adapter.named_tensors()})
        start = {n: t for n, t, _ in fresh(NEEDY[case][0])[1].named_tensors()}
        for name, tensor in found[0].items():
            assert torch.equal(tensor, found[1][name])
        untrained = [n for n, _, s in adapter.named_tensors() if not s.trained and "bias" in n]
        assert case != "smora" or any(not torch.equal(found[0][n], start[n]) for n in untrained)


def test_records_of_micro_batches_add_up():
    model, adapter = fresh(NEEDY["smora"][0])
    companion = Companion(model)
    for part in (IDS[:4], IDS[4:]):
        companion.loss(model(input_ids=part, labels=part).loss, share=0.5).backward()
    counts = [v for (_, name), v in companion.records["a"].items() if name == "counts"]
    kept = adapter.method.top_k * IDS.numel()  # both halves, each token with as many choices as it has
    assert counts and all(float(v.sum()) == kept for v in counts)
    companion.after_step()
    assert not companion.records and companion.steps == 1


def test_a_model_without_trained_adapters_has_no_companion():
    with pytest.raises(AdapterError, match="in training"):
        Companion(tiny_llama())
