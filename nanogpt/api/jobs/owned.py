"""Whose a job is: asked before anything of it is shown or changed."""

from nanogpt.api.caller import Caller
from nanogpt.jobs.store import Job, Kind, Store


def owned(store: Store, caller: Caller, kind: Kind, job_id: str) -> Job | None:
    """The job, if it is of that kind and the caller's; an admin's are all. None for any other, as
    if it did not exist."""
    job = store.get(job_id)
    if job is None or job.kind != kind or not caller.owns(job.owner):
        return None
    return job
