"""From token ids to the text that a client may see, as early as it is certain.

    token ids -> Detokenizer (holds back an unfinished character) -> StopScanner (and a possible stop string) -> text

`TextStream` is the two together, one per request; whatever the tokens and however they are grouped, the pieces it
returns join to the whole decoded text, cut before the first stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"
_CONTEXT = 6  # tokens of what came before that a decoder needs to see (spaces, merged characters)


class Detokenizer:
    """Decodes a growing sequence of tokens, releasing text only where no later token can change it.

    A token alone does not say its text: byte tokens make a character together, and some decoders drop the space
    before a first token. So each piece is the difference of two decodings that share their first tokens.
    `context` is the end of the prompt.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._shown = list(context[-_CONTEXT:])  # tokens whose text is out already
        self._shown_text = decode(self._shown)
        if self._shown_text.endswith(_UNFINISHED):  # a prompt that ends inside a character is no context
            self._shown, self._shown_text = [], ""
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; return the text that became certain (empty while a character is unfinished)."""
        self._pending += token_ids
        text = self._decode(self._shown + self._pending)
        return "" if text.endswith(_UNFINISHED) else self._release(text)

    def finish(self) -> str:
        """Return what is left, with a replacement character for what never got finished."""
        return self._release(self._decode(self._shown + self._pending))

    def _release(self, text: str) -> str:
        new = text[len(self._shown_text) :]
        self._shown = (self._shown + self._pending)[-_CONTEXT:] if new else self._shown + self._pending
        self._shown_text = self._decode(self._shown)
        self._pending = []
        return new


class StopScanner:
    """Cuts a stream of text before the stop string that ends first (of two that end together, the longer).

    Text is held back while it could be the beginning of a stop string. The result does not depend on how the text
    was split.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; return what may be shown. After `stopped` is true nothing is returned any more."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back: no stop string can follow now."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Token ids in, certain text out, up to a stop string (`stopped`)."""

    def __init__(self, decode: Decode, stops: Sequence[str], context: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(decode, context)
        self._scanner = StopScanner(stops)

    @property
    def stopped(self) -> bool:
        return self._scanner.stopped

    def push(self, token_ids: Sequence[int]) -> str:
        return self._scanner.push(self._detokenizer.push(token_ids))

    def finish(self) -> str:
        """The rest of the text, at the end of a generation that no stop string ended."""
        return self._scanner.push(self._detokenizer.finish()) + self._scanner.finish()


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
