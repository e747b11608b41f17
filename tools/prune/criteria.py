"""What an expert is worth to a domain: one number for each layer and expert, the larger the better.

Most criteria are one formula with other exponents,

    score_i = 1 / n_i^d * sum over tokens t routed to i of g_{i,t}^a |u_{i,t}|^b s_t^c

with the coefficient g that the model gives expert i's output u, the turn s of the residual stream, and the number n of
routed tokens (see ``statistics``). They are read off statistics that were collected once; ``"a,b,c,d"`` names any of
them. An expert that no token was routed to scores 0.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

import numpy as np

from .statistics import COUNT, DomainStatistics, Statistics, key


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A way to score experts.

    Attributes:
        name: what it is called, or its exponents.
        function: statistics, domain, seed -> scores [L, E].
        exponents: (a, b, c, d), where it is of the family.
        needs_data: whether demonstrations say anything about it.
    """

    name: str
    function: Callable[[Statistics, str, int], np.ndarray]
    exponents: tuple[float, float, float, float] | None = None
    needs_data: bool = True

    @property
    def sums(self) -> tuple[str, ...]:
        """The sums that it is made of."""
        if self.exponents is None:
            return ()
        a, b, c, d = self.exponents
        return (key(a, b, c), COUNT) if d else (key(a, b, c),)


def score(statistics: Statistics, domain: str, criterion: str = "easy-ep", *, seed: int = 0) -> np.ndarray:
    """Scores [L, E] of a domain's experts, float64; NaN where a layer has fewer experts than E.

    Args:
        criterion: a name in ``CRITERIA``, or four exponents ``"a,b,c,d"``.
        seed: of ``random``; nothing else uses it.

    Raises:
        ValueError: the criterion or the domain is unknown, or the statistics lack what it needs (and how to get it).
    """
    chosen = criterion_of(criterion)
    if domain not in statistics.domains and chosen.needs_data:
        raise ValueError(f'there is no domain "{domain}": choose one of {", ".join(statistics.domains) or "none"}')
    scores = chosen.function(statistics, domain, seed)
    return np.where(statistics.experts, scores, np.nan)


def family(statistics: Statistics, domain: str, a: float, b: float, c: float, d: float) -> np.ndarray:
    """score_i = 1 / n_i^d * sum_t g^a |u|^b s^c, [L, E]; 0 where n_i is 0.

    Raises:
        ValueError: the sums were not collected.
    """
    held = statistics.domains[domain]
    total = _sum(held, domain, a, b, c)
    if not d:
        return total
    n = _sum(held, domain, 0, 0, 0)
    return np.divide(total, n**d, out=np.zeros_like(total), where=n > 0)


def _sum(held: DomainStatistics, domain: str, a: float, b: float, c: float) -> np.ndarray:
    name = key(a, b, c)
    if name not in held.sums:
        raise ValueError(
            f'the statistics of domain "{domain}" hold no sum of g^{a:g} |u|^{b:g} s^{c:g}: collect them again with '
            f"--exponents {name} (they hold {' '.join(held.sums)})"
        )
    return held.sums[name]


def easy_ep(statistics: Statistics, domain: str, seed: int = 0) -> np.ndarray:
    """EASY-EP: sum_t g |u| s. arXiv 2504.06792, equation 3: output-aware importance times the token's contribution."""
    return family(statistics, domain, 1, 1, 1, 0)


def reap(statistics: Statistics, domain: str, seed: int = 0) -> np.ndarray:
    """REAP: 1/n sum_t g |u|. arXiv 2510.13999, section 4: a mean, so that rarity does not count."""
    return family(statistics, domain, 1, 1, 0, 1)


def gating(statistics: Statistics, domain: str, seed: int = 0) -> np.ndarray:
    """Gating score: sum_t g. arXiv 2504.06792, equation 2 (a baseline there)."""
    return family(statistics, domain, 1, 0, 0, 0)


def frequency(statistics: Statistics, domain: str, seed: int = 0) -> np.ndarray:
    """Frequency: n, the number of routed tokens. arXiv 2504.06792, equation 2 (a baseline there)."""
    return family(statistics, domain, 0, 0, 0, 0)


def ean(statistics: Statistics, domain: str, seed: int = 0) -> np.ndarray:
    """Expert activation norm: sum_t |u|. A baseline of REAP, arXiv 2510.13999 (``ean_sum`` in its repository)."""
    return family(statistics, domain, 0, 1, 0, 0)


def weighted_ean(statistics: Statistics, domain: str, seed: int = 0) -> np.ndarray:
    """Sum_t g |u|: EASY-EP without its token term (arXiv 2504.06792, table 3); ``weighted_ean_sum`` in REAP's code."""
    return family(statistics, domain, 1, 1, 0, 0)


def man(statistics: Statistics, domain: str, seed: int = 0) -> np.ndarray:
    """Mean activation norm: 1/n sum_t |u|. arXiv 2606.15716, from its abstract: proposed for task-agnostic pruning."""
    return family(statistics, domain, 0, 1, 0, 1)


def max_norm(statistics: Statistics, domain: str, seed: int = 0) -> np.ndarray:
    """The largest |u| over routed tokens: ``max_activations`` in REAP's repository takes the largest entry instead."""
    return statistics.domains[domain].max_norm


def random(statistics: Statistics, domain: str, seed: int = 0) -> np.ndarray:
    """Uniform numbers of [0, 1) from ``seed``, the same for every domain: the baseline of doing nothing clever."""
    return np.random.default_rng(seed).random((len(statistics.model["layers"]), statistics.model["num_experts"]))


def aimer(statistics: Statistics, domain: str, seed: int = 0) -> np.ndarray:
    """AIMER: 1 - A with A = mean|w| / sqrt(mean w^2) over an expert's gate, up and down weights.

    A is what the public repository of AIMER (``calib_free_prune.py``) calls the score; it prunes the largest, the flat,
    unspecialised experts. A is at most 1, so 1 - A is a score as the others are, and no demonstration changes it.
    """
    if "aimer" not in statistics.weights:
        raise ValueError(
            "the statistics hold no AIMER numbers of the weights: they are not taken from packed, quantised weights; "
            "collect from the checkpoint before quantisation"
        )
    return 1 - statistics.weights["aimer"]


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("easy-ep", easy_ep, (1, 1, 1, 0)),
        Criterion("reap", reap, (1, 1, 0, 1)),
        Criterion("gating", gating, (1, 0, 0, 0)),
        Criterion("frequency", frequency, (0, 0, 0, 0)),
        Criterion("ean", ean, (0, 1, 0, 0)),
        Criterion("weighted-ean", weighted_ean, (1, 1, 0, 0)),
        Criterion("man", man, (0, 1, 0, 1)),
        Criterion("max-norm", max_norm),
        Criterion("random", random, needs_data=False),
        Criterion("aimer", aimer, needs_data=False),
    )
}


def criterion_of(name: str) -> Criterion:
    """The criterion of a name or of four exponents ``"a,b,c,d"``.

    Raises:
        ValueError: there is none; with the close matches.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    if "," in name:
        try:
            a, b, c, d = (float(part) for part in name.split(","))
        except ValueError:
            a = b = c = d = float("nan")
        if not all(0 <= exponent < 100 for exponent in (a, b, c, d)):
            raise ValueError(f'criterion "{name}": give four exponents a,b,c,d from 0, like 1,1,1,0 for easy-ep')
        exponents = (a, b, c, d)
        canonical = ",".join(f"{exponent:g}" for exponent in exponents)
        return Criterion(canonical, lambda statistics, domain, seed: family(statistics, domain, *exponents), exponents)
    close = difflib.get_close_matches(name, CRITERIA)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(CRITERIA)}, or exponents a,b,c,d"
    )
    raise ValueError(f'unknown criterion "{name}": {hint}')
