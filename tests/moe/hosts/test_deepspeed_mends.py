"""What DeepSpeed 0.19.8 does wrong about experts without saying so: each is mended, or refused with the reason."""

import copy
import os
from pathlib import Path

import pytest
import torch
from deepspeed_toy import MICRO_BATCHES, Run, micro_batch, train_plainly
from torch import nn

pytestmark = pytest.mark.distributed


# ---- gradient norm and clipping --------------------------------------------------------------------------------------


def check_norms(stage, dtype, clip, steps=3):
    with Run("promoe", stage=stage, ep=2, dtype=dtype, clip=clip) as run:
        return run.train(0, steps) | {"parameters": run.parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_norm_is_the_whole_models_without_clipping_too(ranks, stage):
    expected = train_plainly("promoe", 3, clip=0)
    for result in ranks(2).run(check_norms, stage, "float32", 0.0):
        torch.testing.assert_close(result["norms"], expected["norms"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_in_bfloat16_the_norm_counts_every_expert_too(ranks, stage):
    expected = train_plainly("promoe", 3)
    for result in ranks(2).run(check_norms, stage, "bfloat16", 0.5):
        torch.testing.assert_close(result["norms"], expected["norms"], rtol=3e-2, atol=0)


def check_deepspeeds_own_norm():
    """What the engine does without the mend: another norm, and none reported."""
    import deepspeed
    from deepspeed.runtime.utils import clip_grad_norm_

    with Run("promoe", stage=0, ep=2) as run:
        for number in range(run.rank, MICRO_BATCHES, run.world):
            run.engine.backward(run.engine(*micro_batch(0, number)))
            if number < MICRO_BATCHES - run.world:
                run.engine.step()
        clip_grad_norm_(run.engine.module.parameters(), 0.5, mpu=None)
        after = torch.stack([p.grad.norm() for p in run.engine.module.parameters() if p.grad is not None]).norm()
        assert deepspeed.runtime.engine.DeepSpeedEngine.clip_fp32_gradients._gatewright
        return after.item()


def test_deepspeeds_own_clipping_still_needs_the_mend(ranks):
    """If this fails, DeepSpeed clips rightly by itself: the mend can go."""
    results = ranks(2).run(check_deepspeeds_own_norm)
    assert abs(results[0] - results[1]) > 1e-4 or abs(results[0] - 0.5) > 1e-4


def check_bf16_start(weight_decay):
    """At ZeRO-0, the wrapper's construction must leave weights and Adam's step alone."""
    with Run("promoe", stage=0, ep=2, dtype="bfloat16", weight_decay=weight_decay, lr=0.1) as run:
        weights = {name: p.detach().float() for name, p in run.engine.module.named_parameters()}
        masters = run.state()["master"]
        state = run.engine.optimizer.optimizer.state
        return all(torch.equal(masters[n], w) for n, w in weights.items() if "experts" not in n), len(state)


def test_bfloat16_at_zero_0_begins_at_the_models_weights_and_step_0(ranks):
    assert ranks(2).run(check_bf16_start, 0.5) == [(True, 0), (True, 0)]


def check_other_engines():
    """Engines without our layers are left as they are."""
    import deepspeed

    from gatewright.moe.hosts.deepspeed import default_config

    model = nn.Linear(4, 4)
    config = default_config(zero_stage=0, clip=0.1) | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()
    assert engine.get_global_grad_norm() is None
    return engine.load_checkpoint("never-written")


def test_engines_without_our_layers_are_left_alone(ranks):
    assert ranks(1).run(check_other_engines) == [(None, None)]


# ---- ZeRO-3's leaf ---------------------------------------------------------------------------------------------------


class First(nn.Module):
    """A model whose first module is the MoE layer, on inputs that need no gradient."""

    def __init__(self, layer):
        super().__init__()
        self.moe, self.head = layer, nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.moe(x)[0]).square().mean()


def check_input_without_gradient(stage):
    import deepspeed

    from gatewright.moe import ExpertParallel, ExpertSpec
    from gatewright.moe.hosts.deepspeed import DeepSpeedMoELayer, default_config, full_parameters
    from gatewright.routers import create_router

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    router = create_router("topk", dim=16, num_experts=4, top_k=2)
    layer = DeepSpeedMoELayer(router, ExpertSpec(16, 8, "gelu"), parallel=ExpertParallel.create(2))
    config = default_config(zero_stage=stage, lr=0.01, clip=0.0)
    model = First(layer)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for step in range(3):
        engine.backward(engine(torch.randn(6, 16, generator=torch.Generator().manual_seed(step))))
        engine.step()
    result = {name: value.clone() for name, value in full_parameters(engine)}
    engine.destroy()
    return result


def test_a_layer_on_inputs_without_gradient_trains_at_zero_3(ranks):
    (plain, _), (partitioned, _) = (ranks(2).run(check_input_without_gradient, stage) for stage in (0, 3))
    for name, value in plain.items():
        torch.testing.assert_close(partitioned[name], value, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# ---- the layout ------------------------------------------------------------------------------------------------------


def check_layouts():
    from gatewright.moe import ExpertParallel, ExpertSpec
    from gatewright.moe.hosts.deepspeed import DeepSpeedMoELayer
    from gatewright.routers import create_router

    messages = {}

    def expect(what, action):
        with pytest.raises(ValueError) as caught:
            action()
        messages[what] = str(caught.value)

    expect("world", lambda: ExpertParallel.create(3))
    expect("experts", lambda: Run("topk", ep=2, num_experts=3))
    expect("order", lambda: Run("topk", ep=2, config={"use_data_before_expert_parallelism": True}))
    other = torch.distributed.new_group([1, 0])
    layout = ExpertParallel(size=2, rank=1 - torch.distributed.get_rank(), group=other)
    layer = DeepSpeedMoELayer(create_router("topk", dim=4, num_experts=2), ExpertSpec(4, 4), parallel=layout)
    expect("direct", lambda: layer.set_deepspeed_parallelism(True))
    expect("folding", lambda: layer.set_deepspeed_parallelism(False, folding_group_handles=object()))
    router = create_router("topk", dim=4, num_experts=2)
    router.scale_of_logits = torch.nn.Parameter(torch.ones(()))
    expect("scalar", lambda: DeepSpeedMoELayer(router, ExpertSpec(4, 4), parallel=layout))
    layer.parallel = ExpertParallel(size=2, rank=layer.ep_rank, group=torch.distributed.new_group([0]))
    if torch.distributed.get_rank() == 0:
        expect("groups", lambda: layer.set_deepspeed_parallelism())
    else:
        layer.parallel = layout
        layer.set_deepspeed_parallelism()
    return messages


def test_layouts_that_do_not_fit_are_refused(ranks):
    for messages in ranks(2).run(check_layouts):
        assert "does not divide 2 ranks: choose one of [1, 2]" in messages["world"]
        assert "3 routed experts do not divide over expert parallelism 2" in messages["experts"]
        assert "use_data_before_expert_parallelism" in messages["order"]
        assert "neighbouring ranks" in messages["direct"]
        assert "tensor_parallel" in messages["folding"]
        assert "router.scale_of_logits" in messages["scalar"] and "torch.ones(1)" in messages["scalar"]
    assert "the layer's group is ranks [0], the engine's [0, 1]" in ranks(2).run(check_layouts)[0]["groups"]


def check_tags_survive():
    from gatewright.moe import ExpertSpec
    from gatewright.moe.hosts.deepspeed import DeepSpeedMoELayer
    from gatewright.routers import create_router

    layer = DeepSpeedMoELayer(create_router("topk", dim=4, num_experts=2), ExpertSpec(4, 4), device="meta")
    layer.experts.to_empty(device="cpu")
    for twin in (layer.to_empty(device="cpu"), copy.deepcopy(layer)):
        for parameter in twin.experts.parameters():
            assert parameter.allreduce is False and parameter.group_name == "ep_size_1"
            assert parameter.ds_autoep_uc_meta["logical_shape"][0] == 2
    return True


def test_tags_survive_leaving_the_meta_device_and_copying(ranks):
    assert ranks(1).run(check_tags_survive) == [True]


# ---- DeepSpeed's own checkpoints -------------------------------------------------------------------------------------


def check_native_save(folder, **options):
    with Run(**options) as run:
        run.train(0, 2)
        run.engine.save_checkpoint(str(folder))
        return run.train(2, 3)


def check_native_load(folder, steps_after=1, load=None, **options):
    """The message of the refusal, or what the next steps give."""
    with Run(**options) as run:
        before = run.parameters()
        try:
            run.engine.load_checkpoint(str(folder), **(load or {}))
        except ValueError as error:
            after = run.parameters()
            assert all(torch.equal(after[name], value) for name, value in before.items())
            return str(error)
        return run.train(2, 2 + steps_after)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_native_checkpoints_load_at_their_layout_and_at_no_other(ranks, tmp_path, stage):
    expected = ranks(2).run(check_native_save, tmp_path, router="topk", stage=stage, ep=2)
    same = ranks(2).run(check_native_load, tmp_path, router="topk", stage=stage, ep=2)
    assert [result["losses"] for result in same] == [result["losses"] for result in expected]
    for message in ranks(2).run(check_native_load, tmp_path, router="topk", stage=stage, ep=1):
        assert "was saved at expert parallelism 2, this run has 1" in message
        assert "use save_checkpoint and load_checkpoint" in message


@pytest.mark.parametrize("stage", [1, 3])
def test_native_weights_alone_change_layout_where_deepspeed_does_it_rightly(ranks, tmp_path, stage):
    ranks(2).run(check_native_save, tmp_path, router="topk", stage=stage, ep=2)
    expected = ranks(2).run(
        check_native_load, tmp_path, router="topk", stage=stage, ep=2, load={"load_module_only": True}
    )
    results = ranks(2).run(
        check_native_load, tmp_path, router="topk", stage=stage, ep=1, load={"load_module_only": True}
    )
    for result, same in zip(results, expected, strict=True):
        if stage == 3:
            assert "was saved at expert parallelism 2, this run has 1" in result
        else:
            torch.testing.assert_close(result["losses"], same["losses"], rtol=1e-6, atol=0)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("which", ["*model_states.pt", "*optim_states.pt", "expert"])
def test_a_native_checkpoint_that_would_run_code_is_refused(ranks, tmp_path, which):
    folder, trace = tmp_path / "run", tmp_path / "trace"
    ranks(2).run(check_native_save, folder, router="topk", stage=1, ep=2)
    file = sorted(folder.rglob("*expert_1*" if which == "expert" else which))[0]
    torch.save({"module": Evil(trace)}, file)
    for message in ranks(2).run(check_native_load, folder, router="topk", stage=1, ep=2):
        assert file.name in message and "could run code" in message
    assert not trace.exists()


def test_other_folders_are_refused(ranks, tmp_path):
    (tmp_path / "latest").write_text("step-1")
    options = {"router": "topk", "stage": 0, "ep": 1}
    assert "is no folder" in ranks(1).run(check_native_load, tmp_path, **options)[0]
    (tmp_path / "step-1").mkdir()
    assert "it is no DeepSpeed checkpoint" in ranks(1).run(check_native_load, tmp_path, **options)[0]
    (tmp_path / "step-1" / "checkpoint.json").write_text("{}")
    assert "load it by load_checkpoint(engine, path)" in ranks(1).run(check_native_load, tmp_path, **options)[0]


def check_universal(folder):
    """The guard, past the configuration, which refuses universal loading too."""
    from gatewright.moe.hosts.deepspeed import DeepSpeedMoELayer
    from gatewright.moe.hosts.deepspeed_native import check_native_checkpoint

    with Run("topk", stage=3, ep=2) as run:
        layers = [m for m in run.engine.module.modules() if isinstance(m, DeepSpeedMoELayer)]
        with pytest.raises(ValueError, match="at ZeRO-3 counts Adam's step wrongly"):
            check_native_checkpoint(run.engine, layers, Path(folder), weights_only=False, universal=True)
    with pytest.raises(ValueError, match="checkpoint.load_universal=true is not supported"):
        Run("topk", stage=1, ep=2, config={"checkpoint": {"load_universal": True}})
    return True


def test_universal_checkpoints_are_refused(ranks, tmp_path):
    assert ranks(2).run(check_universal, tmp_path) == [True, True]


class Attribute:
    """Pickled as ``getattr(of, name)``, as Python before 3.11.4 pickles a member of an enumeration."""

    def __init__(self, of, name):
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def test_attributes_in_pickles_are_members_of_one_enumeration_only(tmp_path):
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    from gatewright.moe.hosts.deepspeed_native import check_pickles

    torch.save({"stage": Attribute(ZeroStageEnum, "gradients"), "x": torch.ones(2)}, tmp_path / "good.pt")
    check_pickles(tmp_path)
    for of, name in ((fragment_address, "__init__"), (ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro")):
        torch.save({"stage": Attribute(of, name)}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match="bad.pt does not load with weights_only=True"):
            check_pickles(tmp_path)
