"""torchrun with two things of our own: its store listens on one address only, and its end is said
in one line instead of a traceback. Options are torchrun's own.

torchrun's stores listen on every interface, and the c10d rendezvous unpickles what it finds in its
store: whoever reaches the port could run code here. There is nothing to negotiate where each node
has a torchrun of its own and the ranks find each other (nanogpt/cluster/process_group.py), so
`--rdzv-backend=own` does without either.
"""

import logging
import socket
import sys
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from nanogpt.network import split_endpoint

STORE_TIMEOUT = timedelta(seconds=60)


class OwnRendezvous(RendezvousHandler):
    """The rendezvous of one node with itself. The store lives as long as torchrun does, and listens
    at the endpoint, HOST:PORT."""

    def __init__(self, run_id: str, endpoint: str) -> None:
        self._run_id = run_id
        self._host, port = split_endpoint(endpoint)
        family = socket.getaddrinfo(self._host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((self._host, port), family=family)
        self._port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(
            self._host,
            self._port,
            is_master=True,
            timeout=STORE_TIMEOUT,
            master_listen_fd=listener.detach(),
        )

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "own"

    def next_rendezvous(self) -> RendezvousInfo:
        store = dist.PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(self._host, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass  # nobody else could join

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _own(params: RendezvousParameters) -> RendezvousHandler:
    return OwnRendezvous(params.run_id, params.endpoint)


def main() -> int:
    """Exit code 0 after a signal, 1 when the ranks could not be kept alive."""
    # A restart is said by the rank that died (an error) and by the front end.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    rendezvous_handler_registry.register("own", _own)
    try:
        run.main()
    except SignalException:
        return 0
    except ChildFailedError as error:
        name, failure = error.name, error.get_first_failure()[1]
        print(
            f"torchrun gave up: {name}, local rank {failure.local_rank}, exit {failure.exitcode}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
