"""Rank 0's part: between the front end and the broadcast."""

import logging
import os
import time

from nanogpt.cluster.broadcast import Broadcast
from nanogpt.cluster.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Alive,
    Command,
    Frame,
    Hello,
    Introduce,
    Welcome,
    encode,
)
from nanogpt.cluster.transport import ControlLink
from nanogpt.registry import ModelInfo

log = logging.getLogger(__name__)


class Lead:
    """Takes what the front end says and broadcasts it; greets each new front end."""

    def __init__(
        self,
        control: ControlLink,
        broadcast: Broadcast,
        hello: Hello,
        heartbeat_s: float,
    ) -> None:
        self._control, self._broadcast = control, broadcast
        self._hello, self._heartbeat_s = hello, heartbeat_s
        self._epoch = 0
        self._tick = 0
        self._last_beat = 0.0
        control.send(hello)

    @staticmethod
    def hello(
        world_size: int, models: tuple[ModelInfo, ...], needs: tuple[int, ...] = (), budget: int = 0
    ) -> Hello:
        """See Hello for what these are."""
        return Hello(PROTOCOL_VERSION, world_size, models, os.getpid(), needs, budget)

    def turn(self, timeout_ms: int) -> None:
        """Queue for broadcast what has come, after waiting up to `timeout_ms` for something."""
        commands: list[Command] = []
        for message in self._control.receive(timeout_ms):
            if isinstance(message, Introduce):
                log.info("a new front end: saying hello again")
                self._control.send(self._hello)
            elif isinstance(message, Welcome):
                self._epoch = message.epoch
                commands.append(message)
            elif message.epoch == self._epoch:
                commands.append(message)
        now = time.monotonic()
        if now - self._last_beat >= self._heartbeat_s:
            self._last_beat = now
            self._control.send(Alive(self._epoch))
        if commands:
            self._send(commands)

    def _send(self, commands: list[Command]) -> None:
        """In as few frames as they fit into: many long requests may go on at once after a crash."""
        payload = encode(Frame(self._tick + 1, tuple(commands)))
        if len(payload) > MAX_MESSAGE_BYTES and len(commands) > 1:
            half = len(commands) // 2
            self._send(commands[:half])
            self._send(commands[half:])
            return
        self._tick += 1
        self._broadcast.send(payload)
