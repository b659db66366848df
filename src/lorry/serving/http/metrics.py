"""What a server has done, for Prometheus; each app has a registry of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lorry.serving.request import Output

#: Bounds of the histograms, in seconds.
_TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of the HTTP side, and the engine's own figures as they are when somebody asks.

    Parameters
    ----------
    stats
        Returns the engine's figures: a dataclass of numbers, and of numbers by name.
    """

    def __init__(self, stats: Callable[[], Any]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry()
        self._stats = stats
        own = self.registry
        self._answers = Counter(
            "lorry_http_answers", "Answers by endpoint and status.", ["path", "status"], registry=own
        )
        self._tokens = Counter("lorry_tokens", "Tokens of prompts and answers.", ["kind"], registry=own)
        self._ends = Counter("lorry_sequences", "Sequences that ended, by why.", ["finish"], registry=own)
        self._first = Histogram(
            "lorry_time_to_first_token_seconds", "Until the first token.", buckets=_TIMES, registry=own
        )
        self._whole = Histogram("lorry_sequence_seconds", "Until the last token.", buckets=_TIMES, registry=own)
        self.registry.register(_Engine(self))

    def answered(self, path: str, status: int) -> None:
        """Count an answer; `path` is the endpoint's as the app knows it."""
        self._answers.labels(path, str(status)).inc()

    def watch(self) -> Watch:
        """Return what follows the sequences of a request that begins now."""
        return Watch(self, time.monotonic())

    def text(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def gauges(self) -> Iterator[tuple[str, str, dict[str, float]]]:
        """Yield the engine's figures: name, name of their label or none, and value for each label."""
        found = self._stats()
        for each in dataclasses.fields(found):
            value = getattr(found, each.name)
            if isinstance(value, dict):
                yield each.name, "kind", {str(k): float(v) for k, v in value.items()}
            elif isinstance(value, int | float):
                yield each.name, "", {"": float(value)}

    def first(self, seconds: float) -> None:
        """Note the time to a first token."""
        self._first.observe(seconds)

    def ended(self, output: Output, seconds: float) -> None:
        """Note the end of a sequence."""
        self._whole.observe(seconds)
        self._ends.labels(output.finish).inc()
        usage = output.usage
        for kind, count in (("prompt", usage.prompt), ("cached", usage.cached), ("completion", usage.completion)):
            self._tokens.labels(kind).inc(count)


class Watch:
    """Follows the sequences of one request."""

    def __init__(self, metrics: Metrics, began: float) -> None:
        self._metrics, self._began = metrics, began
        self._seen: set[str] = set()

    def saw(self, output: Output) -> None:
        """Take note of an output."""
        seconds = time.monotonic() - self._began
        if output.tokens and output.id not in self._seen:
            self._seen.add(output.id)
            self._metrics.first(seconds)
        if output.finish is not None:
            self._metrics.ended(output, seconds)


class _Engine:
    """Asks for the engine's figures when they are collected."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import GaugeMetricFamily

        for name, label, values in self._metrics.gauges():
            family = GaugeMetricFamily(f"lorry_engine_{name}", f"The engine's {name}.", labels=[label] if label else [])
            for of, value in values.items():
                family.add_metric([of] if label else [], value)
            yield family

    def describe(self) -> Iterable[Any]:
        return ()
