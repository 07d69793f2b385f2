"""The pieces a stream shows join to what decoding everything at once, and searching it, would have given."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from dormouse.engine.detokenize import Detokenizer, StopScanner, TextStream


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are single bytes: the hardest case for characters of many bytes."""
    return bytes(token_ids).decode(errors="replace")


def expected_cut(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that ends first (the longer of two), by trying every end."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


def split(text: str, cuts: Sequence[int]) -> list[str]:
    at = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(at)]


small_text = st.text(alphabet="abé\n", max_size=30)
stop_strings = st.lists(st.text(alphabet="abé\n", min_size=1, max_size=4), max_size=4)


@given(text=small_text, stops=stop_strings, cuts=st.lists(st.integers(0, 1000), max_size=12))
def test_stop_strings_are_found_however_the_text_is_split(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner = StopScanner(stops)
    shown = "".join(scanner.push(piece) for piece in split(text, cuts))
    found = scanner.stopped
    shown += scanner.finish()
    assert shown == expected_cut(text, stops)
    assert found == (shown != text or any(text.endswith(stop) for stop in stops))


@given(text=small_text, stops=stop_strings)
def test_nothing_is_shown_that_a_stop_string_takes_back(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for character in text:
        shown += scanner.push(character)
        assert expected_cut(text, stops).startswith(shown)


@given(text=st.text(max_size=40), context=st.binary(max_size=8))
def test_characters_of_many_tokens_come_out_whole(text: str, context: bytes) -> None:
    stream = Detokenizer(decode_bytes, list(context))
    pieces = [stream.push([byte]) for byte in text.encode()] + [stream.finish()]
    assert "".join(pieces) == text
    assert all(piece in text for piece in pieces)


@given(data=st.binary(max_size=60), cuts=st.lists(st.integers(0, 1000), max_size=8))
def test_bytes_that_are_no_text_are_replaced_once_and_not_lost(data: bytes, cuts: list[int]) -> None:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    stream = Detokenizer(decode_bytes)
    shown = "".join(stream.push(data[a:b]) for a, b in itertools.pairwise(at)) + stream.finish()
    assert shown == data.decode(errors="replace")


def test_a_stop_string_inside_a_character_of_many_tokens() -> None:
    stream = TextStream(decode_bytes, ["é!"])
    assert [stream.push([byte]) for byte in "café! x".encode()] == ["c", "a", "f", "", "", "", "", ""]
    assert stream.stopped


def test_the_space_before_a_first_word_is_kept() -> None:
    def decode(token_ids: Sequence[int]) -> str:  # as SentencePiece does: the first space is dropped
        return "".join([" Paris", " is", " big"][i] for i in token_ids).removeprefix(" ")

    assert Detokenizer(decode, [0]).push([1]) == " is"
    assert Detokenizer(decode).push([1]) == "is"
