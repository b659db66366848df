"""Sheets of pictures: kept small in a record, and drawn beside its plot."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from lorry.claims.ledger import Record, read_records
from lorry.claims.page import draw, markdown, picture_name, sheet_name
from lorry.claims.sheets import sheet, write_sheet


def flat(*colours):
    return torch.stack([torch.tensor(c, dtype=torch.uint8)[:, None, None].expand(3, 8, 8) for c in colours])


RED, GREEN, BLUE, WHITE = (200, 0, 0), (0, 200, 0), (0, 0, 200), (255, 255, 255)


def test_every_picture_stands_at_its_place(tmp_path):
    made = sheet("four", flat(RED, GREEN, BLUE, WHITE), ["a", "b"], ["one", "two"])
    write_sheet(made, tmp_path / "sheet.png")
    drawn = Image.open(tmp_path / "sheet.png").convert("RGB")
    centres = {c: [] for c in (RED, GREEN, BLUE)}
    for y in range(drawn.height):
        for x in range(drawn.width):
            if (found := drawn.getpixel((x, y))) in centres:
                centres[found].append((x, y))
    middle = {c: [sum(axis) / len(axis) for axis in zip(*spots, strict=True)] for c, spots in centres.items()}
    assert middle[RED][0] == middle[BLUE][0] < middle[GREEN][0]
    assert middle[RED][1] == middle[GREEN][1] < middle[BLUE][1]


def test_a_record_keeps_its_sheet_and_the_page_shows_it(tmp_path):
    record = read_records()[0]
    made = sheet("two", flat(RED, BLUE), ["a", "b"], ["one"])
    record = replace(record, finding=replace(record.finding, sheet=made))
    again = Record.from_dict(json.loads(json.dumps(asdict(record))))
    assert again.finding.sheet.png == made.png and list(again.finding.sheet.columns) == ["a", "b"]
    draw(again, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {picture_name(record), sheet_name(record)}
    assert f"claims/{sheet_name(record)}" in markdown([again])


def test_a_sheet_with_other_places_than_pictures_is_refused():
    with pytest.raises(ValueError, match="Expected 3 square pictures"):
        sheet("three", flat(RED, BLUE), ["a", "b", "c"], ["one"])
