"""Which cluster has the model of a job: work for another one goes back to the queue."""

from collections.abc import Callable

from nanogpt.api.backend import Cluster
from nanogpt.errors import ModelNotFound
from nanogpt.jobs.runner import PutBack
from nanogpt.registry import ModelInfo

Elsewhere = Callable[[str], bool]
"""Whether another cluster has the model, or had it until not long ago. May raise Unavailable."""


def nowhere(model: str) -> bool:
    """For the only cluster."""
    return False


def find_here(cluster: Cluster, model: str, elsewhere: Elsewhere) -> ModelInfo:
    """The model of a job. Raises PutBack while another cluster has it, then ModelNotFound."""
    info = cluster.models().get(model)
    if info is not None:
        return info
    if elsewhere(model):
        raise PutBack(f"the model {model!r} is served by another cluster")
    raise ModelNotFound(
        f"the model {model!r} is not served any more: start a server that has it, and send the "
        "request again",
        param="model",
    )
