"""`lorry demo` on the pocket model, with few steps."""

from __future__ import annotations

import json
import math

import pytest

from lorry import pocket

pytestmark = pytest.mark.skipif(
    not (pocket.PATH / "model.safetensors").is_file(), reason="the pocket model's weights are not built"
)


def test_the_demo_writes_its_report(run_json, tmp_path):
    shown = run_json("demo", "--out", tmp_path, "--steps", 12, "--test-rows", 16)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report == shown
    assert report.keys() == {"adapters", "fuse", "peft_max_difference", "seconds"}
    assert len(report["adapters"]) == 4
    assert all(a.keys() == {"name", "before", "after"} for a in report["adapters"])
    assert report["fuse"]["base_restored"] is True
    assert all(r["tensors_applied"] == r["tensors_total"] for r in report["fuse"]["receipts"])
    assert report["fuse"]["max_difference_fused_composed"] < 1e-3
    if report["peft_max_difference"] is not None:
        assert math.isfinite(report["peft_max_difference"]) and report["peft_max_difference"] < 1e-4
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    for picture in ("before-after.png", "losses.png", "heat-map.png"):
        assert f"({picture})" in page
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for row in report["adapters"]:
        assert (tmp_path / "adapters" / row["name"] / "adapter_config.json").is_file()
