"""Suppression of boxes by its definition, and torchvision imported whichever build it is."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import Generator, Tensor

from lorry.kernels import vision


def greedy(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """The definition: take the best, drop what overlaps it too much, and again."""
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-float(scores[i]), i)):
        if all(not iou(boxes[i].tolist(), boxes[j].tolist()) > threshold for j in kept):
            kept.append(i)
    return kept


def iou(a: list[float], b: list[float]) -> float:
    width, height = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union else float("nan")


def drawn(count: int, seed: int, size: float = 4.0) -> tuple[Tensor, Tensor]:
    g = Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=g, dtype=torch.float64) * size
    boxes = torch.cat([corner, corner + 0.2 + torch.rand(count, 2, generator=g, dtype=torch.float64)], 1)
    return boxes, torch.rand(count, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_boxes_are_removed_by_better_ones_that_remain(seed, threshold):
    boxes, scores = drawn(40, seed)
    assert vision.nms(boxes, scores, threshold).tolist() == greedy(boxes, scores, threshold)


def test_more_boxes_than_are_held_against_each_other_at_once(monkeypatch):
    boxes, scores = drawn(50, 7)
    monkeypatch.setattr(vision, "AT_ONCE", 8)
    assert vision.nms(boxes, scores, 0.2).tolist() == greedy(boxes, scores, 0.2)


def test_a_chain_in_which_every_second_box_remains():
    left = torch.arange(9, dtype=torch.float64)
    boxes = torch.stack([left, 0 * left, left + 2, 0 * left + 1], 1)
    assert vision.nms(boxes, -left, 0.3).tolist() == [0, 2, 4, 6, 8]


def test_equal_scores_no_boxes_and_boxes_without_area():
    boxes = torch.tensor([[0.0, 0, 2, 2]]).repeat(3, 1)
    assert vision.nms(boxes, torch.ones(3), 0.5).tolist() == [0]
    assert vision.nms(torch.zeros(0, 4), torch.zeros(0), 0.5).shape == (0,)
    assert vision.nms(torch.zeros(2, 4), torch.tensor([1.0, 2.0]), 0.5).tolist() == [1, 0]
    assert vision.nms(torch.zeros(0, 4), torch.zeros(0), 0.5).dtype == torch.int64


def test_half_precision_is_compared_in_single():
    boxes, scores = drawn(30, 3)
    halved = boxes.half()
    assert vision.nms(halved, scores, 0.4).tolist() == vision.nms(halved.float(), scores, 0.4).tolist()


def test_importing_lorry_imports_neither_torch_nor_torchvision():
    code = "import lorry, sys; print(sorted({'torch', 'torchvision'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_torchvision_is_imported_after_lorry_and_suppresses_boxes():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    import torchvision

    boxes, scores = drawn(40, 11)
    assert torch.ops.torchvision.nms(boxes, scores, 0.3).tolist() == greedy(boxes, scores, 0.3)
    assert torchvision.transforms.functional.hflip(torch.arange(3.0)[None]).tolist() == [[2.0, 1.0, 0.0]]
