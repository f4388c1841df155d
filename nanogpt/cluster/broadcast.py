"""Rank 0's commands to every rank, over torch.distributed (gloo, on the CPU).

A broadcast is a fixed frame of FRAME_BYTES with its payload's length in front; what doesn't fit
follows in one more broadcast of just the size. Both sides post a frame ahead of time and poll it
once a turn of the engine loop, so no thread waits in gloo and an idle rank costs next to nothing.
"""

import struct
import time
from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist

from nanogpt.cluster.messages import MAX_MESSAGE_BYTES
from nanogpt.errors import EngineError

FRAME_BYTES = 4096  # measured: 0.3 ms at 2 ranks, about the cost of an empty one
_HEADER = struct.Struct("<I")
_ROOM = FRAME_BYTES - _HEADER.size

AGREE_POLL_S = 0.002

# A timeout closes gloo's connections for good, and an idle group may wait for ever: silence is
# the front end's business (see watch.py), not gloo's.
GROUP_TIMEOUT = timedelta(days=365)


class PeerLost(EngineError):
    """Another rank is gone, and with it the group."""


class Broadcast:
    """One direction, rank 0 to all. Every rank calls `poll` often; rank 0 also `send`s.

    With a world of one rank nothing touches the network. `lifeline` is work of rank 0 that ends
    only when another rank does.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None,
        lifeline: dist.Work | None = None,
    ) -> None:
        self._rank, self._alone, self._group = rank, world_size == 1, group
        self._lifeline = lifeline
        self._outbox: deque[bytes] = deque()
        self._early: list[bytes] = []  # what came together with the word of `tell`
        self._frame = torch.zeros(FRAME_BYTES, dtype=torch.uint8)
        self._work: dist.Work | None = None
        if not self._alone and rank != 0:
            self._post(self._frame)

    @property
    def pending(self) -> bool:
        """Whether rank 0 still has something that not every rank has taken."""
        return bool(self._outbox) or self._work is not None

    def send(self, payload: bytes) -> None:
        """Rank 0: queue a payload; it goes out, in order, in the next calls of `poll`."""
        if len(payload) > MAX_MESSAGE_BYTES:
            raise EngineError(f"broadcast of {len(payload)} bytes, limit {MAX_MESSAGE_BYTES}")
        self._outbox.append(payload)

    def tell(self, word: bytes) -> bytes:
        """Rank 0's word, on every rank. For a broadcast on which nothing else has been sent; waits
        for rank 0, which waits for nobody. Raises PeerLost."""
        if self._rank == 0:
            self.send(word)
        while not (heard := self.poll()):
            time.sleep(AGREE_POLL_S)
        self._early = heard[1:]
        return heard[0]

    def poll(self) -> list[bytes]:
        """Move on without waiting. Returns the payloads that arrived, on rank 0 its own.

        Raises PeerLost when the group can't go on.
        """
        early, self._early = self._early, []
        return early + self._poll()

    def _poll(self) -> list[bytes]:
        if self._alone:
            sent = list(self._outbox)
            self._outbox.clear()
            return sent
        try:
            return self._poll_root() if self._rank == 0 else self._poll_leaf()
        except RuntimeError as error:
            # gloo's: "[FILE:LINE] Connection closed by peer [ADDRESS]. This is typically ..."
            reason = str(error).partition("] ")[2].partition(". ")[0] or str(error)
            raise PeerLost(f"another rank is gone: {reason}") from error

    def _poll_root(self) -> list[bytes]:
        if self._lifeline is not None and self._lifeline.is_completed():
            self._lifeline.wait()  # raises what went wrong
            raise PeerLost("another rank spoke when none should")
        delivered: list[bytes] = []
        while self._settled() and self._outbox:
            payload = self._outbox.popleft()
            head = payload[:_ROOM]
            raw = _HEADER.pack(len(payload)) + head
            self._frame[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            self._post(self._frame)
            if len(payload) > _ROOM:
                rest = torch.frombuffer(bytearray(payload[_ROOM:]), dtype=torch.uint8)
                dist.broadcast(rest, src=0, group=self._group)
            delivered.append(payload)
        return delivered

    def _poll_leaf(self) -> list[bytes]:
        received: list[bytes] = []
        while self._settled():
            (length,) = _HEADER.unpack(self._frame[: _HEADER.size].numpy().tobytes())
            if length > MAX_MESSAGE_BYTES:
                raise EngineError(f"broadcast announces {length} bytes, limit {MAX_MESSAGE_BYTES}")
            payload = (
                self._frame[_HEADER.size : _HEADER.size + min(length, _ROOM)].numpy().tobytes()
            )
            if length > _ROOM:
                rest = torch.empty(length - _ROOM, dtype=torch.uint8)
                dist.broadcast(rest, src=0, group=self._group)
                payload += rest.numpy().tobytes()
            received.append(payload)
            self._post(self._frame)
        return received

    def _post(self, tensor: torch.Tensor) -> None:
        self._work = dist.broadcast(tensor, src=0, group=self._group, async_op=True)

    def _settled(self) -> bool:
        """Whether the posted frame is through (True as well when none is posted)."""
        if self._work is None:
            return True
        if not self._work.is_completed():
            return False
        self._work.wait()  # raises what went wrong
        self._work = None
        return True
