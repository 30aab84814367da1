"""What /metrics says, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
REQUESTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vlmsft_requests", "Chat requests by HTTP status; 499 = the client left", ["status"], registry=registry
        )
        self.request_seconds = Histogram(
            "vlmsft_request_seconds", "From a request to its answer's end", buckets=SECONDS, registry=registry
        )
        self.first_text_seconds = Histogram(
            "vlmsft_first_text_seconds",
            "From the encoded prompt to the first text of its answer",
            buckets=SECONDS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "vlmsft_queue_seconds", "From the encoded prompt to its batch", buckets=SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("vlmsft_prompt_tokens", "Tokens of prompts", registry=registry)
        self.generated_tokens = Counter("vlmsft_generated_tokens", "Tokens of answers", registry=registry)
        self.answer_tokens = Histogram("vlmsft_answer_tokens", "Tokens of an answer", buckets=TOKENS, registry=registry)
        self.batch_requests = Histogram(
            "vlmsft_batch_requests", "Requests generated together", buckets=REQUESTS, registry=registry
        )
        self.running = Gauge("vlmsft_requests_running", "Requests being generated", registry=registry)
        self.waiting = Gauge("vlmsft_requests_waiting", "Requests that wait for a batch", registry=registry)
