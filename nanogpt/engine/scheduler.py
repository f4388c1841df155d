"""What the next step computes: continuous batching over a pool of KV blocks.

Each step has a budget of tokens. Running sequences that need one token (decode) come first, so
that nobody's stream stalls; prompts fill the rest in chunks; then waiting sequences are admitted
while blocks last. Admission is optimistic: it counts the blocks of the tokens that exist, not of
those to come. When a decoding sequence finds no free block, the last in order (priority, then
arrival) gives up its blocks and is recomputed later, be it the finder itself. The first in order
is never preempted, and the pool holds at least one full context, so it always advances.

A block is registered in the prefix cache when the chunk that fills it is scheduled, not when it
has been computed: in every layer all rows write their keys and values before any row reads, so
sequences of the same step can already share it.
"""

from bisect import insort
from dataclasses import dataclass, field

from nanogpt.engine.block_manager import BlockManager, extend_hashes
from nanogpt.engine.sequence import Sequence, appoint_leader
from nanogpt.engine.waiting import WaitingQueue
from nanogpt.errors import ConfigError


@dataclass(slots=True)
class Chunk:
    """Tokens [start, end) of a sequence, and the choices that sample from the last one's logits."""

    seq: Sequence
    start: int
    end: int
    samplers: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class Batch:
    """One step's work: first the block copies (source, destination), then the chunks."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    budget: int = 0


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
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of key
        self.num_steps = self.num_preemptions = 0
        self.num_prompt_tokens = self.num_cached_tokens = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.push(seq)

    def schedule(self) -> Batch:
        """The next step's batch; its chunks count as computed from here on."""
        self.num_steps += 1
        batch = Batch(budget=self.max_batch_tokens)
        for seq in tuple(self.running):
            if seq.running and seq.remaining == 1 and self._ensure_slot(seq, batch):
                self._place(seq, batch)
        for seq in tuple(self.running):
            if seq.running and seq.remaining > 1 and batch.budget:
                self._place(seq, batch)
        self._admit(batch)
        return batch

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is; its followers go on without it."""
        if seq.leader is not None:
            seq.leader.followers.remove(seq)
            return
        queue = self.running if seq.running else self.waiting
        queue.remove(seq)
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

    def _ensure_slot(self, seq: Sequence, batch: Batch) -> bool:
        """Give the token at `num_computed` a block of its own to be written to, or preempt."""
        index = seq.num_computed // self.blocks.block_size
        table = seq.block_table
        is_new = index == len(table)
        if not is_new and not self.blocks.is_shared(table[index]):
            return True
        while not self.blocks.num_free:
            victim = self.running[-1]  # not in this step yet: those go in order
            self._preempt(victim)
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
        self.num_preemptions += 1
        self.running.remove(seq)
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
        self.num_prompt_tokens += max(0, min(end, seq.prompt_len) - start)
        seq.num_computed = end
        self._register(seq, start, end)
        if not seq.remaining and seq.wants_token:
            chunk.samplers = [seq, *self._fork(seq)]

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """Followers that now share the leader's complete prompt. Each of them soon needs a block
        of its own, so those without room wait, with a leader of their own."""
        followers, leader.followers = leader.followers, []
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
        size = self.blocks.block_size
        if start // size != end // size:
            extend_hashes(seq.block_hashes, seq.tokens, size, end // size)
            for i in range(start // size, end // size):
                self.blocks.register(seq.block_table[i], seq.block_hashes[i])

    # Admission

    def _admit(self, batch: Batch) -> None:
        while batch.budget and self.waiting and len(self.running) < self.max_num_seqs:
            seq = self.waiting.peek()
            cached = self._find_cached(seq)
            fresh = self.blocks.blocks_for(len(seq.tokens)) - len(cached)
            if fresh + self.blocks.count_free(cached) > self._num_spare():
                break
            self.waiting.pop()
            self.blocks.share(cached)
            seq.block_table = cached + self.blocks.allocate(fresh)
            self._start(seq, len(cached) * self.blocks.block_size)
            self._place(seq, batch)

    def _num_spare(self) -> int:
        """Free blocks beyond one for each running sequence, so that admission does not preempt."""
        return self.blocks.num_free - len(self.running)

    def _find_cached(self, seq: Sequence) -> list[int]:
        """Cached blocks of the sequence's beginning. At least the last token is left to compute,
        since its logits are needed, and so is whatever has to be scored."""
        usable = min(len(seq.tokens), seq.score_next if seq.scoring else len(seq.tokens)) - 1
        count = usable // self.blocks.block_size
        extend_hashes(seq.block_hashes, seq.tokens, self.blocks.block_size, count)
        return self.blocks.find(seq.block_hashes[:count])

    def _start(self, seq: Sequence, num_cached: int) -> None:
        seq.num_computed = num_cached
        self.num_cached_tokens += min(num_cached, seq.prompt_len)
        if seq.cached_tokens is None:
            for each in (seq, *seq.followers):
                each.cached_tokens = min(num_cached, seq.prompt_len)
        self._insert_running(seq)

    def _insert_running(self, seq: Sequence) -> None:
        seq.running = True
        insort(self.running, seq, key=lambda s: s.key)
