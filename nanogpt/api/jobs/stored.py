"""Everything that keeps work: the store, the runner, and the routes' objects, as one thing."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from nanogpt.api.backend import Cluster
from nanogpt.api.jobs import outcome
from nanogpt.api.jobs.completions import Completions
from nanogpt.api.jobs.execute import CompletionExecutor
from nanogpt.api.service import Service
from nanogpt.jobs.runner import Runner
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
        cluster: Cluster,
        cards: Mapping[str, ModelCard],
        config: JobsConfig,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self.completions = Completions(
            service, store, cluster, cards, keep_s=config.keep_hours * HOUR_S, clock=clock
        )
        completion = CompletionExecutor(cluster, service.metrics, self.completions.settle)
        self._runner = Runner(
            store,
            {"completion": completion},
            ready=lambda: cluster.ready() and bool(cluster.models()),
            size=_size,
            room=config.max_running,
            failed=self._failed,
        )
        service.metrics.add(_JobsCollector(store))
        service.companion = self

    def start(self) -> None:
        self._runner.start()

    def drain(self, grace_s: float) -> None:
        """Who waits has so many seconds left; other work is put back. For a signal handler."""
        self._runner.drain(grace_s)

    def close(self) -> None:
        self._runner.close()
        self._store.close()

    def _failed(self, job: Job, error: Exception) -> bytes:
        self.completions.settle(job.id, 0, 0)
        return outcome.encode(outcome.failure(error))


def _size(job: Job) -> int:
    """Choices that a job has generated at once."""
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
