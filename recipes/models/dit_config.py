"""What a diffusion transformer is made of, and the sizes of the papers.

| size | depth | dim | heads | input | patch |
|---|---|---|---|---|---|
| tiny | 6 | 96 | 4 | 1 x 28 x 28 digits | 4 (2 up to 16 x 16) |
| S, B, L, XL | 12, 12, 24, 28 | 384, 768, 1024, 1152 | 6, 12, 16, 16 | 4 x 32 x 32 latents | 2 |

A dense feed-forward has hidden width 4 * dim. Experts stand in every second block (1, 3, 5, ...), and a token activates
4 * dim hidden units in them, whatever the router:

| router | routed experts (tiny) | hidden | a token gets | besides |
|---|---|---|---|---|
| promoe | 12 (6) | 2 * dim | 1 | the unconditional expert; a shared one |
| topk, expert_choice, diffmoe, and others | 8 (4) | 4 * dim | 1 | |
| race | 32 (16) | dim | 4 on average | |
| dense | | 4 * dim | | |

Sources: ProMoE, arXiv:2510.24711v2, table 2 and the released configurations, the baselines included; race's 4 in 32
from Expert Race, arXiv:2503.16057, table 4, here in every second block.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

from gatewright.routers import list_routers

DENSE = "dense"
# what a field's annotation admits; what comes out of JSON may be anything
KINDS = {
    int: int,
    float: int | float,
    bool: bool,
    str: str,
    tuple[int, int, int]: tuple,
    int | tuple[int, ...]: int | tuple,
    tuple[tuple[int, ...], ...]: tuple,
    Mapping[str, Any]: Mapping,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """What rebuilds a model. JSON: ``DiTConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config``.

    Attributes:
        input_shape: (C, H, W) of an image or a latent.
        num_classes: label ``num_classes`` stands for "no label".
        patch: side of a patch; tokens L = (H / patch) * (W / patch).
        dim: token width, D.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden width of a dense feed-forward over dim.
        learn_sigma: twice as many output channels; the ddpm objective reads its variance from them, flow nothing.
        qk_norm: layer norm on queries and keys, for the stability of very long runs.
        label_dropout: with which probability training hides a label.
        router: a router's name, or "dense".
        router_options: besides dim, num_experts and top_k.
        num_experts: routed experts of a layer, or of each MoE block in order, as pruning may leave them. 0 where dense,
            as the three below.
        kept_experts: of each MoE block, the experts that are there, where pruning removed the others and left the
            router as it was: their tokens get nothing from them. Empty = all are there.
        top_k: experts a token (on average, for some routers); not for routers that have no such option.
        expert_hidden: hidden width of an expert, the shared one included.
        shared_expert: whether one more expert runs on every token.
        moe_every: 2 = in blocks 1, 3, 5, ...; 1 = in all.

    Raises:
        ValueError: a value outside its range, or values that do not go together.
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    patch: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    learn_sigma: bool = True
    qk_norm: bool = False
    label_dropout: float = 0.1
    router: str = DENSE
    router_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_experts: int | tuple[int, ...] = 0
    kept_experts: tuple[tuple[int, ...], ...] = ()
    top_k: float = 0
    expert_hidden: int = 0
    shared_expert: bool = False
    moe_every: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), KINDS[field.type]
            if not isinstance(value, kind) or (isinstance(value, bool) and field.type is not bool):
                raise ValueError(f"{field.name}={value!r}: expected {getattr(field.type, '__name__', field.type)}")
        if len(self.input_shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in self.input_shape):
            raise ValueError(f"input_shape={self.input_shape}: give (channels, height, width), each at least 1")
        for name in ("num_classes", "patch", "dim", "depth", "heads", "moe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose at least 1")
        _, height, width = self.input_shape
        if height % self.patch or width % self.patch:
            sides = [side for side in range(1, min(height, width) + 1) if height % side == width % side == 0]
            raise ValueError(
                f"patch={self.patch} does not divide an input of {height} x {width}: choose one of {sides}"
            )
        if self.dim % 4:
            raise ValueError(f"dim={self.dim}: choose a multiple of 4, for the sines and cosines of two axes")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}: choose a divisor of it")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout={self.label_dropout}: choose 0 to 1")
        if not 1 <= self.mlp_ratio * self.dim < math.inf:
            raise ValueError(f"mlp_ratio={self.mlp_ratio}: choose a positive number, 4 in the papers")
        self._check_experts()

    def _check_experts(self) -> None:
        if self.router == DENSE:
            names = ("num_experts", "kept_experts", "top_k", "expert_hidden", "shared_expert")
            set_values = [name for name in names if getattr(self, name)]
            if set_values or self.router_options:
                given = ", ".join([*set_values, *["router_options"] * bool(self.router_options)])
                raise ValueError(f'router="dense" has no experts: leave out {given}, or name a router')
            return
        known = [*list_routers(), DENSE]
        if self.router not in known:
            raise ValueError(f'unknown router "{self.router}"{_suggest(self.router, known)}')
        counts = self.num_experts if isinstance(self.num_experts, tuple) else (self.num_experts,)
        if not counts or not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
            raise ValueError(f"num_experts={self.num_experts!r}: expected int, or one int for each MoE block")
        if isinstance(self.num_experts, tuple):
            if len(counts) != len(self.moe_blocks):
                blocks = ", ".join(map(str, self.moe_blocks))
                raise ValueError(f"num_experts={self.num_experts}: give one number, or one for each of blocks {blocks}")
            if len(set(counts)) == 1:
                object.__setattr__(self, "num_experts", counts[0])
        if min(counts) < 1 or self.expert_hidden < 1 or not 0 < self.top_k <= min(counts):
            raise ValueError(
                f"num_experts={self.num_experts}, top_k={self.top_k}, expert_hidden={self.expert_hidden}: "
                "all must be positive, and top_k at most num_experts"
            )
        if self.kept_experts and (
            len(self.kept_experts) != len(self.moe_blocks)
            or not all(isinstance(ids, tuple) and all(isinstance(i, int) for i in ids) for ids in self.kept_experts)
        ):
            raise ValueError(
                f"kept_experts={self.kept_experts}: give a list of ids for each of {len(self.moe_blocks)} MoE blocks"
            )
        if self.top_k == int(self.top_k):
            object.__setattr__(self, "top_k", int(self.top_k))  # routers that count experts a token want a whole number
        if json.loads(json.dumps(self.router_options, default=repr)) != self.router_options:
            raise ValueError(f"router_options={self.router_options}: give only what JSON can hold")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.input_shape[1] // self.patch, self.input_shape[2] // self.patch

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def out_channels(self) -> int:
        return self.input_shape[0] * (2 if self.learn_sigma else 1)

    @property
    def hidden(self) -> int:
        """Hidden width of a dense feed-forward."""
        return int(self.dim * self.mlp_ratio)

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """Which blocks have experts."""
        return () if self.router == DENSE else tuple(range(self.moe_every - 1, self.depth, self.moe_every))

    @property
    def experts_per_block(self) -> tuple[int, ...]:
        """Routed experts of each of ``moe_blocks``."""
        same = not isinstance(self.num_experts, tuple)
        return (self.num_experts,) * len(self.moe_blocks) if same else self.num_experts

    @property
    def predicts_target(self) -> bool:
        """Whether each router predicts the model's target from its tokens (``race`` with ``prediction_dim``)."""
        return self.router_options.get("prediction_dim") is not None

    def as_dict(self) -> dict[str, Any]:
        return {name: _as_lists(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DiTConfig":
        """
        Raises:
            ValueError: a value that is unknown (the message offers the close matches), missing or out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ValueError(f'a DiT configuration has no "{name}"{_suggest(name, fields)}')
        required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"the DiT configuration lacks {', '.join(missing)}")
        names = ("input_shape", "num_experts", "kept_experts")
        return cls(**{**values, **{name: _as_tuples(values[name]) for name in names if name in values}})


_BODY = {
    "tiny": {"depth": 6, "dim": 96, "heads": 4},
    "S": {"depth": 12, "dim": 384, "heads": 6},
    "B": {"depth": 12, "dim": 768, "heads": 12},
    "L": {"depth": 24, "dim": 1024, "heads": 16},
    "XL": {"depth": 28, "dim": 1152, "heads": 16},
}
SIZES = tuple(_BODY)


def dit_config(size: str, router: str, **overrides: Any) -> DiTConfig:
    """The configuration of a size with a router's usual experts (the tables at the top of this file).

    Args:
        size: "tiny", "S", "B", "L" or "XL".
        router: a router's name, or "dense".
        overrides: any field of ``DiTConfig``; ``router_options`` are added to the usual ones.

    Raises:
        ValueError: an unknown size, router or field (the message offers the close matches), or a bad value.
    """
    if size not in _BODY:
        raise ValueError(f'unknown size "{size}"{_suggest(size, SIZES)}')
    tiny = size == "tiny"
    values = _BODY[size] | {"router": router, "input_shape": (1, 28, 28) if tiny else (4, 32, 32)}
    values["num_classes"] = 10 if tiny else 1000
    own_options = overrides.pop("router_options", {})
    values |= overrides
    values.setdefault("patch", 4 if tiny and max(values["input_shape"][1:]) > 16 else 2)
    if router != DENSE:
        values = _experts(router, tiny, values) | overrides
        values["router_options"] = {**_router_options(router, values), **own_options}
    elif own_options:
        values["router_options"] = own_options
    return DiTConfig.from_dict(values)


def _experts(router: str, tiny: bool, values: dict[str, Any]) -> dict[str, Any]:
    dim = values["dim"]
    if router == "promoe":
        usual = {"num_experts": 6 if tiny else 12, "top_k": 1, "expert_hidden": 2 * dim, "shared_expert": True}
    elif router == "race":
        usual = {"num_experts": 16 if tiny else 32, "top_k": 4, "expert_hidden": dim}
    else:
        usual = {"num_experts": 4 if tiny else 8, "top_k": 1, "expert_hidden": 4 * dim}
    return values | usual


def _router_options(router: str, values: dict[str, Any]) -> dict[str, Any]:
    if router == "topk":
        return {"balance_weight": 0.01}
    if router == "race":
        return {"prediction_dim": values["patch"] ** 2 * values["input_shape"][0]}
    return {}


def _as_lists(value: Any) -> Any:
    return [_as_lists(part) for part in value] if isinstance(value, tuple) else value


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list | tuple) else value


def _suggest(given: str, known: Any) -> str:
    lower = {name.lower(): name for name in known}
    close = [lower[match] for match in difflib.get_close_matches(str(given).lower(), lower, n=3, cutoff=0.5)]
    hint = f": did you mean {' or '.join(close)}?" if close else ":"
    return f"{hint} Known: {', '.join(known)}"
