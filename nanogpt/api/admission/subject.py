"""Who is limited, judged and banned."""

from typing import NamedTuple

from nanogpt.errors import InvalidRequest

MAX_USER_CHARS = 256


class Subject(NamedTuple):
    """A user of a key. User "" is the key itself; key "" (in bans only) is whichever key.

    A user belongs to its key: two keys may each have a user "42", and the owner of one key can't
    get a user of another into trouble by sending that name.
    """

    key: str
    user: str

    def __str__(self) -> str:
        if not self.user:
            return f"key {self.key!r}"
        return f"user {self.user!r}" + (f" of key {self.key!r}" if self.key else "")


def clean_user(user: str | None) -> str:
    """The request's `user`, "" for none. Raises InvalidRequest when it is too long.

    Text that UTF-8 can't hold would break every store that it goes to, so it is replaced.
    """
    if not user:
        return ""
    if len(user) > MAX_USER_CHARS:
        raise InvalidRequest(
            f"user has {len(user)} characters, at most {MAX_USER_CHARS} are allowed",
            param="user",
        )
    return user.encode("utf-8", "replace").decode()
