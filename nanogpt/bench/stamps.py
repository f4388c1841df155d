"""Times as characters: a token says when it was made, in its own text.

Both processes are on one machine and read the same monotonic clock. The vocabulary is a run of
CJK ideographs, each one character of three bytes in UTF-8, as long as an average token of GPT-2.
"""

import time

UNIT_S = 0.0005
_FIRST = 0x4E00
COUNT = 20_000  # so times are known within 10 s
CHARACTERS = "".join(map(chr, range(_FIRST, _FIRST + COUNT)))


def now_id() -> int:
    """The present time as a token id."""
    return int(time.monotonic() / UNIT_S) % COUNT


def age_s(character: str, now: float) -> float:
    """Seconds from the time in the character to `now` (time.monotonic()): 0 to 10."""
    return ((int(now / UNIT_S) - (ord(character) - _FIRST)) % COUNT) * UNIT_S
