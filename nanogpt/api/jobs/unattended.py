"""Generating without a client that waits: whoever asked reads the result later."""

import time
from collections.abc import Callable

from nanogpt.api.assemble import Assembler
from nanogpt.api.backend import Handle
from nanogpt.api.exchange import Exchange
from nanogpt.api.metrics import Metrics
from nanogpt.api.plan import Plan


def unattended(
    plan: Plan,
    handle: Handle,
    assembler: Assembler,
    metrics: Metrics,
    is_gone: Callable[[], bool],
) -> Exchange:
    """Waits for its turn however long that takes, and ends soon after `is_gone` says so."""
    return Exchange(
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
