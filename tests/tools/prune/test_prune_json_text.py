"""Values change where they stand; everything else in the text stays."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.tools.prune.json_text import replace_values

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def test_only_the_value_changes():
    text = (
        '{\r\n\t"a":   1 , "b":{"num_experts":128,"x":"}{\\"num_experts\\": 3"},\n  "c": [\n    1,\n    2\n  ], '
        '"d": 1e-06}\n\n'
    )
    new = replace_values(text, {("b", "num_experts"): 64, ("c",): [7], ("b", "n_group"): 1, ("z",): "ä"})
    assert new == (
        '{\r\n\t"a":   1 , "b":{"num_experts":64,"x":"}{\\"num_experts\\": 3","n_group": 1},\n  "c": [\n    7\n  ], '
        '"d": 1e-06, "z": "\\u00e4"}\n\n'
    )


def test_keys_are_added_as_the_others_stand():
    assert replace_values('{\n  "a": 1,\n  "b": 2\n}', {("c",): 3, ("d",): 4}) == (
        '{\n  "a": 1,\n  "b": 2,\n  "c": 3,\n  "d": 4\n}'
    )
    assert replace_values("{ }", {("a",): 1, ("b",): 2}) == '{"a": 1,"b": 2 }'
    with pytest.raises(KeyError):
        replace_values("[1]", {("a",): 1})


def places(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from places(inner, (*path, place))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), st.data())
def test_the_new_text_means_the_edited_value(content, data):
    text = json.dumps(
        content,
        indent=data.draw(st.sampled_from([None, 1, "\t"])),
        ensure_ascii=data.draw(st.booleans()),
        separators=data.draw(st.sampled_from([(",", ":"), (", ", ": ")])),
    )
    path = data.draw(st.sampled_from(list(places(content))))
    new = data.draw(VALUES)
    expected = json.loads(text)
    if path:
        holder = expected
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = new
    else:
        expected = new
    assert json.loads(replace_values(text, {path: new})) == expected
    assert replace_values(text, {}) == text
