"""Bursts: several tokens of each running sequence between two looks of the host.

Small networks decode faster than Python schedules. So where a decoder is (see decode.py), the
sequences of a batch get `steps` tokens each before the host sees any, and while it hands out the
tokens of one burst, the device computes the next:

    host      start 1 │ start 2, wait for 1, record 1 │ start 3, wait for 2, record 2 │ ...
    device            [ burst 1      ][ burst 2      ][ burst 3      ]

The next burst starts blindly, from the tokens on the device. That is only done while nobody waits
to be admitted and the batch is still worth it; sequences that have ended meanwhile go on for
nothing, and their tokens are thrown away. All else (prompts, arrivals, preemption, parameters that
need more than a temperature) is for the scheduler, after the last burst has been recorded.

Blocks may be freed while a burst that writes to them is under way: whatever uses them anew comes
later in the device's stream, and reads no slot that it has not written.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from nanogpt.engine.decode import IDLE, Decoder
from nanogpt.engine.sampler import scale_of, stream_of
from nanogpt.engine.scheduler import Batch, Scheduler
from nanogpt.engine.sequence import Sequence
from nanogpt.engine.transfer import Fetched

FEWEST_STEPS = 2  # hide the host's work behind the device's
ROWS_PER_STEP = 32  # that work grows with the rows, and more steps share it


@dataclass
class Burst:
    """One burst under way, row by row."""

    seqs: list[Sequence]
    starts: np.ndarray  # (n,): position of the first token that each row computes
    wanted: np.ndarray  # (n,): how many tokens each may still bring forth, from this burst on
    steps: int
    num_known: int  # of its steps are the scheduler's: its first, or none
    tokens: Fetched  # (steps, n)


class Bursts:
    """The bursts of one engine: at most two under way, of the same sequences."""

    def __init__(self, decoder: Decoder, scheduler: Scheduler) -> None:
        self._decoder, self._scheduler = decoder, scheduler
        self._under_way: deque[Burst] = deque()
        self._tables = np.zeros((0, decoder.max_blocks), np.int32)

    def __bool__(self) -> bool:
        """Whether there is one to collect."""
        return bool(self._under_way)

    def takes(self, batch: Batch) -> bool:
        """Whether a batch can be the first step of a burst."""
        return batch.is_decode and all(is_plain(chunk.seq) for chunk in batch.chunks)

    def start(self, batch: Batch) -> None:
        """Begin with a batch; none is under way."""
        seqs = [chunk.seq for chunk in batch.chunks]
        starts = np.array([chunk.start for chunk in batch.chunks])
        self._tables = np.zeros((len(seqs), self._decoder.max_blocks), np.int32)
        self._decoder.start(
            np.array([seq.tokens[-1] for seq in seqs]),
            starts,
            np.array([scale_of(seq.params) for seq in seqs]),
        )
        wanted = np.array([seq.max_new - seq.output_len for seq in seqs])
        self._launch(seqs, starts, wanted, num_known=1)

    def follow(self) -> None:
        """Start the burst after the only one under way, if there is nothing else to do."""
        (last,) = self._under_way
        running = np.array([seq.running for seq in last.seqs])
        if self._scheduler.waiting or running.sum() != len(self._scheduler.running):
            return
        wanted = np.where(running, last.wanted - last.steps, 0).clip(min=0)
        alive = int(np.count_nonzero(wanted))
        if alive and self._decoder.bucket(alive) == self._decoder.bucket(len(wanted)):
            self._launch(last.seqs, last.starts + last.steps, wanted, num_known=0)

    def collect(self) -> list[tuple[Sequence, list[int], int]]:
        """Wait for the oldest burst: each sequence that still runs, its tokens, and how many of
        the burst's steps are the scheduler's."""
        burst = self._under_way.popleft()
        rows = burst.tokens.wait().T.tolist()
        self._scheduler.num_steps += burst.steps - burst.num_known
        return [
            (seq, tokens[:count], burst.num_known)
            for seq, count, tokens in zip(burst.seqs, burst.wanted.tolist(), rows, strict=True)
            if count and seq.running
        ]

    def _launch(
        self, seqs: list[Sequence], starts: np.ndarray, wanted: np.ndarray, *, num_known: int
    ) -> None:
        """Start a burst of as many steps as there are blocks for; of none if that is nothing."""
        rows = len(seqs)
        steps = min(
            self._decoder.max_steps, FEWEST_STEPS + rows // ROWS_PER_STEP, int(wanted.max())
        )
        while steps:
            limits = np.where(wanted, starts + np.minimum(wanted, steps) - 1, IDLE)
            if self._scheduler.reserve(zip(seqs, limits.tolist(), strict=True)):
                break
            steps //= 2
        else:
            return
        for row, seq in enumerate(seqs):
            self._tables[row, : len(seq.block_table)] = seq.block_table
        tokens = self._decoder.run(self._tables, limits, self._uniforms(seqs, starts, steps))
        self._under_way.append(Burst(seqs, starts, wanted, steps, num_known, tokens))

    @staticmethod
    def _uniforms(seqs: list[Sequence], starts: np.ndarray, steps: int) -> np.ndarray:
        """(steps, n): what each row draws with; 0 where it draws nothing."""
        drawn = np.zeros((len(seqs), steps))
        for row, (seq, start) in enumerate(zip(seqs, starts.tolist(), strict=True)):
            if seq.running and not seq.params.is_greedy:
                stream = stream_of(seq)[start + 1 - seq.prompt_len :][:steps]
                drawn[row, : len(stream)] = stream
        return np.ascontiguousarray(drawn.T)


def is_plain(seq: Sequence) -> bool:
    """Its tokens take no more than a temperature, and nothing but tokens is reported."""
    p = seq.params
    has_rules = p.is_penalised or p.logit_bias or p.min_tokens
    reports = seq.scoring or p.logprobs is not None
    return not (seq.may_slide or p.is_filtered or has_rules or reports)
