"""From a dense feed-forward to experts and back: decomposition, and upcycling of a layer.

    y = sum_i W_out^i act(W_in^i x + b_in^i) + b_out^i        i = 1..n parts of the hidden units

A feed-forward acts on each hidden unit alone, so any cut of its hidden units into n parts is n experts whose sum it is:
rows of W_in (of both halves where gated) and columns of W_out. ``split_feed_forward`` cuts it, ``merge_experts`` puts
it together again.

``upcycle`` fills the experts of a ``MoELayer`` from a feed-forward so that the layer computes what the feed-forward
does, before any training:

    "copies"   every expert is the feed-forward, divided by the sum S of a token's weights
    "slices"   expert j is part j mod n of n, divided by the sum of a token's weights on each part; router rows
               repeat n times, so that neighbours j = n g .. n g + n - 1 (a virtual group) score alike and a token that
               chooses one of them chooses all

S must be the same for every token, which is a property of the router; it is measured, in float64, and a router that
does not have it is refused. The division is of W_out and b_out, so it is exact for every activation.

Sources: decomposition: Union of Experts, arXiv:2503.02495. Copies: sparse upcycling, arXiv:2212.05055. Slices and
virtual groups: arXiv:2410.07524 and megatron/core/transformer/moe/upcycling_utils.py (NVIDIA/Megatron-LM), read, which
spreads the factor over both maps by its square or cube root (exact for relu squared alone of its activations) and
takes the factor of a raw softmax from the mean weight.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..routers.base import Router, Routing, TokenContext
from .experts import FeedForward, GroupedExperts
from .layer import MoELayerCode

HOW = ("copies", "slices")
DRAWS = 16  # of the tokens that weights are measured with


class FeedForwardWeights(NamedTuple):
    """A feed-forward as plain tensors, or several with a first dimension [n, ...].

    Attributes:
        w_in: [H, D]; [2H, D] where gated, the gate's rows first (``torch.cat([gate_proj, up_proj])`` of a LLaMA).
        w_out: [D, H].
        b_in, b_out: [H] or [2H], and [D]; None where there is none.
    """

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None = None
    b_out: Tensor | None = None

    @property
    def hidden(self) -> int:
        return self.w_out.shape[-1]

    @property
    def dim(self) -> int:
        return self.w_out.shape[-2]

    @property
    def gated(self) -> bool:
        return self.w_in.shape[-2] == 2 * self.hidden

    @torch.no_grad()
    def copy_to(self, target: FeedForward | GroupedExperts) -> None:
        """Copies one feed-forward into a ``FeedForward``, or several into a bank of as many experts.

        Raises:
            ValueError: other shapes than the target's, or biases that it has no place for.
        """
        _copy(self, _read(target))


Dense = FeedForward | FeedForwardWeights


def split_feed_forward(dense: Dense, num_experts: int) -> FeedForwardWeights:
    """Cuts a feed-forward into experts of equal width whose outputs add up to its output.

    b_out is divided by their number; the last expert has what rounding leaves, so that ``merge_experts`` gives the same
    bits again. To keep it whole beside the experts, cut weights without it: ``weights._replace(b_out=None)``.

    Args:
        dense: [H, D] and [D, H]; see ``FeedForwardWeights``.
        num_experts: n; must divide H.

    Returns:
        Stacked: w_in [n, H/n, D] ([n, 2H/n, D] gated), w_out [n, D, H/n], b_in [n, ...], b_out [n, D].

    Raises:
        ValueError: shapes that are no feed-forward's, or n that does not divide H.
    """
    dense = _read(dense)
    if num_experts < 1 or dense.hidden % num_experts:
        raise ValueError(
            f"num_experts={num_experts}: {dense.hidden} hidden units do not divide into so many equal parts"
        )

    def rows(value: Tensor | None) -> Tensor | None:
        """[H, ...] or [2H, ...] -> [n, H/n, ...] or [n, 2H/n, ...], each half of a gated one cut by itself."""
        if value is None:
            return None
        halves = value.unflatten(0, (1 + dense.gated, num_experts, -1))
        return halves.transpose(0, 1).flatten(1, 2).contiguous()

    b_out = None
    if dense.b_out is not None:
        b_out = (dense.b_out / num_experts).repeat(num_experts, 1)
        b_out[-1] = dense.b_out - b_out[:-1].sum(0)
    w_out = dense.w_out.unflatten(1, (num_experts, -1)).transpose(0, 1).contiguous()
    return FeedForwardWeights(rows(dense.w_in), w_out, rows(dense.b_in), b_out)


def merge_experts(experts: GroupedExperts | FeedForwardWeights) -> FeedForwardWeights:
    """The feed-forward that is the sum of the experts: the inverse of ``split_feed_forward``, to the bit.

    Args:
        experts: a bank that holds all of them, or stacked weights [n, ...].
    """
    experts = _read(experts, stacked=True)

    def rows(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        halves = value.unflatten(1, (1 + experts.gated, -1))
        return halves.transpose(0, 1).flatten(0, 2).contiguous()

    b_out = None if experts.b_out is None else experts.b_out[:-1].contiguous().sum(0) + experts.b_out[-1]
    w_out = experts.w_out.transpose(0, 1).flatten(1).contiguous()
    return FeedForwardWeights(rows(experts.w_in), w_out, rows(experts.b_in), b_out)


@torch.no_grad()
def upcycle(
    layer: MoELayerCode,
    dense: Dense,
    *,
    how: Literal["copies", "slices"] = "copies",
    zero_router: bool = False,
    noise: float = 0.0,
    x: Tensor | None = None,
    context: TokenContext | None = None,
) -> None:
    """Fills the experts of the layer that live on this rank, in place, so that the layer computes what ``dense`` does.

    Equal experts with equal router rows stay equal while they get equal gradients. Copies under a drawn router part by
    themselves; with ``zero_router``, give them some ``noise``.

    Args:
        layer: its experts have the feed-forward's width for "copies", an n-th of it for "slices".
        dense: a ``FeedForward``, or the weights of any.
        how: "copies", or "slices" (E and the router's top_k multiples of n). Virtual groups are made in the router's
            ``weight`` and ``linear_bias``; one without them must give every slice the same weight as it is.
        zero_router: set the router's parameters to 0 ("copies" only): all experts score alike, so that weights that are
            not renormalised have one sum too. Ties choose the same experts for every token until the router has moved.
        noise: each expert gets so many times its own fresh initial weights added, which breaks the equality by as much
            and parts the experts. Drawn by the expert's id, so that every layout draws the same.
        x, context: tokens [T, D] to measure weights with, and their context; by default random ones, and the context of
            the router's ``example()``.

    Raises:
        ValueError: widths, activations or biases that do not fit; a layer whose output cannot be the feed-forward's, or
            a router whose weights on the feed-forward's parts differ between tokens, with what would work.
    """
    if how not in HOW:
        raise ValueError(f'how="{how}": choose one of {HOW}')
    weights, router = _read(dense), layer.router
    parts = _parts(layer, dense, weights, how)
    if zero_router and how == "slices":
        raise ValueError('zero_router with how="slices": tied scores choose no whole set of slices; leave it out')
    if layer.experts.w1.is_meta:
        raise ValueError("the layer is on the meta device: give it memory first, layer.to_empty(device=...)")
    before = {name: value.clone() for name, value in router.state_dict().items()}
    try:
        if zero_router:
            for parameter in router.parameters():
                parameter.zero_()
        elif how == "slices":
            _repeat_rows(router, parts)
        total = _measure(router, parts, x, context, layer.spec.dim)
    except Exception:
        router.load_state_dict(before)
        raise
    sliced = split_feed_forward(weights, parts)
    sliced = sliced._replace(w_out=sliced.w_out / total, b_out=None if sliced.b_out is None else sliced.b_out / total)
    routed = [expert for expert, kind in enumerate(router.expert_kinds) if kind == "routed"]
    part_of = {expert: j % parts for j, expert in enumerate(routed)}  # and 0, the whole, of a local expert
    for bank in filter(None, (layer.experts, layer.local_experts)):
        for row, expert in enumerate(bank.ids):
            own = _one(_read(bank), row)
            _copy(_one(sliced, part_of.get(expert, 0)), own)
            if noise:
                fresh = bank.spec.draw(bank.seed, bank.layer, expert, dtype=own.w_in.dtype, device=own.w_in.device)
                own.w_in.add_(fresh[0], alpha=noise)
                own.w_out.add_(fresh[1], alpha=noise)


def _one(stacked: FeedForwardWeights, place: int) -> FeedForwardWeights:
    return FeedForwardWeights(*(None if value is None else value[place] for value in stacked))


def _copy(source: FeedForwardWeights, target: FeedForwardWeights) -> None:
    """Into the target's tensors; its biases become 0 where the source has none."""
    for name, value in source._asdict().items():
        place = getattr(target, name)
        if place is None and value is not None:
            raise ValueError(f"{name} is given and the target has no biases: make it with ExpertSpec(bias=True)")
        if value is not None and place.shape != value.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}: the target's is {list(place.shape)}")
    for place, value in zip(target, source, strict=True):
        if value is not None:
            place.copy_(value)
        elif place is not None:
            place.zero_()


def _read(module: Dense | GroupedExperts, stacked: bool = False) -> FeedForwardWeights:
    """The weights as views, their shapes checked."""
    if isinstance(module, FeedForward):
        module = FeedForwardWeights(module.up.weight, module.down.weight, module.up.bias, module.down.bias)
    elif isinstance(module, GroupedExperts):
        module, stacked = FeedForwardWeights(module.w_in, module.w_out, module.b_in, module.b_out), True
    weights = FeedForwardWeights(*(value if value is None else value.detach() for value in module))
    *first, dim, hidden = weights.w_out.shape
    shapes = {name: list(value.shape) for name, value in weights._asdict().items() if value is not None}
    for rows in (hidden, 2 * hidden):
        expected = {"w_in": [*first, rows, dim], "w_out": [*first, dim, hidden], "b_in": [*first, rows]}
        expected["b_out"] = [*first, dim]
        if len(first) == stacked and all(shape == expected[name] for name, shape in shapes.items()):
            return weights
    leading = "n, " if stacked else ""
    raise ValueError(
        f"weights of shapes {shapes}: expected w_in [{leading}H, D] or [{leading}2H, D] where gated, w_out "
        f"[{leading}D, H], b_in [{leading}H] or [{leading}2H], b_out [{leading}D]"
    )


def _parts(layer: MoELayerCode, dense: Dense, weights: FeedForwardWeights, how: str) -> int:
    """Into how many parts the feed-forward is cut, after checking that the layer can hold them."""
    spec, router = layer.spec, layer.router
    if isinstance(dense, FeedForward) and dense.spec.activation != spec.activation:
        raise ValueError(f'activation "{dense.spec.activation}" does not become "{spec.activation}": give both one')
    if weights.dim != spec.dim or weights.gated != spec.gated:
        kinds = {True: "gated", False: "not gated"}
        raise ValueError(
            f"a feed-forward of dim={weights.dim}, {kinds[weights.gated]}, and experts of dim={spec.dim}, "
            f"{kinds[spec.gated]}: make the layer's ExpertSpec like the feed-forward"
        )
    if not spec.bias and (weights.b_in is not None or weights.b_out is not None):
        raise ValueError("the feed-forward has biases and the experts have none: ExpertSpec(bias=True)")
    if layer.shared is not None:
        raise ValueError(
            "the layer's shared feed-forward adds to what the experts give: upcycle a layer without, and add one whose "
            "output weights are 0"
        )
    if how == "copies":
        if weights.hidden != spec.hidden:
            raise ValueError(
                f"copies of a feed-forward of hidden={weights.hidden} in experts of hidden={spec.hidden}: make them "
                'equal, or how="slices" with experts of an n-th'
            )
        return 1
    parts, top_k = weights.hidden // spec.hidden, getattr(router, "options", {}).get("top_k")
    if weights.hidden % spec.hidden or router.num_experts % parts:
        raise ValueError(
            f"a feed-forward of hidden={weights.hidden} in {router.num_experts} experts of hidden={spec.hidden}: the "
            "experts' hidden must divide the feed-forward's, into n parts, and n the number of experts"
        )
    if isinstance(top_k, int) and top_k % parts:
        raise ValueError(f"top_k={top_k}: a token needs whole sets of {parts} slices; choose a multiple of {parts}")
    if layer.local_experts is not None:
        raise ValueError('local experts hold no whole feed-forward with how="slices": use how="copies"')
    return parts


def _repeat_rows(router: Router, parts: int) -> None:
    """Virtual groups: each of the first E / parts rows of the router, and of its bias, ``parts`` times."""
    for name in ("weight", "linear_bias"):
        value = getattr(router, name, None)
        if isinstance(value, nn.Parameter) and value.shape[:1] == (router.num_experts,):
            value.copy_(value[: router.num_experts // parts].repeat_interleave(parts, 0))


def _measure(router: Router, parts: int, x: Tensor | None, context: TokenContext | None, dim: int) -> float:
    """The sum of a token's weights on each part, which must be one number for all tokens and parts."""
    try:
        twin = copy.deepcopy(router).cpu().double()
        given, context = x is not None, _on_cpu(router.example()[1] if context is None else context)
        generator = torch.Generator().manual_seed(0)
        sums = []
        for _ in range(1 if given else DRAWS):
            tokens = x if given else torch.randn(context.num_tokens, dim, generator=generator, dtype=torch.float64)
            for training in (True, False):
                part = _sums(twin.train(training)(tokens.double().cpu(), context), twin, parts)
                sums.append(part if context.real_T is None else part[context.real_T])
    except _Refused as error:
        raise ValueError(f'router "{router.name}" cannot start as a feed-forward: {error}') from None
    except Exception as error:
        raise ValueError(
            f'router "{router.name}" does not take random tokens in the context of its example ({error}): give x and '
            "context to measure its weights with"
        ) from error
    sums = torch.cat(sums)
    low, high = sums.min().item(), sums.max().item()
    if not (low > 0 and high - low <= 1e-9 * high):
        raise ValueError(
            f'router "{router.name}" cannot start as a feed-forward: the weights of a token on '
            f"{'its experts' if parts == 1 else 'each slice'} sum to {low:.4g} for one and {high:.4g} for another. "
            + _advice(router)
        )
    return 1.0 if abs(high - 1) < 1e-12 else high


class _Refused(Exception):
    pass


def _on_cpu(context: TokenContext) -> TokenContext:
    fields = {field.name: getattr(context, field.name) for field in dataclasses.fields(context)}
    return context.replace(**{name: value.cpu() for name, value in fields.items() if isinstance(value, Tensor)})


def _sums(routing: Routing, router: Router, parts: int) -> Tensor:
    """[T, parts]: the weights of a token on each part."""
    if routing.dispatch is not None or routing.rows is not None:
        raise _Refused("its experts see mixtures of tokens, or rows of their own, and not tokens")
    if routing.requested is not None:
        raise _Refused("its experts have a capacity, and a dropped token would get less; drop nothing")
    token, expert, weight = routing.as_list()
    kinds = router.expert_kinds
    if any(kinds[i] in ("copy", "constant") for i in expert.unique().tolist()):
        raise _Refused("some of its experts return the token itself, or a constant")
    place = torch.zeros(len(kinds), dtype=torch.int64)
    place[[i for i, kind in enumerate(kinds) if kind == "routed"]] = torch.arange(router.num_experts) % parts
    counts = torch.tensor([kind in ("routed", "local") for kind in kinds])
    sums = weight.new_zeros(routing.num_tokens, parts)
    return sums.index_put((token, place[expert]), weight * counts[expert], accumulate=True)


def _advice(router: Router) -> str:
    options = getattr(router, "options", {})
    if router.name == "topk" and not options.get("renormalise") and not options.get("softmax_after"):
        return (
            "Give it renormalise=True or softmax_after=True (with top_k=1 its gate then learns nothing), or for copies "
            "zero_router=True"
        )
    return (
        "Choose a router whose weights have one sum, such as topk with renormalise=True, or for copies try "
        "zero_router=True"
    )
