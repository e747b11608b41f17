"""Routers with one planted fault each, and their healthy siblings: what the kit must catch, and what it must not.

``FAULTS`` pairs each broken class with the sibling that does the same thing rightly, the check that names the fault,
and words of its message.
"""

import dataclasses
import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gatewright.routers import GatedRouter, Router, Routing, TokenContext
from gatewright.routers.base import count_experts, router_dtype
from gatewright.routers.losses import balance_loss
from gatewright.routers.selection import drop_padding, keep_within_capacity


class Plain(Router):
    """Softmax top-k with a balance loss: what most others here change one line of."""

    evidence = "paper"
    causal = True
    batch_independent = True
    loss_names = ("balance",)

    def __init__(self, *, dim: int, num_experts: int, top_k: int = 2) -> None:
        super().__init__(num_experts=num_experts)
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * 0.02)

    def logits(self, x: Tensor, context: TokenContext) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        return self.choose(self.logits(x.to(router_dtype(x)), context), context)

    def choose(self, logits: Tensor, context: TokenContext) -> Routing:
        scores = logits.softmax(-1)
        weight, index = scores.topk(self.top_k)
        index, weight = drop_padding(index, weight, context.real_T)
        losses = {"balance": balance_loss(scores, count_experts(index, self.bank_size), context.real_T)}
        return Routing.from_topk(index, weight, bank_size=self.bank_size, logits=logits, scores=scores, losses=losses)


# ---- gradient


class GradientCut(Plain):
    def choose(self, logits, context):
        routing = super().choose(logits, context)
        return routing.replace(weight=routing.weight.detach())


class Scaled(Plain):
    """A learned temperature."""

    def __init__(self, *, dim: int, num_experts: int, top_k: int = 2) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.temperature = nn.Parameter(torch.ones(1))

    def logits(self, x, context):
        return super().logits(x, context) * self.temperature.to(x.dtype)


class ParameterCut(Scaled):
    def logits(self, x, context):
        return Plain.logits(self, x, context) * self.temperature.detach().to(x.dtype)


class ScalarParameter(Scaled):
    def __init__(self, *, dim: int, num_experts: int, top_k: int = 2) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.temperature = nn.Parameter(torch.ones(()))


class NormalisedLogits(Plain):
    """Logits divided by their deviation over the experts."""

    def logits(self, x, context):
        logits = super().logits(x, context)
        return logits / (logits.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


class NaNAtEqualScores(Plain):
    def logits(self, x, context):
        logits = super().logits(x, context)
        return logits / logits.std(-1, keepdim=True, correction=0)


class ByEntropy(Plain):
    """Weights scaled by the scores' entropy over its highest value."""

    def __init__(self, *, dim: int, num_experts: int, top_k: int = 1) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)

    def highest(self) -> float:
        return max(torch.log(torch.tensor(float(self.bank_size))).item(), 1e-6)

    def choose(self, logits, context):
        routing = super().choose(logits, context)
        entropy = -(routing.scores * logits.log_softmax(-1)).sum(-1, keepdim=True) / self.highest()
        return routing.replace(weight=routing.weight * entropy)


class OneExpertBreaks(ByEntropy):
    def highest(self):
        return torch.log(torch.tensor(float(self.bank_size)))


class InTheDtypeOfTheTokens(Plain):
    def forward(self, x, context):
        return self.choose(self.logits(x, context), context)


# ---- what a decision depends on


class Centred(Plain):
    """Tokens minus the mean of the tokens so far."""

    def forward(self, x, context):
        x = x.to(router_dtype(x))
        return self.choose(self.logits(x - self.mean(x, context), context), context)

    def mean(self, x, context):
        sum_BLD = x.view(context.batch_size, context.length, x.shape[1]).cumsum(1)
        return (sum_BLD / torch.arange(1, context.length + 1, dtype=x.dtype)[:, None]).flatten(0, 1)


class FutureLeak(Centred):
    def mean(self, x, context):
        x_BLD = x.view(context.batch_size, context.length, x.shape[1])
        mask_BL = torch.ones(x_BLD.shape[:2]) if context.padding_mask is None else context.padding_mask
        count_B1 = mask_BL.sum(1, keepdim=True).clamp(min=1)
        return (x_BLD.sum(1) / count_B1).repeat_interleave(context.length, 0)


class CentredOnSample(FutureLeak):
    causal = False


class PaddingLeak(CentredOnSample):
    def mean(self, x, context):
        x_BLD = x.view(context.batch_size, context.length, x.shape[1])
        return (x_BLD.sum(1) / max(context.length, 1)).repeat_interleave(context.length, 0)


class BatchLeak(Centred):
    causal = False

    def mean(self, x, context):
        real_T = torch.ones(len(x)) if context.real_T is None else context.real_T
        return x.sum(0) / real_T.sum().clamp(min=1)


class CentredOnBatch(BatchLeak):
    batch_independent = False


class SeesPadding(Plain):
    """Its own __call__, which lets padding through to a loss."""

    loss_names = ("norm",)

    def __call__(self, x, context=None):
        return nn.Module.__call__(self, x, TokenContext.for_tokens(x) if context is None else context)

    def choose(self, logits, context):
        routing = super().choose(logits, context)
        return routing.replace(losses={"norm": logits.square().sum()})


class ByToken(Plain):
    """A bias for each token id."""

    requires = ("token_ids",)

    def __init__(self, *, dim: int, num_experts: int, top_k: int = 2, vocab_size: int = 16) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.bias = nn.Parameter(torch.randn(vocab_size, num_experts))

    def logits(self, x, context):
        return super().logits(x, context) + self.bias.to(x.dtype)[context.token_ids.flatten()]

    @classmethod
    def example(cls):
        context = TokenContext(batch_size=2, length=8, token_ids=torch.arange(16).view(2, 8))
        return {"dim": 16, "num_experts": 4}, context


class UndeclaredRequirement(ByToken):
    requires = ()


# ---- randomness


class Noisy(Plain):
    """Noise on the logits in training."""

    @property
    def requires(self):
        return ("noise",) if self.training else ()

    def logits(self, x, context):
        logits = super().logits(x, context)
        return logits + self.draw(logits, context) if self.training else logits

    def draw(self, logits, context):
        return context.noise(*logits.shape).to(logits.dtype)


class UnseededNoise(Noisy):
    def draw(self, logits, context):
        return torch.randn_like(logits)


class NoiseByPlace(Noisy):
    """Seeded, but by the place in the batch: another layout draws another noise."""

    def draw(self, logits, context):
        return torch.randn(logits.shape, generator=torch.Generator().manual_seed(context.seed + context.step)).to(
            logits
        )


class OwnGenerator(Noisy):
    """A generator of its own, which moves: a recomputation draws anew."""

    def __init__(self, *, dim: int, num_experts: int, top_k: int = 2) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.state = [1]

    def draw(self, logits, context):
        self.state[0] += 1
        return torch.randn(logits.shape, generator=torch.Generator().manual_seed(self.state[0])).to(logits)


# ---- the decision itself


class Limited(Plain):
    """An expert keeps the first tokens of the batch, up to a capacity."""

    batch_independent = False

    def __init__(self, *, dim: int, num_experts: int, top_k: int = 2, capacity_factor: float = 0.5) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.capacity_factor = capacity_factor

    def choose(self, logits, context):
        routing = super().choose(logits, context)
        tokens = len(logits) if context.real_T is None else context.real_T.sum()
        capacity = self.capacity_factor * self.top_k * tokens / self.num_experts
        index = routing.index
        keep = keep_within_capacity(index, routing.weight, self.bank_size, capacity, "position")
        return self.dropped(routing.replace(requested=index, index=index.masked_fill(~keep, -1)), keep)

    def dropped(self, routing, keep):
        return routing.replace(weight=routing.weight * keep)


class WeightsForDroppedTokens(Limited):
    def dropped(self, routing, keep):
        return routing


class WrongExpertCount(Plain):
    """Counts an expert that its kinds do not name."""

    def choose(self, logits, context):
        return super().choose(logits, context).replace(bank_size=self.bank_size + 1)


class CountsFromOne(Plain):
    def choose(self, logits, context):
        routing = super().choose(logits, context)
        return routing.replace(index=torch.where(routing.index < 0, -1, routing.index + 1))


class SameExpertTwice(Plain):
    def choose(self, logits, context):
        routing = super().choose(logits, context)
        return routing.replace(index=routing.index[:, :1].expand(-1, self.top_k))


class UnnamedLoss(Plain):
    loss_names = ()


class EveryArgmax(Plain):
    """All experts that equal the highest score; ties to the first."""

    def __init__(self, *, dim: int, num_experts: int) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=1)

    def choose(self, logits, context):
        return super().choose(logits.nan_to_num(0.0), context)


class CannotCompareNaN(EveryArgmax):
    def choose(self, logits, context):
        scores = logits.softmax(-1)
        highest = (scores == scores.amax(-1, keepdim=True)) & (scores.cumsum(-1) <= 1 + 1e-6)
        index = highest.nonzero()[: len(logits), 1][:, None]
        if len(index) != len(logits):
            raise RuntimeError(f"{len(index)} choices of {len(logits)} tokens")
        return Plain.choose(self, logits, context)


class InPlace(Plain):
    def forward(self, x, context):
        return super().forward(x.mul_(2) if not x.requires_grad else x, context)


class EPDependent(Plain):
    """Looks for the experts of its own rank first."""

    def logits(self, x, context):
        logits = super().logits(x, context)
        if not dist.is_initialized():
            return logits
        own = torch.arange(self.bank_size) * dist.get_world_size() // self.bank_size == dist.get_rank()
        return logits + own.to(logits.dtype)


class DecidesDifferentlyCompiled(Plain):
    def logits(self, x, context):
        return super().logits(x, context) * (2 if torch.compiler.is_compiling() else 1)


class Steps(GatedRouter, Plain):
    """Plain, in three steps."""

    def logits(self, x, context):
        return Plain.logits(self, x.to(router_dtype(x)), context)

    def assign(self, logits, scores, context):
        return self.choose(logits, context)


class ForwardLeavesTheSteps(Steps):
    def forward(self, x, context):
        return self.choose(2 * self.logits(x, context), context)


# ---- options


class Warm(Plain):
    """Logits over a temperature."""

    def __init__(self, *, dim: int, num_experts: int, top_k: int = 2, temperature: float = 1.0) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.temperature = temperature

    def logits(self, x, context):
        return super().logits(x, context) / self.temperature


class IgnoredOption(Warm):
    def logits(self, x, context):
        return Plain.logits(self, x, context)


class Table(Plain):
    """A fixed random preference of experts, part of the checkpoint."""

    persistent = True

    def __init__(self, *, dim: int, num_experts: int, top_k: int = 2) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.register_buffer("preference", torch.randn(num_experts), persistent=self.persistent)

    def logits(self, x, context):
        return super().logits(x, context) + self.preference.to(x.dtype)


class LosesItsTable(Table):
    """The table is drawn anew, and otherwise, when a run is loaded."""

    persistent = False
    drawn = itertools.count()

    def __init__(self, *, dim: int, num_experts: int, top_k: int = 2) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.preference += torch.randn(num_experts, generator=torch.Generator().manual_seed(next(self.drawn)))


# ---- state


class Biased(Plain):
    """A selection bias that moves against the load."""

    state_names = ("bias",)
    reductions = {"load": "sum"}

    def __init__(self, *, dim: int, num_experts: int, top_k: int = 2, rate: float = 0.1) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.rate = rate
        self.register_buffer("bias", torch.zeros(num_experts))

    def choose(self, logits, context):
        scores = logits.softmax(-1)
        index = (scores.detach() + self.bias.to(scores.dtype)).topk(self.top_k).indices
        index, weight = drop_padding(index, scores.gather(1, index), context.real_T)
        load = count_experts(index, self.bank_size)
        losses = {"balance": balance_loss(scores, load, context.real_T)}
        return Routing.from_topk(
            index,
            weight,
            bank_size=self.bank_size,
            logits=logits,
            scores=scores,
            losses=losses,
            stats=self.statistics(load, context) if self.training else {},
        )

    def statistics(self, load, context):
        return {"load": load}

    def update(self, stats):
        load = stats["load"].to(self.bias.dtype)
        self.bias += self.rate * (load.mean() - load).sign()


class MovesInForward(Biased):
    """Hidden state: a recomputation moves it a second time."""

    def statistics(self, load, context):
        super().update({"load": load})
        return {"load": load}

    def update(self, stats):
        pass


class NeverUpdated(Biased):
    """It has an update, and no statistics reach it."""

    def statistics(self, load, context):
        return {}


class StatisticsForNobody(Biased):
    """It has statistics, and no update."""

    update = Router.update


class UndeclaredState(Biased):
    state_names = ()


class PulledByAnEmptyBatch(Biased):
    """Without a token the bias moves all the same."""

    def update(self, stats):
        super().update(stats)
        self.bias -= self.rate / 2


class MeanOfMicroBatches(Biased):
    """The mean load of the micro-batches, which an empty one halves; its size is what moves the bias."""

    reductions = {"load": "mean"}

    def statistics(self, load, context):
        return {"load": load.to(torch.float32)}

    def update(self, stats):
        load = stats["load"].to(self.bias.dtype)
        self.bias += self.rate * (load.mean() - load) / 10


class SumOfMicroBatches(MeanOfMicroBatches):
    reductions = {"load": "sum"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A broken class, its healthy sibling, the check that names the fault, and words that the message must hold."""

    broken: type[Router]
    healthy: type[Router]
    check: str
    says: str

    def __repr__(self) -> str:
        return self.broken.__name__


FAULTS = [
    Fault(GradientCut, Plain, "gradient_reaches_every_parameter", "weights without gradient"),
    Fault(ParameterCut, Scaled, "gradient_reaches_every_parameter", 'a gradient of parameter "temperature"'),
    Fault(FutureLeak, CentredOnSample, "causal_is_true", "then tokens 1 to 11 of sample 0 changed"),
    Fault(FutureLeak, Centred, "causal_is_true", "set `causal = False`"),
    Fault(BatchLeak, CentredOnBatch, "batch_independent_is_true", "then every sample but number 0 changed"),
    Fault(PaddingLeak, CentredOnSample, "padding_is_absent", "real tokens a sample [5, 5, 5]"),
    Fault(SeesPadding, Plain, "padding_may_hold_anything", "loss norm is nan"),
    Fault(SeesPadding, Plain, "wrong_shapes_are_refused", "ValueError that begins with the shape of x"),
    Fault(UndeclaredRequirement, ByToken, "requires_is_true", "add the field that forward reads to `requires`"),
    Fault(WeightsForDroppedTokens, Limited, "dropped_tokens_have_no_weight", "weight 0 wherever the expert id is -1"),
    Fault(WrongExpertCount, Plain, "decision_is_well_formed", "16 tokens over 5"),
    Fault(CountsFromOne, Plain, "decision_is_well_formed", "expert ids of 0 to 3, or -1 for none"),
    Fault(SameExpertTwice, Plain, "decision_is_well_formed", "twice"),
    Fault(UnnamedLoss, Plain, "declarations", "['balance']"),
    Fault(ScalarParameter, Scaled, "declarations", "temperature of shape []"),
    Fault(InPlace, Plain, "forward_is_pure", "changed in place"),
    Fault(InPlace, Plain, "layer_is_its_definition", "by its definition"),
    Fault(MovesInForward, Biased, "recomputation_changes_nothing", "router.bias"),
    Fault(MovesInForward, Biased, "forward_is_pure", "buffer bias"),
    Fault(OwnGenerator, Noisy, "forward_is_pure", "attributes as before"),
    Fault(OwnGenerator, Noisy, "recomputation_changes_nothing", "draw with context.noise"),
    Fault(UnseededNoise, Noisy, "randomness_is_keyed", "that of torch moved"),
    Fault(NoiseByPlace, Noisy, "randomness_is_keyed", "each sample's draw as in any batch"),
    Fault(EPDependent, Plain, "two_ranks", "never by the rank"),
    Fault(NaNAtEqualScores, NormalisedLogits, "equal_scores", "every parameter 0"),
    Fault(CannotCompareNaN, EveryArgmax, "nonfinite_tokens", "nan in tokens 4 and 5 of sample 1"),
    Fault(OneExpertBreaks, ByEntropy, "one_expert", "'num_experts': 1"),
    Fault(InTheDtypeOfTheTokens, Plain, "dtypes", "bfloat16"),
    Fault(IgnoredOption, Warm, "options_are_used", "option temperature=1.0 and 0.5"),
    Fault(LosesItsTable, Table, "saves_and_loads", "made again by options and state_dict"),
    Fault(NeverUpdated, Biased, "state_moves_by_update", "so state never moves"),
    Fault(StatisticsForNobody, Biased, "state_moves_by_update", "no update"),
    Fault(UndeclaredState, Biased, "state_moves_by_update", "state_names"),
    Fault(PulledByAnEmptyBatch, Biased, "nothing_to_route", "buffer bias"),
    Fault(MeanOfMicroBatches, SumOfMicroBatches, "micro_batches_add_up", "with an empty one between"),
    Fault(DecidesDifferentlyCompiled, Plain, "compiled", "aot_eager"),
    Fault(ForwardLeavesTheSteps, Steps, "gated_steps", "assign(logits, scores(logits), context)"),
]
