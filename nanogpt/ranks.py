"""Where this process stands among the others."""

from collections.abc import Mapping
from typing import NamedTuple, Self

from nanogpt.errors import StartupError


class Ranks(NamedTuple):
    """Numbers of one process. Ranks count through node 0 first, then node 1 and so on, whatever
    order torchrun's rendezvous found: rank 0 is on the node that has the front end."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    store_host: str
    store_port: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], node: int) -> Self:
        """From torchrun's variables. Raises StartupError when they are not there."""
        if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False":
            raise StartupError(
                "ranks need torchrun's store: unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
            )
        try:
            local_rank = int(environ["LOCAL_RANK"])
            local_world_size = int(environ["LOCAL_WORLD_SIZE"])
            return cls(
                rank=node * local_world_size + local_rank,
                world_size=int(environ["WORLD_SIZE"]),
                local_rank=local_rank,
                local_world_size=local_world_size,
                node=node,
                store_host=environ["MASTER_ADDR"],
                store_port=int(environ["MASTER_PORT"]),
            )
        except (KeyError, ValueError) as error:
            raise StartupError(
                f"start this with ./launch.sh or torchrun ({error} is missing or not a number)"
            ) from error
