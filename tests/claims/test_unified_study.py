"""The two findings of the unified study in miniature: scenes, verdicts that follow from figures, parts left out."""

import statistics

import pytest
import torch

from lorry.claims.ledger import Setting, claims
from lorry.claims.studies import _unified_scenes as scenes
from lorry.claims.studies import merging_text
from lorry.claims.studies import unified_study as study
from lorry.claims.verdicts import compare, together

FEW = {name: study.VARIANTS[name] for name in ("lora", "pissa", "lora-plus")}


@pytest.fixture(scope="module")
def findings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "SCENES", {"digits": scenes.rotated, "reviews": scenes.reviews})
        patch.setattr(study, "VARIANTS", FEW)
        patch.setattr(scenes, "_CROSSED", ("lora",))
        return {one.key: one.study(Setting(seeds=(0, 1), effort=0.05)) for one in claims("unified-study")}


def test_verdicts_follow_from_the_figures(findings):
    found = findings["rate-matters-most"]
    shares = {name: values for name, (values,) in found.panels[0].series.items()}
    pairs = [[a - b for a, b in zip(shares["rate"], shares[less], strict=True)] for less in ("rank", "batch size")]
    assert found.verdict == together([compare(pair) for pair in pairs])
    present = [values for name, values in shares.items() if name not in ("variant", "variant x rate")]
    assert [sum(parts) for parts in zip(*present, strict=True)] == pytest.approx([1, 1], abs=1e-3)


def test_every_variant_is_at_every_rate_and_chosen_on_other_rows(findings):
    found = findings["tuned-lora-matches"]
    (panel,) = found.panels
    assert list(panel.series) == list(FEW) and list(panel.x) == list(scenes.rotated(Setting()).rates)
    assert all(len(seeds) == 2 and max(seeds) <= 1 for places in panel.series.values() for seeds in places)
    assert set(found.rates) == {f"{name}, digits" for name in FEW}
    assert f"LoRA {statistics.fmean(best(panel, found, 'lora')):.3f}" in found.summary


def best(panel, found, name):
    rate = found.rates[f"{name}, digits"]
    return panel.series[name][list(panel.x).index(rate)] if rate in panel.x else [float("nan")]


def test_what_cannot_be_had_is_left_out_and_said(findings):
    assert all("Left out, for want of data or weights: reviews." in found.notes for found in findings.values())


def test_parts_of_the_digits_are_disjoint_and_the_variants_are_eight():
    scene = scenes.rotated(Setting())
    parts = [{tuple(r["x"].tolist()) for r in rows} for rows in (scene.job["data"], scene.job["eval_data"], scene.test)]
    assert not parts[0] & parts[2] and not parts[1] & parts[2] and len(study.VARIANTS) >= 8


def test_the_last_layer_alone_gives_what_the_whole_encoder_gives(shared):
    pytest.importorskip(scenes._PACKAGE)
    model, tokenizer = merging_text.encoder()
    coded = tokenizer(["a fine film", "a film that is long and dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = model(**coded, output_hidden_states=True)
        alone = scenes.UpperLayer(model)(whole.hidden_states[-2], coded["attention_mask"].float())
    assert torch.allclose(alone, whole.logits, atol=1e-5)
    scene = scenes.reviews(Setting(effort=0.05, data=shared / "data"))
    assert sorted({row["label"] for row in scene.job["data"]}) == [0, 1]
    assert max(len(row["x"]) for row in scene.job["data"]) <= scenes._TOKENS
