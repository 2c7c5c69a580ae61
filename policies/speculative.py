"""A cascade token by token: a small model writes where it is sure, a larger one where it is not.

FrugalGPT's cascade (`frugal`) judges whole answers, and throws away those it does not accept. Here
each token is deferred on its own (Narasimhan et al. 2025, "Faster Cascades via Speculative
Decoding", by Chow's rule), so that the larger model corrects an answer where it would go wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Annotated, Any

from pydantic import Field

from policies.base import Decision, Policy, Query
from policies.errors import PolicyError
from policies.kinds import Settings
from policies.plan import Answer, Name, Plan, Probability
from policies.registry import BuildContext, PolicyKind


class Speculative(Policy):
    """Lets one of `leads` write, and `base` where its likeliest token is less likely than `gate`.

    Of several leads `router` chooses; what it gives to another model goes there. Raises
    `PolicyError` for several without a router, and for a base that leads.
    """

    def __init__(
        self, leads: Iterable[str], base: str, *, gate: float, router: Policy | None = None
    ) -> None:
        names = tuple(leads)
        if base in names:
            raise PolicyError(f"speculative.leads: {base!r} is the base, which cannot lead itself")
        self._router = router
        self._led = {
            lead: Answer(members=(lead, base), weights=(0.0, 1.0), rule="gated", gate=gate)
            for lead in names
        }
        if router is None and len(self._led) != 1:
            raise PolicyError("speculative.router is missing; several leads need one")
        self._reason = f"{base} where it is less sure of a token than {gate:g}"

    def decide(self, query: Query) -> Decision:
        """Return the plan for `query`."""
        if self._router is None:
            [(lead, plan)] = self._led.items()
            return Decision(plan=plan, reason=f"{lead}, and {self._reason}")
        routed = self._router.decide(query)
        match routed.plan:
            case Answer(members=(lead,)) if lead in self._led:
                reason = f"{routed.reason}; {self._reason}"
                return replace(routed, plan=self._led[lead], reason=reason, limited=False)
        return routed

    def plans(self) -> Iterable[Plan]:
        """Return every lead's plan, and the router's own."""
        return chain(self._led.values(), () if self._router is None else self._router.plans())


class SpeculativeSettings(Settings):
    """`router` is the specification of what chooses among `leads`."""

    leads: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)]
    base: Name
    gate: Probability = 0.9
    router: Mapping[str, Any] | None = None


def _build(settings: SpeculativeSettings, context: BuildContext) -> Policy:
    router = None if settings.router is None else context.nested(settings.router)
    return Speculative(settings.leads, settings.base, gate=settings.gate, router=router)


KIND = PolicyKind(settings=SpeculativeSettings, build=_build)
