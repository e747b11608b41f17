"""What a pass over demonstrations leaves behind: enough for every criterion, a few numbers an expert.

For domain, layer ``l``, token ``t`` and routed expert ``i``, over the routed pairs (t, i) alone:

    g   the coefficient that the model multiplies the expert's output with
    |u| the L2 norm of that output before the coefficient
    s   how much the routed output turns the residual stream, max(0, 1 - cos(h, h + r))

and the file holds, in float64, the sums over tokens of ``g^a |u|^b s^c`` [L, E] for the exponents that were asked for
(``"0,0,0"`` counts the routed tokens, ``"1,1,1"`` is the score of EASY-EP, arXiv 2504.06792, equation 3), the largest
|u|, and the sums of each demonstration by itself. Sums add up over demonstrations, processes and machines.

    STATS (safetensors)
        metadata "gatewright": JSON {"format": 1, "kind": ..., "version": ..., "model", "options", "domains"}
        "domain.0.sum.1,1,1" [L, E]   "domain.0.demo.1,1,1" [demos, L, E]   "domain.0.max_norm" [L, E]
        "domain.0.tokens_per_demo" [demos]   "weights.aimer" [L, E]
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ... import __version__
from ...moe.files import write_bytes

FORMAT = 1
KIND = "gatewright pruning statistics"


def key(a: float, b: float, c: float) -> str:
    """The name of the sum of g^a |u|^b s^c."""
    return ",".join(f"{exponent:g}" for exponent in (a, b, c))


# What is collected unless told otherwise, and what of it is kept of each demonstration by itself.
STANDARD = (*(key(*abc) for abc in itertools.product((0, 1), repeat=3)), key(0, 2, 0), key(2, 2, 0))
PER_DEMO = STANDARD
COUNT, EASY_EP = key(0, 0, 0), key(1, 1, 1)


def exponents(name: str) -> tuple[float, float, float]:
    """(a, b, c) of a sum's name.

    Raises:
        ValueError: it is no such name.
    """
    try:
        a, b, c = (float(part) for part in name.split(","))
    except ValueError:
        a = b = c = float("nan")
    if not all(0 <= exponent < 100 for exponent in (a, b, c)) or key(a, b, c) != name:
        raise ValueError(
            f'"{name}" names no sum: three exponents from 0, like "1,1,1", each written as short as it goes'
        )
    return a, b, c


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DomainStatistics:
    """The sums over one domain's demonstrations. E is the largest expert count; where a layer has fewer, 0 follows.

    Attributes:
        sums: by ``key(a, b, c)``, each [L, E] float64.
        max_norm: the largest |u|, [L, E]; 0 where no token was routed.
        per_demo: some of the sums of each demonstration by itself, [demos, L, E].
        tokens_per_demo: tokens of each demonstration that count, [demos].
    """

    sums: Mapping[str, np.ndarray]
    max_norm: np.ndarray
    tokens_per_demo: np.ndarray
    per_demo: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        def numbers(what: str, value: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
            array = np.ascontiguousarray(value, dtype=np.float64)
            if shape is not None and array.shape != shape:
                raise ValueError(f"{what} has shape {array.shape}, not {shape}")
            if not np.isfinite(array).all() or (array < 0).any():
                raise ValueError(f"{what} holds numbers that are negative or not finite")
            return array

        if not self.sums:
            raise ValueError("statistics without a sum: collect at least " + COUNT)
        first = np.asarray(next(iter(self.sums.values())))
        if first.ndim != 2 or 0 in first.shape:
            raise ValueError(f"a sum has shape {first.shape}, not [layers, experts]")
        for name in (*self.sums, *self.per_demo):
            exponents(name)
        tokens = np.ascontiguousarray(self.tokens_per_demo, dtype=np.int64)
        if tokens.ndim != 1 or not len(tokens) or (tokens < 0).any():
            raise ValueError("tokens_per_demo is a list of token counts, one a demonstration, at least one")
        sums = {name: numbers(f"the sum {name}", value, first.shape) for name, value in sorted(self.sums.items())}
        demos = {
            name: numbers(f"the sum {name} by demonstration", value, (len(tokens), *first.shape))
            for name, value in sorted(self.per_demo.items())
        }
        for name, value in demos.items():
            if name not in sums:
                raise ValueError(f"the sum {name} is there by demonstration, but not in all")
            if not np.allclose(value.sum(0), sums[name], rtol=1e-6, atol=1e-12 * float(sums[name].max(initial=1.0))):
                raise ValueError(f"the demonstrations' sums {name} do not add up to the sum over all")
        object.__setattr__(self, "sums", sums)
        object.__setattr__(self, "per_demo", demos)
        object.__setattr__(self, "tokens_per_demo", tokens)
        object.__setattr__(self, "max_norm", numbers("max_norm", self.max_norm, first.shape))

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return self.max_norm.shape

    @property
    def demos(self) -> int:
        return len(self.tokens_per_demo)

    @property
    def tokens(self) -> int:
        return int(self.tokens_per_demo.sum())

    @property
    def easy_ep_per_demo(self) -> np.ndarray:
        """The EASY-EP score of each demonstration, [demos, L, E].

        Raises:
            ValueError: it was not collected.
        """
        if EASY_EP not in self.per_demo:
            raise ValueError(f"these statistics hold no sum {EASY_EP} of each demonstration by itself")
        return self.per_demo[EASY_EP]

    @classmethod
    def of_demo(
        cls, sums: Mapping[str, np.ndarray], max_norm: np.ndarray, tokens: int, *, per_demo: Iterable[str] = PER_DEMO
    ) -> DomainStatistics:
        """One demonstration's, of whose sums those named in ``per_demo`` are kept by themselves."""
        own = {name: np.asarray(sums[name])[None] for name in per_demo if name in sums}
        return cls(sums=sums, max_norm=max_norm, tokens_per_demo=np.array([tokens]), per_demo=own)

    @classmethod
    def total(cls, parts: Sequence[DomainStatistics]) -> DomainStatistics:
        """Of all parts' demonstrations, in the order given.

        Raises:
            ValueError: there is no part, or they hold different things.
        """
        if not parts:
            raise ValueError("no statistics to add up")
        for part in parts[1:]:
            if (part.shape, part.sums.keys(), part.per_demo.keys()) != (
                parts[0].shape,
                parts[0].sums.keys(),
                parts[0].per_demo.keys(),
            ):
                raise ValueError(
                    "statistics of different shapes or sums do not add up: "
                    f"{parts[0].shape} {', '.join(parts[0].sums)} and {part.shape} {', '.join(part.sums)}"
                )
        return cls(
            sums={name: np.sum([part.sums[name] for part in parts], axis=0) for name in parts[0].sums},
            max_norm=np.max([part.max_norm for part in parts], axis=0),
            tokens_per_demo=np.concatenate([part.tokens_per_demo for part in parts]),
            per_demo={name: np.concatenate([part.per_demo[name] for part in parts]) for name in parts[0].per_demo},
        )

    def __add__(self, other: DomainStatistics) -> DomainStatistics:
        return self.total([self, other])

    def subset(self, demos: Sequence[int]) -> DomainStatistics:
        """Of some demonstrations alone: the sums that are known of each, and ``max_norm`` of all.

        Raises:
            ValueError: no sum is known of each demonstration.
        """
        rows = list(demos)
        return DomainStatistics(
            sums={name: value[rows].sum(0) for name, value in self.per_demo.items()},
            max_norm=self.max_norm,
            tokens_per_demo=self.tokens_per_demo[rows],
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """The statistics of one model.

    Attributes:
        model: what was observed: ``model_type``, ``name``, ``config_sha256``, ``header_hash``, ``num_experts``,
            ``top_k``, ``num_groups``, ``topk_group``, ``layers`` (absolute indices), ``experts_per_layer``, and, where
            the checkpoint has layers for multi-token prediction, their indices as ``mtp_layers``.
        options: how they were collected.
        domains: by name.
        weights: what needs no data, each [L, E]: ``"aimer"``.
        version: of the gatewright that collected them.
    """

    model: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    domains: Mapping[str, DomainStatistics] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    version: str = __version__

    def __post_init__(self) -> None:
        if not isinstance(self.model, Mapping) or not isinstance(self.options, Mapping):
            raise ValueError("model and options are objects")
        object.__setattr__(self, "model", checked_model(self.model))
        shape = (len(self.model["layers"]), self.model["num_experts"])
        if not self.domains and not self.weights:
            raise ValueError("statistics without a domain: name at least one")
        beyond = np.arange(shape[1]) >= np.array(self.model["experts_per_layer"])[:, None]
        for name, domain in self.domains.items():
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"{name!r} is no name of a domain")
            if domain.shape != shape:
                raise ValueError(f'domain "{name}" has shape {domain.shape}, the model {shape}')
            if any(value[beyond].any() for value in domain.sums.values()):
                raise ValueError(f'domain "{name}" counts tokens for experts that its layer does not have')
        for name, value in self.weights.items():
            if np.shape(value) != shape:
                raise ValueError(f'"{name}" of the weights has shape {np.shape(value)}, the model {shape}')

    @property
    def experts(self) -> np.ndarray:
        """Which of the [L, E] places are experts, where layers have different numbers of them."""
        return np.arange(self.model["num_experts"]) < np.array(self.model["experts_per_layer"])[:, None]

    @property
    def sha256(self) -> str:
        """Of the file that `save` writes."""
        return hashlib.sha256(self._bytes()).hexdigest()

    def save(self, file: str | Path) -> None:
        """Writes the file as a whole, or leaves what was there.

        Raises:
            OSError: it cannot be written there.
        """
        write_bytes(Path(file), self._bytes())

    def _bytes(self) -> bytes:
        arrays: dict[str, np.ndarray] = {f"weights.{name}": value for name, value in self.weights.items()}
        for place, domain in enumerate(self.domains.values()):
            arrays[f"domain.{place}.max_norm"] = domain.max_norm
            arrays[f"domain.{place}.tokens_per_demo"] = domain.tokens_per_demo
            arrays |= {f"domain.{place}.sum.{name}": value for name, value in domain.sums.items()}
            arrays |= {f"domain.{place}.demo.{name}": value for name, value in domain.per_demo.items()}
        about = {
            "format": FORMAT,
            "kind": KIND,
            "version": self.version,
            "model": self.model,
            "options": dict(self.options),
            "domains": list(self.domains),
        }
        text = json.dumps(about, ensure_ascii=False, allow_nan=False, sort_keys=True)
        return safetensors.numpy.save(arrays, metadata={"gatewright": text})

    @classmethod
    def load(cls, file: str | Path) -> Statistics:
        """Reads and checks a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is none of statistics, or of a newer gatewright, or damaged.
        """
        file = Path(file)
        if not file.exists():
            raise FileNotFoundError(2, "there is no such file: collect statistics first", str(file))
        if file.is_dir():
            raise ValueError(f"{file} is a folder, not a file of statistics")
        try:
            with safetensors.safe_open(file, framework="numpy") as stream:
                about = json.loads((stream.metadata() or {}).get("gatewright", "null"))
                if not isinstance(about, dict) or about.get("kind") != KIND:
                    raise ValueError(
                        f"{file} is not a file of pruning statistics: `gatewright prune collect` makes one"
                    )
                check_format(file, about, FORMAT)
                arrays = {name: stream.get_tensor(name) for name in stream.keys()}
        except (safetensors.SafetensorError, TypeError) as error:  # a type that numpy lacks is a TypeError
            raise ValueError(
                f"{file} is not a file of pruning statistics, or is cut short ({error}): collect it again"
            ) from None
        except json.JSONDecodeError:
            raise ValueError(f"{file} is not a file of pruning statistics: its description cannot be read") from None
        try:
            return cls._read(about, arrays)
        except KeyError as error:
            raise ValueError(f"{file} is damaged: it lacks {error}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None

    @classmethod
    def _read(cls, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Statistics:
        def below(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

        domains = {
            name: DomainStatistics(
                sums=below(f"domain.{place}.sum."),
                per_demo=below(f"domain.{place}.demo."),
                max_norm=arrays[f"domain.{place}.max_norm"],
                tokens_per_demo=arrays[f"domain.{place}.tokens_per_demo"],
            )
            for place, name in enumerate(about["domains"])
        }
        return cls(
            model=about["model"],
            options=about["options"],
            domains=domains,
            weights=below("weights."),
            version=about["version"],
        )

    def merge(self, *others: Statistics) -> Statistics:
        """With others of the same model: new domains come along, the demonstrations of known ones are added.

        Raises:
            ValueError: they are of another model, or were collected in another way.
        """
        domains, weights = dict(self.domains), dict(self.weights)
        for other in others:
            for what in ("model", "options"):
                mine, theirs = getattr(self, what), getattr(other, what)
                differ = [name for name in (*mine, *theirs) if mine.get(name) != theirs.get(name)]
                if differ:
                    name = differ[0]
                    raise ValueError(
                        f"statistics of different {what} do not add up: {name} is {mine.get(name)!r} in one and "
                        f"{theirs.get(name)!r} in the other"
                    )
            for name, domain in other.domains.items():
                domains[name] = domains[name] + domain if name in domains else domain
            for name, value in other.weights.items():
                if name in weights and not np.array_equal(weights[name], value):
                    raise ValueError(f'"{name}" of the weights differs: these are not statistics of the same weights')
                weights[name] = value
        return dataclasses.replace(self, domains=domains, weights=weights)


def check_format(file: Path, about: Mapping[str, Any], known: int) -> None:
    """Refuses a file of a newer format.

    Raises:
        ValueError: with the version that wrote it.
    """
    found = about.get("format")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{file} names no format, so it cannot be read: it is damaged")
    if found > known:
        raise ValueError(
            f"{file} has format {found} (gatewright {about.get('version', 'of an unknown version')} wrote it); this "
            f"gatewright {__version__} reads format {known} and older: update gatewright"
        )


def checked_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a model that statistics and plans carry, with every field checked.

    Raises:
        ValueError: a field is missing or impossible.
    """
    model = dict(model)
    for name in ("model_type", "name", "config_sha256", "header_hash"):
        if not isinstance(model.get(name), str):
            raise ValueError(f"model.{name} is {model.get(name)!r}, not text")
    for name in ("num_groups", "topk_group"):
        model[name] = model.get(name) or 1
    for name in ("num_experts", "num_groups", "topk_group", "top_k"):
        # in our own runs a router may choose a number of experts a token that is only known on average
        if name == "top_k" and is_own(model) and isinstance(model.get(name), float) and model[name] > 0:
            continue
        if not _whole(model.get(name)) or model[name] < 1:
            raise ValueError(f"model.{name} is {model.get(name)!r}, not a whole number from 1")
    model.setdefault("experts_per_layer", [model["num_experts"]] * len(model.get("layers") or ()))
    model.setdefault("mtp_layers", [])
    for name in ("layers", "experts_per_layer", "mtp_layers"):
        if not isinstance(model.get(name), list | tuple) or not all(_whole(one) and one >= 0 for one in model[name]):
            raise ValueError(f"model.{name} is {model.get(name)!r}, not a list of whole numbers")
        model[name] = list(model[name])
    layers, experts = model["layers"], model["experts_per_layer"]
    if not layers or sorted(set(layers)) != layers:
        raise ValueError(f"model.layers is {layers}, not a list of ascending layer indices")
    if len(experts) != len(layers) or max(experts) != model["num_experts"] or min(experts) < 1:
        raise ValueError(
            f"model.experts_per_layer is {experts}: one count for each of {len(layers)} layers, the largest of them "
            f"num_experts = {model['num_experts']}"
        )
    if model["top_k"] > model["num_experts"]:
        raise ValueError(f"model.top_k is {model['top_k']} of {model['num_experts']} experts")
    groups = model["num_groups"]
    if model["num_experts"] % groups or model["topk_group"] > groups:
        raise ValueError(
            f"model.num_groups is {groups} and topk_group {model['topk_group']}: the groups must divide "
            f"{model['num_experts']} experts, and no more can be chosen than there are"
        )
    return model


def is_own(model: Mapping[str, Any]) -> bool:
    """Whether a description is of a run of this library rather than of a transformers checkpoint."""
    return model["model_type"].startswith("gatewright/")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
