"""Experiments for Prometheus: the reports' figures as gauges in its text format."""

from __future__ import annotations

from collections.abc import Iterable

import prometheus_client as prometheus

from router.experiments.reporting import Gauge

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST

_HELP = {
    "shoal_experiment_effect": "Estimated difference from the control, in the metric's unit.",
    "shoal_experiment_effect_low": "Lower end of the always-valid interval of the effect.",
    "shoal_experiment_effect_high": "Upper end of the always-valid interval of the effect.",
    "shoal_experiment_p": "Always-valid p-value of no effect.",
    "shoal_experiment_units": "Randomised units that an arm has.",
    "shoal_experiment_sample_ratio_p": "P-value of the planned split; below 0.001 it is broken.",
    "shoal_experiment_guardrail_breached": "1 if an arm surely harms beyond the guardrail's limit.",
}


def exposition(gauges: Iterable[Gauge]) -> bytes:
    """Return `gauges` in Prometheus' text format.

    They come from the ledger, so every replica shows the same. A registry of its own is made for
    each scrape: arms and metrics that left the configuration leave the page with it.
    """
    registry = prometheus.CollectorRegistry()
    families: dict[str, prometheus.Gauge] = {}
    for gauge in gauges:
        if gauge.name not in families:
            families[gauge.name] = prometheus.Gauge(
                gauge.name, _HELP[gauge.name], tuple(gauge.labels), registry=registry
            )
        families[gauge.name].labels(**gauge.labels).set(gauge.value)
    return prometheus.generate_latest(registry)
