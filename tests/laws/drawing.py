"""Options of methods drawn from their declared ranges."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import lorry

THOROUGH = os.environ.get("LORRY_HYPOTHESIS") == "thorough"
#: Upper ends where a declared range has none, by the option's name; anything else is a small number.
MOST = {"size": 600, "capacity": 6, "warmup": 3, "final": 3, "interval": 3, "projection_seed": 99, "draw_seed": 99}
MOST_INT, MOST_FLOAT = 5, 4.0
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def effort(examples: int, **more: Any) -> settings:
    """How many examples: always the same ones, unless thoroughness is asked for; then many, and others each time."""
    return settings(
        max_examples=examples * (20 if THOROUGH else 1),
        derandomize=not THOROUGH,
        deadline=None,
        database=None,
        print_blob=THOROUGH,
        report_multiple_bugs=THOROUGH,
        phases=[phase for phase in Phase if phase is not Phase.explain],
        suppress_health_check=list(HealthCheck),
        **more,
    )


def values_of(field: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    """Draw a value that the option's declaration allows."""
    rules, kind = field.metadata, str(field.type)
    declared = kind.split("|")[0].strip()
    if "choices" in rules:
        drawn: st.SearchStrategy[Any] = st.sampled_from(rules["choices"])
    elif declared == "bool":
        drawn = st.booleans()
    elif declared == "int":
        low = int(rules.get("at_least", -1))
        drawn = st.integers(low, max(low, min(int(rules.get("at_most", 10**6)), MOST.get(field.name, MOST_INT))))
    elif declared == "float":
        low = rules.get("above", rules.get("at_least", -1.0))
        high = rules.get("below", rules.get("at_most", MOST_FLOAT))
        inside = [low + (high - low) * share for share in (0.001, 0.03, 0.2, 0.5, 0.9)]
        drawn = st.sampled_from([*([low] if "above" not in rules else []), *inside])
    elif declared.startswith("tuple[int"):
        drawn = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
    elif declared.startswith("tuple[str"):
        drawn = st.lists(st.sampled_from(PROJECTIONS), unique=True).map(tuple)
    elif declared == "Method":
        drawn = st.sampled_from(["lora", "loha"])
    else:
        raise AssertionError(f"say how '{field.name}' of type {kind} is drawn")
    return st.one_of(st.none(), drawn) if "None" in kind else drawn


@st.composite
def options_of(draw: Any, slug: str) -> dict[str, Any]:
    """Draw some of a method's options; sizes always, since their defaults are made for large layers."""
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(lorry.methods()[slug].cls):  # type: ignore[arg-type]
        sized = str(field.type) == "int" or field.name == "kernels"
        if sized or draw(st.booleans()):
            chosen[field.name] = draw(values_of(field))
    return {"method": slug, **chosen}


def refused(options: dict[str, Any]) -> bool:
    """Whether these options do not go together, which a method says in words."""
    try:
        lorry.method_from(options)
    except lorry.OptionError as error:
        assert str(error).strip(), f"{options} are refused without a word"
        return True
    return False


def without_tasks(options: dict[str, Any]) -> dict[str, Any]:
    """The same options, but for gates that must be told the task of every row."""
    wanted = {"ept": ("gate", "token"), "lora-mixer": ("inference_mode", "sparse")}.get(options["method"])
    return options if wanted is None else {**options, wanted[0]: wanted[1]}
