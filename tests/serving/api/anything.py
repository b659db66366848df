"""Bodies of requests that are shaped like the schemas and filled with anything."""

from hypothesis import strategies as st

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "math", "base+math:0.5", "base+:", "pocket", "../x", "\x00", "\ud800", "{", "[0-9]+", "(", "a" * 300]
    ),
)
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, -(2**63), 2**64, 10**400, 1e308, 0.5, -0.0, float("nan"), float("inf")]),
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def body_of(model, likely):
    """Bodies with the fields of a schema; `likely` has values by field that get past the first check."""
    fields = {name: st.one_of([likely.get(name, ANYTHING)] * 3 + [ANYTHING]) for name in model.model_fields}
    needed = {name: likely.get(name, TEXTS) for name, field in model.model_fields.items() if field.is_required()}
    needed |= {"max_tokens": likely["max_tokens"]} if "max_tokens" in fields and "max_tokens" in likely else {}
    some = st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )
    return st.tuples(st.fixed_dictionaries(needed), some).map(lambda pair: {**pair[0], **pair[1]}) | ANYTHING
