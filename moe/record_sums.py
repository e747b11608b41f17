"""What a recorder adds up: the decisions of L layers, reduced on their device into tensors of fixed shape.

Nothing here waits for the device. Counts are of every token; what looks into logits and scores is of a sample of
tokens, drawn by place and not by content. Decisions are kept as they are until a window ends or ``HELD_BYTES`` or
``HELD_DECISIONS`` of them have come, and those of equal shape are reduced together: a small operation between large
ones runs from cold caches and costs many times its work, so the fewer the better.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict

import torch
from torch import Tensor

from ..routers.base import Routing
from .layer import _runs
from .record_log import ACTIVE, MARGIN_EDGES, POSITIONS

BINS = len(MARGIN_EDGES) - 1
SUBSETS = 8
HELD_BYTES = 8 << 20
HELD_DECISIONS = 1024  # small ones are many before they are large, and each costs Python objects


@dataclasses.dataclass(frozen=True)
class Bank:
    """Which of a layer's expert ids are loaded: ``routed``, of ``size``. ``always``: whether every real token can take
    one of them."""

    routed: tuple[int, ...]
    size: int
    always: bool = True

    @property
    def whole(self) -> bool:
        return len(self.routed) == self.size

    @functools.cached_property
    def stretches(self) -> list[tuple[int, int]]:
        """The routed ids as first and last of each stretch without a gap."""
        return _runs(list(self.routed))

    def columns(self, values: Tensor) -> Tensor:
        """[..., size] -> [..., E]: those of the routed experts."""
        if self.whole:
            return values
        parts = [values[..., first : last + 1] for first, last in self.stretches]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def holds(self, ids: Tensor) -> Tensor:
        """Which ids are those of routed experts. [...] -> [...] bool"""
        if self.whole:
            return ids >= 0
        return torch.stack([(ids >= first) & (ids <= last) for first, last in self.stretches]).any(0)


@dataclasses.dataclass
class _Seen:
    """One layer's decision in one forward: what is counted, and the sampled rows. ``counts``: of the routed experts,
    where the layer counted them, else ``load`` is to be counted. ``eligible``: which tokens can take a routed expert,
    where not every real one can."""

    tokens: int
    length: int
    counts: Tensor | None
    load: Tensor | None
    requested: Tensor | None
    kept: Tensor | None
    real: Tensor | None
    eligible: Tensor | None
    sigmoid: bool
    chosen: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None
    valid: Tensor | None = None
    mask: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        return (
            self.counts,
            self.load,
            self.requested,
            self.kept,
            self.real,
            self.eligible,
            self.valid,
            self.chosen,
            self.logits,
            self.scores,
        )

    @property
    def shapes(self) -> tuple:
        """Decisions with equal ones are reduced together."""
        kinds = ((part.shape, part.dtype, part.device) if part is not None else None for part in self.parts)
        return (*kinds, self.tokens, self.length, self.sigmoid)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)


class RoutingSums:
    """
    Args:
        banks: one a layer.
        sample: tokens of a layer and forward that are looked at closely; 0 = all.

    Attributes:
        look_closely: whether the next forwards are looked at, or counted alone.
        with_structure: whether it is added up which experts their tokens have together.
    """

    def __init__(self, banks: list[Bank], sample: int) -> None:
        self.banks, self.sample = banks, sample
        self.experts = max((len(bank.routed) for bank in banks), default=0)
        self.sums: dict[str, Tensor] = {}
        self.loss_keys: list[tuple[int, str]] = []
        self.losses: Tensor | None = None
        self.structure: dict[str, Tensor] = {}
        self.look_closely = True
        self.with_structure = False
        self._seen: dict[int, _Seen] = {}
        self._held: list[tuple[int, _Seen]] = []
        self._held_bytes = 0
        self._pending_losses: list[tuple[tuple[int, str], Tensor]] = []
        self._cache: dict[tuple, Tensor] = {}
        self._turn = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        layers = len(self.banks)
        vectors = ("tokens", "sampled", "entropy_sum", "mass_sum", "z_sum", "logit_square_sum")
        return {name: (layers,) for name in vectors} | {
            "counts": (layers, self.experts),
            "dropped": (layers, self.experts),
            "score_sum": (layers, self.experts),
            "margin_histogram": (layers, BINS),
            "active_histogram": (layers, ACTIVE),
            "drops": (layers, POSITIONS, 2),
        }

    def allocate(self, device: torch.device) -> None:
        """Makes the tensors, all 0, where there are none yet."""
        if not self.sums:
            self.sums = {name: torch.zeros(s, dtype=torch.float64, device=device) for name, s in self.shapes().items()}

    def allocate_structure(self, device: torch.device) -> None:
        if not self.structure:
            layers, square = len(self.banks), (self.experts, self.experts)
            made = {"coactivation": (layers, *square), "flow": (max(0, layers - 1), *square)}
            self.structure = {n: torch.zeros(s, dtype=torch.float64, device=device) for n, s in made.items()}

    def clear(self) -> None:
        """Begins a new window."""
        for value in self.sums.values():
            value.zero_()
        self.loss_keys, self.losses = [], None

    def add(
        self,
        layer: int,
        routing: Routing,
        real_T: Tensor | None,
        length: int,
        *,
        counts_E: Tensor | None = None,
        sigmoid: bool = False,
    ) -> None:
        """Takes a layer's decision in a training forward.

        Args:
            real_T: [T] True = a token, False = padding; None = all are tokens.
            length: of a sequence; T is a multiple.
            counts_E: assignments of each routed expert, where the layer counted them.
            sigmoid: whether scores that the routing lacks are shares of sigmoids of its logits, not a softmax.
        """
        if layer in self._seen:
            # another forward: a micro-batch, or a layer that runs twice
            self.end_forward()
        bank = self.banks[layer]
        if routing.selected is not None or routing.dispatch is not None:
            counts_E = None  # what is computed is not the load
        load = self._load(routing) if counts_E is None else None
        if not self.sums:
            self.allocate((load if counts_E is None else counts_E).device)
        able = None
        if not bank.always and routing.scores is not None:
            able = bank.columns(routing.scores.detach()).sum(-1) > 0
        seen = self._seen[layer] = _Seen(
            tokens=routing.num_tokens,
            length=length,
            counts=counts_E,
            load=load,
            requested=routing.requested,
            kept=None if routing.requested is None else routing.index,
            real=real_T,
            eligible=able,
            sigmoid=sigmoid,
        )
        if self.look_closely and (routing.logits is not None or routing.scores is not None):
            self._look(seen, routing, bank)
        if self.with_structure:
            seen.mask = self._chosen(routing, bank.size)
        for name, value in routing.losses.items():
            self._pending_losses.append(((layer, name), value.detach()))

    @torch.no_grad()
    def _look(self, seen: _Seen, routing: Routing, bank: Bank) -> None:
        """Takes the sampled tokens' rows."""
        values = routing.logits if routing.logits is not None else routing.scores
        rows = self._rows(routing.num_tokens, values.device)

        def sampled(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            values = values.detach() if rows is None else values.detach().index_select(0, rows)
            return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values

        ids = routing.index if routing.selected is None else None
        seen.chosen = sampled(self._chosen(routing, bank.size) if ids is None else ids)
        seen.valid = sampled(seen.real)
        if routing.logits is not None:
            seen.logits = bank.columns(sampled(routing.logits))
        if routing.scores is not None:
            seen.scores = bank.columns(sampled(routing.scores))

    def _rows(self, tokens: int, device: torch.device) -> Tensor | None:
        """The sampled tokens: by turns one of several random subsets, so that none follows the sequences' length."""
        if not self.sample or tokens <= self.sample:
            return None
        self._turn += 1
        turn = self._turn % SUBSETS
        if ("rows", tokens, device, turn) not in self._cache:
            generator = torch.Generator().manual_seed(turn)
            for number in range(SUBSETS):
                rows = torch.randperm(tokens, generator=generator)[: self.sample].sort().values
                self._cache["rows", tokens, device, number] = rows.to(device)
        return self._cache["rows", tokens, device, turn]

    def _load(self, routing: Routing) -> Tensor:
        """[T, K] or [N] ids to be counted with those of other layers, or already [E] counts."""
        if routing.selected is None and routing.dispatch is None:
            return routing.expert if routing.index is None else routing.index
        return routing.load_E().double()

    def _chosen(self, routing: Routing, size: int) -> Tensor:
        """[T, size] bool: which experts each token has."""
        if routing.selected is not None:
            return routing.selected
        if routing.index is not None:
            return _mask(routing.index, size)
        if routing.dispatch is not None:
            return torch.ones(routing.num_tokens, size, dtype=torch.bool, device=routing.dispatch.device)
        cells = torch.zeros(routing.num_tokens * size, dtype=torch.bool, device=routing.expert.device)
        return cells.index_fill_(0, routing.token * size + routing.expert, True).view(-1, size)

    def _add_drops(self, layers: list[int], seen: list[_Seen], bank: Bank) -> None:
        """Dropped and requested assignments by sixteenth of the sequence."""
        tokens, length, device = seen[0].tokens, seen[0].length, seen[0].kept.device
        key = ("place", tokens, length, device)
        if key not in self._cache:
            self._cache[key] = torch.arange(tokens, device=device) % length * POSITIONS // length
        asked_GT, kept_GT = (
            bank.holds(torch.stack(ids)).sum(-1) for ids in ([s.requested for s in seen], [s.kept for s in seen])
        )
        both_GT2 = torch.stack([asked_GT - kept_GT, asked_GT], -1).double()
        drops_GP2 = both_GT2.new_zeros(len(seen), POSITIONS, 2).index_add_(1, self._cache[key], both_GT2)
        self._add("drops", layers, drops_GP2)

    @torch.no_grad()
    def end_forward(self) -> None:
        """No decision of another forward belongs to those that came."""
        if self.with_structure and self._seen:
            self._add_structure()
        self._held += self._seen.items()
        self._held_bytes += sum(seen.nbytes for seen in self._seen.values())
        self._seen.clear()
        if self._held_bytes > HELD_BYTES or len(self._held) > HELD_DECISIONS:
            self.reduce()

    @torch.no_grad()
    def reduce(self) -> None:
        """Adds up what has come."""
        if self._seen:
            self.end_forward()
        groups: dict[tuple, list[tuple[int, _Seen]]] = defaultdict(list)
        for layer, seen in self._held:
            groups[seen.shapes, self.banks[layer]].append((layer, seen))
        self._held, self._held_bytes = [], 0
        for group in groups.values():
            self._reduce_group([layer for layer, _ in group], [seen for _, seen in group])
        if self._pending_losses:
            self._add_losses()

    def _reduce_group(self, layers: list[int], seen: list[_Seen]) -> None:
        bank = self.banks[layers[0]]
        if seen[0].counts is not None:
            counts = torch.stack([s.counts for s in seen]).double()
        else:
            counts = self._counts([s.load for s in seen], bank)
        self._add("counts", layers, counts)
        if seen[0].requested is not None:
            self._add("dropped", layers, self._counts([s.requested for s in seen], bank) - counts)
            if seen[0].kept is not None:
                self._add_drops(layers, seen, bank)
        self._add_tokens(layers, seen, bank)
        if seen[0].chosen is not None:
            self._sum_sample(layers, seen, bank)

    def _add_tokens(self, layers: list[int], seen: list[_Seen], bank: Bank) -> None:
        """How many tokens can take a routed expert."""
        taking_GT = None if seen[0].real is None else torch.stack([s.real for s in seen])
        if seen[0].eligible is not None:
            able_GT = torch.stack([s.eligible for s in seen])
            taking_GT = able_GT if taking_GT is None else able_GT & taking_GT
        if taking_GT is not None:
            self._add("tokens", layers, taking_GT.sum(-1))
        else:
            self._add("tokens", layers, self._ones(self._rows_of(layers)) * seen[0].tokens)

    def _counts(self, loads: list[Tensor], bank: Bank) -> Tensor:
        """[G, E] of ids, or of load as it is."""
        load = torch.stack(loads)
        if load.is_floating_point():
            return bank.columns(load)
        ids = load.flatten(1)
        counts = torch.zeros(len(ids), bank.size + 1, dtype=torch.float64, device=ids.device)
        counts.scatter_add_(1, torch.where(ids < 0, bank.size, ids), self._ones(ids))
        return bank.columns(counts[:, : bank.size])

    def _ones(self, like: Tensor) -> Tensor:
        key = ("one", like.device)
        if key not in self._cache:
            self._cache[key] = torch.ones((), dtype=torch.float64, device=like.device)
        return self._cache[key].expand(like.shape)

    def _sum_sample(self, layers: list[int], seen: list[_Seen], bank: Bank) -> None:
        """Sums over the sampled tokens n of a group of layers."""
        chosen = torch.stack([s.chosen for s in seen])
        chosen_GnE = bank.columns(chosen if chosen.dtype == torch.bool else _mask(chosen, bank.size))
        valid_Gn = None if seen[0].valid is None else torch.stack([s.valid for s in seen])
        z_GnE = None if seen[0].logits is None else torch.stack([s.logits for s in seen])
        if seen[0].scores is not None:
            s_GnE = torch.stack([s.scores for s in seen])
            if not bank.whole:
                sum_Gn1 = s_GnE.sum(-1, keepdim=True)
                some_Gn = sum_Gn1[..., 0] > 0
                valid_Gn = some_Gn if valid_Gn is None else valid_Gn & some_Gn
                s_GnE = s_GnE / sum_Gn1.masked_fill(sum_Gn1 == 0, 1)
        elif seen[0].sigmoid:
            s_GnE = z_GnE.sigmoid()
            s_GnE = s_GnE / s_GnE.sum(-1, keepdim=True).clamp(min=torch.finfo(s_GnE.dtype).tiny)
        else:
            s_GnE = z_GnE.softmax(-1)

        tiny = torch.finfo(s_GnE.dtype).tiny
        per_token = [
            torch.ones_like(s_GnE[..., 0]),
            -(s_GnE * s_GnE.clamp(min=tiny).log()).sum(-1),
            (s_GnE * chosen_GnE).sum(-1),
        ]
        names = ["sampled", "entropy_sum", "mass_sum"]
        if z_GnE is not None:
            finite_GnE = z_GnE.isfinite()
            z0_GnE = z_GnE.masked_fill(~finite_GnE, 0)
            number_Gn = finite_GnE.sum(-1)
            per_token += [z_GnE.logsumexp(-1).square(), z0_GnE.square().sum(-1) / number_Gn]
            names += ["z_sum", "logit_square_sum"]
            centred_GnE = (z0_GnE - (z0_GnE.sum(-1) / number_Gn)[..., None]).masked_fill(~finite_GnE, 0)
            deviation_Gn = (centred_GnE.square().sum(-1) / number_Gn).sqrt()
            self._add_margins(layers, z_GnE, chosen_GnE, deviation_Gn, valid_Gn)
        values_VGn = torch.stack(per_token)
        if valid_Gn is not None:
            values_VGn = torch.where(valid_Gn, values_VGn, 0)
            s_GnE = torch.where(valid_Gn[..., None], s_GnE, 0)
        for name, value in zip(names, values_VGn.sum(-1, dtype=torch.float64), strict=True):
            self._add(name, layers, value)
        self._add("score_sum", layers, s_GnE.sum(1, dtype=torch.float64))
        active_Gn = chosen_GnE.sum(-1).clamp(max=ACTIVE - 1)
        self._add("active_histogram", layers, self._histogram(active_Gn, valid_Gn, ACTIVE))

    def _add_margins(self, layers, z_GnE, chosen_GnE, deviation_Gn, valid_Gn) -> None:
        least_Gn = z_GnE.masked_fill(~chosen_GnE, torch.inf).amin(-1)
        other_Gn = z_GnE.masked_fill(chosen_GnE, -torch.inf).amax(-1)
        margin_Gn = (least_Gn - other_Gn) / deviation_Gn
        # nothing or everything chosen, or logits that are all equal or no numbers
        known_Gn = (least_Gn < torch.inf) & (other_Gn > -torch.inf) & ~margin_Gn.isnan()
        known_Gn = known_Gn if valid_Gn is None else known_Gn & valid_Gn
        first, step = MARGIN_EDGES[1], 10
        place_Gn = ((margin_Gn.clamp(min=first / 2) / first).log10() * step).floor() + 1
        place_Gn = place_Gn.nan_to_num(0).clamp(0, BINS - 1).long()
        self._add("margin_histogram", layers, self._histogram(place_Gn, known_Gn, BINS))

    def _histogram(self, place_Gn: Tensor, valid_Gn: Tensor | None, bins: int) -> Tensor:
        weight_Gn = self._ones(place_Gn) if valid_Gn is None else valid_Gn.double()
        counts = torch.zeros(len(place_Gn), bins, dtype=torch.float64, device=place_Gn.device)
        return counts.scatter_add_(1, place_Gn, weight_Gn)

    def _add(self, name: str, layers: list[int], value: Tensor) -> None:
        """Adds [G, ...] to the rows of these layers, and to the first columns."""
        total = self.sums[name]
        value = value.to(total.device, total.dtype)
        if total.dim() == 2 and value.shape[1] != total.shape[1]:
            total = total[:, : value.shape[1]]
        total.index_add_(0, self._rows_of(layers), value)

    def _rows_of(self, layers: list[int]) -> Tensor:
        device = self.sums["counts"].device
        key = ("layers", tuple(layers), device)
        if key not in self._cache:
            self._cache[key] = torch.tensor(layers, device=device)
        return self._cache[key]

    def _add_structure(self) -> None:
        """Which experts tokens have together, in a layer and in neighbouring ones; over all tokens."""
        masks = {layer: self.banks[layer].columns(seen.mask).float() for layer, seen in self._seen.items()}
        self.allocate_structure(next(iter(masks.values())).device)
        for layer, mask_TE in masks.items():
            pairs = self.structure["coactivation"][layer]
            pairs[: mask_TE.shape[1], : mask_TE.shape[1]] += (mask_TE.T @ mask_TE).to(pairs.device)
        for layer, following in itertools.pairwise(range(len(self.banks))):
            here, there = masks.get(layer), masks.get(following)
            if here is not None and there is not None and len(here) == len(there) and here.device == there.device:
                pairs = self.structure["flow"][layer]
                pairs[: here.shape[1], : there.shape[1]] += (here.T @ there).to(pairs.device)

    def _add_losses(self) -> None:
        """``losses`` [2, n]: for each of ``loss_keys`` the sum, and over how many forwards."""
        device = self.sums["counts"].device
        values = [value for _, value in self._pending_losses]
        if len({(value.dtype, value.device, value.shape) for value in values}) > 1:
            values = [value.reshape(()).to(device, torch.float64) for value in values]
        new = torch.stack(values).flatten().to(device, torch.float64)
        keys = list(dict.fromkeys([*self.loss_keys, *(key for key, _ in self._pending_losses)]))
        places = {key: place for place, key in enumerate(keys)}
        total = new.new_zeros(2, len(keys))
        if self.losses is not None:
            total[:, : len(self.loss_keys)] = self.losses
        rows = self._rows_of([places[key] for key, _ in self._pending_losses])
        self.loss_keys, self.losses = keys, total.index_add_(1, rows, torch.stack([new, self._ones(new)]))
        self._pending_losses = []


def _mask(ids: Tensor, size: int) -> Tensor:
    """[..., K] ids, -1 = none -> [..., size] bool."""
    mask = torch.zeros(*ids.shape[:-1], size + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(-1, torch.where(ids < 0, size, ids), True)[..., :size]
