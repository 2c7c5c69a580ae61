"""Plans without the models that a machine lacks: another stands in for each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from policies.base import Decision, ModelFacts, Policy, Query
from policies.footprint import Footprint
from policies.plan import Answer, Plan, children, with_parts


class StandIns(Policy):
    """Decides as `policy` does, and puts a model that is there in the place of one that is not."""

    def __init__(self, policy: Policy, names: Mapping[str, str]) -> None:
        """`names` says who stands in for whom."""
        self._policy = policy
        self._names = names

    def decide(self, query: Query) -> Decision:
        """Return the policy's decision, with its plan as it can run here."""
        decision = self._policy.decide(query)
        return replace(decision, plan=stand_in(decision.plan, self._names))

    def plans(self) -> Iterable[Plan]:
        """Return the policy's plans as they can run here."""
        return [stand_in(plan, self._names) for plan in self._policy.plans()]

    def settle(self, query: Query, decision: Decision, cost: Footprint) -> None:
        """Tell the policy."""
        self._policy.settle(query, decision, cost)


class StandInFacts(Mapping[str, ModelFacts]):
    """The models' facts; those of a model that is not there are its stand-in's.

    Those `left_out` are chosen by no policy that does not name them.
    """

    def __init__(
        self,
        models: Mapping[str, ModelFacts],
        names: Mapping[str, str],
        *,
        left_out: Collection[str] = (),
    ) -> None:
        self._models = models
        self._names = names
        self._left_out = frozenset(left_out)

    def __getitem__(self, name: str) -> ModelFacts:
        return self._models[self._names.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._models if name not in self._left_out)
        yield from self._names

    def __len__(self) -> int:
        return sum(1 for _ in self)


def stand_in(plan: Plan, names: Mapping[str, str]) -> Plan:
    """Return `plan` with its members renamed by `names`; what then stands there twice goes once."""
    if isinstance(plan, Answer):
        renamed = [names.get(name, name) for name in plan.members]
        kept = [i for i, name in enumerate(renamed) if name not in renamed[:i]]
        return replace(
            plan,
            members=tuple(renamed[i] for i in kept),
            weights=None if plan.weights is None else tuple(plan.weights[i] for i in kept),
        )
    changed = [stand_in(part, names) for part in children(plan)]
    return with_parts(plan, {i: p for i, p in enumerate(changed) if p not in changed[:i]})
