"""Figures for Prometheus.

What the engine and the registry count themselves is read at the moment of a scrape; what happens to requests is
counted here. Beside our own names stand the few of vLLM's that Kubernetes' inference gateway looks for.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.adapters.registry import RegistryStats
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
        for name, text, value in (
            ("loramux_adapters_in_slots", "Adapters ready for use.", len(stats.slots)),
            ("loramux_adapters_in_host_memory", "Folded adapters in host memory.", len(stats.host)),
            ("loramux_adapter_host_bytes", "Bytes of folded adapters in host memory.", sum(stats.host.values())),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, value in (
            ("loramux_adapter_loads", "Adapters put into a slot.", stats.num_loads),
            ("loramux_adapter_load_failures", "Adapters that could not be put into a slot.", stats.num_failures),
            ("loramux_adapter_slot_hits", "Adapters that a request found in a slot.", stats.num_slot_hits),
            ("loramux_adapter_slot_misses", "Adapters that a request had to wait for.", stats.num_slot_misses),
        ):
            yield CounterMetricFamily(name, text, value)
        names = self._names()
        resident = sorted(names[digest] for digest in stats.slots if digest in names)
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that are resident; alias for inference gateways.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        family.add_metric([str(self._max_slots), ",".join(resident), ""], time.time())
        yield family
