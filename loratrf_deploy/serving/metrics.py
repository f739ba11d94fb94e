"""What /metrics says, in Prometheus' words."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .catalogue import Catalogue

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Of one server: a registry of its own, so that several may live in one process."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter("loratrf_requests", "Requests that were answered.", ["path", "status"], registry=own)
        self.seconds = Histogram(
            "loratrf_request_seconds",
            "From a request's headers to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=own,
        )
        self.running = Gauge("loratrf_requests_running", "Requests that are being answered.", registry=own)
        self.waiting = Gauge("loratrf_rows_waiting", "Texts that no batch has taken yet.", registry=own)
        self.batch_rows = Histogram("loratrf_batch_rows", "Texts in a batch.", buckets=_ROWS, registry=own)
        self.prompt_tokens = Counter("loratrf_prompt_tokens", "Tokens of texts and prompts.", registry=own)
        self.made_tokens = Counter("loratrf_generated_tokens", "Tokens that were generated.", registry=own)

    def watch(self, catalogue: Catalogue) -> None:
        """Counts the adapters of `catalogue` whenever somebody asks."""

        def resident() -> int:
            return sum(info.resident for info in catalogue.session.adapters.values())

        def resident_bytes() -> int:
            return sum(info.bytes for info in catalogue.session.adapters.values() if info.resident)

        own = self._registry
        Gauge("loratrf_adapters", "Adapters that requests may name.", registry=own).set_function(
            lambda: len(catalogue.names())
        )
        Gauge("loratrf_adapters_resident", "Adapters in memory.", registry=own).set_function(resident)
        Gauge("loratrf_adapter_bytes", "Memory of the adapters in it.", registry=own).set_function(resident_bytes)
        Gauge("loratrf_adapter_evictions_total", "Adapters put aside for others.", registry=own).set_function(
            lambda: catalogue.session.evictions
        )

    def text(self) -> bytes:
        """The text format of /metrics."""
        return generate_latest(self._registry)
