"""The parameters of a list, and the page that they ask for."""

from collections.abc import Callable, Mapping

from nanogpt.api.caller import Caller
from nanogpt.api.decode import clip
from nanogpt.api.jobs.owned import owned
from nanogpt.errors import InvalidRequest, NotFound
from nanogpt.jobs.store import Job, Kind, Store


def page(
    store: Store,
    caller: Caller,
    kind: Kind,
    query: Mapping[str, str],
    *,
    default: int,
    most: int,
    wanted: Callable[[Job], bool] = lambda job: True,
) -> tuple[list[Job], bool]:
    """(the caller's jobs of that kind that are wanted, whether there are more). Raises
    InvalidRequest, NotFound."""
    limit = _limit(query.get("limit"), default, most)
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc", param="order")
    after = query.get("after", "")
    if after and owned(store, caller, kind, after) is None:
        raise NotFound(f"there is no {clip(after, 100)!r} to go on after", param="after")
    owner = None if caller.is_admin else caller.name
    found: list[Job] = []
    while len(found) <= limit:
        jobs = store.page(kind, owner, after=after, limit=limit + 1, newest=order == "desc")
        found += filter(wanted, jobs)
        if len(jobs) <= limit:
            break
        after = jobs[-1].id
    return found[:limit], len(found) > limit


def _limit(text: str | None, default: int, most: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise InvalidRequest(f"limit must be an integer from 1 to {most}", param="limit")
    return int(text)
