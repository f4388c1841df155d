"""Blocks of the KV cache: who holds which, and which free ones can be found again.

A block has room for `block_size` tokens of every layer. Sequences hold blocks by reference count.
A full block is registered under a hash of its tokens and of all tokens before them (a chain, as
in vLLM's automatic prefix caching), so that another sequence with the same beginning shares it.
A block without holders is free, but keeps its registration until it is used for something else;
the least recently used goes first, and blocks that nobody could find go before all others.

    blocks    held (references > 0)  |  free: unregistered ... oldest ... newest
                                        └ allocate() takes from this end
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from nanogpt.errors import EngineError

DIGEST_BYTES = 16  # a collision would mix two prompts: 128 bits make that no event


def extend_hashes(hashes: list[bytes], tokens: list[int], block_size: int, num_blocks: int) -> None:
    """Grow a sequence's chain of block hashes, in place, to its first `num_blocks` full blocks."""
    for i in range(len(hashes), num_blocks):
        block = array("i", tokens[i * block_size : (i + 1) * block_size])
        parent = hashes[-1] if hashes else b""
        hashes.append(blake2b(parent + block.tobytes(), digest_size=DIGEST_BYTES).digest())


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest beginning of a chain that is in the cache, as blocks."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of these blocks have no holder: sharing them uses up that many free ones."""
        return sum(not self._references[block] for block in blocks)

    def freed_by(self, block_tables: Iterable[list[int]]) -> set[int]:
        """Blocks that nobody but these tables holds: releasing them all would free these."""
        held = Counter(block for table in block_tables for block in table)
        return {block for block, count in held.items() if count == self._references[block]}

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks with one reference each. The caller has checked `num_free`."""
        assert count <= len(self._free)
        blocks = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these blocks, held or free."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One holder less for each; the end of a chain is reused before its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            self._free[block] = None
            if self._hash_of[block] is None:
                self._free.move_to_end(block, last=False)

    def register(self, block: int, digest: bytes) -> None:
        """Make a full block findable. Of two equal blocks the first stays the one to find."""
        if self._hash_of[block] is None and digest not in self._block_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None

    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """Raise EngineError unless the tables explain every reference and every block is somewhere.

        `block_tables` are those of all sequences that hold blocks.
        """
        held = [0] * self.num_blocks
        for table in block_tables:
            for block in table:
                held[block] += 1
        problems = []
        if held != self._references:
            problems += [
                f"block {block}: {count} references, {holders} holders"
                for block, (count, holders) in enumerate(zip(self._references, held, strict=True))
                if count != holders
            ]
        if any(map(self._references.__getitem__, self._free)):
            problems.append("a block is both free and held")
        if len(self._free) != held.count(0):
            problems.append(f"{len(self._free)} free blocks, {held.count(0)} without holders")
        num_registered = self.num_blocks - self._hash_of.count(None)
        found = [*map(self._hash_of.__getitem__, self._block_of.values())]
        if found != [*self._block_of] or num_registered != len(found):
            problems.append("the prefix cache's two directions disagree")
        if problems:
            raise EngineError("KV cache accounting: " + "; ".join(problems[:5]))
