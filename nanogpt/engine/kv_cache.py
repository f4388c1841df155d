"""How large a KV cache has to be."""

DEFAULT_BLOCK_SIZE = 16  # tokens


def blocks_per_context(context_length: int, block_size: int = DEFAULT_BLOCK_SIZE) -> int:
    """Blocks of one full context: the least that an engine's pool may have."""
    return -(-context_length // block_size)
