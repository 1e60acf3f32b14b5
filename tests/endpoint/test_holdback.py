"""Stop strings: what is shown does not depend on how the text is cut into tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tunewright.endpoint.answers import End, Holdback, Piece, cut
from tunewright.generate import Token

letters = st.text(alphabet="abc", max_size=12)
chunks = st.lists(st.text(alphabet="abc", max_size=4), max_size=12)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)
END_ID = 99


def cut_letter_by_letter(text: str, stop: list[str]) -> tuple[str, bool]:
    """The plain way: after each letter, look whether the text now ends in a stop string."""
    for size in range(1, len(text) + 1):
        ends = [one for one in stop if text[:size].endswith(one)]
        if ends:
            return text[: size - max(map(len, ends))], True
    return text, False


@given(chunks, stops)
def test_holdback_shows_what_stands_before_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    gate, shown = Holdback(stop), ""
    for piece in pieces:
        if gate.stopped:
            break
        shown += gate.push(piece)
        assert not any(one in shown for one in stop)
    shown += gate.flush()
    assert (shown, gate.stopped) == cut_letter_by_letter("".join(pieces), stop)


@given(chunks, stops)
def test_holdback_keeps_no_more_than_could_still_become_a_stop_string(pieces: list[str], stop: list[str]) -> None:
    gate = Holdback(stop)
    said = shown = ""
    for piece in pieces:
        said, shown = said + piece, shown + gate.push(piece)
        if gate.stopped:
            return
        held = said[len(shown) :]
        assert not held or any(one.startswith(held) for one in stop)


@given(chunks, stops, st.booleans())
def test_cut_gives_each_shown_token_once_and_no_other(pieces: list[str], stop: list[str], ends: bool) -> None:
    tokens = [Token(place, text, -1.0) for place, text in enumerate(pieces)]
    everything = [*cut([*tokens, *([Token(END_ID, "", -1.0)] if ends else [])], stop, [END_ID])]
    *parts, end = everything
    assert isinstance(end, End)
    assert all(isinstance(part, Piece) for part in parts)
    shown = "".join(part.text for part in parts)
    ids = [token.id for part in parts for token in part.tokens]
    wanted, stopped = cut_letter_by_letter("".join(pieces), stop)
    assert shown == wanted
    assert end.finish_reason == ("stop" if stopped or ends else "length")
    assert ids == list(range(len(ids)))
    assert "".join(pieces[place] for place in ids).startswith(shown)
    if not stopped:
        assert len(ids) == len(pieces) == end.num_tokens
    elif ids:
        assert len("".join(pieces[: len(ids) - 1])) < max(len(shown), 1)


def test_a_token_is_shown_with_the_text_that_it_begins() -> None:
    tokens = [Token(1, "one S", -1.0), Token(2, "T", -1.0), Token(3, "art", -1.0), Token(4, " STOP", -1.0)]
    pieces = [part for part in cut(tokens, ["STOP"], []) if isinstance(part, Piece)]
    assert [(part.text, [token.id for token in part.tokens]) for part in pieces] == [
        ("one ", [1]), ("", []), ("STart", [2, 3]), (" ", [4]),
    ]  # fmt: skip


def test_parts_of_a_character_go_with_it() -> None:
    tokens = [Token(1, "a", -1.0), Token(2, "", -1.0), Token(3, "", -1.0), Token(4, "\N{EURO SIGN}", -1.0)]
    pieces = [part for part in cut(tokens, [], []) if isinstance(part, Piece) and part.tokens]
    assert [[token.id for token in part.tokens] for part in pieces] == [[1], [2, 3, 4]]
    stopped = [part for part in cut(tokens, ["\N{EURO SIGN}"], []) if isinstance(part, Piece) and part.tokens]
    assert [[token.id for token in part.tokens] for part in stopped] == [[1]]
