"""Expert activations: a = f(h), and from the gradient of a, that of h with a computed again.

    gelu, gelu_tanh, relu, relu2 = relu(h)^2, silu        [N, H]  -> [N, H]
    swiglu = silu(gate) * up, geglu = gelu(gate) * up     [N, 2H] -> [N, H]      gate is the first half of h

``activate`` is the definition, in differentiable operations. ``activate_into`` and ``activation_backward_into`` write
into given tensors in as few passes as torch's own kernels allow; ``h``, ``a`` and ``dh`` must not overlap.
"""

import difflib

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu")
GATED = ("swiglu", "geglu")
_GATE = {"swiglu": "silu", "geglu": "gelu"}
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}

_aten = torch.ops.aten


def check_activation(activation: str) -> None:
    """Raises ValueError where ``activation`` is not one of ``ACTIVATIONS``."""
    if activation not in ACTIVATIONS:
        close = difflib.get_close_matches(str(activation), ACTIVATIONS, n=1)
        hint = f'did you mean "{close[0]}"? ' if close else ""
        choices = ", ".join(f'"{name}"' for name in ACTIVATIONS)
        raise ValueError(f'activation="{activation}" does not exist: {hint}Choose {choices}')


def activate(h: Tensor, activation: str) -> Tensor:
    """[N, H'] -> [N, H], with H' = 2H where the activation is gated and H' = H where not."""
    if activation in GATED:
        gate, up = h.chunk(2, dim=-1)
        return activate(gate, _GATE[activation]) * up
    if activation in _APPROXIMATE:
        return F.gelu(h, approximate=_APPROXIMATE[activation])
    if activation == "silu":
        return F.silu(h)
    return F.relu(h) if activation == "relu" else F.relu(h).square()


def activate_into(h: Tensor, a: Tensor, activation: str) -> None:
    """Writes f(h), [N, H'], into ``a``, [N, H]."""
    if activation in GATED:
        gate, up = h.chunk(2, dim=-1)
        activate_into(gate, a, _GATE[activation])
        a.mul_(up)
    elif activation in _APPROXIMATE:
        _aten.gelu.out(h, approximate=_APPROXIMATE[activation], out=a)
    elif activation == "silu":
        _aten.silu.out(h, out=a)
    else:
        torch.clamp_min(h, 0, out=a)
        if activation == "relu2":
            a.mul_(a)


def activation_backward_into(h: Tensor, da: Tensor, a: Tensor, dh: Tensor, activation: str) -> None:
    """From ``h`` [N, H'] and the gradient ``da`` [N, H] writes f(h) into ``a`` and the gradient of h into ``dh``."""
    if activation in GATED:
        gate, up = h.chunk(2, dim=-1)
        dgate, dup = dh.chunk(2, dim=-1)
        activate_into(gate, dup, _GATE[activation])
        torch.mul(dup, up, out=a)
        dup.mul_(da)
        torch.mul(da, up, out=dgate)
        _derivative_into(gate, dgate, dgate, _GATE[activation])
    else:
        activate_into(h, a, activation)
        _derivative_into(h, da, dh, activation)


def _derivative_into(h: Tensor, da: Tensor, dh: Tensor, activation: str) -> None:
    """Writes da * f'(h) into ``dh``, which may be ``da``."""
    if activation in _APPROXIMATE:
        _aten.gelu_backward.grad_input(da, h, approximate=_APPROXIMATE[activation], grad_input=dh)
    elif activation == "silu":
        _aten.silu_backward.grad_input(da, h, grad_input=dh)
    else:
        _aten.threshold_backward.grad_input(da, h, 0, grad_input=dh)
        if activation == "relu2":
            dh.mul_(h).mul_(2)
