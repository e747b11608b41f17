"""The authors' own training run of the whole ProMoE transformer, in float64, against ours through the converter."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gatewright.moe import MoELayer, finish_step
from gatewright.recipes.data.draw import Draw
from gatewright.recipes.models.dit import DiT
from gatewright.recipes.models.flow import Flow
from gatewright.recipes.models.promoe_weights import from_released, infer_config, to_released

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "promoe_dit_training.safetensors"

pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden cases are not beside the repository")


@pytest.fixture(scope="module")
def case():
    with safe_open(GOLDEN, "pt") as file:
        return file.metadata(), load_file(GOLDEN)


def make_model(case, backend):
    metadata, tensors = case
    released = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    options = {"contrastive_weight": float(metadata["contrastive_weight"]), "temperature": float(metadata["tau"])}
    options |= {"gate": metadata["gate"], "unconditional": True}
    config = infer_config(released, heads=int(metadata["heads"]), router_options=options)
    model = DiT(config, partial(MoELayer, backend=backend)).double()
    model.load_state_dict(from_released(released, config))
    return model


def test_shapes_tell_the_configuration(case):
    metadata, _ = case
    config = make_model(case, "reference").config
    assert config.input_shape == (int(metadata["channels"]), int(metadata["size"]), int(metadata["size"]))
    expected = [int(metadata[name]) for name in ("D", "depth", "E", "hidden", "patch", "null_label", "K")]
    found = [config.dim, config.depth, config.num_experts, config.expert_hidden, config.patch, config.num_classes]
    assert [*found, config.top_k] == expected
    assert config.moe_blocks == (1, 3) and config.shared_expert and config.learn_sigma


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_first_output(case, backend):
    _, tensors = case
    model = make_model(case, backend)
    s, noise, x0 = tensors["t"][0], tensors["noise"][0], tensors["x0"][0]
    s_B111 = s[:, None, None, None]
    out, routings = model((1 - s_B111) * x0 + s_B111 * noise, 1000 * s, tensors["labels"][0])
    assert (out - tensors["first_output"]).abs().max() < 1e-9
    assert len(routings) == 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_sixty_steps(case, backend):
    metadata, tensors = case
    model = make_model(case, backend)
    objective = Flow(model.config)
    betas = tuple(float(beta) for beta in metadata["betas"].split(","))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=float(metadata["lr"]), betas=betas, weight_decay=float(metadata["weight_decay"])
    )
    losses, norms = [], []
    for step in range(int(metadata["steps"])):
        draw = Draw(0, step, tuple(range(int(metadata["B"]))))
        given = [tensors[name][step] for name in ("x0", "labels", "noise", "t")]
        scored = objective.score_at(model, *given, draw)
        loss = scored.terms["velocity"].mean()
        (loss + sum(objective.auxiliary(scored.routings, scored.target).values())).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), float(metadata["clip"])))
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        finish_step(model)
    torch.testing.assert_close(torch.stack(losses), tensors["flow_loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.stack(norms), tensors["grad_norm"], rtol=1e-6, atol=0)
    final = to_released(model.state_dict(), model.config)
    for name, value in final.items():
        # a key's bias has no gradient but rounding, and Adam scales that up
        if not name.endswith("attn.qkv.bias"):
            torch.testing.assert_close(
                value, tensors[f"final.{name}"], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
