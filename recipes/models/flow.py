"""Rectified flow: the model learns the velocity of straight lines from data to noise.

    x_s = (1 - s) x_0 + s eps          s = sigmoid(n), n ~ N(0, 1)
    loss = mean (out[first C channels] - (eps - x_0))^2          the model is told t = 1000 s
    sampling: Euler from s = 1 to 0 in equal steps,  x <- x + (s' - s) v(x, 1000 s)

Sources: Liu et al., arXiv:2209.03003; logit-normal times, Esser et al., arXiv:2403.03206; as in the released code of
ProMoE, arXiv:2510.24711v2.
"""

import torch
from torch import Tensor

from gatewright.recipes.data.draw import Draw

from .objective import Model, Objective, Scored

TIME_SCALE = 1000


class Flow(Objective):
    name = "flow"

    def score(self, model: Model, x0: Tensor, labels: Tensor, draw: Draw) -> Scored:
        noise = draw.normal("noise", tuple(x0.shape[1:])).to(x0)
        s = draw.normal("time", (1,))[:, 0].sigmoid().to(x0)
        return self.score_at(model, x0, labels, noise, s, draw)

    def score_at(self, model: Model, x0: Tensor, labels: Tensor, noise: Tensor, s: Tensor, draw: Draw) -> Scored:
        """With noise [B, C, H, W] and place on the line s [B] given."""
        s_B111 = s[:, None, None, None]
        x = (1 - s_B111) * x0 + s_B111 * noise
        out, routings = self.ask(model, x, TIME_SCALE * s, labels, draw)
        target = noise - x0
        error = (out[:, : x0.shape[1]] - target).square().flatten(1).mean(1)
        return Scored(terms={"velocity": error}, target=target, routings=routings)

    def sample(self, model: Model, labels: Tensor, draw: Draw, *, guidance: float, steps: int, like: Tensor) -> Tensor:
        x = draw.normal("sample", self.config.input_shape).to(like)
        places = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        for here, there in zip(places[:-1], places[1:], strict=True):
            t = torch.full((len(x),), TIME_SCALE * here, dtype=x.dtype, device=x.device)
            velocity = self.guide(model, x, t, labels, guidance)[:, : x.shape[1]]
            x = x + (there - here) * velocity
        return x
