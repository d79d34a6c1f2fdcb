"""What the server counts, for Prometheus."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds

prometheus_client.disable_created_metrics()  # a time beside each counter, which nothing here needs


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        shared = dict(namespace="nanogpt", registry=(registry := CollectorRegistry()))
        self.registry = registry
        about = "Requests by path and status; 499: the client disconnected."
        self.requests = Counter("requests", about, ["path", "status"], **shared)
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens read.", **shared)
        self.tokens = Counter("tokens", "Tokens generated.", **shared)
        self.steps = Counter("steps", "Steps of the model, each of one token for every text.", **shared)
        self.failures = Counter("failures", "Steps that failed.", **shared)
        self.texts = Gauge("texts", "Texts being generated.", **shared)
        self.texts_limit = Gauge("texts_limit", "Texts that can be generated at the same time.", **shared)
        self.waiting = Gauge("waiting", "Texts that wait for a place.", **shared)
        self.completions = Gauge("completions", "Completion requests being processed.", **shared)
        self.first_token = Histogram("first_token_seconds", "Time to first token.", buckets=BUCKETS, **shared)
        self.completion = Histogram("completion_seconds", "Time to the end of the response.", buckets=BUCKETS, **shared)

    def value(self, name: str) -> float | None:
        """The current value of nanogpt_NAME."""
        return self.registry.get_sample_value(f"nanogpt_{name}")

    def text(self) -> bytes:
        """All metrics in Prometheus's text format, version 0.0.4."""
        return prometheus_client.generate_latest(self.registry)
