"""What the server counts and measures, for Prometheus."""

from functools import partial

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds

prometheus_client.disable_created_metrics()  # a timestamp for each counter, which nothing here needs


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="nanogpt", registry=self.registry)
        gauge = partial(Gauge, namespace="nanogpt", registry=self.registry)
        histogram = partial(Histogram, namespace="nanogpt", registry=self.registry, buckets=BUCKETS)
        about = "Requests by path and status; 499: the client disconnected."
        self.requests = counter("requests", about, ["path", "status"])
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens read.")
        self.tokens = counter("tokens", "Tokens generated.")
        self.steps = counter("steps", "Steps of the model, each of one token for every text.")
        self.failures = counter("failures", "Steps that failed.")
        self.texts = gauge("texts", "Texts being generated.")
        self.texts_limit = gauge("texts_limit", "Texts that can be generated at the same time.")
        self.waiting = gauge("waiting", "Texts that wait for a place.")
        self.completions = gauge("completions", "Completion requests being processed.")
        self.first_token = histogram("first_token_seconds", "Time to first token.")
        self.completion = histogram("completion_seconds", "Time to the end of the response.")

    def text(self) -> bytes:
        """All metrics in Prometheus's text format, version 0.0.4."""
        return prometheus_client.generate_latest(self.registry)
