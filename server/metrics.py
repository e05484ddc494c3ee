"""Figures for Prometheus.

What the engine and the registry count themselves is read at the moment of a scrape; what happens to requests is
counted here. Beside our own names stand the few of vLLM's that Kubernetes' inference gateway looks for.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.adapters.lease import RegistryStats
from server.adapters.tiers import TierStats
from server.delivery import GenerationGroup
from server.engine import EngineStats, FinishReason
from server.errors import ServerError

__all__ = ["Metrics"]

LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The figures of one server.

    Args:
        engine, adapters: give a snapshot; called once a scrape.
        names: adapter names by digest, at the moment of the scrape.
    """

    def __init__(
        self,
        engine: Callable[[], EngineStats],
        adapters: Callable[[], RegistryStats],
        names: Callable[[], dict[str, str]],
        *,
        model_id: str,
        max_slots: int,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Snapshot(engine, adapters, names, model_id, max_slots))
        self._requests = Counter(
            "loramux_requests", "Requests that ended, by how.", ["outcome"], registry=self._registry
        )
        self._http = Counter(
            "loramux_http_requests",
            "HTTP requests that ended; status 499: the client went first.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._first_token = Histogram(
            "loramux_time_to_first_token_seconds",
            "From arrival to the first token.",
            registry=self._registry,
            buckets=LATENCY_BUCKETS_S,
        )
        self._duration = Histogram(
            "loramux_request_duration_seconds",
            "From arrival to the last token.",
            registry=self._registry,
            buckets=LATENCY_BUCKETS_S,
        )

    @contextmanager
    def observe(self, group: GenerationGroup) -> Iterator[None]:
        """Count a call by how the block ends; with several sequences, by how the first one did."""
        outcome = "cancelled"
        try:
            yield
            finished = group.generations[0].finished
            if finished is not None and finished.reason is not FinishReason.CANCELLED:
                outcome = finished.reason.value
        except ServerError as error:
            outcome = error.code
            raise
        finally:
            timing = group.timing
            self._requests.labels(outcome).inc()
            self._duration.observe(time.monotonic() - timing.started_s)
            if timing.first_token_s is not None:
                self._first_token.observe(timing.first_token_s - timing.started_s)

    def count_http(self, method: str, route: str, status: int) -> None:
        """Count a request that has ended."""
        self._http.labels(method, route, status).inc()

    def render(self) -> bytes:
        """All figures in the text format."""
        return generate_latest(self._registry)


class _Snapshot(Collector):
    def __init__(
        self,
        engine: Callable[[], EngineStats],
        adapters: Callable[[], RegistryStats],
        names: Callable[[], dict[str, str]],
        model_id: str,
        max_slots: int,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._names = names
        self._model_id = model_id
        self._max_slots = max_slots

    def collect(self) -> Iterator[Metric]:
        yield from self._engine_metrics(self._engine())
        yield from self._adapter_metrics(self._adapters())

    def _engine_metrics(self, stats: EngineStats) -> Iterator[Metric]:
        for name, text, value in (
            ("loramux_requests_running", "Requests that generate.", stats.num_running),
            ("loramux_requests_waiting", "Requests that wait.", stats.num_waiting),
            ("loramux_kv_cache_usage_ratio", "Share of the KV cache in use.", stats.kv_usage),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, value in (
            ("loramux_engine_steps", "Steps of the engine.", stats.num_steps),
            ("loramux_prompt_tokens", "Prompt tokens computed, again after a preemption.", stats.num_prompt_tokens),
            ("loramux_generated_tokens", "Tokens generated.", stats.num_generated_tokens),
            ("loramux_prefix_cache_queries", "Tokens of started requests.", stats.num_prefix_tokens),
            ("loramux_prefix_cache_hits", "Tokens that were found in the cache.", stats.num_prefix_hit_tokens),
            ("loramux_preemptions", "Requests that gave their cache blocks back.", stats.num_preemptions),
        ):
            yield CounterMetricFamily(name, text, value)
        for name, value in (
            ("vllm:num_requests_running", stats.num_running),
            ("vllm:num_requests_waiting", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", stats.kv_usage),
        ):
            family = GaugeMetricFamily(name, "Alias for inference gateways.", labels=["model_name"])
            family.add_metric([self._model_id], value)
            yield family

    def _adapter_metrics(self, stats: RegistryStats) -> Iterator[Metric]:
        failures = "Adapters that could not be brought into memory."
        yield CounterMetricFamily("loramux_adapter_load_failures", failures, stats.num_failures)
        allocated = "Bytes that the slots really take, used or not."
        yield GaugeMetricFamily("loramux_slot_allocated_bytes", allocated, stats.slot_allocated_bytes)
        yield GaugeMetricFamily("loramux_adapters_pinned", "Adapters that stay in their slots.", len(stats.pinned))
        yield from _tier_metrics({"slot": stats.slot_tier, "host": stats.host_tier})
        names = self._names()
        yield from self._resident_metrics(stats, names)
        yield from _usage_metrics(stats, names)

    def _resident_metrics(self, stats: RegistryStats, names: dict[str, str]) -> Iterator[Metric]:
        in_slots = sorted((names[digest], digest) for digest in stats.slots if digest in names)
        in_host = sorted((names[digest], digest) for digest in stats.host if digest in names)
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that are resident; alias for inference gateways.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        family.add_metric([str(self._max_slots), ",".join(name for name, _ in in_slots), ""], time.time())
        yield family
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "1 for each adapter in a slot (gpu) or in host memory (cpu); alias for inference gateways.",
            labels=["adapter_name", "level", "pinned"],
        )
        for level, resident in (("gpu", in_slots), ("cpu", in_host)):
            for name, digest in resident:
                loaded.add_metric([name, level, "true" if digest in stats.pinned else "false"], 1)
        yield loaded
        for name, number in (
            ("vllm:num_gpu_loaded_lora_adapters", len(stats.slots)),
            ("vllm:num_cpu_loaded_lora_adapters", len(stats.host)),
        ):
            yield GaugeMetricFamily(name, "Adapters that are resident; alias for inference gateways.", number)


def _tier_metrics(tiers: Mapping[str, TierStats]) -> Iterator[Metric]:
    """Figures of each tier, told apart by the label `tier`."""
    gauges: tuple[tuple[str, str, Callable[[TierStats], float]], ...] = (
        ("loramux_tier_adapters", "Adapters that are there.", lambda of: of.num_adapters),
        ("loramux_tier_bytes", "Bytes of folded adapters there.", lambda of: of.num_bytes),
        ("loramux_tier_max_bytes", "Budget of these bytes.", lambda of: of.max_bytes),
    )
    counters: tuple[tuple[str, str, Callable[[TierStats], float]], ...] = (
        ("loramux_tier_hits", "Adapters that a starting request found there.", lambda of: of.num_hits),
        ("loramux_tier_misses", "Adapters that a starting request did not find there.", lambda of: of.num_misses),
        ("loramux_tier_loads", "Adapters brought there.", lambda of: of.num_loads),
        ("loramux_tier_evictions", "Adapters that made room for others.", lambda of: of.num_evictions),
        ("loramux_tier_load_seconds", "Time that bringing them there took.", lambda of: of.load_s),
    )
    for name, text, value in gauges:
        gauge = GaugeMetricFamily(name, text, labels=["tier"])
        for tier, stats in tiers.items():
            gauge.add_metric([tier], value(stats))
        yield gauge
    for name, text, value in counters:
        counter = CounterMetricFamily(name, text, labels=["tier"])
        for tier, stats in tiers.items():
            counter.add_metric([tier], value(stats))
        yield counter


def _usage_metrics(stats: RegistryStats, names: Mapping[str, str]) -> Iterator[Metric]:
    """Requests by adapter and where they found it; only adapters that were used since the start have a series."""
    family = CounterMetricFamily(
        "loramux_adapter_requests", "Requests by adapter, and where they found it.", labels=["adapter", "found_in"]
    )
    for digest, usage in stats.usage.items():
        if digest in names and usage.num_requests:
            in_store = max(usage.num_requests - usage.num_slot_hits - usage.num_host_hits, 0)
            for found_in, number in (("slot", usage.num_slot_hits), ("host", usage.num_host_hits), ("store", in_store)):
                family.add_metric([names[digest], found_in], number)
    yield family
