"""Values in Prometheus' text format, or OpenMetrics where the scraper prefers that."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from router.metrics.families import BY_NAME, FAMILIES
from router.metrics.family import SUM, Family, Series, Values


def exposition(values: Values, *, accept: str, others: Iterable[Metric] = ()) -> tuple[bytes, str]:
    """Return the page of `values` and its content type, as the `Accept` header wants it.

    What other libraries count stands after our own.

    The registry lives for one page: what has gone from the configuration is gone from the page.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(values, others))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Page(Collector):
    def __init__(self, values: Values, others: Iterable[Metric]) -> None:
        self._others = others
        self._by_family: dict[str, dict[Series, float]] = defaultdict(dict)
        for (name, *labels), value in values.items():
            family = BY_NAME.get(name)
            # Another version of Shoal may have written it.
            if family is not None and len(labels) == len(family.labels) + bool(family.buckets):
                self._by_family[name][tuple(labels)] = value

    def collect(self) -> Iterator[Metric]:
        """Yield the families that have values."""
        for family in FAMILIES:
            found = self._by_family.get(family.name, {})
            if found:
                yield _COLLECT[family.kind](family, found)
        yield from self._others


def _counter(family: Family, values: dict[Series, float]) -> Metric:
    metric = CounterMetricFamily(family.name, family.help, labels=family.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric


def _gauge(family: Family, values: dict[Series, float]) -> Metric:
    metric = GaugeMetricFamily(family.name, family.help, labels=family.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric


def _histogram(family: Family, values: dict[Series, float]) -> Metric:
    metric = HistogramMetricFamily(family.name, family.help, labels=family.labels)
    sums: dict[Series, float] = {}
    counts: dict[Series, list[float]] = defaultdict(lambda: [0.0] * (len(family.buckets) + 1))
    for (*labels, bucket), value in values.items():
        if bucket == SUM:
            sums[tuple(labels)] = value
        else:
            # A bound of an earlier version counts in the next one that there is.
            counts[tuple(labels)][bisect_left(family.buckets, float(bucket))] += value
    bounds = (*map(str, family.buckets), "+Inf")
    for series, found in counts.items():
        cumulated = list(zip(bounds, accumulate(found), strict=True))
        metric.add_metric(series, cumulated, sums.get(series, 0.0))
    return metric


_COLLECT = {"counter": _counter, "gauge": _gauge, "histogram": _histogram}
