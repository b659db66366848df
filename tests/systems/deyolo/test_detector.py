"""Detectors: what they look at, what is trained, precision, checkpoints, and the whole run."""

import json

import pytest
import torch

from lorry.core.errors import CheckpointError, OptionError
from lorry.systems import Run, run
from lorry.systems.deyolo import FUSIONS, Options, Plan, adapted, detector, draw, fit, found, load, precision, save, toy

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

CLASSES = ("digit 0", "digit 1")


@pytest.fixture(scope="module")
def few():
    return toy(8, seed=0)


def features(model, x):
    return torch.cat([each.flatten() for each in model.backbone(x).values()])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_detector_looks_at_the_modalities_of_its_fusion(fusion, few):
    model = detector(Options(CLASSES, fusion=fusion)).eval()
    x = torch.stack(few.inputs([0]))
    with torch.no_grad():
        plain = features(model, x)
        for modality, part in (("rgb", slice(0, 3)), ("ir", slice(3, 6))):
            changed = x.clone()
            changed[:, part] = 1 - changed[:, part]
            ignored = fusion in ("rgb", "ir") and fusion != modality
            assert torch.equal(features(model, changed), plain) == ignored


def test_pairs_of_other_shapes_are_searched_and_answered_in_their_own_pixels():
    model = detector(Options(CLASSES)).eval()
    with torch.no_grad():
        answers = model([torch.rand(6, 48, 100), torch.rand(6, 200, 120)])
    for answer, (height, width) in zip(answers, ((48, 100), (200, 120)), strict=True):
        right, bottom = (float(answer["boxes"][:, k].max()) for k in (2, 3))
        assert width / 2 < right < width + 1e-3 and height / 2 < bottom < height + 1e-3


def test_everything_is_trained_and_the_loss_falls(few):
    model = detector(Options(CLASSES))
    before = {name: each.clone() for name, each in model.named_parameters()}
    losses = fit(model, few, Plan(25, 2e-2, batch=8, flip=0.0), seed=0)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(not torch.equal(each, before[name]) for name, each in model.named_parameters())


def test_training_depends_on_the_seed_alone(few):
    runs = []
    for _ in range(2):
        model = detector(Options(CLASSES, fusion="sum"), seed=3)
        runs.append(fit(model, few, Plan(2, batch=4), seed=5))
        torch.rand(1)
    assert runs[0] == runs[1]


def test_a_lora_is_trained_and_leaves_the_detector_as_it_was(few):
    model = detector(Options(CLASSES))
    fit(model, few, Plan(3, batch=4), seed=0)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    plain = found(model, few)
    adapter = adapted(model, rank=2)
    torch.testing.assert_close(found(model, few)[0]["scores"], plain[0]["scores"])
    start = {name: each.clone() for name, each in adapter.named_parameters()}
    fit(model, few, Plan(3, 1e-2, batch=4), seed=0)
    assert all(not torch.equal(each, start[name]) for name, each in adapter.named_parameters())
    assert any(not torch.equal(a["boxes"], b["boxes"]) for a, b in zip(found(model, few), plain, strict=True))
    adapter.detach()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_true_boxes_have_a_precision_of_one_and_wrong_ones_less(few, tmp_path):
    right = [{**target, "scores": torch.ones(len(target["labels"]))} for target in few.targets(range(len(few)))]
    assert precision(few, right)["map"] == pytest.approx(1.0)
    moved = [{**each, "boxes": each["boxes"] + torch.tensor([4.0, 0, 4, 0])} for each in right]
    scores = precision(few, moved)
    assert scores["map50"] == pytest.approx(1.0) and scores["map"] < 0.7
    other = [{**each, "labels": 1 - each["labels"]} for each in right]
    assert precision(few, other)["map50"] < 0.2
    nothing = [{key: value[:0] for key, value in each.items()} for each in right]
    assert precision(few, nothing)["map50"] == 0
    draw(few, right, tmp_path / "a.png")
    draw(few, nothing, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_saved_detector_is_the_same(few, tmp_path):
    options = Options(CLASSES, variant="figure", crossed=False)
    model = detector(options, seed=1)
    fit(model, few, Plan(1, batch=4), seed=0)
    save(model, options, tmp_path / "model")
    again, read = load(tmp_path / "model")
    assert read == options
    for a, b in zip(found(model, few), found(again, few), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    (tmp_path / "model" / "deyolo.json").write_text(json.dumps({"classes": ["a"], "depth": 3}))
    with pytest.raises(CheckpointError, match="holds no detector"):
        load(tmp_path / "model")
    (tmp_path / "model" / "deyolo.json").write_text(json.dumps({"classes": ["a"]}))
    with pytest.raises(CheckpointError, match="do not fit its options"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fusion": "late"}, "fusion is one of"),
        ({"size": 40}, "no multiple of twice the stride 16"),
        ({"levels": 3}, "expected 1 to 2 with 4 widths"),
        ({"neck": 12}, "expected a multiple of 8"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, says):
    with pytest.raises(OptionError, match=says):
        Options(CLASSES, **options)
    with pytest.raises(OptionError, match="each once"):
        Options(("a", "a"))


def test_nothing_to_train_is_refused(few):
    model = detector(Options(CLASSES)).requires_grad_(False)
    with pytest.raises(OptionError, match="There are 0 tensors to train"):
        fit(model, few, Plan(1), seed=0)


def test_the_system_runs_whole_and_again_on_its_own_data_and_detector(tmp_path):
    first = run("deyolo", Run(tmp_path / "a", effort=0.01))
    assert [row[0] for row in first.rows][:3] == ["DEA", "DEA, not crossed", "sum"] and len(first.rows) == 8
    assert all((tmp_path / "a" / file).exists() for file in first.files)
    based = str(tmp_path / "a" / "model")
    second = run("deyolo", Run(tmp_path / "b", effort=0.01, data=tmp_path / "a" / "data", base=based))
    assert len(second.rows) == 8
    with pytest.raises(OptionError, match="is no data set of pairs"):
        run("deyolo", Run(tmp_path / "c", data=tmp_path / "a"))
