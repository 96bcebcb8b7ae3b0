"""Stop strings against a simple definition: the text before the stop string that is complete first."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgelm.runtime.text.stops import StopMatcher

texts = st.text("ab", max_size=14)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition, character by character."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(places)]


@settings(max_examples=400, deadline=None)
@given(texts, stop_lists, st.lists(st.integers(0, 20), max_size=8))
@example("aab", ["aab", "ab"], [1, 2])
@example("abab", ["abb", "ba"], [2])
def test_the_text_before_the_first_stop_string_is_shown_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher, shown = StopMatcher(stops), ""
    for piece in pieces(text, cuts):
        shown += matcher.add(piece)
        assert not any(stop in shown for stop in stops)
        if matcher.stopped:
            break
    assert (shown + matcher.finish(), matcher.stopped) == expected(text, stops)


@settings(max_examples=200, deadline=None)
@given(texts, stop_lists)
def test_only_possible_beginnings_of_a_stop_string_are_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.add(text)
    if not matcher.stopped:
        ends = [text[-length:] for length in range(1, 4) if length <= len(text)]
        held = max((len(end) for end in ends for stop in stops if stop != end and stop.startswith(end)), default=0)
        assert shown == text[: len(text) - held]


def test_held_back_text_is_shown_if_no_stop_string_follows() -> None:
    matcher = StopMatcher(["</s>"])
    assert [matcher.add(piece) for piece in ("a<", "/", "s", "x<")] == ["a", "", "", "</sx"]
    assert matcher.finish() == "<"
    assert matcher.finish() == ""
