"""Everything that keeps work: the store, the runner, and the routes' objects, as one thing."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from nanogpt.api.admission import Admission
from nanogpt.api.backend import Cluster
from nanogpt.api.jobs import outcome, relay
from nanogpt.api.jobs.batch_feed import Room
from nanogpt.api.jobs.batch_run import BatchExecutor
from nanogpt.api.jobs.batches import BatchRoutes
from nanogpt.api.jobs.completions import Completions
from nanogpt.api.jobs.execute import CompletionExecutor
from nanogpt.api.jobs.files import FileRoutes
from nanogpt.api.jobs.lines import LineRunner
from nanogpt.api.jobs.whereabouts import nowhere
from nanogpt.api.service import Service
from nanogpt.jobs.announce import Announcer
from nanogpt.jobs.runner import LEASE_S, SHARED_LEASE_S, Runner
from nanogpt.jobs.shared import open_files
from nanogpt.jobs.store import Job, Store, StoreUnavailable
from nanogpt.jobs_config import JobsConfig
from nanogpt.registry import ModelCard

HOUR_S = 3600.0


class Stored:
    """Thread-safe once it is made; `start` has the jobs worked on."""

    def __init__(
        self,
        service: Service,
        store: Store,
        directory: Path,
        config: JobsConfig,
        *,
        cluster: Cluster,
        admission: Admission,
        cards: Mapping[str, ModelCard],
        max_body_bytes: int,
        max_num_seqs: int,
        clock: Callable[[], float],
        announcer: Announcer | None = None,
    ) -> None:
        """`directory`: where the content of files is kept, or passes through when the store is
        shared by servers: it is there too then. `max_num_seqs`: choices that a rank runs at once.
        """
        self._store, self._announcer = store, announcer
        keep_s = config.keep_hours * HOUR_S
        self.completions = Completions(
            service, store, cluster, cards, keep_s=keep_s, clock=clock, settles=not store.shared
        )
        self._contents = open_files(directory / "files", store, config, clock)
        self.files = FileRoutes(self._contents, store, keep_s=keep_s)
        self.batches = BatchRoutes(self.files, store, cluster, keep_s=keep_s, clock=clock)
        elsewhere = nowhere if announcer is None else announcer.is_offered
        self._runner = Runner(
            store,
            {
                "completion": CompletionExecutor(
                    cluster, admission, service.metrics, self.completions.settle, elsewhere
                ),
                "generate": relay.RelayExecutor(cluster, elsewhere),
                "batch": BatchExecutor(
                    LineRunner(cluster, cards, admission, service.metrics, clock, elsewhere),
                    self._contents,
                    Room(
                        lambda: config.batch_choices(max(1, cluster.status().ranks) * max_num_seqs)
                    ),
                    max_line_bytes=max_body_bytes,
                    keep_s=keep_s,
                    clock=clock,
                ),
            },
            ready=lambda: cluster.ready() and bool(cluster.models()),
            size=_size,
            room=config.max_running,
            failed=self._failed,
            on_swept=self._contents.forget,
            lease_s=SHARED_LEASE_S if store.shared else LEASE_S,
            room_now=config.max_running if store.shared else float("inf"),
        )
        service.metrics.add(_JobsCollector(store))
        service.companion = self

    def start(self) -> None:
        self._runner.start()
        if self._announcer is not None:
            self._announcer.start()

    def drain(self, grace_s: float) -> None:
        """Who waits has so many seconds left; other work is put back. For a signal handler."""
        self._runner.drain(grace_s)

    @property
    def is_idle(self) -> bool:
        return self._runner.running == 0

    def close(self) -> None:
        self._runner.close()
        if self._announcer is not None:
            self._announcer.close()
        self._store.close()

    def _failed(self, job: Job, error: Exception) -> bytes:
        if job.kind == "batch":
            return b""
        if job.kind == "generate":
            return relay.failed(error)
        self.completions.settle(job.id, 0, 0)
        return outcome.encode(outcome.failure(error))


def _size(job: Job) -> int:
    """Choices that a job has generated at once. The lines of batches share a room of their own."""
    if job.kind == "batch":
        return 0
    if job.kind == "generate":
        return relay.choices(job)
    request = outcome.plan_of(job).request
    return len(request.prompts) * request.n


class _JobsCollector(Collector):
    """The backlog, read when somebody asks."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[GaugeMetricFamily]:
        jobs = GaugeMetricFamily(
            "nanogpt_jobs", "Stored completions and batches.", labels=["lane", "status"]
        )
        backlog = dict.fromkeys(("now", "background", "batch"), 0)
        try:
            for count in self._store.counts():
                lane = count.lane.name.lower()
                jobs.add_metric([lane, count.status], count.jobs)
                if count.status in ("queued", "in_progress"):
                    backlog[lane] += count.jobs
        except StoreUnavailable:
            return  # no value is better than a wrong one
        yield jobs
        unfinished = GaugeMetricFamily(
            "nanogpt_jobs_backlog", "Jobs that wait or run, to scale on.", labels=["lane"]
        )
        for lane, number in backlog.items():
            unfinished.add_metric([lane], number)
        yield unfinished
