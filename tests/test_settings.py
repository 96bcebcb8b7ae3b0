"""Generation settings: accepted values, messages for the others, and the contents of a cache key."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from edgelm.runtime import GenerationSettings
from edgelm.runtime.errors import SettingsError
from edgelm.runtime.settings import SettingsKeywords

OTHERS: dict[str, dict[str, Any]] = {
    "max_tokens": {"max_tokens": 7},
    "min_tokens": {"min_tokens": 2},
    "temperature": {"temperature": 0.5},
    "top_k": {"temperature": 0.5, "top_k": 4},
    "top_p": {"temperature": 0.5, "top_p": 0.5},
    "min_p": {"temperature": 0.5, "min_p": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "presence_penalty": {"presence_penalty": -0.1},
    "frequency_penalty": {"frequency_penalty": 0.1},
    "logit_bias": {"logit_bias": {3: -math.inf}},
    "seed": {"temperature": 0.5, "seed": 1},
    "stop": {"stop": ["a"]},
    "stop_token_ids": {"stop_token_ids": [3]},
    "logprobs": {"logprobs": 0},
    "json_schema": {"json_schema": {"type": "object"}},
    "regex": {"regex": "a+"},
    "lark": {"lark": 'start: "a"'},
    "timeout": {"timeout": 3.0},
    "context_full": {"context_full": "slide"},
    "keep": {"context_full": "slide", "keep": 4},
    "lookup": {"lookup": False},
    "special_tokens": {"special_tokens": True},
}
NAMES = [item.name for item in dataclasses.fields(GenerationSettings)]


def test_the_keywords_of_the_engine_are_the_settings() -> None:
    assert list(SettingsKeywords.__annotations__) == NAMES == list(OTHERS)
    types = {item.name: item.type for item in dataclasses.fields(GenerationSettings)}
    assert {name: kind.__forward_arg__ for name, kind in SettingsKeywords.__annotations__.items()} == types


@pytest.mark.parametrize(
    "settings",
    [
        *({"max_tokens": value} for value in (0, -1, True, 1.5, 3.0, "3", None, math.nan)),
        *({"min_tokens": value} for value in (-1, True, 0.5, None, 257)),
        *({"temperature": value} for value in (-0.1, math.nan, math.inf, "1", None, True, 1j)),
        *({"temperature": 1, "top_k": value} for value in (-1, 1.5, None, False)),
        *({"temperature": 1, "top_p": value} for value in (0, -0.1, 1.1, math.nan, None, "1")),
        *({"temperature": 1, "min_p": value} for value in (-0.1, 1.1, math.nan, None)),
        *({"repetition_penalty": value} for value in (0, -1, 1e-7, 1e7, math.nan, math.inf, None)),
        *({"presence_penalty": value} for value in (1e7, -1e7, math.nan, math.inf, None, "0")),
        *({"frequency_penalty": value} for value in (math.nan, -math.inf, None)),
        *({"logit_bias": value} for value in (5, [1])),
        *({"lookup": value} for value in (None, 1, "no")),
        *({"special_tokens": value} for value in (None, 1, "no")),
        *({"logit_bias": value} for value in ({"1": 2}, {-1: 1}, {1: math.nan}, {1: math.inf}, {1: 1e7})),
        *({"logit_bias": value} for value in ({1: "a"}, {True: 1})),
        *({"seed": value} for value in (-1, 2**64, 1.5, "1", True)),
        *({"stop": value} for value in ("", ["a", ""], [1], 5, None, b"a")),
        *({"stop_token_ids": value} for value in ([-1], ["1"], [1.5], 5, "12", [True], None)),
        *({"logprobs": value} for value in (-1, 1.5, True)),
        *({"json_schema": value} for value in ([], "{", "5", 5, {"a": math.nan}, {"a": {1, 2}}, "\ud800")),
        *({name: value} for name in ("regex", "lark") for value in (5, b"a", ["a"])),
        *({"timeout": value} for value in (0, -1, math.nan, math.inf, "1")),
        *({"context_full": value} for value in ("drop", None, 5, "Stop")),
        *({"context_full": "slide", "keep": value} for value in (-1, 1.5, None)),
    ],
    ids=repr,
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=list(settings)[-1]):
        GenerationSettings(**settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value",
    [10**400, 10**5000, -(10**5000), Fraction(10**400), [10**5000]],
    ids=["digits", "5000", "-5000", "fraction", "list"],
)
def test_an_oversized_number_is_refused_by_name(name: str, value: Any) -> None:
    """Python prints no integer with more than 4,300 digits, and no float exceeds 308 digits."""
    with pytest.raises(SettingsError, match=name):
        GenerationSettings(**{name: value})


def test_numbers_of_all_types_are_accepted() -> None:
    given = GenerationSettings(temperature=Fraction(1, 2), timeout=Fraction(3, 2), logit_bias={3: Fraction(1, 4)})
    assert given == GenerationSettings(temperature=0.5, timeout=1.5, logit_bias={3: 0.25})
    assert json.dumps(given.cache_key())


def test_other_types_than_settings_are_refused_as_a_base() -> None:
    wrong: Any
    for wrong in (10**5000, [10**5000]):
        with pytest.raises(SettingsError, match="GenerationSettings"):
            GenerationSettings.of(wrong, {})
    for wrong in ({10**5000: 1}, {3: 10**400}, {3: Fraction(10**400)}):
        with pytest.raises(SettingsError, match="logit_bias"):
            GenerationSettings(logit_bias=wrong)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_p": 0.9}, "temperature"),
        ({"temperature": 0, "top_k": 5}, "temperature"),
        ({"min_p": 0.1}, "temperature"),
        ({"min_tokens": 9, "max_tokens": 8}, "max_tokens"),
        ({"keep": 3}, "slide"),
        ({"regex": "a", "json_schema": {}}, "one of them"),
        ({"regex": "a", "stop": "b"}, "leave them out"),
        ({"json_schema": {}, "min_tokens": 1}, "leave them out"),
        ({"json_schema": {}, "stop_token_ids": [1]}, "leave them out"),
    ],
    ids=repr,
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        GenerationSettings(**settings)


def test_an_unknown_setting_is_answered_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean 'temperature'"):
        GenerationSettings.of(None, {"temprature": 1})
    with pytest.raises(SettingsError, match=r"'zzz'.*docs/generation\.md"):
        GenerationSettings.of(None, {"zzz": 1})
    wrong: Any = {"temperature": 1}
    with pytest.raises(SettingsError, match="GenerationSettings"):
        GenerationSettings.of(wrong, {})


def test_keywords_override_the_settings() -> None:
    base = GenerationSettings(temperature=0.5, top_p=0.9, stop="x", logit_bias={3: 1}, json_schema=None)
    assert GenerationSettings.of(base, {}) is base
    changed = GenerationSettings.of(base, {"seed": 4, "stop": ["y"]})
    assert changed == dataclasses.replace(base, seed=4, stop=("y",))
    assert GenerationSettings.of(None, {}) == GenerationSettings()


def test_settings_with_the_same_meaning_are_equal() -> None:
    one = GenerationSettings(
        temperature=np.float32(0.5), stop="a", stop_token_ids=[4, np.int64(2), 4], logit_bias={5: 1, np.int64(2): 2},
        seed=np.int64(3),
    )  # fmt: skip
    other = GenerationSettings(
        temperature=0.5, stop=("a", "a"), stop_token_ids=(2, 4), logit_bias={2: 2.0, 5: 1.0}, seed=3
    )
    assert one == other == dataclasses.replace(one)


def test_the_properties_of_a_schema_keep_their_order() -> None:
    settings = GenerationSettings(json_schema='{"b": 1, "a": 2}')
    assert settings.json_schema == '{"b":1,"a":2}'
    assert dataclasses.replace(settings) == GenerationSettings(json_schema={"b": 1, "a": 2}) == settings


def test_settings_with_a_stop_and_a_schema_are_refused_after_replacing() -> None:
    with pytest.raises(SettingsError):
        dataclasses.replace(GenerationSettings(stop="a"), regex="b")


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_can_change_an_answer_is_in_the_cache_key(name: str) -> None:
    others = dict(OTHERS[name])
    changed = GenerationSettings(**others)
    del others[name]
    before = GenerationSettings(**others).cache_key()
    assert (changed.cache_key() != before) == (name not in ("timeout", "lookup"))
    assert json.loads(json.dumps(changed.cache_key(), allow_nan=False)) == changed.cache_key()


def test_a_seed_is_not_in_the_cache_key_of_a_greedy_request() -> None:
    assert GenerationSettings(seed=1).cache_key() == GenerationSettings().cache_key()
    assert GenerationSettings(seed=1).plain


def test_the_defaults_are_plain_and_deterministic_and_others_are_not() -> None:
    assert GenerationSettings().plain and GenerationSettings().deterministic
    plain = {"max_tokens", "stop", "stop_token_ids", "timeout", "context_full", "keep", "lookup", "special_tokens"}
    assert {name for name in NAMES if GenerationSettings(**OTHERS[name]).plain} == plain
    sampled = {"temperature", "top_k", "top_p", "min_p", "seed"}
    assert {name for name in NAMES if not GenerationSettings(**OTHERS[name]).deterministic} == sampled


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationSettings().seed = 1  # type: ignore[misc]


CHANGES: dict[str, Callable[[Any], object]] = {
    "set": lambda bias: operator.setitem(bias, 5, 1.0),
    "delete": lambda bias: operator.delitem(bias, 3),
    "merge": lambda bias: operator.ior(bias, {5: 1.0}),
    "update": lambda bias: bias.update({5: 1.0}),
    "clear": lambda bias: bias.clear(),
    "pop": lambda bias: bias.pop(3),
    "popitem": lambda bias: bias.popitem(),
    "setdefault": lambda bias: bias.setdefault(5, 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bias_cannot_be_changed(change: str) -> None:
    given = {3: 1.0}
    settings = GenerationSettings(logit_bias=given)
    with pytest.raises(TypeError, match="cannot be changed"):
        CHANGES[change](settings.logit_bias)
    given[7] = 1.0
    assert settings.logit_bias == {3: 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_equal_settings_have_one_hash(name: str) -> None:
    one, other = GenerationSettings(**OTHERS[name]), GenerationSettings(**OTHERS[name])
    assert {one: 1}[other] == 1
    assert len({one, GenerationSettings()}) == 2
    # Copied as for other processes.
    assert hash(copy.deepcopy(one)) == hash(copy.copy(one)) == hash(one)
    assert json.loads(json.dumps(dataclasses.asdict(one), default=list))["max_tokens"] == one.max_tokens
