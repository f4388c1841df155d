"""Where this process stands among the others."""

from collections.abc import Mapping
from typing import NamedTuple, Self

from nanogpt.errors import StartupError
from nanogpt.network import split_endpoint


class Ranks(NamedTuple):
    """Numbers of one process. Ranks count through node 0 first, then node 1 and so on, as many on
    each: rank 0 is on the node that has the front end."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    store_host: str
    store_port: int

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str], node: int = 0, nnodes: int = 1, endpoint: str = ""
    ) -> Self:
        """From torchrun's variables. Our launcher starts a torchrun for each node that knows of
        that node only, and node 0's has the store of all at `endpoint` (HOST:PORT); a bare torchrun
        of several nodes knows all. Raises StartupError when the variables are not there."""
        if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False":
            raise StartupError(
                "ranks need torchrun's store: unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
            )
        try:
            local_rank = int(environ["LOCAL_RANK"])
            local_world_size = int(environ["LOCAL_WORLD_SIZE"])
            world_size = int(environ["WORLD_SIZE"])
            host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
            if nnodes > 1 and world_size == local_world_size:
                world_size *= nnodes
                host, port = split_endpoint(endpoint)
        except (KeyError, ValueError) as error:
            raise StartupError(
                f"start this with ./launch.sh or torchrun ({error} is missing or not a number)"
            ) from error
        if world_size != nnodes * local_world_size:
            raise StartupError(
                f"torchrun has {world_size} processes, which is not {nnodes} (nnodes) times "
                f"{local_world_size}: the same number for each node is needed, and --nnodes"
            )
        return cls(
            rank=node * local_world_size + local_rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            node=node,
            store_host=host,
            store_port=port,
        )
