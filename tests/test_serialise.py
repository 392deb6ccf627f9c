"""Typed JSON: what is written reads back equal, and nothing but dataclasses and known functions is ever made."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmjax.errors import UserError
from slmjax.serialise import canonical, differences, fingerprint, from_json, to_json

pytestmark = pytest.mark.fast


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    shape: tuple = (1, 2)
    flag: bool | None = None


leaves = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.builds(Outer, st.builds(Inner), inner, st.none()),
    max_leaves=12,
)


@given(values)
def test_round_trip_through_text(value):
    text = json.dumps(to_json(value), allow_nan=False)
    assert from_json(json.loads(text)) == value


def test_functions_go_by_name():
    assert from_json(to_json(fingerprint)) is fingerprint


def test_a_lambda_is_refused_with_its_field():
    with pytest.raises(UserError, match=r"inner\.rate: a function"):
        to_json(Outer(inner=Inner(rate=lambda: 1)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"$type": "subprocess:Popen", "args": ["true"]}, "not part of slmjax"),
        ({"$function": "antigravity:fly"}, "not part of slmjax"),
        ({"$function": "os:system"}, "not part of slmjax"),
        ({"$type": "slmjax.errors:UserError"}, "not a dataclass"),
        ({"$type": "slmjax.nowhere:Thing"}, "does not exist"),
        ({"$type": f"{__name__}:Inner", "rat": 1}, "'rat'"),
        ({"a": 1}, "without \\$type"),
    ],
)
def test_hostile_or_stale_json_is_refused(data, words):
    with pytest.raises(UserError, match=words):
        from_json(data)


def test_reading_imports_no_foreign_module():
    import sys

    with pytest.raises(UserError, match="--code"):
        from_json({"$type": "antigravity:X"})
    assert "antigravity" not in sys.modules


def test_fingerprint_ignores_order_and_sees_every_field():
    a, b = to_json(Outer()), to_json(Outer(inner=Inner(rate=2e-3)))
    assert fingerprint(a) == fingerprint(dict(reversed(a.items())))
    assert fingerprint(a) != fingerprint(b)
    assert canonical({"b": 1, "a": [1, 2]}) == '{"a":[1,2],"b":1}'


def test_differences_name_the_field():
    a, b = to_json(Outer()), to_json(Outer(inner=Inner(rate=2e-3), shape=(1, 3)))
    assert differences(a, b) == ["inner.rate: 0.001 -> 0.002", "shape.1: 2 -> 3"]
    assert differences(a, a) == []
