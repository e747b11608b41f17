"""The golden cases: inputs, parameters, outputs and gradients that the papers' own code computed in float64.

They lie beside the repository, not in it; a test that needs one skips, saying so, where it is missing.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from gatewright.moe import ExpertSpec, FeedForward, MoELayer

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"


def load_golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of ``shared/golden/NAME.safetensors``."""
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"golden case {path} is not on this machine")
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def assert_equal(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    assert actual is not None, f"{what} is missing"
    error = (actual.reshape(expected.shape) - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance, f"{what} differs by {error:.3g}, more than {tolerance:.1g}"


def golden_layer(router, case: dict[str, Tensor], meta: dict[str, str], backend: str) -> MoELayer:
    """A float64 layer of GELU(tanh) experts with biases, holding the case's; ids beyond the routed ones are local."""
    spec = ExpertSpec(int(meta["D"]), int(meta["H"]), activation="gelu_tanh", bias=True)
    shared = FeedForward(spec) if "param.shared_expert.up_proj.weight" in case else None
    layer = MoELayer(router, spec, shared=shared, backend=backend).double()
    with torch.no_grad():
        for bank, row, expert in _places(layer):
            for view, name in _expert_views(bank, row):
                view.copy_(case[f"param.experts.{expert}.{name}"])
        if shared is not None:
            for part, name in ((shared.up, "up_proj"), (shared.down, "down_proj")):
                part.weight.copy_(case[f"param.shared_expert.{name}.weight"])
                part.bias.copy_(case[f"param.shared_expert.{name}.bias"])
    return layer


def assert_expert_gradients(layer: MoELayer, case: dict[str, Tensor]) -> None:
    for bank, row, expert in _places(layer):
        for view, name in _expert_views(bank, row, gradient=True):
            assert_equal(view, case[f"grad.experts.{expert}.{name}"], f"gradient of expert {expert} {name}")
    if layer.shared is not None:
        for part, name in ((layer.shared.up, "up_proj"), (layer.shared.down, "down_proj")):
            assert_equal(
                part.weight.grad, case[f"grad.shared_expert.{name}.weight"], f"gradient of shared {name}.weight"
            )
            assert_equal(part.bias.grad, case[f"grad.shared_expert.{name}.bias"], f"gradient of shared {name}.bias")


def _places(layer: MoELayer):
    for bank in (layer.experts, layer.local_experts):
        if bank is not None:
            yield from ((bank, row, expert) for row, expert in enumerate(bank.ids))


def _expert_views(bank, row: int, gradient: bool = False):
    w1, w2, w3 = (p.grad if gradient else p for p in (bank.w1, bank.w2, bank.w3))
    rows_in = bank.spec.rows_in
    return (
        (w1[row], "up_proj.weight"),
        (w3[row, 0, :rows_in], "up_proj.bias"),
        (w2[row], "down_proj.weight"),
        (w3[row, 0, rows_in:], "down_proj.bias"),
    )
