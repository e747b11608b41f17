"""Denoising diffusion with a learned variance: the model learns what noise is in an image, and how sure to be.

    beta_t from 1e-4 to 0.02 in 1000 equal steps;  abar_t = product of (1 - beta)
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    noise       mean (eps_model - eps)^2
    variance    KL(q(x_{t-1} | x_t, x_0) || p_model) in bits a dimension, and at t = 0 -log p(x_0) of 8-bit values
                log var_model = f log beta_t + (1 - f) log betatilde_t,   f = (v + 1) / 2;   its mean without gradient
    the first C channels are eps_model, the others v; without them only the first loss remains

    sampling at K of the steps, evenly spaced, the schedule made anew from their abar:
    ddim        x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1}) eps_model
    ancestral   x_{t-1} ~ N(mean of q(. | x_t, x_0), var_model); beta_t where no variance is learned

Sources: Ho et al., arXiv:2006.11239; Nichol and Dhariwal, arXiv:2102.09672, and guided-diffusion, whose loss DiT takes
(arXiv:2212.09748); DDIM, arXiv:2010.02502. Released samplers of DiT guide the first 3 channels only; these guide all.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from gatewright.recipes.data.draw import Draw

from .dit_config import DiTConfig
from .objective import PREDICTION_WEIGHT, Model, Objective, Scored

STEPS = 1000
BETAS = (1e-4, 0.02)


class Schedule:
    """What follows from the abar of a chain of steps; float64, [steps] each.

    Attributes:
        abar: the share of the image's variance that is left.
        before: abar of the step before; 1 before the first.
        beta: of the chain.
        log_least: log of the variance of q(x_{t-1} | x_t, x_0), the first step's as the second's, since its own is 0.
        from_image, from_noisy: the mean of q(x_{t-1} | x_t, x_0) is from_image x_0 + from_noisy x_t.
    """

    def __init__(self, abar: Tensor) -> None:
        self.abar = abar
        self.before = torch.cat([abar.new_ones(1), abar[:-1]])
        self.beta = 1 - abar / self.before
        least = self.beta * (1 - self.before) / (1 - abar)
        self.log_least = torch.cat([least[1:2] if len(least) > 1 else self.beta[:1], least[1:]]).log()
        self.from_image = self.beta * self.before.sqrt() / (1 - abar)
        self.from_noisy = (1 - self.before) * (1 - self.beta).sqrt() / (1 - abar)

    def at(self, name: str, index_B: Tensor, like: Tensor) -> Tensor:
        """The value at each sample's step, as [B, 1, 1, 1] beside ``like``."""
        return getattr(self, name)[index_B.cpu()].to(like)[:, None, None, None]


class DDPM(Objective):
    """
    Args:
        config, prediction_weight: see ``Objective``.
        sampler: "ddim", which needs fewer steps, or "ancestral".
    """

    name = "ddpm"

    def __init__(
        self,
        config: DiTConfig,
        *,
        prediction_weight: float = PREDICTION_WEIGHT,
        sampler: Literal["ddim", "ancestral"] = "ddim",
    ) -> None:
        super().__init__(config, prediction_weight=prediction_weight)
        if sampler not in ("ddim", "ancestral"):
            raise ValueError(f'sampler="{sampler}": choose "ddim" or "ancestral"')
        self.sampler = sampler
        self.schedule = Schedule((1 - torch.linspace(*BETAS, STEPS, dtype=torch.float64)).cumprod(0))

    def score(self, model: Model, x0: Tensor, labels: Tensor, draw: Draw) -> Scored:
        noise = draw.normal("noise", tuple(x0.shape[1:])).to(x0)
        t = (draw.uniform("time") * STEPS).to(torch.int64).to(x0.device)
        return self.score_at(model, x0, labels, noise, t, draw)

    def score_at(self, model: Model, x0: Tensor, labels: Tensor, noise: Tensor, t: Tensor, draw: Draw) -> Scored:
        """With noise [B, C, H, W] and step t [B] int64 given."""
        abar = self.schedule.at("abar", t, x0)
        x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        out, routings = self.ask(model, x, t.to(x0.dtype), labels, draw)
        guess, v = _split(out, x0.shape[1])
        terms = {"noise": (guess - noise).square().flatten(1).mean(1)}
        if v is not None:
            terms["variance"] = self._variance_loss(x0, x, guess.detach(), v, t)
        return Scored(terms=terms, target=noise, routings=routings)

    def _variance_loss(self, x0: Tensor, x: Tensor, guess: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """[B] bits a dimension."""
        mean, log_var = _posterior(self.schedule, x, guess, v, t)
        true_mean = self.schedule.at("from_image", t, x) * x0 + self.schedule.at("from_noisy", t, x) * x
        true_log_var = self.schedule.at("log_least", t, x)
        gap = (true_mean - mean).square() * (-log_var).exp()
        kl = 0.5 * (log_var - true_log_var - 1 + (true_log_var - log_var).exp() + gap)
        nats = torch.where(t[:, None, None, None] == 0, -log_likelihood(x0, mean, 0.5 * log_var), kl)
        return nats.flatten(1).mean(1) / math.log(2)

    def sample(self, model: Model, labels: Tensor, draw: Draw, *, guidance: float, steps: int, like: Tensor) -> Tensor:
        if steps > STEPS:
            raise ValueError(f"steps={steps}: the chain has {STEPS}; choose at most that many")
        taken = torch.linspace(STEPS - 1, 0, steps, dtype=torch.float64).round().to(torch.int64).flip(0)
        schedule = Schedule(self.schedule.abar[taken])
        x = draw.normal("sample", self.config.input_shape).to(like)
        for index in reversed(range(steps)):
            place = torch.full((len(x),), index)
            t = torch.full((len(x),), float(taken[index]), dtype=x.dtype, device=x.device)
            guess, v = _split(self.guide(model, x, t, labels, guidance), x.shape[1])
            if self.sampler == "ddim":
                abar, before = schedule.at("abar", place, x), schedule.at("before", place, x)
                x = before.sqrt() * _image(x, guess, abar) + (1 - before).sqrt() * guess
                continue
            x, log_var = _posterior(schedule, x, guess, v, place)
            if index:
                fresh = Draw(draw.seed, index, draw.positions).normal("sample", self.config.input_shape).to(x)
                x = x + (0.5 * log_var).exp() * fresh
        return x


def log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the Gaussian's mass in the cell of width 2/255 around x; the cells at -1 and 1 reach to infinity."""
    above, below = ((x - mean + shift) * (-log_scale).exp() for shift in (1 / 255, -1 / 255))
    up_to, from_here, inside = _cdf(above), 1 - _cdf(below), _cdf(above) - _cdf(below)
    mass = torch.where(x < -0.999, up_to, torch.where(x > 0.999, from_here, inside))
    return mass.clamp(min=1e-12).log()


def _cdf(x: Tensor) -> Tensor:
    """guided-diffusion's approximation of the normal distribution function, within 2e-3."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def _split(out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The noise, and v where it is learned."""
    return out[:, :channels], out[:, channels:] if out.shape[1] > channels else None


def _image(x: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    return (x - (1 - abar).sqrt() * noise) / abar.sqrt()


def _posterior(schedule: Schedule, x: Tensor, noise: Tensor, v: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of p(x_{t-1} | x_t)."""
    x0 = _image(x, noise, schedule.at("abar", t, x))
    mean = schedule.at("from_image", t, x) * x0 + schedule.at("from_noisy", t, x) * x
    log_most = schedule.at("beta", t, x).log()
    if v is None:
        return mean, log_most
    fraction = (v + 1) / 2
    return mean, fraction * log_most + (1 - fraction) * schedule.at("log_least", t, x)
