"""What past traffic would have cost and been worth under a target, before anybody turns it on.

The controller goes through logged requests again, in order of time and by their clock: each with
the scores that a policy predicted for it, the plan that this policy chose, and what that cost. It
starts without experience, as on its first day. Where it takes another plan, the answer is taken to
be as long as the one there was, and members to cost what their logged answers cost over estimates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from policies.base import Decision, ModelFacts, Query
from policies.budget.controller import Controller
from policies.budget.prices import Resource
from policies.footprint import Cost, Footprint, estimate
from policies.plan import Plan, members

RESOURCES: tuple[Resource, ...] = get_args(Resource)
# A domain that gives up less predicted quality than this does not pay for anything.
_NOTHING = 0.0005
_MOST_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class PastRequest:
    """One logged request: when, its tokens, a policy's predictions, its plan and its cost."""

    time_s: float
    prompt_tokens: int
    output_tokens: int
    scores: Mapping[str, float]
    plan: Plan
    cost: Cost


@dataclass(kw_only=True)
class Sums:
    """Sums over requests: costs by resource and predicted quality, as it was and under the target.

    `num_fewer` would get fewer members, `num_cheaper` as many that cost less.
    """

    num_requests: int = 0
    num_fewer: int = 0
    num_cheaper: int = 0
    was: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RESOURCES, 0.0))
    under: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RESOURCES, 0.0))
    quality_was: float = 0.0
    quality_under: float = 0.0

    @property
    def lost(self) -> float:
        """Mean predicted quality given up."""
        return (self.quality_was - self.quality_under) / max(1, self.num_requests)

    def to_json(self) -> dict[str, Any]:
        """Return the sums as JSON data, with qualities as means."""
        count = max(1, self.num_requests)
        return {
            **vars(self),
            "quality_was": self.quality_was / count,
            "quality_under": self.quality_under / count,
        }


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What a target would have done: in all, by domain; and how many hours the traffic took."""

    total: Sums
    domains: Mapping[str, Sums]
    hours: float

    def sentence(self, targets: Sequence[object], resource: Resource) -> str:
        """Return in words what would have been different under `targets`, and who pays for it.

        Costs are told in `resource`.
        """
        total = self.total
        if not total.num_requests:
            return "No request here has a policy's predictions: there is nothing to simulate."
        was, under = total.was[resource], total.under[resource]
        change = under / was - 1 if was else 0.0
        means = total.to_json()
        better, worse = means["quality_was"], means["quality_under"]
        lost = sorted(self.domains.items(), key=lambda entry: -entry[1].lost)
        paying = [f"{name} (-{sums.lost:.3f})" for name, sums in lost if sums.lost > _NOTHING]
        return (
            f"Under {' and '.join(map(str, targets))} {_these(total.num_requests)} of "
            f"{self.hours:.2g} hours would "
            f"have cost {under:.4g} {resource} instead of {was:.4g} ({change:+.1%}), at a "
            f"predicted quality of {worse:.3f} instead of {better:.3f}: "
            f"{total.num_fewer / total.num_requests:.1%} of them would get fewer members, "
            f"{total.num_cheaper / total.num_requests:.1%} cheaper ones; "
            + f"{', '.join(paying[:_MOST_NAMED]) or 'no domain'} "
            + ("pay for it." if len(paying) > 1 else "pays for it.")
        )


def _these(num: int) -> str:
    return f"these {num:,} requests" if num > 1 else "this one request"


class Clock:
    """The time of the request that is played."""

    now_s = 0.0

    def __call__(self) -> float:
        """Return Unix time."""
        return self.now_s


def simulate(
    requests: Iterable[PastRequest],
    *,
    models: Mapping[str, ModelFacts],
    controller: Controller,
    clock: Clock,
    ratio_of: Callable[[str, Resource], float],
) -> Simulation:
    """Let `controller` decide `requests`, which come in order of time.

    `models` and `controller` go by `clock`; `ratio_of` says what a member's answers were logged to
    cost of a resource, over their estimates.
    """
    total, domains = Sums(), defaultdict[str, Sums](Sums)
    first_s = last_s = None
    for request in requests:
        clock.now_s = last_s = request.time_s
        first_s = request.time_s if first_s is None else first_s
        query = Query(text="", prompt_tokens=request.prompt_tokens)
        own = Decision(plan=request.plan, scores=dict(request.scores))
        chosen = controller.choose(query, own)
        was = {name: getattr(request.cost, name) for name in RESOURCES}
        under = was
        if chosen.plan != own.plan:
            found = estimate(
                chosen.plan,
                {name: models[name].rates for name in members(chosen.plan)},
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
            )
            names = members(chosen.plan)
            under = {
                resource: getattr(found, resource)
                * sum(ratio_of(name, resource) for name in names)
                / len(names)
                for resource in RESOURCES
            }
        controller.observe(query, chosen, Footprint(**under))
        best = max(request.scores, key=request.scores.__getitem__)
        tags = models[best].domains if best in models else ()
        fewer = len(members(chosen.plan)) < len(members(own.plan))
        cheaper = not fewer and any(under[name] < was[name] for name in RESOURCES)
        for sums in (total, domains[tags[0] if tags else best]):
            sums.num_requests += 1
            sums.num_fewer += fewer
            sums.num_cheaper += cheaper
            sums.quality_was += controller.quality(own)
            sums.quality_under += chosen.details["budget"]["quality"]
            for resource in RESOURCES:
                sums.was[resource] += was[resource]
                sums.under[resource] += under[resource]
    hours = 0.0 if first_s is None or last_s is None else (last_s - first_s) / 3600
    return Simulation(total=total, domains=dict(domains), hours=hours)
