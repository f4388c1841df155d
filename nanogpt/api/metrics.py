"""What Prometheus reads: counted here for HTTP, asked from the cluster for the engines."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nanogpt.api.admission import Admission
from nanogpt.api.backend import Cluster

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. A step on a GPU takes milliseconds, one on a busy CPU up to a second.
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """All instruments of one application; nothing is registered globally."""

    def __init__(self, cluster: Cluster, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "nanogpt_http_requests",
            "Answers by route and status code.",
            ["route", "status"],
            registry=self._registry,
        )
        self.in_progress = Gauge(
            "nanogpt_http_requests_in_progress",
            "Completion requests that wait for tokens or stream them.",
            registry=self._registry,
        )
        self.choices = Counter(
            "nanogpt_choices",
            "Finished choices by reason.",
            ["model", "finish_reason"],
            registry=self._registry,
        )
        self.cancelled = Counter(
            "nanogpt_requests_cancelled",
            "Requests whose client left before the end.",
            ["model"],
            registry=self._registry,
        )
        self.prompt_tokens = Counter(
            "nanogpt_prompt_tokens", "Prompt tokens accepted.", ["model"], registry=self._registry
        )
        self.completion_tokens = Counter(
            "nanogpt_completion_tokens",
            "Tokens generated for clients.",
            ["model"],
            registry=self._registry,
        )
        self.first_token = self._histogram(
            "nanogpt_time_to_first_token_seconds", "From the request to its first token.", _FIRST
        )
        self.between_tokens = self._histogram(
            "nanogpt_inter_token_seconds",
            "Between tokens of a choice, averaged over those that arrive together.",
            _BETWEEN,
        )
        self.duration = self._histogram(
            "nanogpt_request_seconds", "From the request to the end of its answer.", _WHOLE
        )
        self._registry.register(_ClusterCollector(cluster))
        self._registry.register(_AdmissionCollector(admission))

    def add(self, collector: Collector) -> None:
        """Have it asked as well."""
        self._registry.register(collector)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, text, ["model"], buckets=tuple(buckets), registry=self._registry)

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)


class _ClusterCollector(Collector):
    """The cluster's own figures, read when somebody asks."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        status = self._cluster.status()
        yield GaugeMetricFamily("nanogpt_ready", "1 when a model answers.", float(status.ready))
        yield GaugeMetricFamily("nanogpt_ranks", "Ranks of the worker group.", status.ranks)
        yield GaugeMetricFamily(
            "nanogpt_epoch", "Number of the present worker group; 0 before one came.", status.epoch
        )
        labels = ["model", "rank"]
        gauges: dict[str, GaugeMetricFamily] = {
            "waiting": GaugeMetricFamily(
                "nanogpt_waiting", "Choices that wait for memory or a place.", labels=labels
            ),
            "running": GaugeMetricFamily(
                "nanogpt_running", "Choices that generate.", labels=labels
            ),
        }
        usage = GaugeMetricFamily(
            "nanogpt_kv_usage_ratio", "Part of the KV blocks in use, 0 to 1.", labels=labels
        )
        # Of the engines: they begin at 0 again with each worker group.
        counters: dict[str, CounterMetricFamily] = {
            "prompt_tokens": CounterMetricFamily(
                "nanogpt_engine_prompt_tokens", "Prompt tokens prefilled or found.", labels=labels
            ),
            "cached_tokens": CounterMetricFamily(
                "nanogpt_engine_cached_tokens", "Of these, found in the cache.", labels=labels
            ),
            "generated_tokens": CounterMetricFamily(
                "nanogpt_engine_generated_tokens", "Tokens sampled.", labels=labels
            ),
            "preemptions": CounterMetricFamily(
                "nanogpt_engine_preemptions", "Choices put back for want of blocks.", labels=labels
            ),
            "fair_preemptions": CounterMetricFamily(
                "nanogpt_engine_fair_preemptions",
                "Choices put back in favour of another user's.",
                labels=labels,
            ),
            "steps": CounterMetricFamily("nanogpt_engine_steps", "Engine steps.", labels=labels),
        }
        yield from _residency(self._cluster)
        for rank, models in sorted(self._cluster.stats().items()):
            for one in models:
                key = [one.model, str(rank)]
                for name, gauge in gauges.items():
                    gauge.add_metric(key, getattr(one, name))
                for name, counter in counters.items():
                    counter.add_metric(key, getattr(one, name))
                used = one.total_blocks - one.free_blocks
                usage.add_metric(key, used / one.total_blocks if one.total_blocks else 0.0)
        yield from gauges.values()
        yield usage
        yield from counters.values()


def _residency(cluster: Cluster) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    """Which models are in memory. Counters are of this process."""
    families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
        "resident": GaugeMetricFamily(
            "nanogpt_model_resident", "1 when the model is loaded.", labels=["model"]
        ),
        "bytes": GaugeMetricFamily(
            "nanogpt_model_memory_bytes", "Of a loaded model on each rank.", labels=["model"]
        ),
        "waiting": GaugeMetricFamily(
            "nanogpt_model_waiting", "Requests that wait for the model.", labels=["model"]
        ),
        "load_s": GaugeMetricFamily(
            "nanogpt_model_load_seconds", "How long loading took the last time.", labels=["model"]
        ),
        "loads": CounterMetricFamily(
            "nanogpt_model_loads", "Times that the model was loaded.", labels=["model"]
        ),
        "failures": CounterMetricFamily(
            "nanogpt_model_load_failures", "Times that it could not be.", labels=["model"]
        ),
        "evictions": CounterMetricFamily(
            "nanogpt_model_evictions", "Times that it made room for another.", labels=["model"]
        ),
    }
    for name, status in sorted(cluster.model_states().items()):
        is_there = status.state in ("open", "draining")
        for field, family in families.items():
            value = float(is_there) if field == "resident" else getattr(status, field)
            family.add_metric([name], 0.0 if field == "bytes" and not is_there else value)
    yield from families.values()


class _AdmissionCollector(Collector):
    """What admission has counted since this process began."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[CounterMetricFamily]:
        stats = self._admission.stats()
        decisions = CounterMetricFamily(
            "nanogpt_admission",
            "Decisions by kind, and code of the error (or name of the rule).",
            labels=["decision", "code"],
        )
        for key, count in sorted(stats.decisions.items()):
            decisions.add_metric(list(key), count)
        yield decisions
        for name, text, count in (
            ("pattern_timeouts", "Searches for a pattern given up.", stats.pattern_timeouts),
            ("redis_failures", "Times that Redis did not answer.", stats.redis_failures),
            ("audit_failures", "Lines that the audit log lacks.", stats.audit_failures),
        ):
            yield CounterMetricFamily(f"nanogpt_admission_{name}", text, count)
