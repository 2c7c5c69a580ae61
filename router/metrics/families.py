"""Every metric that `GET /metrics` shows; docs/metrics.md has the same table, and a test compares.

Label values come from configuration and code only, never from what clients send, so that their
number stays small. `policy` is "none" where the client named a model or a plan, `arm` is
"experiment/arm", "shadow/name" for what a shadow answered unseen, or "none".
"""

from __future__ import annotations

from functools import partial

from router.metrics.family import Family, Kind, Merge

NONE = "none"

# OpenTelemetry's GenAI conventions: gen_ai.server.request.duration, .time_to_first_token and
# .time_per_output_token.
_DURATION_S = tuple(round(0.01 * 2**n, 2) for n in range(14))
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
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
    help: str,
    *,
    labels: tuple[str, ...] = (),
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

# Counted from the ledger's rows, for all replicas together and for good.

REQUESTS = _counter(
    "shoal_requests_total",
    "Requests of clients, by HTTP status; 499 is a client that left.",
    labels=("policy", "arm", "status"),
)
ERRORS = _counter(
    "shoal_errors_total",
    "Requests without a whole answer, by the error's code.",
    labels=("type",),
)
MODEL_REQUESTS = _counter(
    "shoal_model_requests_total",
    "Requests that a model read or wrote for; a fused or escalated one counts for each.",
    labels=_WHO,
)
TOKENS = _counter(
    "shoal_tokens_total",
    "Tokens that models read (prompt) and wrote (output), accepted or not.",
    labels=(*_WHO, "direction"),
)
COST_USD = _counter(
    "shoal_cost_usd_total",
    "What the models cost, in US dollars.",
    labels=_WHO,
)
ENERGY_WH = _counter(
    "shoal_energy_wh_total",
    "Energy that requests used, in watt-hours, by how it is known.",
    labels=(*_WHO, "method"),
)
CARBON_GCO2E = _counter(
    "shoal_carbon_gco2e_total",
    "Carbon of requests, operational and embodied, in grams of CO2 equivalent.",
    labels=(*_WHO, "method"),
)
PLANS = _counter(
    "shoal_plans_total",
    "Plans by shape: answer (one model), fused, cascade or best.",
    labels=("policy", "shape"),
)
CASCADE_STAGES = _counter(
    "shoal_cascade_stages_total",
    "Cascades by the last stage that ran; the first is 1.",
    labels=("policy", "stage"),
)
ESCALATIONS = _counter(
    "shoal_cascade_escalations_total",
    "Steps to a cascade's next stage: the answer was rejected or hopeless, failed or timed out.",
    labels=("policy", "reason"),
)
DURATION_S = _histogram(
    "shoal_request_duration_seconds",
    "Time from a request's arrival to the end of its answer; answered requests.",
    labels=("policy",),
    buckets=_DURATION_S,
)
FIRST_TOKEN_S = _histogram(
    "shoal_time_to_first_token_seconds",
    "Time from a request's arrival to its first text; streamed answers.",
    labels=("policy",),
    buckets=_FIRST_TOKEN_S,
)
PER_TOKEN_S = _histogram(
    "shoal_time_per_output_token_seconds",
    "Mean time between an answer's tokens after the first text; streamed answers.",
    labels=("policy",),
    buckets=_PER_TOKEN_S,
)
MEMBERS = _histogram(
    "shoal_ensemble_members",
    "Models fused in the accepted answer.",
    labels=("policy",),
    buckets=_MEMBERS,
)
CONFIDENCE = _histogram(
    "shoal_router_confidence_ratio",
    "The policy's best predicted quality, 0 to 1, where it predicts one.",
    labels=("policy",),
    buckets=_SHARES,
)
DROPPED_ROWS = _counter(
    "shoal_ledger_dropped_rows_total",
    "Rows that the ledger could not keep: its queue was full, or the database refused.",
)

# Published by every ingress replica, and merged.

REPLICAS = _gauge(
    "shoal_ingress_replicas",
    "Ingress replicas that gave a sign of life in the last seconds.",
)
REPLICAS_WANTED = _gauge(
    "shoal_ingress_replicas_wanted",
    "The least number of ingress replicas that the configuration asks for.",
)
PENDING_ROWS = _gauge(
    "shoal_ledger_pending_rows",
    "Rows that wait to be written.",
    merge="sum",
)
GRID_INTENSITY = _gauge(
    "shoal_grid_intensity_gco2e_per_kwh",
    "The grid's carbon intensity that requests are priced with.",
)
GRID_STALE = _gauge(
    "shoal_grid_stale",
    "1 while a live feed is configured but its data are too old to use.",
    merge="max",
)
PRICES = {
    resource: _gauge(
        f"shoal_budget_price_per_{resource}",
        f"The price λ of a budgeted policy: quality (0 to 1) per {unit}; replicas' mean.",
        labels=("policy",),
    )
    for resource, unit in (("usd", "US dollar"), ("wh", "watt-hour"), ("gco2e", "gram of CO2e"))
}

# Read when somebody scrapes.

BUILD_INFO = _gauge(
    "shoal_build_info",
    "Always 1: the version, the pool, and the fingerprint that answers carry.",
    labels=("version", "pool", "fingerprint"),
)
LEDGER_UP = _gauge(
    "shoal_ledger_up",
    "1 if the ledger's database answers; counters and budgets are missing while it doesn't.",
)
ENGINE_UP = _gauge(
    "shoal_engine_up",
    "1 if the engine can serve.",
    labels=("engine",),
)
ENGINE_RUNNING = _gauge(
    "shoal_engine_running_requests",
    "Requests in the engine's batch, summed over its replicas.",
    labels=("engine",),
)
ENGINE_QUEUED = _gauge(
    "shoal_engine_queued_requests",
    "Requests that wait for room in the engine's batch.",
    labels=("engine",),
)
ENGINE_LANES = _gauge(
    "shoal_engine_active_lanes",
    "Lanes in use; a lane is one model answering one request.",
    labels=("engine",),
)
ENGINE_KV_USED = _gauge(
    "shoal_engine_kv_used_bytes",
    "Key/value cache in use.",
    labels=("engine",),
)
ENGINE_KV_CAPACITY = _gauge(
    "shoal_engine_kv_capacity_bytes",
    "Key/value cache that there is; 0 where the engine doesn't say.",
    labels=("engine",),
)
ENGINE_IDLE_WH = _gauge(
    "shoal_engine_idle_wh",
    "Watt-hours drawn while no request ran, since the running replicas began; 0 without a meter.",
    labels=("engine",),
)
ENGINE_CIRCUIT_OPEN = _gauge(
    "shoal_engine_circuit_open",
    "1 while an engine leaves its remote server alone because that server failed.",
    labels=("engine",),
)
BUDGET_USED = {
    resource: _gauge(
        f"shoal_budget_used_{resource}",
        f"{what} charged to a cap in its present window; what runs counts as held.",
        labels=("scope", "period"),
    )
    for resource, what in _RESOURCES.items()
}
BUDGET_REMAINING = {
    resource: _gauge(
        f"shoal_budget_remaining_{resource}",
        f"{what} left until a cap's window ends.",
        labels=("scope", "period"),
    )
    for resource, what in _RESOURCES.items()
}
BUDGET_USED_RATIO = _gauge(
    "shoal_budget_used_ratio",
    "Share of a cap that is used, 0 to 1.",
    labels=("scope", "period", "resource"),
)
BUDGET_ELAPSED_RATIO = _gauge(
    "shoal_budget_elapsed_ratio",
    "Share of a cap's window that is over, 0 to 1.",
    labels=("period",),
)

# Worked out from the ledger by one replica for all, every ten seconds or more.

TARGET_USED_RATIO = _gauge(
    "shoal_budget_target_used_ratio",
    "What a budgeted policy spent in its window, of what its target allows up to now.",
    labels=("policy", "resource"),
)
FEEDBACK_SCORE = _gauge(
    "shoal_feedback_score_ratio",
    "Mean score, 0 to 1, of the last 2,000 rated answers, by policy.",
    labels=("policy",),
)
FEEDBACK_ANSWERS = _gauge(
    "shoal_feedback_answers",
    "How many of the last 2,000 rated answers are the policy's.",
    labels=("policy",),
)
CALIBRATION_BIAS = _gauge(
    "shoal_router_calibration_bias_ratio",
    "Predicted quality minus users' score, mean of the last 2,000 rated answers.",
    labels=("policy",),
)
CALIBRATION_ERROR = _gauge(
    "shoal_router_calibration_error_ratio",
    "Expected calibration error over ten bins of predicted quality, of the same answers.",
    labels=("policy",),
)
CALIBRATION_ANSWERS = _gauge(
    "shoal_router_calibration_answers",
    "Rated answers whose quality the policy had predicted.",
    labels=("policy",),
)
_EFFECT = ("experiment", "arm", "metric")
EXPERIMENT_EFFECT = _gauge(
    "shoal_experiment_effect",
    "Estimated difference from the control, in the metric's unit.",
    labels=_EFFECT,
)
EXPERIMENT_EFFECT_LOW = _gauge(
    "shoal_experiment_effect_low",
    "Lower end of the always-valid interval of the effect.",
    labels=_EFFECT,
)
EXPERIMENT_EFFECT_HIGH = _gauge(
    "shoal_experiment_effect_high",
    "Upper end of the always-valid interval of the effect.",
    labels=_EFFECT,
)
EXPERIMENT_P = _gauge(
    "shoal_experiment_p",
    "Always-valid p-value of no effect.",
    labels=_EFFECT,
)
EXPERIMENT_UNITS = _gauge(
    "shoal_experiment_units",
    "Randomised units that an arm has.",
    labels=("experiment", "arm"),
)
EXPERIMENT_SAMPLE_RATIO = _gauge(
    "shoal_experiment_sample_ratio_p",
    "P-value of the planned split; below 0.001 it is broken.",
    labels=("experiment",),
)
EXPERIMENT_GUARDRAIL = _gauge(
    "shoal_experiment_guardrail_breached",
    "1 if an arm surely harms beyond the guardrail's limit.",
    labels=_EFFECT,
)
SHADOW_REQUESTS = _gauge(
    "shoal_shadow_mirrored_requests",
    "Requests that a shadow has answered too.",
    labels=("shadow",),
)
SHADOW_AGREEMENT = _gauge(
    "shoal_shadow_agreement_ratio",
    "Share of the shadow's answers that equal the served ones.",
    labels=("shadow",),
)
SHADOW_QUALITY = _gauge(
    "shoal_shadow_quality_ratio",
    "Mean score of the shadow's answers that a label could judge.",
    labels=("shadow",),
)
SHADOW_SERVED_QUALITY = _gauge(
    "shoal_shadow_served_quality_ratio",
    "Mean score of the served answers to the same requests.",
    labels=("shadow",),
)
REPORTS_AGE_S = _gauge(
    "shoal_reports_age_seconds",
    "Age of the figures on targets, feedback, calibration, experiments and shadows.",
)

FAMILIES = tuple(_ALL)
BY_NAME = {family.name: family for family in FAMILIES}
