"""The contests of merge methods: the parts they stand on, and both of them at the smallest size."""

import pytest
import torch

from lorry.claims import Setting
from lorry.claims.merged import Try, finding, tries
from lorry.claims.studies import merging, merging_text
from lorry.core.errors import OptionError
from lorry.merging import merge_methods

FEW = {name: [Try(name, 1.0), Try(name, 2.0)] for name in ("task-arithmetic", "ties", "linear")}


def test_every_merge_method_gets_six_valid_settings():
    found = tries()
    assert set(found) == set(merge_methods())
    for slug, settings in found.items():
        assert len(set(map(str, settings))) == 6
        for one in settings:
            merge_methods()[slug].parse(one.options)


def test_the_verdict_counts_methods_against_task_arithmetic():
    everything = {
        "base": [0.1, 0.1],
        "own adapter": [0.9, 0.9],
        "task-arithmetic": [0.5, 0.5],
        "better": [0.6, 0.7],
        "mixed": [0.4, 0.7],
        "worse": [0.2, 0.3],
    }
    found = finding({"all": everything, "unseen": everything, "chosen": {}}, "accuracy", [])
    assert found.verdict == "partly"
    assert "Better on every seed: better." in found.summary and "Better on average only: mixed." in found.summary
    # the best first
    assert list(found.panels[0].series)[:2] == ["own adapter", "better"]


def test_pocket_skills_at_the_smallest_size():
    found = merging.pocket_skills(Setting(seeds=(0,), effort=0.02), FEW)
    assert set(found.panels[0].series) == {"base", "own adapter", *FEW}
    assert all(0 <= value <= 1 for panel in found.panels for (values,) in panel.series.values() for value in values)


def test_text_needs_its_data():
    with pytest.raises(OptionError, match="--data"), merging_text.text_scene(Setting(), 0):
        pass


def test_text_at_the_smallest_size(shared):
    found = merging_text.text(Setting(seeds=(0,), effort=0.02, data=shared / "data"), FEW)
    assert set(found.panels[0].series) == {"base", "own adapter", *FEW}


def test_the_upper_layers_alone_give_what_the_whole_encoder_gives(shared):
    model, tokenizer = merging_text.encoder()
    pairs = merging_text.balanced(merging_text.reviews(shared / "data"), 0)[:5]
    (batch,) = merging_text.batches(model, tokenizer, pairs, 5)
    coded = tokenizer([p[0] for p in pairs], padding=True, truncation=True, max_length=48, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(batch.logits(model), model(**coded).logits, atol=1e-5)


def test_tasks_are_balanced_and_read_as_they_are(shared):
    for read in merging_text.TASKS.values():
        pairs = merging_text.balanced(read(shared / "data"), 0)
        assert len(pairs) >= 300 and sum(label for _, label in pairs) * 2 == len(pairs)
        assert all(text.strip() for text, _ in pairs)
