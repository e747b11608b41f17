"""DeepSpeed as a host: the MoE layer that its engine trains, and what its engine does wrong about experts, mended.

    import deepspeed
    from gatewright.moe import ExpertParallel, ExpertSpec
    from gatewright.moe.hosts.deepspeed import DeepSpeedMoELayer, default_config

    deepspeed.init_distributed()
    parallel = ExpertParallel.create(2)
    model = MyModel(layer=lambda i: DeepSpeedMoELayer(create_router(...), ExpertSpec(...), parallel=parallel, layer=i))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=default_config(...))

Nothing else is to be called: ZeRO 0 to 3, float32 and bfloat16, accumulation, clipping, any expert parallelism that
divides the ranks. ``TokenContext`` is filled by the model that calls the layer, as without an engine.

Why the layer is made as it is (read in DeepSpeed 0.19.8):

* The engine splits optimizer groups, reduces gradients and finds expert groups for two classes only, told by
  ``isinstance``. So the layer is a subclass of ``AutoEPMoELayer`` whose constructor, which converts a transformers
  block, is passed by.
* The engine reads tags and placement from the three parameters ``experts.w1``, ``w2``, ``w3``.
* The whole layer is a leaf for ZeRO-3: its hooks look for tensors in what a module returns and do not see into a
  ``Routing``.

What importing this file mends, for engines that hold such a layer and for no others:

* float32 at ZeRO-0: the engine averages the ranks' gradient norms, which is wrong where ranks hold different experts,
  and reports no norm. Here it clips by, and reports, the norm of the whole model.
* bfloat16 at ZeRO-0: the norm leaves the experts out, and the optimizer is stepped once at construction, which counts a
  step and decays the weights.
* ``engine.load_checkpoint`` loads a ZeRO-1/2 checkpoint at another expert parallelism without an error and with wrong
  optimizer state, a universal one without buffers and, at ZeRO-3, with a wrong count of Adam's steps, and unpickles
  whatever it finds. Each is refused before anything is read (``deepspeed_native``); ``save_checkpoint`` and
  ``load_checkpoint`` of this package do it right (``deepspeed_checkpoint``).
And for every process that imports this file:

* On a CPU the engine's start compiles a shared-memory operator that only its inference all-reduce uses. That needs a
  compiler and takes most of a minute, and a start that is killed meanwhile leaves a lock behind that lets every later
  one wait for ever, saying nothing. It is left out; that all-reduce then goes through the process group.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from deepspeed import ops
    from deepspeed.checkpoint.autoep_affine import (
        autoep_experts_for_rank,
        autoep_placement_to_affine_map,
        legacy_uniform_autoep_placement_descriptor,
    )
    from deepspeed.checkpoint.constants import (
        AFFINE_MAP,
        AUTOEP_EXPERT_PLACEMENT,
        AUTOEP_PARAM_EP_RANK,
        AUTOEP_PARAM_LOCAL_EXPERTS,
        AUTOEP_PARAM_LOGICAL_SHAPE,
        DS_AUTOEP_UC_META,
    )
    from deepspeed.module_inject.auto_ep_comm import COMM_BACKEND
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
except ImportError as error:
    raise ImportError(
        "gatewright.moe.hosts.deepspeed needs DeepSpeed 0.19.8 or newer, below 0.20: pip install gatewright[deepspeed]"
    ) from error

from ...routers.base import Router, Routing, TokenContext
from ..experts import ExpertSpec
from ..layer import MoELayerCode, moe_layers
from ..parallel import ExpertParallel, clip_gradients, grad_norm
from .checkpoint_files import checkpoint_buffers, checkpoint_parameters, find_latest, read_manifest
from .deepspeed_checkpoint import load_checkpoint, save_checkpoint
from .deepspeed_config import check_config, default_config, read_config
from .deepspeed_ema import EMA, ema_parameters, full_parameters
from .deepspeed_native import check_native_checkpoint

ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = [
    "EMA",
    "DeepSpeedMoELayer",
    "check_config",
    "checkpoint_buffers",
    "checkpoint_parameters",
    "default_config",
    "ema_parameters",
    "find_latest",
    "full_parameters",
    "global_grad_norm",
    "load_checkpoint",
    "read_config",
    "read_manifest",
    "save_checkpoint",
]


class DeepSpeedMoELayer(MoELayerCode, AutoEPMoELayer):
    """``MoELayer`` as DeepSpeed's engine wants it; the same arguments, the same results.

    Args:
        router, spec, options: see ``MoELayer``. ``parallel`` comes from ``ExpertParallel.create(size)``, called after
            ``deepspeed.init_distributed()``; the engine's own groups are checked to agree with it.
    """

    def __init__(self, router: Router, spec: ExpertSpec, **options: Any) -> None:
        nn.Module.__init__(self)
        self.build(router, spec, **options)
        if any(hasattr(parameter, "ds_id") for parameter in self.experts.parameters()):
            raise ValueError(
                "inside deepspeed.zero.Init experts are split over the wrong ranks: build the model outside"
            )
        without_dimension = [name for name, parameter in self.named_parameters() if parameter.dim() == 0]
        if without_dimension:
            # it broadcasts every parameter by a view of its bytes
            raise ValueError(
                f"parameters {', '.join(without_dimension)} are numbers without a dimension, which DeepSpeed's engine "
                "cannot broadcast: make each a vector of one, torch.ones(1)"
            )
        self._describe_to_engine()

    def _describe_to_engine(self) -> None:
        """Sets what the engine reads from an ``AutoEPMoELayer``."""
        self.num_experts = self.router.num_experts
        self.num_local_experts = len(self.experts.ids)
        self.ep_size, self.ep_rank = self.parallel.size, self.parallel.rank
        self.ep_group_name = _group_name(self.parallel)
        self.ep_group = self.tp_group = self.folding_group_handles = None
        self.comm_backend, self.combine_impl = COMM_BACKEND, "weighted_sum"
        self.expert_placement_descriptor = _placement(self.router, self.parallel)
        self._z3_leaf = True

    def _tag_expert_parameters(self) -> None:
        placement = _placement(self.router, self.parallel)
        for parameter in self.experts.parameters():
            # False also without expert parallelism: ZeRO-1/2 insist on an optimizer group of experts
            parameter.allreduce = False
            parameter.group_name = parameter.ds_zero_partition_group_name = _group_name(self.parallel)
            parameter.ds_zero_placement_family = "autoep_expert"
            logical_shape = [self.router.num_experts, *getattr(parameter, "ds_shape", parameter.shape)[1:]]
            metadata = {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, logical_shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
                AUTOEP_PARAM_EP_RANK: self.parallel.rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.parallel.rank)),
            }
            setattr(parameter, DS_AUTOEP_UC_META, metadata)

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
    ) -> None:
        """Called by the engine: makes its groups, and checks that they are those that the layer travels over.

        Raises:
            ValueError: the configuration lays the ranks out in another way than ``ExpertParallel`` does.
        """
        if use_data_before_expert_parallel_:
            raise ValueError(
                "use_data_before_expert_parallelism=true: ExpertParallel gives neighbouring ranks one group; remove it"
            )
        if folding_group_handles is not None:
            raise ValueError("tensor_parallel: a gatewright layer holds whole experts; remove it")
        super().set_deepspeed_parallelism(False, None)
        mine = (
            dist.get_process_group_ranks(self.parallel.group) if self.parallel.group is not None else [dist.get_rank()]
        )
        engines = dist.get_process_group_ranks(self.ep_group)
        if mine != engines:
            raise ValueError(
                f"expert parallelism {self.ep_size}: the layer's group is ranks {mine}, the engine's {engines}. "
                "Make the groups by ExpertParallel.create(size), without pipeline or sequence parallelism"
            )

    def __call__(self, x: Tensor, context: TokenContext | None = None) -> tuple[Tensor, Routing]:
        if torch.is_grad_enabled() and not x.requires_grad:
            # ZeRO-3 collects a leaf's gradients once that of its input is there: without one, before they exist
            x = x + x.new_zeros((), requires_grad=True)
        return super().__call__(x, context)


def _group_name(parallel: ExpertParallel) -> str:
    return f"ep_size_{parallel.size}"


def _placement(router: Router, parallel: ExpertParallel) -> dict[str, Any]:
    """Which rank holds which experts, in DeepSpeed's words: contiguous blocks, as ``ExpertParallel`` has them."""
    return legacy_uniform_autoep_placement_descriptor(
        router.num_experts, router.num_experts // parallel.size, parallel.size
    )


def our_layers(engine: DeepSpeedEngine) -> list[DeepSpeedMoELayer]:
    """The engine's layers of this host, looked for once."""
    if "_gatewright_layers" not in engine.__dict__:
        engine._gatewright_layers = [m for m in engine.module.modules() if isinstance(m, DeepSpeedMoELayer)]
    return engine._gatewright_layers


def expert_parallel(model: nn.Module) -> ExpertParallel:
    """The layout of the model's MoE layers; one process that holds every expert where there is none.

    Raises:
        ValueError: the layers differ in it.
    """
    layouts = {(layer.parallel.size, layer.parallel.rank): layer.parallel for layer in moe_layers(model)}
    if len(layouts) > 1:
        raise ValueError(
            f"MoE layers of one model at expert parallelism {sorted(size for size, _ in layouts)}: choose one for all"
        )
    return next(iter(layouts.values()), ExpertParallel())


def global_grad_norm(engine: DeepSpeedEngine) -> float:
    """The 2-norm of the whole model's gradient, before clipping, at the last step: the same on every rank.

    Raises:
        RuntimeError: there was no step yet.
    """
    norm = engine.get_global_grad_norm()
    if norm is None:
        raise RuntimeError("there is no gradient norm before the first optimizer step")
    return float(norm)


def _mend(name: str):
    """Replaces a method of the engine by ``mended(engine, original, *args)``, for engines with our layers."""

    def decorate(mended):
        original = getattr(DeepSpeedEngine, name)
        if hasattr(original, "_gatewright"):
            return mended

        @functools.wraps(original)
        def method(engine, *args, **kwargs):
            if not our_layers(engine):
                return original(engine, *args, **kwargs)
            return mended(engine, functools.partial(original, engine), *args, **kwargs)

        method._gatewright = True
        setattr(DeepSpeedEngine, name, method)
        return mended

    return decorate


@_mend("clip_fp32_gradients")
def _clip_fp32_gradients(engine, original) -> None:
    engine._global_grad_norm = clip_gradients(
        engine.module.parameters(), engine.gradient_clipping(), expert_parallel(engine.module)
    )


@_mend("_take_model_step")
def _take_model_step(engine, original, lr_kwargs) -> None:
    in_float32 = not (engine.fp16_enabled() or engine.bfloat16_enabled() or engine.zero_optimization())
    if in_float32 and engine.gradient_clipping() == 0:
        engine._global_grad_norm = grad_norm(engine.module.parameters(), expert_parallel(engine.module))
    original(lr_kwargs)


@_mend("_configure_optimizer")
def _configure_optimizer(engine, original, client_optimizer, model_parameters) -> None:
    check_config(engine._config._param_dict)
    original(client_optimizer, model_parameters)


@_mend("_configure_fp16_optimizer")
def _configure_fp16_optimizer(engine, original, optimizer, low_precision_dtype):
    """The wrapper that bfloat16 gets at ZeRO-0, with the step that it took at construction undone."""
    wrapper = original(optimizer, low_precision_dtype)
    with torch.no_grad():
        if isinstance(wrapper, FP16_Optimizer):
            for master, model in zip(wrapper.fp32_groups_flat, wrapper.fp16_groups_flat, strict=True):
                master.copy_(model)
        else:
            for masters, models in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
                for master, model in zip(masters, models, strict=True):
                    master.copy_(model)
    wrapper.optimizer.state.clear()
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        wrapper.unscale_and_clip_grads = functools.partial(
            _unscale_and_clip_grads, engine, wrapper, wrapper.unscale_and_clip_grads
        )
    return wrapper


def _unscale_and_clip_grads(engine, wrapper, original, total_norm, apply_scale: bool = True):
    models = [p for group in wrapper.fp16_groups for p in group]
    masters = [p for group in wrapper.fp32_groups for p in group]
    wrapper._global_grad_norm = float(grad_norm(models, expert_parallel(engine.module), [p.grad for p in masters]))
    return original(wrapper._global_grad_norm, apply_scale)


@_mend("load_checkpoint")
def _load_native_checkpoint(
    engine,
    original,
    load_dir,
    tag=None,
    load_module_strict=True,
    load_optimizer_states=True,
    load_lr_scheduler_states=True,
    load_module_only=False,
    custom_load_fn=None,
):
    universal = engine.load_universal_checkpoint()
    pointer = Path(load_dir) / ("latest_universal" if universal else "latest")
    name = tag if tag is not None or not pointer.is_file() else pointer.read_text().strip()
    if name is not None:
        check_native_checkpoint(
            engine,
            our_layers(engine),
            Path(load_dir) / str(name),
            weights_only=load_module_only or not load_optimizer_states,
            universal=universal,
        )
    return original(
        load_dir,
        tag=tag,
        load_module_strict=load_module_strict,
        load_optimizer_states=load_optimizer_states,
        load_lr_scheduler_states=load_lr_scheduler_states,
        load_module_only=load_module_only,
        custom_load_fn=custom_load_fn,
    )
