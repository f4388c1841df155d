"""What the next step computes: continuous batching over a pool of KV blocks.

Each step has a budget of tokens. Running sequences that need one token (decode) come first, so
that nobody's stream stalls. Prompts fill the rest in chunks, but no more than half of the budget
beside decodes, whose next tokens wait for the end of the step. Then waiting sequences are admitted
while blocks last, the least served tenant's first (see fairness.py). Admission is optimistic: it
counts the blocks of the tokens that exist, not of those to come. When a decoding sequence finds no
free block, the last in order gives up its blocks and is recomputed later, be it the finder itself.
The order goes round: every tenant's first sequence, every tenant's second, and so on; so memory
is taken from who has most. Where there is no room for the first that waits, a step begins with a
swap: running sequences make room for it whose tenant has had more than a fair share.

Something always advances. The sequence that would be admitted first, were it waiting, heads the
running order: memory is never taken from it, and only one that goes before it may displace it. It
keeps that rank until it does work that was never done before, since nothing else is charged; all
requests together have only so much of that. And the pool holds at least one full context.

A block is registered in the prefix cache when the chunk that fills it is scheduled, not when it
has been computed: in every layer all rows write their keys and values before any row reads, so
sequences of the same step can already share it.

Most steps only advance the sequences of the step before by one token each. Those go a short way
(`_advance`) that gives the same batch as the long one.
"""

from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from nanogpt.engine.block_manager import BlockManager, extend_hashes
from nanogpt.engine.fairness import Flow, Flows
from nanogpt.engine.sequence import Sequence, appoint_leader
from nanogpt.engine.waiting import WaitingQueue, admission_key
from nanogpt.errors import ConfigError

MAX_SWAPS = 4  # a step: each makes a prompt to compute now, and a sequence to recompute later


@dataclass(slots=True)
class Chunk:
    """Tokens [start, end) of a sequence, and the choices that sample from the last one's logits."""

    seq: Sequence
    start: int
    end: int
    samplers: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class Batch:
    """One step's work: first the block copies (source, destination), then the chunks.

    `follows`: the chunks are those of the batch before, each a token further, and nothing in the
    block tables has changed but for blocks that were appended. Valid until the next one is made.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    budget: int = 0
    follows: bool = False

    @property
    def is_decode(self) -> bool:
        """Every chunk is one token, and gives one token to its own sequence."""
        return all(
            chunk.end - chunk.start == 1 and chunk.samplers == [chunk.seq] for chunk in self.chunks
        )


class Scheduler:
    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_batch_tokens: int, context_length: int
    ) -> None:
        if blocks.num_blocks < blocks.blocks_for(context_length):
            raise ConfigError(
                f"the KV cache has {blocks.num_blocks} blocks of {blocks.block_size} tokens, but "
                f"one full context of {context_length} tokens needs "
                f"{blocks.blocks_for(context_length)}: give it more memory"
            )
        if max_batch_tokens < max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens {max_batch_tokens} must be at least max_num_seqs "
                f"{max_num_seqs}, so that every running sequence can advance in each step"
            )
        self.blocks = blocks
        self.max_num_seqs, self.max_batch_tokens = max_num_seqs, max_batch_tokens
        self.flows = Flows()
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of key
        self._order: list[Sequence] = []  # who runs, less those that began in this step
        # The last batch, if it was all decode; None as soon as another sequence runs, or one less.
        self._last: list[Chunk] | None = None
        self._charges: list[tuple[Flow, int]] = []  # tokens of each flow in it
        self.num_steps = self.num_preemptions = self.num_fair_preemptions = 0
        self.num_prompt_tokens = self.num_cached_tokens = 0

    def add(self, seq: Sequence) -> None:
        """Queue a sequence with its followers."""
        self.flows.join(seq)
        self.waiting.push(seq)

    def schedule(self) -> Batch:
        """The next step's batch; its chunks count as computed from here on.

        Each token sampled from the last batch must have been appended, or its sequence finished.
        """
        self.num_steps += 1
        self._swap()
        batch = self._advance() or self._compose()
        self._admit(batch)
        if not batch.follows:
            self._remember(batch)
        return batch

    def _compose(self) -> Batch:
        """A batch of running sequences: decodes, then prompts."""
        batch = Batch(budget=self.max_batch_tokens)
        self._order = self._running_order()
        for seq in tuple(self._order):
            if seq.running and seq.remaining == 1 and self._ensure_slot(seq, batch):
                self._place(seq, batch)
        if batch.chunks:
            batch.budget = self._prompt_budget(len(batch.chunks))
        for seq in self._order:
            if seq.remaining > 1 and batch.budget:
                self._place(seq, batch)
        return batch

    def _advance(self) -> Batch | None:
        """The last batch, each sequence a token further; None if that is not all there is to do."""
        chunks, size = self._last, self.blocks.block_size
        if chunks is None:
            return None
        full = [c.seq for c in chunks if len(c.seq.block_table) * size == c.end]
        if len(full) > self.blocks.num_free:
            return None
        for seq, block in zip(full, self.blocks.allocate(len(full)), strict=True):
            seq.block_table.append(block)
        for chunk in chunks:
            start = chunk.start = chunk.end
            chunk.seq.num_computed = chunk.end = end = start + 1
            if end % size == 0:
                self._register(chunk.seq, start, end)
        for flow, count in self._charges:
            flow.charge(count)
        return Batch([*chunks], budget=self._prompt_budget(len(chunks)), follows=True)

    def _prompt_budget(self, num_decodes: int) -> int:
        """Tokens of prompts in a step that also decodes."""
        return min(self.max_batch_tokens - num_decodes, (self.max_batch_tokens + 1) // 2)

    def _remember(self, batch: Batch) -> None:
        self._last = None
        if len(batch.chunks) == len(self.running) and batch.is_decode:
            self._last = batch.chunks
            self._charges = [*Counter(chunk.seq.flow for chunk in batch.chunks).items()]

    def reserve(self, needs: Iterable[tuple[Sequence, int]]) -> bool:
        """Blocks for the tokens of running sequences up to a position each, where more are needed;
        False, with nothing done, if there are too few."""
        size = self.blocks.block_size
        missing = [(seq, last // size + 1 - len(seq.block_table)) for seq, last in needs]
        missing = [(seq, count) for seq, count in missing if count > 0]
        if sum(count for _, count in missing) > self.blocks.num_free:
            return False
        for seq, count in missing:
            seq.block_table += self.blocks.allocate(count)
        return True

    def advance(self, seq: Sequence, count: int) -> None:
        """Account for tokens that were computed without a batch for each (see bursts.py): `count`
        of a running sequence, appended to it already, and as many sampled."""
        if not count:
            return
        start, seq.num_computed = seq.num_computed, seq.num_computed + count
        self._register(seq, start, seq.num_computed)
        seq.flow.charge(count)
        self._last = None

    def slide(self, seq: Sequence) -> None:
        """After a token for which the context of a running sequence has no room: compute the last
        ones anew, in other blocks (these may be shared), or preempt it if there are too few."""
        seq.slide()
        self.blocks.release(seq.block_table)
        seq.block_table = []
        count = self.blocks.blocks_for(len(seq.tokens))
        if count > self.blocks.num_free:
            self._preempt(seq)
            self.num_preemptions += 1
            return
        seq.block_table = self.blocks.allocate(count)
        self._last = None

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is; its followers go on without it."""
        self.flows.leave(seq)
        if seq.leader is not None:
            seq.leader.followers.remove(seq)
            return
        if seq.running:
            self._leave_running(seq)
        else:
            self.waiting.remove(seq)
        if seq.followers:
            heir = seq.hand_over()
            if heir.running:
                self._insert_running(heir)
            else:
                self.waiting.push(heir)
        else:
            self.blocks.release(seq.block_table)
            seq.block_table = []
        seq.running = False

    def check_integrity(self) -> None:
        """Raise EngineError unless free + used == total and every reference is explained."""
        self.blocks.check_integrity(seq.block_table for seq in self.running)

    # Running sequences

    def _running_order(self) -> list[Sequence]:
        """By priority, by rank in the flow for its weight, by arrival; but in front of all the
        one that would be admitted first."""
        places = self._places()
        if len(places) == 1:
            return [*self.running]
        ranked = [
            (seq.priority, rank / flow.weight, seq.arrival, seq)
            for flow, seqs in places.items()
            for rank, seq in enumerate(seqs, 1)
        ]
        order = [seq for *_, seq in sorted(ranked)]
        first = min(order, key=admission_key, default=None)
        return sorted(order, key=lambda seq: seq is not first)

    def _places(self) -> dict[Flow, list[Sequence]]:
        """Each flow's running sequences, by arrival."""
        places: dict[Flow, list[Sequence]] = {}
        for seq in self.running:
            places.setdefault(seq.flow, []).append(seq)
        return places

    def _ensure_slot(self, seq: Sequence, batch: Batch) -> bool:
        """Give the token at `num_computed` a block of its own to be written to, or preempt."""
        index = seq.num_computed // self.blocks.block_size
        table = seq.block_table
        is_new = index == len(table)
        if not is_new and not self.blocks.is_shared(table[index]):
            return True
        while not self.blocks.num_free:
            victim = self._order.pop()  # not in this step yet: those go in order
            self._preempt(victim)
            self.num_preemptions += 1
            if victim is seq:
                return False
            if not is_new and not self.blocks.is_shared(table[index]):
                return True  # the victim was the other holder
        (block,) = self.blocks.allocate(1)
        if is_new:
            table.append(block)
        else:  # copy on write: the block is the shared, partly filled end of a prompt
            batch.copies.append((table[index], block))
            self.blocks.release([table[index]])
            table[index] = block
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._leave_running(seq)
        self.blocks.release(seq.block_table)
        seq.running, seq.num_computed, seq.block_table = False, 0, []
        self.waiting.push(seq)

    def _place(self, seq: Sequence, batch: Batch) -> None:
        """Add the sequence's next chunk to the batch; its blocks are there already."""
        start = seq.num_computed
        end = start + min(seq.remaining, batch.budget)
        chunk = Chunk(seq, start, end)
        batch.chunks.append(chunk)
        batch.budget -= end - start
        if not seq.has_slid:
            self.num_prompt_tokens += max(0, min(end, seq.prompt_len) - start)
        seq.num_computed = end
        self._register(seq, start, end)
        served = max(0, min(end, seq.prompt_len) - seq.num_charged)
        seq.num_charged += served
        if not seq.remaining and seq.wants_token:
            chunk.samplers = [seq, *self._fork(seq)]
            if seq.has_slid:
                served = end  # each token takes a context of its own
        seq.flow.charge(served + len(chunk.samplers))

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """Followers that now share the leader's complete prompt. Each of them soon needs a block
        of its own, so those without room wait, with a leader of their own."""
        followers, leader.followers = leader.followers, []
        for seq in followers:
            seq.num_charged = leader.num_charged
        room = min(self.max_num_seqs, self.blocks.num_free) - len(self.running)
        forked, rest = followers[: max(0, room)], followers[max(0, room) :]
        for seq in forked:
            seq.leader = None
            seq.num_computed = leader.num_computed
            seq.block_table, seq.block_hashes = [*leader.block_table], [*leader.block_hashes]
            self.blocks.share(seq.block_table)
            self._insert_running(seq)
        if rest:
            appoint_leader(rest)
            self.waiting.push(rest[0])
        return forked

    def _register(self, seq: Sequence, start: int, end: int) -> None:
        if seq.has_slid:
            return  # nobody will ask for it, and it would take the place of a prompt
        size = self.blocks.block_size
        if start // size != end // size:
            extend_hashes(seq.block_hashes, seq.tokens, size, end // size)
            for i in range(start // size, end // size):
                self.blocks.register(seq.block_table[i], seq.block_hashes[i])

    # Admission

    def _swap(self) -> None:
        """Preempt for the first that waits, where that is fair and makes room enough."""
        for _ in range(MAX_SWAPS):
            if not self.waiting:
                return
            seq = self.waiting.peek()
            cached = self._find_cached(seq)
            victims = self._victims_for(seq, cached)
            if not victims:
                return
            self.waiting.pop()
            for victim in victims:
                self._preempt(victim)
            self.num_fair_preemptions += len(victims)
            self._start(seq, cached)

    def _victims_for(self, seq: Sequence, cached: list[int]) -> list[Sequence]:
        """Whom to preempt for a waiting sequence, those with most first; nobody if there is room
        without that, or not with that either."""
        places, victims = self._places(), list[Sequence]()
        num_own = len(places.get(seq.flow, ()))
        while not self._has_room(seq, cached, victims):
            flows = [
                flow
                for flow, seqs in places.items()
                if seqs and seq.flow.may_displace(flow, num_own, len(seqs))
            ]
            if not flows:
                return []
            most = max(flows, key=lambda f: (f.priority, len(places[f]) / f.weight, f.service))
            victims.append(places[most].pop())
        return victims

    def _admit(self, batch: Batch) -> None:
        while batch.budget and self.waiting:
            seq = self.waiting.peek()
            cached = self._find_cached(seq)
            if not self._has_room(seq, cached):
                break
            self._start(self.waiting.pop(), cached)
            self._place(seq, batch)
            batch.follows = False

    def _has_room(
        self, seq: Sequence, cached: list[int], victims: Collection[Sequence] = ()
    ) -> bool:
        """Whether a waiting sequence could start if the victims didn't run. A free block is left
        to each that runs, so that admission does not preempt."""
        num_running = len(self.running) - len(victims)
        if num_running >= self.max_num_seqs:
            return False
        freed = self.blocks.freed_by(victim.block_table for victim in victims)
        fresh = self.blocks.blocks_for(len(seq.tokens)) - len(cached)
        revived = self.blocks.count_free(cached) + len(freed.intersection(cached))
        return fresh + revived + num_running <= self.blocks.num_free + len(freed)

    def _find_cached(self, seq: Sequence) -> list[int]:
        """Cached blocks of the sequence's beginning. At least the last token is left to compute,
        since its logits are needed, and so is whatever has to be scored."""
        if seq.has_slid:
            return []
        usable = min(len(seq.tokens), seq.score_next if seq.scoring else len(seq.tokens)) - 1
        count = usable // self.blocks.block_size
        extend_hashes(seq.block_hashes, seq.tokens, self.blocks.block_size, count)
        return self.blocks.find(seq.block_hashes[:count])

    def _start(self, seq: Sequence, cached: list[int]) -> None:
        self.blocks.share(cached)
        fresh = self.blocks.blocks_for(len(seq.tokens)) - len(cached)
        seq.block_table = cached + self.blocks.allocate(fresh)
        seq.num_computed = len(cached) * self.blocks.block_size
        num_cached = max(0, min(seq.num_computed, seq.prompt_len))
        self.num_cached_tokens += num_cached
        seq.num_charged = max(seq.num_charged, num_cached)
        if seq.cached_tokens is None:
            for each in (seq, *seq.followers):
                each.cached_tokens = num_cached
        self._insert_running(seq)

    def _leave_running(self, seq: Sequence) -> None:
        self._last = None
        self.running.remove(seq)

    def _insert_running(self, seq: Sequence) -> None:
        self._last = None
        seq.running = True
        insort(self.running, seq, key=lambda s: s.key)
