"""A run folder as a recipe leaves it, made without an engine: a small model, its weights and an average of them."""

import torch

from gatewright.moe import MoELayer
from gatewright.moe.hosts.checkpoint_files import ShardWriter, begin, complete, expert_key
from gatewright.recipes.models.dit import DiT
from gatewright.recipes.models.dit_config import dit_config
from gatewright.tools.runs import Run

STEP = 30
OPTIONS = {"objective": "flow", "data": "digits"}


def small_config(router="promoe", **overrides):
    return dit_config("tiny", router, **{"input_shape": (1, 8, 8), "dim": 32, "depth": 4, **overrides})


def opened(model, seed=0):
    """Weights that adaLN-Zero starts at zero get values, so that something comes out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
    return model


def make_run(path, config=None, *, averaged=True, options=OPTIONS):
    """Writes the run; returns the trained model and the averaged one."""
    config = config or small_config()
    trained, average = opened(DiT(config), seed=1), opened(DiT(config, seed=5), seed=2)
    Run(path=path, model="dit", config=config.as_dict(), options=dict(options)).write({"gatewright": "0"})
    folder, saving = begin(path / "checkpoints", STEP)
    writer = ShardWriter(saving, "rank-00000", 2**20)
    banks = {
        f"{name}.experts.{part}": module.experts.ids
        for name, module in trained.named_modules()
        if isinstance(module, MoELayer)
        for part in ("w1", "w2", "w3")
    }
    for kind, model in {"master": trained, "ema": average}.items():
        if kind == "master" or averaged:
            for parameter, tensor in model.named_parameters():
                for row, expert in enumerate(banks.get(parameter, [])):
                    writer.add(expert_key(kind, parameter, expert), tensor[row])
                if parameter not in banks:
                    writer.add(f"{kind}/{parameter}", tensor)
    parameters = {n: {"trainable": True, "experts": banks.get(n)} for n, _ in trained.named_parameters()}
    buffers = {n: t for n, t in trained.state_dict().items() if n not in parameters}
    for buffer, tensor in buffers.items():
        writer.add(f"buffer/{buffer}", tensor)
    writer.close()
    assert writer.error is None
    manifest = {
        "kinds": ["ema", "exp_avg", "exp_avg_sq"] if averaged else ["exp_avg", "exp_avg_sq"],
        "parameters": parameters,
        "model": {"buffers": {n: list(t.shape) for n, t in buffers.items()}},
        "counters": {"global_steps": STEP},
        "extra": {"step": STEP},
        "files": writer.files,
    }
    complete(saving, folder, manifest, keep=2)
    return trained, average
