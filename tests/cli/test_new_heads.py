"""A base with a new head is called what the user called it."""

import csv

import lorry


def test_an_adapter_of_the_pocket_model_names_no_place_of_this_machine(tmp_path, run_json):
    data = tmp_path / "rows.csv"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("text", "label"), *((word, word[0] == "a") for word in ("abc", "bcd", "axy", "cde"))]
        )
    report = run_json(
        "train", "--base", "pocket", "--data", data, "--out", tmp_path / "out", "--objective", "classification",
        "--steps", 1, "--batch-size", 2,
    )  # fmt: skip
    assert lorry.open(report["jobs"][0]["adapter"]).fingerprint.base == "pocket"
