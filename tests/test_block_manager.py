"""Reference counts, the prefix cache, and the check that finds what is wrong with them."""

import pytest

from nanogpt.engine.block_manager import BlockManager, extend_hashes
from nanogpt.errors import EngineError


def hashes_of(tokens: list[int], block_size: int = 2) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, block_size, len(tokens) // block_size)
    return hashes


def test_allocate_and_release() -> None:
    blocks = BlockManager(4, 2)
    table = blocks.allocate(3)
    assert len(set(table)) == 3
    assert blocks.num_free == 1
    blocks.check_integrity([table])
    blocks.release(table)
    assert blocks.num_free == 4
    blocks.check_integrity([])


def test_what_some_holders_together_would_free() -> None:
    blocks = BlockManager(4, 2)
    first = blocks.allocate(2)
    blocks.share(first[:1])
    second = [first[0], *blocks.allocate(1)]
    assert blocks.freed_by([]) == set()
    assert blocks.freed_by([first]) == {first[1]}
    assert blocks.freed_by([first, second]) == {*first, *second}
    assert blocks.num_free == 1, "it only asks"


def test_shared_blocks_are_free_when_the_last_holder_leaves() -> None:
    blocks = BlockManager(4, 2)
    table = blocks.allocate(2)
    blocks.share(table)
    assert blocks.is_shared(table[0])
    blocks.check_integrity([table, table])
    blocks.release(table)
    assert not blocks.is_shared(table[0])
    assert blocks.num_free == 2
    blocks.release(table)
    assert blocks.num_free == 4


def test_hash_chain_depends_on_everything_before() -> None:
    one, other = hashes_of([1, 2, 3, 4]), hashes_of([9, 2, 3, 4])
    assert one[1] != other[1], "the same block behind another beginning is another block"
    assert hashes_of([1, 2, 3, 4, 5]) == one
    assert hashes_of([1, 2])[0] == one[0]
    assert hashes_of([1, 2, 1, 2])[1] != hashes_of([1, 2, 1, 2])[0]


def test_extending_a_chain_equals_computing_it_at_once() -> None:
    hashes = hashes_of([1, 2, 3, 4])
    extend_hashes(hashes, [1, 2, 3, 4, 5, 6], 2, 3)
    assert hashes == hashes_of([1, 2, 3, 4, 5, 6])


def test_free_blocks_are_found_until_they_are_used_again() -> None:
    blocks = BlockManager(3, 2)
    hashes = hashes_of([1, 2, 3, 4])
    table = blocks.allocate(2)
    for block, digest in zip(table, hashes, strict=True):
        blocks.register(block, digest)
    blocks.release(table)
    assert blocks.find(hashes) == table
    assert blocks.count_free(table) == 2
    blocks.share(blocks.find(hashes))
    assert blocks.num_free == 1
    blocks.release(table)
    (unregistered,) = blocks.allocate(1)
    assert unregistered not in table, "a block that nobody could find goes first"
    (last,) = blocks.allocate(1)
    assert last == table[1], "the end of a chain goes before its beginning"
    assert blocks.find(hashes) == table[:1]
    blocks.check_integrity([[unregistered], [last]])


def test_of_two_equal_blocks_one_is_found() -> None:
    blocks = BlockManager(3, 2)
    (digest,) = hashes_of([1, 2])
    first, second = blocks.allocate(2)
    blocks.register(first, digest)
    blocks.register(second, digest)
    assert blocks.find([digest]) == [first]
    blocks.release([first, second])
    blocks.check_integrity([])


def test_a_gap_ends_what_is_found() -> None:
    blocks = BlockManager(4, 2)
    hashes = hashes_of([1, 2, 3, 4, 5, 6])
    table = blocks.allocate(3)
    blocks.register(table[0], hashes[0])
    blocks.register(table[2], hashes[2])
    assert blocks.find(hashes) == table[:1]


@pytest.mark.parametrize("case", ["leaked", "held twice", "freed while held"])
def test_integrity_check_finds(case: str) -> None:
    blocks = BlockManager(4, 2)
    table = blocks.allocate(2)
    tables = {"leaked": [table[:1]], "held twice": [table, table], "freed while held": [table]}
    if case == "freed while held":
        blocks.release(table[:1])
    with pytest.raises(EngineError, match="KV cache accounting: "):
        blocks.check_integrity(tables[case])
