"""The document and the command."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorry.claims import read_records
from lorry.claims.page import draw, markdown, picture_name, sheet_name
from lorry.cli.main import app

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_document_is_what_the_records_say():
    assert (DOCS / "claims.md").read_text(encoding="utf-8") == markdown(read_records())


def test_every_record_has_its_plot():
    records = read_records()
    sheets = {sheet_name(r) for r in records if r.finding.sheet is not None}
    assert {path.name for path in (DOCS / "claims").glob("*.png")} == {picture_name(r) for r in records} | sheets


def test_plots_are_pictures(tmp_path):
    path = draw(read_records()[0], tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_table_lists_every_record():
    shown = CliRunner().invoke(app, ["claims", "--json"])
    assert shown.exit_code == 0
    assert len(json.loads(shown.stdout)["records"]) == len(read_records())
    plain = CliRunner().invoke(app, ["claims"], env={"COLUMNS": "200"})
    assert all(record.name in plain.stdout for record in read_records())


@pytest.mark.parametrize("name, message", [("mosss", "Did you mean"), ("mos/nothing", "no claim 'mos/nothing'")])
def test_unknown_claims_are_misuse(tmp_path, name, message):
    result = CliRunner().invoke(app, ["claims", "run", name, "--records", str(tmp_path)])
    assert result.exit_code == 2 and message in result.stderr and not list(tmp_path.iterdir())


def test_run_writes_a_record_and_page_draws_it(tmp_path):
    records = tmp_path / "records"
    run = ["claims", "run", "comol", "--seeds", "1", "--effort", "0.01", "--records", str(records), "--json"]
    assert CliRunner().invoke(app, run).exit_code == 0
    found = read_records(records)
    assert found and all(record.effort == 0.01 for record in found)
    page = CliRunner().invoke(app, ["claims", "page", "--out", str(tmp_path / "c.md"), "--records", str(records)])
    assert page.exit_code == 0
    text = (tmp_path / "c.md").read_text(encoding="utf-8")
    assert "not a finding" in text and all((tmp_path / "c" / picture_name(r)).exists() for r in found)
