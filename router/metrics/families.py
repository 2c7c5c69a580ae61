"""Every metric that `GET /metrics` shows; docs/metrics.md has the same table, and a test compares.

A metric has a name, a kind, labels, and a rule by which several replicas' gauges become one. Label
values come from configuration and code only, never from what clients send, so that their number
stays small. `policy` is "none" where the client named a model or a plan, `arm` is "experiment/arm",
"shadow/name" for what a shadow answered unseen, or "none".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]
Merge: TypeAlias = Literal["mean", "sum", "max"]

# A family's name and its labels' values; a histogram's bucket, or SUM, comes last.
Series: TypeAlias = tuple[str, ...]
Values: TypeAlias = Mapping[Series, float]

SUM = "sum"
NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One metric with its labels.

    `buckets` are a histogram's upper bounds, ascending, infinity left out. `merge` says what the
    replicas' gauges of the same labels become.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Merge = "mean"

    def __post_init__(self) -> None:
        assert (self.kind == "counter") == self.name.endswith("_total"), self.name
        assert (self.kind == "histogram") == bool(self.buckets), self.name
        # What a value is stored under in its bucket.
        object.__setattr__(self, "_bounds", (*map(str, self.buckets), "inf"))

    def series(self, *labels: str) -> Series:
        """Return the series with these labels' values."""
        assert len(labels) == len(self.labels), (self.name, labels)
        return (self.name, *labels)

    def bucket(self, value: float) -> str:
        """Return the name of the bucket that `value` falls into."""
        bounds: tuple[str, ...] = self._bounds  # type: ignore[attr-defined]
        return bounds[bisect_left(self.buckets, value)]


# OpenTelemetry's GenAI conventions: gen_ai.server.request.duration, .time_to_first_token and
# .time_per_output_token; a first text may take longer than theirs where a CPU's slots are full.
_DURATION_S = tuple(round(0.01 * 2**n, 2) for n in range(14))
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0),
)
_PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_JOULES = tuple(float(f"{digit}e{power}") for power in range(-4, 4) for digit in (1, 2, 5))
_SHARES = tuple(round(0.1 * n, 1) for n in range(1, 10))
_MEMBERS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)

_RESOURCES = {
    "requests": "Requests",
    "tokens": "Tokens",
    "usd": "US dollars",
    "wh": "Watt-hours",
    "gco2e": "Grams of CO2 equivalent",
}
_WHO = ("model", "policy", "arm")

_ALL: list[Family] = []


def _family(
    kind: Kind,
    name: str,
    *labels: str,
    help: str,
    buckets: tuple[float, ...] = (),
    merge: Merge = "mean",
) -> Family:
    _ALL.append(
        Family(name=name, kind=kind, help=help, labels=labels, buckets=buckets, merge=merge)
    )
    return _ALL[-1]


_counter = partial(_family, "counter")
_gauge = partial(_family, "gauge")
_histogram = partial(_family, "histogram")

# One metric in two lines each.
# fmt: off

# Counted from the ledger's rows, for all replicas together and for good.

REQUESTS = _counter("shoal_requests_total", "policy", "arm", "status",
    help="Requests of clients, by HTTP status; 499 is a client that left.")
ERRORS = _counter("shoal_errors_total", "type",
    help="Requests without a whole answer, by the error's code.")
MODEL_REQUESTS = _counter("shoal_model_requests_total", *_WHO,
    help="Requests that a model read or wrote for; a fused or escalated one counts for each.")
TOKENS = _counter("shoal_tokens_total", *_WHO, "direction",
    help="Tokens that models read (prompt) and wrote (output), accepted or not.")
CACHED_TOKENS = _counter("shoal_cached_prompt_tokens_total", "policy",
    help="Prompt tokens, as clients count them, that an engine had in its cache.")
COST_USD = _counter("shoal_cost_usd_total", *_WHO,
    help="What the models cost, in US dollars.")
ENERGY_WH = _counter("shoal_energy_wh_total", *_WHO, "method",
    help="Energy that requests used, in watt-hours, by how it is known.")
CARBON_GCO2E = _counter("shoal_carbon_gco2e_total", *_WHO, "method",
    help="Carbon of requests, operational and embodied, in grams of CO2 equivalent.")
PLANS = _counter("shoal_plans_total", "policy", "shape",
    help="Plans by shape: answer (one model), fused, cascade or best.")
CASCADE_STAGES = _counter("shoal_cascade_stages_total", "policy", "stage",
    help="Cascades by the last stage that ran; the first is 1.")
ESCALATIONS = _counter("shoal_cascade_escalations_total", "policy", "reason",
    help="Steps to a cascade's next stage: the answer was rejected or hopeless, failed or "
    "timed out.")
FALLBACKS = _counter("shoal_fallbacks_total", "policy",
    help="Plans of a policy's fallback that took over from one that failed or was overloaded.")
DURATION_S = _histogram("shoal_request_duration_seconds", "policy", buckets=_DURATION_S,
    help="Time from a request's arrival to the end of its answer; answered requests.")
FIRST_TOKEN_S = _histogram("shoal_time_to_first_token_seconds", "policy", buckets=_FIRST_TOKEN_S,
    help="Time from a request's arrival to its first text; streamed answers.")
PER_TOKEN_S = _histogram("shoal_time_per_output_token_seconds", "policy", buckets=_PER_TOKEN_S,
    help="Mean time between an answer's tokens after the first text; streamed answers.")
JOULES_PER_TOKEN = _histogram("shoal_energy_joules_per_output_token", "engine", "method",
    buckets=_JOULES,
    help="Joules that an engine used per token that it wrote, by request and how they are known.")
MEMBERS = _histogram("shoal_ensemble_members", "policy", buckets=_MEMBERS,
    help="Models fused in the accepted answer.")
CONFIDENCE = _histogram("shoal_router_confidence_ratio", "policy", buckets=_SHARES,
    help="The policy's best predicted quality, 0 to 1, where it predicts one.")
UNFAMILIAR = _counter("shoal_unfamiliar_requests_total", "policy",
    help="Requests unlike those that the policy learned from, so that it trusted itself less.")
DROPPED_ROWS = _counter("shoal_ledger_dropped_rows_total",
    help="Rows that the ledger could not keep: its queue was full, or the database refused.")

WORKER_FAILURES = _counter("shoal_worker_failures_total", "worker",
    help="Failures of what runs beside the requests; each time it began again.")

# Published by every ingress replica, and merged.

REPLICAS = _gauge("shoal_ingress_replicas",
    help="Ingress replicas that gave a sign of life in the last seconds.")
REPLICAS_WANTED = _gauge("shoal_ingress_replicas_wanted",
    help="The least number of ingress replicas that the configuration asks for.")
PENDING_ROWS = _gauge("shoal_ledger_pending_rows", merge="sum",
    help="Rows that wait to be written.")
GRID_INTENSITY = _gauge("shoal_grid_intensity_gco2e_per_kwh",
    help="The grid's carbon intensity that requests are priced with.")
GRID_STALE = _gauge("shoal_grid_stale", merge="max",
    help="1 while a live feed is configured but its data are too old to use.")
DEVICE_USD = _gauge("shoal_device_usd_per_busy_hour", "engine", "part",
    help="What a busy hour of an engine's device costs by economics: capital, other, idle, energy.")
PRICES = {
    resource: _gauge(f"shoal_budget_price_per_{resource}", "policy",
        help=f"The price λ of a budgeted policy: quality (0 to 1) per {unit}; replicas' mean.")
    for resource, unit in (("usd", "US dollar"), ("wh", "watt-hour"), ("gco2e", "gram of CO2e"))
}

# Read when somebody scrapes.

EDITION = _gauge("shoal_edition",
    help="What is loaded: 1 at the start, one more after each reload; replicas' mean.")
EDITION_LOADED_S = _gauge("shoal_edition_loaded_timestamp_seconds", merge="max",
    help="The Unix time at which what is loaded was put in force.")
BUILD_INFO = _gauge("shoal_build_info", "version", "pool", "fingerprint",
    help="Always 1: the version, the pool, and the fingerprint that answers carry.")
LEDGER_UP = _gauge("shoal_ledger_up",
    help="1 if the ledger's database answers; counters and budgets are missing while it doesn't.")
ENGINE_UP = _gauge("shoal_engine_up", "engine",
    help="1 if the engine can serve.")
ENGINE_RUNNING = _gauge("shoal_engine_running_requests", "engine",
    help="Requests in the engine's batch, summed over its replicas.")
ENGINE_QUEUED = _gauge("shoal_engine_queued_requests", "engine",
    help="Requests that wait for room in the engine's batch.")
ENGINE_LANES = _gauge("shoal_engine_active_lanes", "engine",
    help="Lanes in use; a lane is one model answering one request.")
ENGINE_KV_USED = _gauge("shoal_engine_kv_used_bytes", "engine",
    help="Key/value cache in use.")
ENGINE_KV_CAPACITY = _gauge("shoal_engine_kv_capacity_bytes", "engine",
    help="Key/value cache that there is; 0 where the engine doesn't say.")
ENGINE_IDLE_WH = _gauge("shoal_engine_idle_wh", "engine",
    help="Watt-hours drawn while no request ran, since the running replicas began; "
    "0 without a meter.")
ENGINE_RESTARTS = _counter("shoal_engine_restarts_total", "engine",
    help="How often an engine failed and was started again, since the running replicas began.")
ENGINE_GATED_TOKENS = _counter("shoal_engine_gated_tokens_total", "engine",
    help="Tokens of gated answers whose lead runs alone where it is sure.")
ENGINE_FUSED_TOKENS = _counter("shoal_engine_fused_tokens_total", "engine",
    help="Gated tokens at which the lead was unsure and all members were asked.")
ENGINE_DRAFTED_TOKENS = _counter("shoal_engine_drafted_tokens_total", "engine",
    help="Tokens that were guessed, to be checked several at a time.")
ENGINE_ACCEPTED_TOKENS = _counter("shoal_engine_accepted_tokens_total", "engine",
    help="Guessed tokens that were right.")
ENGINE_CIRCUIT_OPEN = _gauge("shoal_engine_circuit_open", "engine",
    help="1 while an engine leaves its remote server alone because that server failed.")
BUDGET_USED = {
    resource: _gauge(f"shoal_budget_used_{resource}", "scope", "period",
        help=f"{what} charged to a cap in its present window; what runs counts as held.")
    for resource, what in _RESOURCES.items()
}
BUDGET_REMAINING = {
    resource: _gauge(f"shoal_budget_remaining_{resource}", "scope", "period",
        help=f"{what} left until a cap's window ends.")
    for resource, what in _RESOURCES.items()
}
BUDGET_USED_RATIO = _gauge("shoal_budget_used_ratio", "scope", "period", "resource",
    help="Share of a cap that is used, 0 to 1.")
BUDGET_ELAPSED_RATIO = _gauge("shoal_budget_elapsed_ratio", "period",
    help="Share of a cap's window that is over, 0 to 1.")

# Worked out from the ledger by one replica for all, every ten seconds or more.

TARGET_USED_RATIO = _gauge("shoal_budget_target_used_ratio", "policy", "resource",
    help="What a budgeted policy spent in its window, of what its target allows up to now.")
FEEDBACK_SCORE = _gauge("shoal_feedback_score_ratio", "policy",
    help="Mean score, 0 to 1, of the last 2,000 rated answers, by policy.")
FEEDBACK_ANSWERS = _gauge("shoal_feedback_answers", "policy",
    help="How many of the last 2,000 rated answers are the policy's.")
CALIBRATION_BIAS = _gauge("shoal_router_calibration_bias_ratio", "policy",
    help="Predicted quality minus users' score, mean of the last 2,000 rated answers.")
CALIBRATION_ERROR = _gauge("shoal_router_calibration_error_ratio", "policy",
    help="Expected calibration error over ten bins of predicted quality, of the same answers.")
CALIBRATION_ANSWERS = _gauge("shoal_router_calibration_answers", "policy",
    help="Rated answers whose quality the policy had predicted.")
_EFFECT = ("experiment", "arm", "metric")
EXPERIMENT_EFFECT = _gauge("shoal_experiment_effect", *_EFFECT,
    help="Estimated difference from the control, in the metric's unit.")
EXPERIMENT_EFFECT_LOW = _gauge("shoal_experiment_effect_low", *_EFFECT,
    help="Lower end of the always-valid interval of the effect.")
EXPERIMENT_EFFECT_HIGH = _gauge("shoal_experiment_effect_high", *_EFFECT,
    help="Upper end of the always-valid interval of the effect.")
EXPERIMENT_P = _gauge("shoal_experiment_p", *_EFFECT,
    help="Always-valid p-value of no effect.")
EXPERIMENT_UNITS = _gauge("shoal_experiment_units", "experiment", "arm",
    help="Randomised units that an arm has.")
EXPERIMENT_SAMPLE_RATIO = _gauge("shoal_experiment_sample_ratio_p", "experiment",
    help="P-value of the planned split; below 0.001 it is broken.")
EXPERIMENT_GUARDRAIL = _gauge("shoal_experiment_guardrail_breached", *_EFFECT,
    help="1 if an arm surely harms beyond the guardrail's limit.")
SHADOW_REQUESTS = _gauge("shoal_shadow_mirrored_requests", "shadow",
    help="Requests that a shadow has answered too.")
SHADOW_AGREEMENT = _gauge("shoal_shadow_agreement_ratio", "shadow",
    help="Share of the shadow's answers that equal the served ones.")
SHADOW_QUALITY = _gauge("shoal_shadow_quality_ratio", "shadow",
    help="Mean score of the shadow's answers that a label could judge.")
SHADOW_SERVED_QUALITY = _gauge("shoal_shadow_served_quality_ratio", "shadow",
    help="Mean score of the served answers to the same requests.")
REPORTS_AGE_S = _gauge("shoal_reports_age_seconds",
    help="Age of the figures on targets, feedback, calibration, experiments and shadows.")

# fmt: on

FAMILIES = tuple(_ALL)
BY_NAME = {family.name: family for family in FAMILIES}
