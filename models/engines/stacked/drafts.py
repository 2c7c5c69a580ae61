"""Drafts: tokens to come are guessed cheaply, and several of them are checked in one pass.

Decoding reads all weights for every token, and for one row as long as for several: so a request's
next tokens are guessed, by one of its engine's members or from what it has said before, and the
members that answer run them all at once (speculative decoding, Leviathan et al. 2023). Each token
is then drawn from its own distribution, as it would be without a draft: by the same number of the
request's generator, under the penalties and the grammar's state that the tokens before it make.
Where it is the one that was guessed, the next one stands as well; the first that is not ends the
step. So no draft changes any token, greedy or drawn, which Leviathan's own rule does not promise
for seeds: it accepts more often where guess and distribution differ, and as often where the guess
is sure (as from earlier text) or the answer is greedy. A drafting member draws by the same numbers,
so that two distributions that are alike mostly agree (Daliri et al. 2025 on such couplings).

How much is guessed follows what it brings: tokens by the share of guesses that were right lately,
per second as steps of one and of more rows took at the start (equation 1 and theorem 3.8 there).
Where that is no more than without, nothing is guessed for a while.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from models.engines.stacked.cache import PrefixCache
from models.engines.stacked.layout import Part, order_parts
from models.engines.stacked.runner import Runner
from models.engines.stacked.sequence import Sequence

logger = logging.getLogger(__name__)

_LENGTHS = (1, 2, 3, 4, 6, 8)
# What a draft must promise to be made: steps are not all alike.
_LEAST_GAIN = 1.05
# Before anything is known so many guesses count as right of so many; what was seen fades by this
# factor with each guess and each token without one, so that drafts are tried again.
_PRIOR_RIGHT, _PRIOR_TRIED, _FADING = 3.0, 4.0, 0.95
_NGRAM = 3


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step of one row of one member, of all members, and what more rows multiply."""

    one_s: float
    all_s: float
    num_members: int
    factors: Mapping[int, float]  # by rows of a member

    @classmethod
    def measured(cls, runner: Runner, num_members: int) -> StepCosts:
        """Run steps of one and of more tokens on made-up requests."""
        one_s, all_s = (
            min(runner.rehearse(range(n), (1,) * 8)[2:], default=1.0) for n in (1, num_members)
        )
        factors = {
            rows: min(runner.rehearse(range(1), (1, *[rows] * 4))[2:], default=one_s) / one_s
            for rows in (2, 4, 8, 16)
            if 5 * rows <= runner.architecture.context_tokens
        }
        return cls(one_s, all_s, num_members, {1: 1.0, **factors})

    def step_s(self, num_lanes: int, num_rows: float) -> float:
        """Return the seconds of a step of `num_lanes` members with so many rows each."""
        more = (num_lanes - 1) / max(self.num_members - 1, 1)
        return (self.one_s + more * (self.all_s - self.one_s)) * self._factor(num_rows)

    def _factor(self, num_rows: float) -> float:
        known = sorted(self.factors.items())
        for (low, before), (high, after) in pairwise(known):
            if num_rows <= high or high == known[-1][0]:
                return before + (after - before) * (num_rows - low) / (high - low)
        return 1.0


class Drafter(Protocol):
    """Guesses the next tokens of requests that decode."""

    def draft(self, wanted: Mapping[Sequence, int]) -> Mapping[Sequence, Seq[int]]:
        """Return guesses, at most as many as are wanted of each."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Free what is kept of a request."""
        ...

    def cost_s(self) -> float:
        """Return the seconds that one guess takes."""
        ...


@dataclass
class _Record:
    """How a request's drafts went, fading."""

    right: float = 0.0
    tried: float = 0.0

    @property
    def share(self) -> float:
        return (_PRIOR_RIGHT + self.right) / (_PRIOR_TRIED + self.tried)

    def fade(self) -> None:
        self.right, self.tried = self.right * _FADING, self.tried * _FADING


class Drafts:
    """Gives decoding requests their drafts, as long as each request's pays."""

    def __init__(self, drafter: Drafter, costs: StepCosts) -> None:
        self._drafter, self._costs = drafter, costs
        self._records: dict[Sequence, _Record] = {}
        self.num_drafted = 0
        self.num_accepted = 0

    def extend(self, parts: Seq[Part]) -> list[Part]:
        """Return `parts` with drafts after the tokens of those that decode."""
        decoding = [part.sequence for part in parts if _takes_drafts(part)]
        wanted = {
            sequence: length
            for sequence in decoding
            if (length := self._length(sequence, len(decoding)))
        }
        if not wanted:
            return list(parts)
        try:
            drafts = self._drafter.draft(wanted)
        except Exception:
            # Whoever made it fail fails in the step itself; others go on without.
            logger.exception("no drafts for a step")
            return list(parts)
        extended = []
        for part in parts:
            sequence, draft = part.sequence, tuple(drafts.get(part.sequence, ()))
            if draft and sequence.sampler.grammar is not None:
                draft = draft[: sequence.sampler.grammar.num_allowed(draft)]
            extended.append(Part(sequence, part.num_tokens + len(draft), draft))
        return order_parts(extended)

    def learn(self, part: Part, num_accepted: int) -> None:
        """Note how many guesses of a part were right."""
        self.num_drafted += len(part.draft)
        self.num_accepted += num_accepted
        if record := self._records.get(part.sequence):  # else it has just ended
            record.fade()
            record.right += num_accepted
            record.tried += min(num_accepted + 1, len(part.draft))

    def forget(self, sequence: Sequence) -> None:
        """Free what is kept of a request."""
        if self._records.pop(sequence, None) is not None:
            self._drafter.forget(sequence)

    def _length(self, sequence: Sequence, num_decoding: int) -> int:
        """Return how many tokens are worth guessing if others guess as many."""
        record = self._records.setdefault(sequence, _Record())
        most = sequence.max_new_tokens - sequence.num_generated - 1
        lanes, guess_s = sequence.num_lanes, self._drafter.cost_s()
        # Decoding requests share a member's rows; how evenly is not looked at.
        rows = max(1.0, num_decoding * lanes / self._costs.num_members)

        def tokens_per_s(length: int) -> float:
            expected = sum(record.share**i for i in range(length + 1))
            took_s = self._costs.step_s(lanes, rows * (1 + length)) + length * guess_s
            return expected / took_s

        lengths = [length for length in _LENGTHS if length <= most]
        best = max(lengths, key=tokens_per_s, default=0)
        if best and tokens_per_s(best) > _LEAST_GAIN * tokens_per_s(0):
            return best
        record.fade()
        return 0


class Ngrams:
    """Guesses what followed when the last tokens came before, in the prompt or the answer (Saxena
    2023, "Prompt lookup decoding"): for answers that copy, at no cost.
    """

    def __init__(self) -> None:
        # By request: where each n-gram was followed last, and how many tokens have been read.
        self._seen: dict[Sequence, tuple[dict[tuple[int, ...], int], int]] = {}

    def draft(self, wanted: Mapping[Sequence, int]) -> Mapping[Sequence, Seq[int]]:
        """See `Drafter`."""
        return {sequence: self._lookup(sequence, most) for sequence, most in wanted.items()}

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        self._seen.pop(sequence, None)

    def cost_s(self) -> float:
        """See `Drafter`."""
        return 0.0

    def _lookup(self, sequence: Sequence, most: int) -> Seq[int]:
        tokens = sequence.tokens
        places, num_read = self._seen.get(sequence, ({}, _NGRAM))
        for end in range(num_read, len(tokens)):
            places[tuple(tokens[end - _NGRAM : end])] = end
        self._seen[sequence] = places, max(len(tokens), _NGRAM)
        place = places.get(tuple(tokens[-_NGRAM:]))
        return () if place is None else tokens[place : place + most]


class MemberDrafts:
    """Guesses as one member says, on lanes of its own.

    A request's drafting lane is a `Sequence` as any other, which no reader sees: it follows the
    request's tokens, and runs ahead of them by its guesses.
    """

    def __init__(
        self,
        runner: Runner,
        prefixes: PrefixCache,
        member: int | None,
        *,
        guess_s: float,
        most: int,
    ) -> None:
        """Draft with `member` of `runner`, None: with the heaviest of each request.

        `prefixes` gives the lanes their rows, `most` tokens go through in one step.
        """
        self._runner, self._prefixes, self._member = runner, prefixes, member
        self._guess_s, self._most = guess_s, most
        self._lanes: dict[Sequence, Sequence | None] = {}  # None: there is no room

    def draft(self, wanted: Mapping[Sequence, int]) -> Mapping[Sequence, Seq[int]]:
        """See `Drafter`. A prompt that is new goes through first, a step at a time."""
        lanes = {s: lane for s in wanted if (lane := self._lane(s)) is not None}
        drafts: dict[Sequence, list[int]] = {s: [] for s in lanes}
        requests = {lane: s for s, lane in lanes.items()}
        behind = [lane for lane in requests if lane.num_pending > self._most]
        going = behind or list(requests)
        while going:
            parts = order_parts(
                Part(sequence=lane, num_tokens=min(lane.num_pending, self._most)) for lane in going
            )
            stepped = self._runner.step(parts)
            for part in parts:
                part.sequence.advance(part.num_tokens)
            if behind or stepped.drawn is None:
                break
            for lane, token in zip(stepped.sequences, stepped.drawn.token_ids, strict=True):
                sequence, draft = requests[lane], drafts[requests[lane]]
                draft.append(token)
                lane.tokens.append(token)
                grammar = sequence.sampler.grammar
                allowed = grammar is None or grammar.num_allowed(draft) == len(draft)
                if len(draft) == wanted[sequence] or not allowed:
                    going.remove(lane)
                else:
                    lane.sampler = sequence.sampler.after(draft)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        lane = self._lanes.pop(sequence, None)
        if lane is not None:
            self._prefixes.end(lane)

    def cost_s(self) -> float:
        """See `Drafter`."""
        return self._guess_s

    def _lane(self, sequence: Sequence) -> Sequence | None:
        """Return the lane that drafts for a request, brought to its tokens; None: there is none."""
        if sequence not in self._lanes:
            self._lanes[sequence] = self._started(sequence)
        lane = self._lanes[sequence]
        if lane is None:
            return None
        if lane.num_reused is None and not self._prefixes.begin(lane, lends=False):
            return None
        lane.follow(sequence)
        return lane

    def _started(self, sequence: Sequence) -> Sequence | None:
        if sequence.capacity_tokens > self._runner.architecture.context_tokens:
            return None
        weights = sequence.weights.values
        member = self._member
        if member is None:
            member = sequence.members[max(range(len(weights)), key=weights.__getitem__)]
        lane = sequence.alone(member)
        return lane if self._prefixes.admit(lane) else None


def _takes_drafts(part: Part) -> bool:
    """Whether a part decodes, and what it says of the next token depends on tokens alone.

    A lead that runs alone has its own way of computing less.
    """
    sequence = part.sequence
    return (
        part.num_tokens == 1
        and bool(part.drafts)
        and sequence.num_generated > 0
        and not sequence.lead_alone
        and sequence.scout is None
        and not sequence.reads_prompt
    )
