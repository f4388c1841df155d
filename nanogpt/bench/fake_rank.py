"""A rank whose engine makes tokens out of nothing, at a given rate: what the front end can carry.

All else is the real thing: the rank's loop, its messages and sockets, and the front end that rank 0
starts. The model has a vocabulary of single characters, and a token's character is the time when it
was made, so that a client reads off how long each one was on its way.

Started by the subcommand `frontend`:  python -m nanogpt.bench.fake_rank RATE --port PORT
"""

import os
import sys
import time
from collections.abc import Sequence

from nanogpt import log as logging_setup
from nanogpt import options
from nanogpt.bench.alone import ALONE
from nanogpt.bench.stamps import CHARACTERS, now_id
from nanogpt.cluster.broadcast import Broadcast
from nanogpt.cluster.keeper import FrontEndKeeper
from nanogpt.cluster.lead import Lead
from nanogpt.cluster.rank_loop import RankLoop
from nanogpt.cluster.transport import ControlLink
from nanogpt.registry import ModelInfo, TokenizerSpec
from nanogpt.request import EngineEvent, EngineStats, GenerateRequest, TokenEvent
from nanogpt.rundir import RunDir

MODEL = ModelInfo(
    name="clock",
    context_length=1_000_000,
    vocab_size=len(CHARACTERS),
    eos_token_id=None,
    start_token_id=0,
    tokenizer=TokenizerSpec(kind="char", characters=CHARACTERS),
    dtype="none",
    fingerprint="0" * 16,
    created=0,
    num_parameters=0,
)


class TokenGenerator:
    """An engine without a network: each step gives every choice one token, `rate` steps a second
    (0: as fast as it goes)."""

    info = MODEL

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate if rate else 0.0
        self._due = time.monotonic()
        self._live: dict[str, tuple[GenerateRequest, dict[int, int]]] = {}
        self._tokens = self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, request: GenerateRequest) -> None:
        count = len(request.prompts) * request.n
        made = {i: 0 for i in range(count) if i not in request.finished}
        self._live[request.request_id] = (request, made)

    def abort(self, request_id: str, index: int | None = None) -> None:
        if request_id in self._live and index is not None:
            self._live[request_id][1].pop(index, None)
        if index is None or not self._live.get(request_id, (None, {}))[1]:
            self._live.pop(request_id, None)

    def abort_all(self) -> None:
        self._live.clear()

    def step(self) -> list[EngineEvent]:
        self._wait()
        token_ids = (now_id(),)
        events: list[EngineEvent] = []
        for request_id, (request, made) in list(self._live.items()):
            most = request.params.max_tokens
            for index, position in list(made.items()):
                last = position + 1 >= most
                events.append(
                    TokenEvent(
                        request_id,
                        index,
                        position,
                        token_ids,
                        finish_reason="length" if last else None,
                    )
                )
                if last:
                    del made[index]
                else:
                    made[index] = position + 1
            if not made:
                del self._live[request_id]
        self._tokens += len(events)
        self._steps += 1
        return events

    def _wait(self) -> None:
        """Until the next step is due. What was missed while busy or idle is not made up for."""
        self._due = max(self._due + self._interval, time.monotonic())
        time.sleep(max(0.0, self._due - time.monotonic()))

    def stats(self) -> EngineStats:
        running = sum(len(made) for _, made in self._live.values())
        return EngineStats(
            model=MODEL.name,
            running=running,
            generated_tokens=self._tokens,
            steps=self._steps,
        )


def main(argv: Sequence[str]) -> None:
    rate, *others = argv
    config = options.parse_or_exit(others)
    logging_setup.set_up(config.log_level, "fake rank")
    run_dir = RunDir.open(config.host, config.port)
    keeper = FrontEndKeeper(run_dir, others, os.getpid())
    keeper.ensure()
    broadcast = Broadcast(0, 1, None)
    beat_s = config.cluster.heartbeat_s
    lead = Lead(ControlLink(run_dir.control), broadcast, Lead.hello(1, (MODEL,)), beat_s)
    engines = {MODEL.name: TokenGenerator(float(rate))}
    loop = RankLoop(ALONE, engines, broadcast, lead, beat_s)
    while True:
        loop.turn()


if __name__ == "__main__":
    main(sys.argv[1:])
