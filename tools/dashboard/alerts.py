"""What is wrong with a run's routing, as sentences: collapse, overload, starvation, drops towards the end, drift.

An alert is raised only outside what chance explains (the null band: the same tokens over uniformly random experts) and
beyond a threshold relative to the fair share 1/E, never an absolute one: with 256 experts and one choice a token, a
balanced expert gets 0.4 %. Load is judged over the last tenth of the run, so that one odd batch raises nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from ...moe.metrics import collapse_aware_entropy, load_drift, saturation
from ...moe.record_log import RoutingLog

COLLAPSED = 0.5  # collapse-aware entropy below this
OVERLOADED = 4.0  # times the fair share, or three quarters of the way to the most that is possible
STARVED = 0.05  # of the fair share
DROPPED = 0.05  # share of all assignments
LATE_DROPS = 0.02  # more dropped in the last quarter of a sequence than in the first
DRIFTED = 0.15  # share of tokens, or of load, that moved after it had been at rest
SIGNIFICANT = 5.0  # standard deviations of chance


@dataclasses.dataclass(frozen=True)
class Alert:
    """One thing that is wrong.

    Attributes:
        kind: "collapse", "overload", "starvation", "drops", "late drops" or "drift".
        layer: its place among the recorded layers.
        since: the first optimizer step of which it is true without a break until the end.
        experts: those it is about; empty where it is about all.
        sentence: what to tell the user.
    """

    kind: str
    layer: int
    since: int
    experts: tuple[int, ...]
    sentence: str


def find_alerts(log: RoutingLog) -> list[Alert]:
    """Every alert of a run, worst kind first, then by layer."""
    found = []
    if len(log.steps):
        for layer in range(len(log.layers)):
            found += _load_alerts(log, layer)
            found += _drop_alerts(log, layer)
    for layer in range(len(log.layers)):
        found += _drift_alerts(log, layer)
    order = ("collapse", "overload", "starvation", "late drops", "drops", "drift")
    return sorted(found, key=lambda alert: (order.index(alert.kind), alert.layer))


def choices_a_token(log: RoutingLog, layer: int) -> float:
    """k: as the router was told, else how many assignments its tokens asked for on average. NaN without tokens."""
    told, tokens = log.layers[layer].top_k, log.tokens[:, layer].sum()
    if not math.isnan(told):
        return told
    return float(log.requested[:, layer].sum() / tokens) if tokens else math.nan


def recent(log: RoutingLog) -> slice:
    """The last tenth of the windows, at least one."""
    return slice(len(log.steps) - max(1, len(log.steps) // 10), None)


def _load_alerts(log: RoutingLog, layer: int) -> list[Alert]:
    experts, top_k = log.layers[layer].experts, choices_a_token(log, layer)
    # Where every token takes every expert, nothing is chosen, and nothing can be wrong.
    if experts < 2 or not 0 < top_k < experts - 1e-9:
        return []
    requested = log.requested[:, layer, :experts].astype(float)
    now = requested[recent(log)].sum(0)
    if now.sum() <= 0:
        return []
    name = f"layer {log.layers[layer].layer}"
    collapsed = _busiest(now, lambda load: _entropy(load, top_k) < COLLAPSED)
    if collapsed:
        few = max(1, round(top_k))
        top = _largest(now, few)
        since = _since(log, requested, lambda load: _entropy(load, top_k) < COLLAPSED)
        sentence = (
            f"{name} has collapsed: {_experts(top)} {_take(top)} {_percent(now[top].sum() / now.sum())} of "
            f"assignments; balanced would be {_percent(few / experts)}{_when(log, since)}"
        )
        return [Alert("collapse", layer, since, tuple(top), sentence)]
    found = []
    limit = min(OVERLOADED, 1 + 0.75 * (experts / max(1.0, top_k) - 1))
    heavy = _outside(now, top_k, lambda ratio: ratio > limit, above=True)
    if heavy:
        since = _since(log, requested, lambda load: load[heavy].mean() > limit * load.mean())
        sentence = (
            f"{name}: {_experts(heavy)} {_take(heavy)} {_percent(now[heavy].sum() / now.sum())} of assignments; "
            f"balanced would be {_percent(len(heavy) / experts)}{_when(log, since)}"
        )
        found.append(Alert("overload", layer, since, tuple(heavy), sentence))
    starved = _outside(now, top_k, lambda ratio: ratio < STARVED, above=False)
    if starved:
        since = _since(log, requested, lambda load: load[starved].max() < STARVED * load.mean())
        sentence = (
            f"{name}: {_experts(starved)} {_take(starved)} {_percent(now[starved].sum() / now.sum())} of assignments; "
            f"balanced would be {_percent(len(starved) / experts)}{_when(log, since)}"
        )
        found.append(Alert("starvation", layer, since, tuple(starved), sentence))
    return found


def _busiest(now: np.ndarray, test: Callable[[np.ndarray], bool]) -> bool:
    # Twenty assignments an expert: fewer say nothing of an expert's share.
    return now.mean() >= 20 and test(now)


def _entropy(load: np.ndarray, top_k: float) -> float:
    return float(collapse_aware_entropy(load, min(top_k, len(load))))


def _outside(now: np.ndarray, top_k: float, test: Callable[[np.ndarray], np.ndarray], *, above: bool) -> list[int]:
    """The experts that pass the test and lie outside the null band."""
    fair = now.mean()
    deviation = math.sqrt(max(fair * (1 - min(1.0, top_k / len(now))), 1e-12))
    z = (now - fair) / deviation
    passed = np.flatnonzero(test(now / fair) & ((z > SIGNIFICANT) if above else (z < -SIGNIFICANT)))
    return passed.tolist()


def _largest(load: np.ndarray, few: int) -> list[int]:
    return sorted(np.argsort(-load, kind="stable")[:few].tolist())


def _since(log: RoutingLog, requested: np.ndarray, test: Callable[[np.ndarray], bool]) -> int:
    """The first step of the windows, up to the last, in each of which the test holds; windows without load say
    nothing."""
    since = int(log.first_steps[recent(log)][0])
    for place in range(len(requested) - 1, -1, -1):
        if requested[place].sum() > 0:
            if not test(requested[place]):
                break
            since = min(since, int(log.first_steps[place]))
    return since


def _drop_alerts(log: RoutingLog, layer: int) -> list[Alert]:
    drops = log.drops[:, layer].astype(float)
    now = drops[recent(log)].sum(0)
    dropped, asked = now[:, 0], now[:, 1]
    if asked.sum() <= 0 or dropped.sum() <= 0:
        return []
    name = f"layer {log.layers[layer].layer}"

    def late(window: np.ndarray) -> tuple[float, float, float]:
        """Drop rates of the first and the last quarter, and how many deviations of chance lie between them."""
        (early, early_n), (end, end_n) = window[:4].sum(0), window[-4:].sum(0)
        if not early_n or not end_n:
            return 0.0, 0.0, 0.0
        pooled = (early + end) / (early_n + end_n)
        deviation = math.sqrt(max(pooled * (1 - pooled) * (1 / early_n + 1 / end_n), 1e-18))
        return early / early_n, end / end_n, (end / end_n - early / early_n) / deviation

    early, end, deviations = late(now)
    if end - early > LATE_DROPS and end > 2 * early and deviations > SIGNIFICANT:
        since = _since_drops(log, drops, lambda window: late(window)[1] - late(window)[0] > LATE_DROPS)
        sentence = (
            f"{name} drops towards the end: {_percent(end)} of assignments in the last quarter of a sequence are "
            f"dropped, {_percent(early)} in the first; flat would be {_percent(dropped.sum() / asked.sum())} in both"
            f"{_when(log, since)}"
        )
        return [Alert("late drops", layer, since, (), sentence)]
    rate = dropped.sum() / asked.sum()
    if rate > DROPPED:
        since = _since_drops(log, drops, lambda window: window[:, 0].sum() > DROPPED * window[:, 1].sum())
        sentence = f"{name} drops {_percent(rate)} of its assignments for lack of capacity{_when(log, since)}"
        return [Alert("drops", layer, since, (), sentence)]
    return []


def _since_drops(log: RoutingLog, drops: np.ndarray, test: Callable[[np.ndarray], bool]) -> int:
    since = int(log.first_steps[recent(log)][0])
    for place in range(len(drops) - 1, -1, -1):
        if drops[place, :, 1].sum() > 0:
            if not test(drops[place]):
                break
            since = min(since, int(log.first_steps[place]))
    return since


def _drift_alerts(log: RoutingLog, layer: int) -> list[Alert]:
    """Routing that had come to rest and moved again: of the probe where there is one, else of the load."""
    name = f"layer {log.layers[layer].layer}"
    if len(log.probes) >= 4:
        moved = [share_moved(a.index[layer], b.index[layer]) for a, b in zip(log.probes, log.probes[1:], strict=False)]
        tokens = len(log.probes[-1].index[layer])
        rest, place = _moved_again(moved, 1 / math.sqrt(max(1, tokens)))
        if place is None:
            return []
        start, end = log.probes[place].step, log.probes[place + 1].step
        sentence = (
            f"{name} drifts: {_percent(moved[place])} of the probe's choices moved to other experts between steps "
            f"{start:,} and {end:,}, after only {_percent(rest)} in the calmest interval before"
        )
        return [Alert("drift", layer, start, (), sentence)]
    experts = log.layers[layer].experts
    pieces = [chunk for chunk in np.array_split(np.arange(len(log.steps)), 10) if len(chunk)]
    loads = [log.requested[chunk][:, layer, :experts].sum(0).astype(float) for chunk in pieces]
    if len(pieces) < 10 or experts < 2 or min(load.sum() for load in loads) <= 0:
        return []
    moved = [float(load_drift(a, b)) for a, b in zip(loads, loads[1:], strict=False)]
    noise = math.sqrt(experts / (math.pi * min(load.sum() for load in loads)))
    rest, place = _moved_again(moved, noise)
    if place is None:
        return []
    start, end = int(log.first_steps[pieces[place][0]]), int(log.steps[pieces[place + 1][-1]])
    sentence = (
        f"{name} drifts: {_percent(moved[place])} of its load moved to other experts between steps {start:,} and "
        f"{end:,}, after only {_percent(rest)} in the calmest interval before"
    )
    return [Alert("drift", layer, start, (), sentence)]


def share_moved(before: np.ndarray, after: np.ndarray) -> float:
    """Which share of the experts that a token has it did not have before. ids [N, K] of the same tokens, -1 = none"""
    return float(1 - saturation(before, after))


def _moved_again(moved: list[float], noise: float) -> tuple[float, int | None]:
    """The calmest of the earlier intervals, and the last interval of the second half that exceeds it beyond chance.

    Of the second half, because a router that warms up moves more after its first steps, and rightly.
    """
    for place in range(len(moved) - 1, max(1, len(moved) // 2) - 1, -1):
        rest = np.nanmin(moved[:place]) if not np.all(np.isnan(moved[:place])) else math.nan
        if moved[place] > max(rest + DRIFTED, 2 * rest, rest + SIGNIFICANT * noise):
            return float(rest), place
    return math.nan, None


def _experts(ids: list[int]) -> str:
    few = [str(expert) for expert in ids[:6]]
    if len(ids) > len(few):
        return f"{len(ids)} experts ({', '.join(few)}, ...)"
    if len(few) == 1:
        return f"expert {few[0]}"
    return f"experts {', '.join(few[:-1])} and {few[-1]}"


def _take(ids: list[int]) -> str:
    return "takes" if len(ids) == 1 else "take"


def _percent(share: float) -> str:
    """Two significant digits below ten percent, none after the point above."""
    value = 100 * share
    if value == 0:
        return "none"
    if value < 0.01:
        return "less than 0.01 %"
    return f"{value:.0f} %" if value >= 2.95 else f"{value:.2g} %"


def _when(log: RoutingLog, since: int) -> str:
    if len(log.steps) == 1:
        return ""
    return f" (since step {since:,})" if since > int(log.first_steps[0]) else " (throughout)"
