"""The only rank of the only node, for engines and loops outside torchrun."""

from nanogpt.ranks import Ranks

ALONE = Ranks(
    rank=0,
    world_size=1,
    local_rank=0,
    local_world_size=1,
    node=0,
    store_host="",  # one rank needs no store
    store_port=0,
)
