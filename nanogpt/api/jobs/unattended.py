"""Generating without a client that waits: whoever asked reads the result later."""

import time
from collections.abc import Callable

from nanogpt.api.assemble import Assembler
from nanogpt.api.backend import Handle
from nanogpt.api.exchange import Exchange
from nanogpt.api.metrics import Metrics
from nanogpt.api.plan import Plan
from nanogpt.api.response import Collected


def generate(
    plan: Plan,
    handle: Handle,
    assembler: Assembler,
    collected: Collected,
    metrics: Metrics,
    is_gone: Callable[[], bool],
) -> None:
    """Collect the whole answer, however long it waits for its turn. Raises ClientGone soon after
    `is_gone` says so; ServerError when the engines gave up."""
    exchange = Exchange(
        plan,
        handle,
        assembler,
        metrics,
        started=time.monotonic(),
        is_client_gone=is_gone,
        must_end=lambda: False,  # whoever owns the work says when, by `is_gone`
        on_close=lambda prompt_tokens, completion_tokens: None,
        queue_timeout_s=float("inf"),
    )
    try:
        for deltas in exchange.deltas():
            collected.add(deltas or ())
    finally:
        exchange.close()
