"""Whose a job is, and whether they may still have it: asked before anything of it is shown or
changed, and while it is worked on."""

from nanogpt.api.admission import Admission, Principal
from nanogpt.api.caller import Caller
from nanogpt.jobs.store import Job, Kind, Store


def owned(store: Store, caller: Caller, kind: Kind, job_id: str) -> Job | None:
    """The job, if it is of that kind and the caller's; an admin's are all. None for any other, as
    if it did not exist."""
    job = store.get(job_id)
    if job is None or job.kind != kind or not caller.owns(job.owner):
        return None
    return job


def check_still_allowed(admission: Admission, owner: str, user: str | None, job_id: str) -> None:
    """Every now and then while a job of this key and user goes on, as for a request. Raises
    Banned. A key that is gone, or that only web servers know, is still a name that can be banned.
    """
    admission.check_running(Principal(key_name=owner), user=user, request_id=job_id)
