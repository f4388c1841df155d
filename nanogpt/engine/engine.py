"""One model on one rank: requests in, token events out.

A step is three calls: schedule (what to compute), run (the network and the sampler), record
(tokens to sequences, events to the caller). Nothing else touches sequences, so the engine needs
no locks: it belongs to the thread that calls it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from nanogpt.engine.block_manager import BlockManager
from nanogpt.engine.bursts import Bursts
from nanogpt.engine.model_runner import ModelRunner, StepOutput
from nanogpt.engine.sampler import NO_TOKEN
from nanogpt.engine.scheduler import Batch, Scheduler
from nanogpt.engine.sequence import Sequence, appoint_leader
from nanogpt.engine.validation import problem_with
from nanogpt.errors import EngineError
from nanogpt.registry import ModelInfo
from nanogpt.request import (
    EngineEvent,
    EngineStats,
    FinishReason,
    GenerateRequest,
    PromptScored,
    RequestFailed,
    TokenEvent,
    TokenLogprobs,
)
from nanogpt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanogpt.model.load import LoadedModel

NOTHING_TO_SAMPLE = "the logits leave no token to sample"


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Whatever goes wrong with the network is the engine's end."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"{what} failed: {error}") from error


class Engine:
    """Generates this rank's choices of every request that it is given.

    The KV cache has `num_kv_blocks` blocks of `block_size` tokens, enough for one full context at
    the least (else ConfigError). A step computes at most `max_batch_tokens` tokens of at most
    `max_num_seqs` running choices. With `burst_steps` decoding is done in bursts of at most that
    many tokens of each (see bursts.py), which is for GPUs, and so is `deterministic`: CPUs are.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        rank: int,
        device: torch.device | str,
        num_kv_blocks: int,
        block_size: int = 16,
        max_num_seqs: int = 128,
        max_batch_tokens: int = 1024,
        burst_steps: int = 0,
        deterministic: bool = False,
    ) -> None:
        self.info: ModelInfo = loaded.info
        self._rank = rank
        self._blocks = BlockManager(num_kv_blocks, block_size)
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            context_length=self.info.context_length,
        )
        self._runner = ModelRunner(
            loaded,
            device=torch.device(device),
            num_kv_blocks=num_kv_blocks,
            block_size=block_size,
            deterministic=deterministic,
        )
        self._bursts: Bursts | None = None
        if burst_steps:
            decoder = self._runner.decoder(max_rows=max_num_seqs, max_steps=burst_steps)
            self._bursts = Bursts(decoder, self._scheduler) if decoder else None
        self._live: dict[str, dict[int, Sequence]] = {}
        self._events: list[EngineEvent] = []  # of choices that never ran; the next step's
        self._arrivals = 0
        self._num_generated = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._events or self._bursts)

    def add(self, request: GenerateRequest) -> None:
        """Queue this rank's choices of a request. A request that can't run gets RequestFailed."""
        problem = problem_with(
            request, vocab_size=self.info.vocab_size, context_length=self.info.context_length
        )
        if request.request_id in self._live:
            self.abort(request.request_id)
            problem = "another request of this id is running"
        if problem:
            self._events.append(RequestFailed(request.request_id, f"invalid request: {problem}"))
            return
        for prompt_i in range(len(request.prompts)):
            self._add_prompt(request, prompt_i)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a choice, or all of a request, without further events. Unknown ones are fine."""
        choices = self._live.get(request_id, {})
        for seq in [s for s in choices.values() if index in (None, s.index)]:
            self._forget(seq)
        self._events = [
            event
            for event in self._events
            if event.request_id != request_id
            or (index is not None and getattr(event, "index", index) != index)
        ]

    def abort_all(self) -> None:
        """End everything, without further events."""
        for request_id in [*self._live]:
            self.abort(request_id)
        self._events.clear()

    def step(self) -> list[EngineEvent]:
        """Advance every running choice. Events are in an order that the front end can rely on: a
        prompt's scores before its first choice's tokens, each choice's tokens by position.

        Raises EngineError when the network can't be run; the engine is of no use after that.
        """
        events, self._events = self._events, []
        if self._bursts:
            return events + self._finish_burst(self._bursts)
        if not self._live:
            return events
        batch = self._scheduler.schedule()
        with _failing(f"a step of {len(batch.chunks)} sequences"):
            if self._bursts is not None and self._bursts.takes(batch):
                self._runner.copy_blocks(batch.copies)
                self._bursts.start(batch)
                return events  # the next call has the tokens
            output = self._runner.run(batch)
        events += self._record(batch, output)
        return events

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            model=self.info.name,
            waiting=sum(map(len, self._live.values())) - len(scheduler.running),
            running=len(scheduler.running),
            free_blocks=self._blocks.num_free,
            total_blocks=self._blocks.num_blocks,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            generated_tokens=self._num_generated,
            preemptions=scheduler.num_preemptions,
            steps=scheduler.num_steps,
            fair_preemptions=scheduler.num_fair_preemptions,
        )

    def check_integrity(self) -> None:
        """Raise EngineError unless every block is free or held by a running choice."""
        self._scheduler.check_integrity()

    def warm_up(self) -> None:
        """Pay for first calls (allocations, lazily loaded code) before a client has to."""
        prompt = (self.info.start_token_id,) * min(2, self.info.context_length - 1)
        room = self.info.context_length - len(prompt)
        request = GenerateRequest(
            request_id="warm-up",
            model=self.info.name,
            prompts=(prompt,),
            n=2,
            params=SamplingParams(seed=0, max_tokens=min(4, room)),
            owners=(self._rank, self._rank),
        )
        self.add(request)
        while self.has_work:
            self.step()

    def close(self) -> None:
        """Give weights and KV cache back at once: nothing may be asked of the engine any more."""
        self._runner.close()
        self._bursts = None

    # Adding

    def _add_prompt(self, request: GenerateRequest, prompt_i: int) -> None:
        """Sequences for this rank's choices of a prompt; fresh ones share its computation."""
        fresh = []
        for index in range(prompt_i * request.n, (prompt_i + 1) * request.n):
            if request.owners[index] != self._rank or index in request.finished:
                continue
            seq = self._new_sequence(request, index)
            if not seq.scoring and not seq.wants_token:
                self._events.append(_token_event(seq, finish_reason="length"))
                continue
            self._live.setdefault(seq.request_id, {})[index] = seq
            if seq.output_len:
                self._scheduler.add(seq)
            else:
                fresh.append(seq)
        if fresh:
            appoint_leader(fresh)
            self._scheduler.add(fresh[0])

    def _new_sequence(self, request: GenerateRequest, index: int) -> Sequence:
        seq = Sequence(
            request, index, arrival=self._arrivals, context_length=self.info.context_length
        )
        self._arrivals += 1
        seq.ends = seq.end_token_ids(self.info.eos_token_id)
        if request.params.prompt_logprobs and not seq.choice_j and not seq.output_len:
            seq.score_next = 1  # the first token has nothing before it
        return seq

    # Recording

    def _record(self, batch: Batch, output: StepOutput) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        for seq, logprobs in output.scores:
            if not logprobs:
                continue  # a preempted prompt is recomputed up to where its scores go on
            events.append(PromptScored(seq.request_id, seq.prompt_i, seq.score_next, logprobs))
            seq.score_next += len(logprobs)
            if not seq.scoring and not seq.wants_token:
                self._forget(seq)
                events.append(_token_event(seq, finish_reason="length"))
        failed: set[str] = set()
        now = time.monotonic()
        sampled = [seq for chunk in batch.chunks for seq in chunk.samplers]
        for seq, token_id, entry in zip(sampled, output.token_ids, output.logprobs, strict=True):
            if failed and seq.request_id in failed:
                continue
            if token_id == NO_TOKEN:
                self.abort(seq.request_id)
                events.append(RequestFailed(seq.request_id, NOTHING_TO_SAMPLE))
                failed.add(seq.request_id)
            elif event := self._accept(seq, token_id, entry, now):
                events.append(event)
        return events

    def _accept(
        self, seq: Sequence, token_id: int, logprobs: TokenLogprobs | None, now: float
    ) -> TokenEvent | None:
        """Append a sampled token, or end the choice at it. None: it is gathered."""
        if token_id in seq.ends:
            self._forget(seq)
            end = None if logprobs is None else token_id
            return _token_event(seq, (), logprobs, "stop", end)
        self._num_generated += 1
        if seq.output_len + 1 >= seq.max_new:
            self._forget(seq)
            return _token_event(seq, (token_id,), logprobs, "length")
        event = None
        if seq.may_wait(now):
            seq.untold.append(token_id)
        elif seq.output_len and logprobs is None and not seq.untold:  # as most tokens are
            event = TokenEvent(seq.request_id, seq.index, seq.output_len, (token_id,))
        else:
            event = _token_event(seq, (token_id,), logprobs)
        seq.append(token_id)
        if len(seq.tokens) > seq.context_length:
            self._scheduler.slide(seq)
        return event

    def _finish_burst(self, bursts: Bursts) -> list[EngineEvent]:
        with _failing("a burst"):
            bursts.follow()
            rows = bursts.collect()
        events: list[EngineEvent] = []
        now = time.monotonic()
        for seq, token_ids, num_known in rows:
            if seq.running:  # its request may have failed just now
                events += self._accept_all(seq, token_ids, num_known, now)
        return events

    def _accept_all(
        self, seq: Sequence, token_ids: list[int], num_known: int, now: float
    ) -> list[EngineEvent]:
        """Append a burst's tokens, none too many for the choice, up to one that ends it. The
        scheduler knows that `num_known` of the positions before them have been computed."""
        accepted = [
            *takewhile(lambda token: token != NO_TOKEN and token not in seq.ends, token_ids)
        ]
        ending = token_ids[len(accepted)] if len(accepted) < len(token_ids) else None
        reason: FinishReason | None = None if ending is None else "stop"
        if ending is None and seq.output_len + len(accepted) == seq.max_new:
            reason = "length"
        self._num_generated += len(accepted)
        if ending == NO_TOKEN:
            event = _token_event(seq, tuple(accepted))
            self.abort(seq.request_id)
            failure = RequestFailed(seq.request_id, NOTHING_TO_SAMPLE)
            return [event, failure] if event.token_ids else [failure]
        events: list[EngineEvent] = []
        if seq.may_wait(now) and reason is None:
            seq.untold += accepted
        else:
            events = [_token_event(seq, tuple(accepted), None, reason)]
        for token_id in accepted:
            seq.append(token_id)
        self._scheduler.advance(seq, len(accepted) + (ending is not None) - num_known)
        if reason:
            self._forget(seq)
        return events

    def _forget(self, seq: Sequence) -> None:
        self._scheduler.finish(seq)
        choices = self._live[seq.request_id]
        del choices[seq.index]
        if not choices:
            del self._live[seq.request_id]
        if not self._live:  # idle: a good moment to look for leaks
            self.check_integrity()


def _token_event(
    seq: Sequence,
    token_ids: tuple[int, ...] = (),
    logprobs: TokenLogprobs | None = None,
    finish_reason: FinishReason | None = None,
    end_token_id: int | None = None,
) -> TokenEvent:
    """With these tokens, which have not been appended yet, behind those that were not told."""
    gathered, seq.untold = seq.untold, []
    return TokenEvent(
        request_id=seq.request_id,
        index=seq.index,
        position=seq.output_len - len(gathered),
        token_ids=(*gathered, *token_ids),
        logprobs=() if logprobs is None else (logprobs,),
        finish_reason=finish_reason,
        cached_tokens=0 if seq.output_len else seq.cached_tokens or 0,
        end_token_id=end_token_id,
    )
