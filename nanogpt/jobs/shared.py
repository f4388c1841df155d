"""What web servers and clusters on different machines share, as it is configured."""

from collections.abc import Callable
from pathlib import Path

from nanogpt.jobs.files import Files
from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.redis_files import RedisFiles
from nanogpt.jobs.sqs import SqsStore
from nanogpt.jobs.store import Store
from nanogpt.jobs_config import JobsConfig, QueueConfig


def open_shared(queue: QueueConfig, jobs: JobsConfig) -> RedisStore:
    """The store behind `queue.url`, which isn't asked yet. Raises ConfigError."""
    max_bytes = jobs.max_store_mb * 10**6
    if queue.is_sqs:
        return SqsStore(
            queue.url,
            queue.redis_url,
            max_queued=jobs.max_queued,
            max_bytes=max_bytes,
            namespace=queue.name,
        )
    return RedisStore(
        queue.url, max_queued=jobs.max_queued, max_bytes=max_bytes, namespace=queue.name
    )


def open_files(
    directory: Path, store: Store, config: JobsConfig, clock: Callable[[], float]
) -> Files:
    """Files of clients, beside their jobs: in the directory, or where the store is shared."""
    max_file_bytes, max_bytes = config.max_file_mb * 10**6, config.max_store_mb * 10**6
    if isinstance(store, RedisStore):
        return RedisFiles(
            directory, store, max_file_bytes=max_file_bytes, max_bytes=max_bytes, clock=clock
        )
    return Files(directory, store, max_file_bytes=max_file_bytes, max_bytes=max_bytes, clock=clock)
