"""Tokens to text, a few at a time: never half a character, never a piece of a stop string."""

import codecs
import re
from collections.abc import Iterable

from nanogpt.tokenizer import Tokenizer


class _StopString:
    """Knuth, Morris and Pratt's search, one character at a time (SIAM J. Comput. 6(2), 1977).

    `matched` is the length of the longest end of the text so far that begins the stop string.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._back = [0] * (len(text) + 1)  # [k]: the same for the first k characters, but k itself
        for k in range(1, len(text)):
            length = self._back[k]
            while length and text[length] != text[k]:
                length = self._back[length]
            self._back[k + 1] = length + (text[length] == text[k])

    def push(self, character: str) -> bool:
        """True when the stop string is complete."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._back[self.matched]
        self.matched += self.text[self.matched] == character
        return self.matched == len(self.text)


class IncrementalDetokenizer:
    """The text of one choice as its tokens come, in amortised constant time for each character.

    What `push` and `finish` return, joined, is the same however the tokens are chunked: the bytes
    of all tokens as UTF-8 with U+FFFD for what is none, cut before the stop string that is complete
    first (the longest, if several are complete with the same character).

    `offsets[i]` is where the text of token i begins, in code points; a token inside a character
    begins where the character does. `stop_token_count` is the number of tokens taken in when the
    stop string was complete, `kept_token_count` how many of those begin before the cut.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        assert all(stop), "an empty stop string would stop before the first token"
        self._token_bytes = tokenizer.token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stops = [_StopString(s) for s in stop]
        begins = "".join(re.escape(s[0]) for s in stop)
        self._begins = re.compile(f"[{begins}]" if begins else r"(?!)")
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._length = 0  # code points decoded, held or not
        self.offsets: list[int] = []
        self.stopped = False
        self._cut = 0  # where the stop string begins

    @property
    def stop_token_count(self) -> int:
        """Tokens taken in: once stopped, up to the one that completed the stop string."""
        return len(self.offsets)

    @property
    def kept_token_count(self) -> int:
        """Tokens of the text: once stopped, those that begin before the stop string."""
        kept = len(self.offsets)
        while self.stopped and kept and self.offsets[kept - 1] >= self._cut:
            kept -= 1
        return kept

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that can be delivered now. Tokens after the stop string are not looked at."""
        ready = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.offsets.append(self._length)
            ready.append(self._take(self._decode(self._token_bytes(token_id))))
        return "".join(ready)

    def finish(self) -> str:
        """The rest, when no more tokens come: an unfinished character, and what was held back."""
        if self.stopped:
            return ""
        ready = self._take(self._decode(b"", True))
        if self.stopped:
            return ready
        held, self._held = self._held, ""
        return ready + held

    def _take(self, text: str) -> str:
        """What is certain of `_held` and `text`; the rest is held."""
        start, i, matched = self._length, 0, len(self._held)
        self._length += len(text)
        while i < len(text):
            if not matched:  # on to the next character that can begin a stop string
                found = self._begins.search(text, i)
                if found is None:
                    break
                i = found.start()
            character = text[i]
            i += 1
            complete = [len(s.text) for s in self._stops if s.push(character)]
            if complete:
                self.stopped = True
                self._cut = start + i - max(complete)
                return self._release(text[:i], max(complete), keep=False)
            matched = max(s.matched for s in self._stops)
        return self._release(text, matched, keep=True)

    def _release(self, text: str, last: int, *, keep: bool) -> str:
        """All of `_held + text` but the last few characters, which are held or dropped."""
        whole = self._held + text
        certain = len(whole) - last
        self._held = whole[certain:] if keep else ""
        return whole[:certain]
