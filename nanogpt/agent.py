"""torchrun with two things of our own: on one machine its store listens on loopback only, and its
end is said in one line instead of a traceback. Options are torchrun's own.

torchrun's stores listen on every interface, and the c10d rendezvous unpickles what it finds in its
store: whoever reaches the port could run code here. On one machine there is nothing to negotiate,
so `--rdzv-backend=loopback` does without either.
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

LOOPBACK = "127.0.0.1"
STORE_TIMEOUT = timedelta(seconds=60)


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of one node with itself. The store lives as long as torchrun does."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        listener = socket.create_server((LOOPBACK, 0))
        self._port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(
            LOOPBACK,
            self._port,
            is_master=True,
            timeout=STORE_TIMEOUT,
            master_listen_fd=listener.detach(),
        )

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "loopback"

    def next_rendezvous(self) -> RendezvousInfo:
        store = dist.PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._port))

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


def _loopback(params: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(params.run_id)


def main() -> int:
    """Exit code 0 after a signal, 1 when the ranks could not be kept alive."""
    # A restart is said by the rank that died (an error) and by the front end.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    rendezvous_handler_registry.register("loopback", _loopback)
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
