"""Pairs on disk in both formats, generated pairs, and changes that keep a pair aligned."""

import json

import pytest
import torch

from lorry.core.errors import OptionError
from lorry.systems.deyolo import read, toy, without, write
from lorry.systems.deyolo.pairs import augmented


@pytest.fixture(scope="module")
def few():
    return toy(6, seed=0)


@pytest.mark.parametrize("form", ["coco", "yolo"])
def test_a_folder_holds_what_was_written(few, form, tmp_path):
    write(few, tmp_path, form)
    back = read(tmp_path)
    assert back.classes == few.classes and list(back.names) == list(few.names)
    for i in range(len(few)):
        assert torch.equal(back.pictures[i], few.pictures[i])
        torch.testing.assert_close(back.boxes[i], few.boxes[i], rtol=0, atol=1e-3)
        assert torch.equal(back.labels[i], few.labels[i])


def test_folders_may_have_the_names_of_known_sets_and_pictures_no_boxes(few, tmp_path):
    write(few, tmp_path, "yolo")
    (tmp_path / "rgb").rename(tmp_path / "visible")
    (tmp_path / "ir").rename(tmp_path / "infrared")
    (tmp_path / "labels" / "00002.txt").unlink()
    back = read(tmp_path)
    assert len(back) == 6 and back.boxes[2].shape == (0, 4) and len(back.boxes[1])


def test_each_object_is_shown_by_one_modality_and_half_of_them_by_each():
    pairs = toy(60, seed=1)
    shown = torch.cat(list(pairs.seen))
    assert abs(float(shown.float().mean()) - 0.5) < 0.1
    changes = []
    for picture, boxes, seen in zip(pairs.pictures, pairs.boxes, pairs.seen, strict=True):
        for (left, top, right, bottom), modality in zip(boxes.int().tolist(), seen.tolist(), strict=True):
            infrared = picture[3, top:bottom, left:right].float() / 255
            changes.append((modality, float(infrared.max())))
    assert all(top > 0.9 for modality, top in changes if modality == 1)  # pasted digits are bright there
    assert all(top < 0.75 for modality, top in changes if modality == 0)


def test_generated_pairs_depend_on_the_seed_alone_and_held_out_ones_differ():
    again = zip(toy(3, 5).pictures, toy(3, 5).pictures, strict=True)
    assert all(torch.equal(a, b) for a, b in again)
    assert not torch.equal(toy(1, 5).pictures[0], toy(1, 6).pictures[0])
    assert not torch.equal(toy(1, 5).pictures[0], toy(1, 5, held_out=True).pictures[0])


def test_both_pictures_and_the_boxes_are_mirrored_together(few):
    pair, target = few.inputs([0])[0], few.targets([0])[0]
    g = torch.Generator().manual_seed(0)
    changed, moved = augmented(pair, target, g, flip=1.0, light=0.0)
    assert torch.equal(changed, pair.flip(-1))
    for (a, b, c, d), (e, f, h, i) in zip(target["boxes"].int().tolist(), moved["boxes"].int().tolist(), strict=True):
        assert torch.equal(changed[:, f:i, e:h], pair[:, b:d, a:c].flip(-1))


def test_brightness_changes_in_each_picture_by_itself(few):
    pair = few.inputs([0])[0] * 0.5
    changed, _ = augmented(pair, few.targets([0])[0], torch.Generator().manual_seed(3), flip=0.0, light=0.5)
    factors = [float(part.sum() / before.sum()) for part, before in zip(changed.split(3), pair.split(3), strict=True)]
    assert abs(factors[0] - factors[1]) > 0.01
    torch.testing.assert_close(changed[:3], pair[:3] * factors[0])


def test_a_missing_modality_is_black_and_the_other_as_it_was(few):
    pair = few.inputs([0])[0]
    assert torch.equal(without(pair, "rgb")[3:], pair[3:]) and float(without(pair, "rgb")[:3].max()) == 0
    assert torch.equal(without(pair, "ir")[:3], pair[:3]) and float(without(pair, "ir")[3:].max()) == 0


def damage_size(folder):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "ir" / "00001.png")


def damage_label(folder):
    (folder / "labels" / "00001.txt").write_text("7 0.5 0.5 0.1 0.1\n")


def damage_box(folder):
    (folder / "labels" / "00001.txt").write_text("0 0.9 0.5 0.5 0.1\n")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "ir" / "00003.png").unlink(), "found only one of '00003'"),
        (damage_size, "pairs must lie pixel on pixel"),
        (damage_label, "line 1: expected a class from 0 to 1"),
        (damage_box, "lies outside of the 64 x 64 pixels"),
        (lambda folder: (folder / "classes.txt").unlink(), "has labels/ but no classes.txt"),
        (lambda folder: (folder / "labels" / "stray.txt").write_text(""), "boxes for 'stray', but no such pictures"),
        (lambda folder: (folder / "rgb" / "00001.png").write_text("no"), "is no picture that can be read"),
        (lambda folder: (folder / "rgb").rename(folder / "colour"), "expected one of rgb, visible, vis"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(few, tmp_path, damage, says):
    write(few, tmp_path, "yolo")
    damage(tmp_path)
    with pytest.raises(OptionError, match=says):
        read(tmp_path)


def test_annotations_that_are_not_of_coco_are_refused(few, tmp_path):
    write(few, tmp_path, "coco")
    values = json.loads((tmp_path / "annotations.json").read_text())
    values["annotations"][0]["category_id"] = 99
    (tmp_path / "annotations.json").write_text(json.dumps(values))
    with pytest.raises(OptionError, match="not in COCO's form"):
        read(tmp_path)
    (tmp_path / "annotations.json").unlink()
    with pytest.raises(OptionError, match="has no boxes"):
        read(tmp_path)
    with pytest.raises(OptionError, match="coco or yolo"):
        write(few, tmp_path, "voc")
