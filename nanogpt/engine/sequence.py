"""One choice while it runs: its tokens, where its keys and values are, and what it still waits for.

A sequence is the prompt plus the tokens generated so far. `num_computed` of them have keys and
values in the cache; as soon as all of them have, the next token can be sampled:

    tokens   p p p p p p p p p p o o o        len(tokens) = 13
    cache    [. . . .][. . . .][. . . .]      block_table (blocks of 4), num_computed = 12
                                        ^ one token to compute: a decode step

A sequence that may go past the context (params.crop) slides when it does: it keeps the last
context_length tokens, as nanoGPT's generate() does. All of them have new positions then, so none
has keys and values, and each further token takes a prefill of a whole context:

    context of 8      dropped p p p        tokens   p p p o o o o o       prompt_len = 3
    later             dropped p p p p p p o o      tokens   o o o o o o o o      prompt_len = -2

The choices of one prompt start as one leader with followers: the leader computes the prompt, and
followers take its blocks by reference when the prompt is complete (see scheduler.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanogpt.request import GenerateRequest
from nanogpt.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np

    from nanogpt.engine.fairness import Flow
    from nanogpt.engine.token_counts import TokenCounts


def appoint_leader(siblings: list[Sequence]) -> None:
    """Choices of one prompt, none of them started: the first will compute it for all."""
    leader, *followers = siblings
    leader.leader, leader.followers = None, followers
    for follower in followers:
        follower.leader = leader


class Sequence:
    """A choice of a request on this rank. Compared by identity; owned by the scheduler."""

    __slots__ = (
        "arrival",
        "block_hashes",
        "block_table",
        "cached_tokens",
        "choice_j",
        "context_length",
        "counts",
        "dropped",
        "ends",
        "flow",
        "followers",
        "gather_s",
        "has_slid",
        "index",
        "leader",
        "max_new",
        "may_slide",
        "num_charged",
        "num_computed",
        "params",
        "priority",
        "prompt_i",
        "prompt_len",
        "request_id",
        "running",
        "score_next",
        "tenant",
        "tokens",
        "told_at",
        "uniforms",
        "untold",
        "weight",
    )

    def __init__(
        self, request: GenerateRequest, index: int, *, arrival: int, context_length: int
    ) -> None:
        self.request_id = request.request_id
        self.params: SamplingParams = request.params
        self.priority = request.priority
        self.tenant, self.weight = request.tenant, request.weight
        self.flow: Flow  # the tenant's, from the scheduler
        self.arrival = arrival  # a number that grows with every sequence of the engine
        self.index = index
        self.prompt_i, self.choice_j = divmod(index, request.n)
        prompt = request.prompts[self.prompt_i]
        self.prompt_len = len(prompt)  # where the output begins in `tokens`
        self.tokens: list[int] = [*prompt, *(request.resumed[index] if request.resumed else ())]
        self.ends: tuple[int, ...] = ()  # tokens that end it, as end_token_ids; set by the engine
        self.context_length = context_length
        room = max(0, context_length - self.prompt_len)
        most = self.params.max_tokens
        self.max_new = most if self.params.crop else min(most, room)
        self.may_slide = self.max_new > room
        self.dropped: list[int] = []  # what has slid out of the context, from the first token on

        self.running = False
        self.num_computed = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.cached_tokens: int | None = None  # of the prompt; None: not admitted yet
        self.num_charged = 0  # tokens of the prompt that its tenant has had, cached or computed
        self.has_slid = False
        if len(self.tokens) > context_length:
            self.slide()
        self.leader: Sequence | None = None
        self.followers: list[Sequence] = []
        self.score_next = self.prompt_len  # next prompt position to report log probabilities of
        # With log probabilities what is kept back would be too large for a message.
        self.gather_s = request.gather_s if self.params.logprobs is None else 0.0
        self.told_at = 0  # the interval of gather_s in which its latest event was made
        self.untold: list[int] = []  # its latest tokens, which no event has brought yet
        # What the sampler draws when it needs them.
        self.uniforms: np.ndarray | None = None
        self.counts: TokenCounts | None = None

    def __repr__(self) -> str:
        return f"<Sequence {self.request_id}[{self.index}] {self.num_computed}/{len(self.tokens)}>"

    @property
    def key(self) -> tuple[int, int]:
        """Lower priority, then who came first. A total order that never changes."""
        return self.priority, self.arrival

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def scoring(self) -> bool:
        """Log probabilities of a part of the prompt are still to be reported."""
        return self.score_next < self.prompt_len

    @property
    def wants_token(self) -> bool:
        return self.output_len < self.max_new

    def append(self, token_id: int) -> None:
        self.tokens.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)

    def may_wait(self, now: float) -> bool:
        """Whether the next tokens need not be told yet. Intervals begin at the same time for all
        sequences, so that those of a step are told together."""
        if not self.gather_s:
            return False
        interval = int(now / self.gather_s)
        is_same, self.told_at = interval == self.told_at, interval
        return is_same and self.output_len > 0

    def slide(self) -> None:
        """Keep what fits into the context, all of which is to be computed."""
        count = len(self.tokens) - self.context_length
        self.dropped += self.tokens[:count]
        del self.tokens[:count]
        self.prompt_len -= count
        self.num_computed, self.block_hashes = 0, []
        self.has_slid = self.output_len > 0  # the end of a long prompt is like any other prompt

    def end_token_ids(self, eos_token_id: int | None) -> tuple[int, ...]:
        """Tokens that end the choice and are not part of it."""
        if eos_token_id is None or self.params.ignore_eos:
            return self.params.stop_token_ids
        return (eos_token_id, *self.params.stop_token_ids)

    def hand_over(self) -> Sequence:
        """Make the first follower the leader, with this sequence's blocks and progress."""
        heir = self.followers[0]
        appoint_leader(self.followers)
        heir.running = self.running
        heir.num_computed, heir.block_table = self.num_computed, self.block_table
        heir.block_hashes, heir.cached_tokens = self.block_hashes, self.cached_tokens
        heir.score_next, heir.num_charged = self.score_next, self.num_charged
        self.followers, self.block_table = [], []
        return heir
