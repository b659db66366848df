"""Records: their schema, what stands for a key, and the score."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.core.errors import OptionError
from lorry.systems.cbrs import NO_REQUEST, normalised, schema, score, tree_likeness, written
from lorry.systems.cbrs.record import empty
from lorry.systems.cbrs.score import leaves

FULL = {
    **empty(),
    "blood_group": "AB-",
    "bags_needed": "2",
    "patient": {"name": "Mira Sol", "gender": "F", "age_group": "child"},
    "location_markers": ["near the bridge", "gate 4"],
    "contacts": [{"name": "Tom", "contact_numbers": ["555-0100"], "relation_with_patient": "uncle"}],
}


def test_records_follow_their_schema_and_others_do_not():
    jsonschema = pytest.importorskip("jsonschema")
    judge = jsonschema.Draft202012Validator(schema())
    assert judge.is_valid(FULL) and judge.is_valid(empty())
    assert not judge.is_valid({**FULL, "blood_group": "C+"})
    assert not judge.is_valid({**FULL, "more": ""})
    assert not judge.is_valid({key: value for key, value in FULL.items() if key != "contacts"})


def test_letters_of_every_script_are_written_as_they_are():
    assert written({"location": "Zürich ঢাকা"}) == '{"location":"Zürich ঢাকা"}'


def test_variant_keys_stand_for_those_of_the_schema():
    strange = {key: value for key, value in FULL.items() if key not in ("contacts", "bags_needed", "patient")}
    strange |= {
        "contact": FULL["contacts"][0],
        "bag_needed": 2,
        "patient": {"name": "Mira Sol", "Gender": "F", "age-group": "child"},
        "weather": "rain",
    }
    found, notes = normalised(strange)
    assert found == FULL
    assert set(notes) == {
        "contact: renamed to contacts",
        "bag_needed: renamed to bags_needed",
        "patient.Gender: renamed to gender",
        "patient.age-group: renamed to age_group",
        "weather: left out",
    }


def test_a_key_that_is_there_is_not_replaced_by_a_variant():
    found, notes = normalised({**FULL, "contact": []})
    assert found == FULL and notes == ("contact: left out",)


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_whatever_is_an_object_becomes_a_record_and_stays_one(value):
    if not isinstance(value, dict):
        with pytest.raises(OptionError, match="A record is a JSON object"):
            normalised(value)
        return
    found, _ = normalised(value)
    assert {path for path, _ in leaves(found)} >= {"blood_group", "patient.name"}
    assert normalised(found) == (found, ())


def test_no_request_stays_none():
    assert normalised({"is_blood_donation_request": False}) == (dict(NO_REQUEST), ())


def test_identical_records_score_one_in_any_order_of_keys():
    turned = json.dumps(dict(reversed(list(FULL.items()))))
    assert score([turned], [FULL]).final == 1
    assert tree_likeness(FULL, json.loads(turned)) == 1


def test_a_wrong_or_missing_value_costs_its_field():
    less = {**FULL, "blood_group": "", "location_markers": ["gate 4"]}
    found = score([json.dumps(less)], [FULL])
    assert found.fields["blood_group"] == 0 and found.fields["bags_needed"] == 1
    assert found.fields["location_markers"] == pytest.approx(2 / 3)
    assert 0.8 < found.final < 1 and found.final == pytest.approx(0.8 * found.f1 + 0.2 * found.tree)


def test_what_cannot_be_read_counts_as_nothing_and_is_counted():
    both = score([json.dumps(FULL), "{"], [FULL, FULL])
    assert both.valid == 0.5 and both.tree == 0.5
    assert both.f1 == pytest.approx(2 / 3)  # all said is right, half of what is there is said
    assert score(["no", "[]"], [FULL, FULL]).final == 0


def test_a_variant_key_is_renamed_or_an_error_as_the_caller_says():
    variant = {**{k: v for k, v in FULL.items() if k != "contacts"}, "contact": FULL["contacts"]}
    assert score([json.dumps(variant)], [FULL]).final == 1
    strict = score([json.dumps(variant)], [FULL], rename=False)
    assert strict.fields["contacts.name"] == 0 and strict.fields["contact.name"] == 0 and strict.final < 1


def test_trees_lose_what_was_edited():
    a, b = {"x": "1", "y": "2"}, {"x": "1", "y": "3"}
    assert tree_likeness(a, b) == pytest.approx(1 - 1 / 5)
    assert tree_likeness(a, {"x": "1"}) == pytest.approx(1 - 2 / 5)


def test_answers_must_be_as_many_as_records():
    with pytest.raises(OptionError, match="found 1 for 2"):
        score(["{}"], [FULL, FULL])
    with pytest.raises(OptionError, match="found 0 for 0"):
        score([], [])
