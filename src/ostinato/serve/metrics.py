"""Prometheus metrics under the names of vLLM's, with the prefix `ostinato:`.

Kept as plain numbers on the event loop, since a counter is raised for every token of every
stream, and turned into Prometheus' types when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from .client import Feed
from .messages import Ready, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_GAP = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
)
_REQUEST = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_N = (1, 2, 5, 10, 20, 50, 100)
_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)

_DISTRIBUTIONS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Seconds from a request's arrival to its first token.", _TTFT),
    "inter_token_latency_seconds": ("Seconds between two tokens of a completion.", _GAP),
    "request_time_per_output_token_seconds": ("Mean of a completion's seconds between tokens.", _GAP),
    "e2e_request_latency_seconds": ("Seconds from a completion's arrival to its end.", _REQUEST),
    "request_queue_time_seconds": ("Seconds from a completion's arrival until it first ran.", _REQUEST),
    "request_prefill_time_seconds": (
        "Seconds from when a completion first ran to its first token.",
        _REQUEST,
    ),
    "request_inference_time_seconds": (
        "Seconds from when a completion first ran to its last token.",
        _REQUEST,
    ),
    "request_decode_time_seconds": ("Seconds from a completion's first token to its last.", _REQUEST),
    "request_prompt_tokens": ("Prompt tokens of a completion.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a completion.", _TOKENS),
    "request_max_num_generation_tokens": ("Tokens of a prompt's longest completion.", _TOKENS),
    "request_params_n": ("The parameter n of requests.", _N),
    "request_params_max_tokens": ("The parameter max_tokens of requests.", _TOKENS),
}


class Distribution:
    """How often values fell into each bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), as Prometheus wants them."""
        found, total = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            found.append(("+Inf" if bound == float("inf") else str(float(bound)), float(total)))
        return found


class Metrics:
    """What the HTTP process counts; the engine's own counters come with `Stats`."""

    def __init__(self, model: str, ready: Ready) -> None:
        self._model, self._ready = model, ready
        self.stats: Stats | None = None
        """The engine's latest."""
        self._distributions = {name: Distribution(bounds) for name, (_, bounds) in _DISTRIBUTIONS.items()}
        self._gaps = self._distributions["inter_token_latency_seconds"]
        self._prompt_tokens = self._generation_tokens = 0
        self._ended: Counter[str] = Counter()
        self._refused: Counter[int] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def token(self, feed: Feed, gap: float | None) -> None:
        """One token came, this many seconds after the one before it."""
        self._generation_tokens += 1
        if gap is not None:
            self._gaps.observe(gap)
        else:
            self._observe("time_to_first_token_seconds", feed.first_at - feed.arrived)

    def started(self, prompt_tokens: int, n: int, max_tokens: int | None) -> None:
        """A prompt was accepted."""
        self._prompt_tokens += prompt_tokens
        self._observe("request_params_n", n)
        if max_tokens is not None:
            self._observe("request_params_max_tokens", max_tokens)

    def ended(self, feed: Feed, reason: str, prompt_tokens: int, tokens: int, now: float) -> None:
        """A completion ended; `reason` is its finish reason, or "abort" or "error"."""
        self._ended[reason] += 1
        self._observe("e2e_request_latency_seconds", now - feed.arrived)
        self._observe("request_prompt_tokens", prompt_tokens)
        self._observe("request_generation_tokens", tokens)
        if tokens:
            self._observe("request_queue_time_seconds", feed.admitted - feed.arrived)
            self._observe("request_prefill_time_seconds", feed.first_at - feed.admitted)
            self._observe("request_inference_time_seconds", feed.last_at - feed.admitted)
        if tokens > 1:
            seconds = feed.last_at - feed.first_at
            self._observe("request_decode_time_seconds", seconds)
            self._observe("request_time_per_output_token_seconds", seconds / (tokens - 1))

    def longest(self, tokens: int) -> None:
        """The last completion of a prompt has ended; the longest has this many tokens."""
        self._observe("request_max_num_generation_tokens", tokens)

    def refused(self, status: int) -> None:
        """A request was answered with an error."""
        self._refused[status] += 1

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _observe(self, name: str, value: float) -> None:
        self._distributions[name].observe(value)

    # --- for prometheus_client -----------------------------------------------------------

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        """Everything as Prometheus' types."""
        label, model = ["model_name"], [self._model]

        def counter(name: str, text: str, value: float) -> Metric:
            family = CounterMetricFamily(f"ostinato:{name}", text, labels=label)
            family.add_metric(model, value)
            return family

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"ostinato:{name}", text, labels=label)
            family.add_metric(model, value)
            return family

        for name, (text, _) in _DISTRIBUTIONS.items():
            found = self._distributions[name]
            histogram = HistogramMetricFamily(f"ostinato:{name}", text, labels=label)
            histogram.add_metric(model, found.buckets(), found.sum)
            yield histogram
        # vLLM's former name, which older dashboards have.
        old = HistogramMetricFamily(
            "ostinato:time_per_output_token_seconds", "As inter_token_latency_seconds.", labels=label
        )
        old.add_metric(model, self._gaps.buckets(), self._gaps.sum)
        yield old
        yield counter("prompt_tokens", "Prompt tokens of accepted prompts.", self._prompt_tokens)
        yield counter("generation_tokens", "Tokens generated.", self._generation_tokens)
        ended = CounterMetricFamily(
            "ostinato:request_success", "Completions that ended.", labels=[*label, "finished_reason"]
        )
        for reason in ("stop", "length", "tool_calls", "abort", "error"):
            ended.add_metric([*model, reason], self._ended[reason])
        yield ended
        refused = CounterMetricFamily(
            "ostinato:http_errors", "Requests answered with an error.", labels=[*label, "status"]
        )
        for status, count in self._refused.items():
            refused.add_metric([*model, str(status)], count)
        yield refused
        info = GaugeMetricFamily(
            "ostinato:cache_config_info", "The engine's config.", labels=[*label, *self._ready.config]
        )
        info.add_metric([*model, *self._ready.config.values()], 1)
        yield info
        if self.stats is None:
            return
        s = self.stats
        yield gauge("num_requests_running", "Completions in the running batch.", s.running)
        yield gauge("num_requests_waiting", "Completions that wait.", s.waiting)
        yield gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", s.kv_usage)
        yield counter("num_preemptions", "Completions put back into the queue.", s.preemptions)
        yield counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", s.prefix_queries)
        yield counter("prefix_cache_hits", "Tokens found in the prefix cache.", s.prefix_hits)
        yield counter(
            "host_dependency",
            "Times a row waited for its last token, on which its mask depends.",
            s.host_dependency,
        )
        tokens = Distribution(_STEP)
        for size, times in s.step_tokens.items():
            tokens.observe(size, times)
        # vLLM's name; a histogram in spite of its ending.
        iterations = HistogramMetricFamily(
            "ostinato:iteration_tokens_total", "Tokens of a step.", labels=label
        )
        iterations.add_metric(model, tokens.buckets(), tokens.sum)
        yield iterations
        steps = CounterMetricFamily(
            "ostinato:cudagraph_iterations",
            "Steps on a graph (mode FULL), and eager ones (mode NONE) by reason.",
            labels=[*label, "mode", "reason"],
        )
        steps.add_metric([*model, "FULL", ""], s.graph_steps)
        for reason, count in s.eager_steps.items():
            steps.add_metric([*model, "NONE", reason], count)
        yield steps
        memory = GaugeMetricFamily(
            "ostinato:graph_memory_bytes", "Device memory held for graphs.", labels=[*label, "kind"]
        )
        for kind, nbytes in s.graph_memory_bytes.items():
            memory.add_metric([*model, kind], nbytes)
        yield memory
        yield counter("graph_captures", "Graphs captured.", s.captures)
        yield gauge("graph_capture_seconds", "Seconds spent on capturing since the start.", s.capture_seconds)
