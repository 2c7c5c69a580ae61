"""The arithmetic of budgets: reserve the estimate, settle to what was used. Pure: no clock, no I/O.

A request is admitted when, in every window that counts it, what is spent, what other requests in
flight hold and its own estimate together fit the cap. Estimates of tokens and USD are upper bounds
(`max_tokens`, every stage of a cascade), so those caps are never exceeded. Energy and carbon are
measured, and may come out above their estimates; so

- open estimates count with the factor by which the window's settled requests exceeded theirs;
- the factor never refuses a request that is alone in flight and whose own estimate fits.

A cap is therefore exceeded by at most one request's estimation error, once estimates are off by a
steady factor, and no budget that an estimate fits into stays unused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from router.access.limits import NOTHING, RESOURCES, Amounts, Limit


@dataclass(frozen=True, kw_only=True)
class Tally:
    """One window's state. `estimated` is what the requests that make up `spent` had held."""

    spent: Amounts = NOTHING
    held: Amounts = NOTHING
    estimated: Amounts = NOTHING


@dataclass(frozen=True, kw_only=True)
class Hold:
    """What one request in flight holds in the windows named, until it settles or expires.

    `holder` is the replica that runs it and renews it. A `lapsed` hold has expired and given back
    what it held; it is remembered because its request may be alive after all, and settle late:
    to no effect if it has no windows any more, being settled from the ledger.
    """

    request_id: str
    holder: str
    amounts: Amounts
    windows: tuple[str, ...]
    expires_s: float
    lapsed: bool = False


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """The first limit that a request does not fit, with what is spent there and what it needs.

    `final` is True when it would not fit even if everything in flight came to nothing.
    """

    limit: Limit
    spent: int
    needed: int
    final: bool


class Book:
    """The tallies and holds that a transaction works on. Values are replaced, never changed."""

    def __init__(self, tallies: Mapping[str, Tally], holds: Mapping[str, Hold]) -> None:
        self.tallies = dict(tallies)
        self.holds = dict(holds)

    def reserve(self, hold: Hold, limits: Sequence[Limit]) -> Shortage | None:
        """Admit `hold`, or say which of `limits` it does not fit; a final shortage comes first.

        Holds nothing in case of a shortage. A hold that is there already is admitted as it is.
        """
        if hold.request_id in self.holds:
            return None
        short = [found for limit in limits if (found := self._shortage(hold.amounts, limit))]
        if short:
            return min(short, key=lambda shortage: not shortage.final)
        self.holds[hold.request_id] = hold
        for name in hold.windows:
            tally = self.tallies[name]
            self.tallies[name] = replace(tally, held=tally.held.plus(hold.amounts))
        return None

    def settle(self, request_id: str, used: Amounts) -> bool:
        """Turn a hold into what was used, in the windows that admitted it.

        Returns False, and changes nothing, where there is no such hold: it was settled before, or
        never committed. One that was settled from the ledger is known, and changes nothing.
        """
        hold = self.holds.pop(request_id, None)
        if hold is None:
            return False
        for name in hold.windows:
            tally = self.tallies.get(name)
            if tally is None:  # the window ended long ago and is forgotten
                continue
            self.tallies[name] = Tally(
                spent=tally.spent.plus(used),
                held=tally.held if hold.lapsed else tally.held.minus(hold.amounts),
                estimated=tally.estimated.plus(hold.amounts),
            )
        return True

    def charge(self, windows: Sequence[str], used: Amounts) -> None:
        """Add what a request used whose hold is lost to the `windows` that admitted it."""
        for name in windows:
            tally = self.tallies.get(name)
            if tally is not None:
                self.tallies[name] = replace(
                    tally, spent=tally.spent.plus(used), estimated=tally.estimated.plus(used)
                )

    def lapse(self, now_s: float, recorded: Mapping[str, Amounts]) -> None:
        """Give back what holds past their expiry held.

        `recorded` is what the ledger knows to have been used: where the replica died between
        recording a request and settling it, that is charged.
        """
        for hold in list(self.holds.values()):
            if hold.lapsed or hold.expires_s > now_s:
                continue
            if hold.request_id in recorded:
                self.settle(hold.request_id, recorded[hold.request_id])
                # Remembered, so that its replica, should it live after all, finds it settled.
                self.holds[hold.request_id] = replace(hold, lapsed=True, windows=())
                continue
            self.holds[hold.request_id] = replace(hold, lapsed=True)
            for name in hold.windows:
                tally = self.tallies.get(name)
                if tally is not None:
                    self.tallies[name] = replace(tally, held=tally.held.minus(hold.amounts))

    def remaining(self, limit: Limit) -> int:
        """Return what is neither spent nor held under `limit`; never negative."""
        tally, i = self.tallies[limit.window.id], RESOURCES.index(limit.cap.resource)
        return max(0, limit.cap.limit - tally.spent[i] - tally.held[i])

    def _shortage(self, amounts: Amounts, limit: Limit) -> Shortage | None:
        tally, i = self.tallies[limit.window.id], RESOURCES.index(limit.cap.resource)
        cap, needed = limit.cap.limit, amounts[i]
        spent, held, estimated = tally.spent[i], tally.held[i], tally.estimated[i]
        if spent + needed > cap:
            return Shortage(limit=limit, spent=spent, needed=needed, final=True)
        in_flight = held + needed
        if held and estimated:
            # integers: in_flight * max(1, spent / estimated), rounded up
            in_flight = -(-in_flight * max(spent, estimated) // estimated)
        if spent + in_flight > cap:
            return Shortage(limit=limit, spent=spent, needed=needed, final=False)
        return None
