from __future__ import annotations

import pytest

from raydfkd.errors import differences


@pytest.mark.parametrize(
    ("there", "here", "lines"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b is 1 there and 2 here"]),
        ({"a": None}, {}, ["a is null there and not given here"]),
        ({}, {"a": [1]}, ["a is not given there and [1] here"]),
        (
            {"terms": [{"name": "tv", "weight": 1}]},
            {"terms": [{"name": "tv", "weight": 2}]},
            ["terms.tv.weight is 1 there and 2 here"],
        ),
        ({"a": {"kind": "x"}}, {"a": {"kind": "y"}}, ['a is {"kind": "x"} there and {"kind": "y"} here']),
        ({"a": 1}, {"a": 1}, []),
    ],
)
def test_differences_name_keys_and_both_values(there, here, lines):
    assert differences(there, here) == lines
