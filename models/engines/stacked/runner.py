"""Everything of one engine that lives on the device: weights, cache, and the step over both."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.adapter import Adapter
from models.card import ModelCard
from models.engines.base import GenerationRequest, SamplingOptions
from models.engines.stacked.adapters import read_factors, with_adapters
from models.engines.stacked.architecture import read_stack
from models.engines.stacked.cache import Arena
from models.engines.stacked.fusion import LaneWeights, fuse
from models.engines.stacked.graphs import DecodeGraphs, Record, record_cuda
from models.engines.stacked.layout import Part, Step, build_step, group_rows
from models.engines.stacked.lead import unsure_leads, with_leads
from models.engines.stacked.matrices import Pack
from models.engines.stacked.model import StackedModel
from models.engines.stacked.sampler import Draw, SamplerState, Scored, draw, score
from models.engines.stacked.sequence import Said, Sequence
from models.engines.stacked.threads import StepThreads
from models.engines.stacked.weights import Weights, load_weights
from models.engines.text import TextStream

# How many tokens' logits the evidence of a prompt holds at a time.
_EVIDENCE_TOKENS = 256


@dataclass(frozen=True)
class Stepped:
    """What a step tells: the tokens drawn of `sequences`, None where there are none; and what leads
    that are `unsure` said, [V], of whom nothing is drawn before the others were asked (see `lead`).

    After a draft a sequence has several, each drawn as if what the draft has before it were right.
    `logp_RV` is what they were drawn from, before any filter.
    """

    sequences: Seq[Sequence] = ()
    drawn: Draw | None = None
    logp_RV: Tensor | None = None
    unsure: Mapping[Sequence, Tensor] = field(default_factory=dict)


class Runner:
    """Runs steps. Calls may come from any thread, one at a time, within `torch.inference_mode`."""

    def __init__(
        self,
        cards: Seq[ModelCard],
        *,
        kv_memory_bytes: int,
        device: torch.device,
        dtype: torch.dtype,
        pack: Pack[Any],
        num_threads: int | None = None,
        record: Record | None = None,
        scouts: Runner | None = None,
    ) -> None:
        """Load the members' weights; on CPU compute with `num_threads` at most, or all of torch's.

        `scouts` runs leads of another shape. `pack` says how matrices are kept. Decoding steps are
        recorded by `record`; None: as CUDA graphs in bfloat16, else not at all.
        Raises `PoolError` for a checkpoint it cannot compute.
        """
        bases = [card for card in cards if card.adapter is None]
        self.architecture = read_stack(bases)
        self.arena = Arena(self.architecture.shape, kv_memory_bytes, device, dtype)
        if record is None and device.type == "cuda" and dtype == torch.bfloat16:
            record = record_cuda(device)  # grouped products of other types ask the device for sizes
        self._record = record
        weights = load_weights(bases, self.architecture, device, dtype, pack=pack)
        self._take(weights, StackedModel(self.architecture, weights))
        self._threads = StepThreads(num_threads, cards[0].parameters * dtype.itemsize)
        self._scouts = scouts
        self._device = device
        self._drawn: Draw | None = None

    def prepare(self, base: ModelCard, adapters: Mapping[int, Adapter]) -> Callable[[], None]:
        """Read adapters of the `base`, which are to be these members; return what puts them in.

        This takes as long as reading takes, on any thread; that is to be called between two steps,
        and takes none.
        """
        factors = {
            member: read_factors(adapter, base, self.architecture)
            for member, adapter in adapters.items()
        }
        weights = with_adapters(self._weights, factors)
        return partial(self._take, weights, StackedModel(self.architecture, weights))

    def _take(self, weights: Weights[Any], model: StackedModel) -> None:
        """Compute with `weights` from the next step on, by their `model`."""
        self._weights, self._model = weights, model
        self._num_members = len(weights.final_gain_MD)
        self._graphs: DecodeGraphs | None = None
        if self._record is not None:
            self._graphs = DecodeGraphs(
                self._model, self.arena, num_members=self._num_members, record=self._record
            )
        self._step: Step | None = None

    def step(self, parts: Seq[Part]) -> Stepped:
        """Run `parts` and draw the next token of those that are through what they had to run.

        Writes the cache; changes no sequence but its weights, where these follow evidence. A step
        that raises can be run again, also in parts.
        """
        step = self._step_of(parts)
        self._step = None  # until this step has succeeded
        weights = [part.sequence.weights for part in parts]
        try:
            with self._threads.step(step.layout.rows.num_members, step.num_rows):
                return self._run(step)
        except Exception:
            for part, before in zip(parts, weights, strict=True):
                part.sequence.weights = before
            raise

    def _run(self, step: Step) -> Stepped:
        sampling = [part.sequence for part in step.parts for _ in part.drafts]
        states = [part.sequence.sampler.after(d) for part in step.parts for d in part.drafts]
        logits_LV = self._graphs.logits(step) if self._graphs else None
        if logits_LV is None:
            hidden_ND = self._model.forward(step.layout, self.arena)
            self._hear_prompts(step, hidden_ND)
            if not sampling:
                return Stepped()
            if step.sampled_rows_L is not None:
                hidden_ND = hidden_ND.index_select(0, step.sampled_rows_L)
            _keep_states(sampling, hidden_ND, step.lanes_R)
            logits_LV = self._model.logits(hidden_ND, step.lanes)
        logp_LV, lanes_R = logits_LV.log_softmax(-1), step.lanes_R
        leads: list[Said | None] = []
        unsure: dict[Sequence, Tensor] = {}
        if any(sequence.lead_alone or sequence.said for sequence in sampling):
            leads = [said for part in step.parts for said in _leads_of(part)]
            logp_LV, lanes_R = with_leads(logp_LV, lanes_R, leads)
            unsure = unsure_leads(logp_LV, lanes_R, sampling)
            sure = [r for r, sequence in enumerate(sampling) if sequence not in unsure]
            lanes_R, sampling = [lanes_R[r] for r in sure], [sampling[r] for r in sure]
            states = [states[r] for r in sure]
        if not sampling:
            return Stepped(unsure=unsure)
        logp_RV = fuse(logp_LV, lanes_R, [sequence.fusion for sequence in sampling])
        drawn = draw(logp_RV, states)
        _weigh_answers(sampling, logp_LV, lanes_R, drawn.token_ids)
        if not unsure and not any(leads):
            # The same lanes may go on.
            self._step, self._drawn = step, drawn
        return Stepped(sampling, drawn, logp_RV, unsure)

    def try_out(self) -> None:
        """Run one prefill and one decoding step of all members; raises what they raise.

        First-use costs are paid then.
        """
        self.rehearse(range(self._num_members), (2, 1))

    def rehearse(self, members: range, chunks: Seq[int]) -> list[float]:
        """Run a made-up request in steps of so many tokens; return the seconds of each.

        The first is its prompt, each other decodes one token, with a draft of the rest. Empty where
        the cache has no room for it.
        """
        options, tokens = SamplingOptions(), [0] * chunks[0]
        sequence = Sequence(
            request=GenerationRequest(
                request_id="warm-up", prompt_tokens=tuple(tokens), members=(), sampling=options
            ),
            members=tuple(members),
            weights=LaneWeights((1 / len(members),) * len(members)),
            lane_of=tuple(range(len(members))),
            end_tokens=frozenset(),
            tokens=tokens,
            max_new_tokens=sum(chunks[1:]) + 1,
            sampler=SamplerState(options, None, random.Random(0)),
            text=TextStream(()),
            send=lambda outcome: None,  # noqa: ARG005 - nobody reads it
        )
        sequence.region_start = self.arena.allocate(sequence.num_rows)
        if sequence.region_start is None:
            return []
        took_s = []
        try:
            for num_tokens in chunks:
                draft = (0,) * (num_tokens - sequence.num_pending)
                started_s = time.perf_counter()
                stepped = self.step([Part(sequence=sequence, num_tokens=num_tokens, draft=draft)])
                took_s.append(time.perf_counter() - started_s)
                sequence.num_cached += num_tokens
                sequence.tokens += stepped.drawn.token_ids if stepped.drawn else ()
        finally:
            self.arena.release(sequence.region_start, sequence.num_rows)
            self._step = None
        return took_s

    def _hear_prompts(self, step: Step, hidden_ND: Tensor) -> None:
        """Weigh and score this step's prompt tokens for who asked for it.

        What the lanes say of a token sets the weights from the next one on. So a prompt's
        probability under evidence at temperature 1 is the members' own, each whole, mixed by the
        prior. What a scout makes of a prompt waits for those whom it leads, who say the rest.
        """
        for sequence, hidden_KTD, targets in self._read(step, hidden_ND):
            if sequence.follows is not None:
                sequence.keep_prompt(hidden_KTD[0])
                continue
            num_top = sequence.sampler.options.prompt_logprobs
            slices = []
            for logp_nV, ids in self._told(sequence, hidden_KTD, targets):
                said_n1 = logp_nV.gather(1, ids.repeat(len(logp_nV) // len(ids))[:, None])
                said_TK = said_n1.view(-1, len(ids)).T.double().cpu()
                if num_top is None:
                    totals = said_TK.sum(0).tolist()
                    sequence.weights = sequence.weights.heard(totals, len(ids))
                    continue
                fusions = []
                for said in said_TK.tolist():
                    fusions.append(sequence.fusion)
                    if sequence.weights.evidence is not None:
                        sequence.weights = sequence.weights.heard(said, 1)
                # Row k * T + t is what lane k says of token t.
                lanes_T = [range(t, len(logp_nV), len(ids)) for t in range(len(ids))]
                slices.append(score(fuse(logp_nV, lanes_T, fusions), ids.tolist(), num_top))
            if num_top is not None:
                sequence.scored = Scored(
                    logprobs=[logprob for one in slices for logprob in one.logprobs],
                    top=[top for one in slices for top in one.top],
                )

    def _read(self, step: Step, hidden_ND: Tensor) -> Iterator[tuple[Sequence, Tensor, Seq[int]]]:
        """Yield each part's sequence that reads its prompt, its lanes' hidden states, [K, T, D].

        And the prompt's tokens that follow: the hidden state of each prompt token but the last says
        what its lane thought of the next.
        """
        next_row, order = 0, step.layout.order
        for part in step.parts:
            first_row, next_row = next_row, next_row + part.num_rows
            sequence = part.sequence
            start = sequence.num_cached + 1
            targets = sequence.request.prompt_tokens[start : start + part.num_tokens]
            if not targets or not sequence.reads_prompt:
                continue
            rows_n = torch.arange(first_row, next_row, device=self._device)
            if order is not None:
                rows_n = order.to_requests_N[rows_n]
            yield sequence, hidden_ND[rows_n].view(sequence.num_lanes, part.num_tokens, -1), targets

    def _told(
        self, sequence: Sequence, hidden_KTD: Tensor, targets: Seq[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the lanes say of `targets`, lane by lane, [K * T, V], and the targets, [T].

        A scout's come first. A slice at a time, to bound memory.
        """
        leading: Iterator[tuple[Tensor, Tensor]] | None = None
        if self._scouts is not None and sequence.scout is not None:
            its_TD = sequence.scout.prompt_TD
            assert its_TD is not None, "a scout reads before those whom it leads"
            its_1TD = its_TD[None, sequence.num_cached :]
            leading = self._scouts._told(sequence.scout, its_1TD, targets)
        for start in range(0, len(targets), _EVIDENCE_TOKENS):
            ids = torch.tensor(targets[start : start + _EVIDENCE_TOKENS], device=self._device)
            hidden_nD = hidden_KTD[:, start : start + len(ids)].flatten(0, 1)
            lanes = group_rows(sequence.members, len(ids), self._num_members, self._device)
            logp_nV = self._model.logits(hidden_nD, lanes).log_softmax(-1)
            if leading is not None:
                logp_nV = torch.cat([next(leading)[0], logp_nV])
            yield logp_nV, ids

    def _step_of(self, parts: Seq[Part]) -> Step:
        step = self._step
        if (
            step is not None
            and self._drawn is not None
            and step.continues(parts, self._drawn.token_ids)
            and step.advance(self._drawn.tokens_R)
        ):
            return step
        return build_step(
            parts,
            num_members=self._num_members,
            row_bytes=self.arena.row_bytes // self.architecture.shape.num_layers,
            device=self._device,
        )


def _leads_of(part: Part) -> Seq[Said | None]:
    """Return for each token that a part draws what a lead has said of it, if it has one."""
    num_drawn = len(part.drafts)
    return part.sequence.said[:num_drawn] or [None] * num_drawn


def _keep_states(sampling: Seq[Sequence], hidden_LD: Tensor, lanes_R: Seq[Seq[int]]) -> None:
    """Keep what the last layer made of the end of a prompt that is to be scored.

    Of those whom a scout leads, of another width, only the scout's.
    """
    for sequence, lanes in zip(sampling, lanes_R, strict=True):
        scores = sequence.sampler.options.prompt_logprobs is not None
        if scores and not sequence.num_generated and sequence.scout is None:
            (sequence.follows or sequence).state_KD = hidden_LD[list(lanes)].float().cpu().numpy()


def _weigh_answers(
    sampling: Seq[Sequence], logp_LV: Tensor, lanes_R: Seq[Seq[int]], token_ids: Seq[int]
) -> None:
    """Add what each lane thought of the drawn tokens to the evidence that goes on with them."""
    for sequence, lanes, token in zip(sampling, lanes_R, token_ids, strict=True):
        evidence = sequence.weights.evidence
        if evidence is not None and evidence.update:
            sequence.weights = sequence.weights.heard(logp_LV[list(lanes), token].tolist(), 1)
