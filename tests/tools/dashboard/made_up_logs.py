"""Routing logs of runs that never were: healthy ones, and ones with a fault planted in a layer."""

from pathlib import Path

import numpy as np

from gatewright.moe.record_log import MARGIN_EDGES, LayerInfo, LogWriter, Window

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def write_log(
    run: Path,
    *,
    layers: int = 4,
    experts: int = 16,
    top_k: int = 2,
    windows: int = 20,
    every: int = 10,
    tokens: int = 16_384,
    probes: int = 6,
    probe_tokens: int = 640,
    plant: dict[int, str] | None = None,
    classes: tuple[str, ...] = CLASSES,
    names: tuple[str, ...] | None = None,
    capacity: bool = False,
    structure: bool = True,
    seed: int = 0,
) -> Path:
    """Writes a log and returns its folder.

    Args:
        plant: by layer: "collapse", "overload", "starvation", "drops" or "drift", from the middle of the run on.
        capacity: whether a small, even share of the assignments is dropped.
    """
    draw = np.random.default_rng(seed)
    plant = plant or {}
    infos = [
        LayerInfo(
            name=names[i] if names else f"blocks.{i}.mlp",
            layer=i,
            experts=experts,
            top_k=float(top_k),
            router="topk",
            options={"top_k": top_k},
            kinds=("routed",) * experts,
        )
        for i in range(layers)
    ]
    writer = LogWriter(run, infos, {"every": every})
    writer.start(0)
    popular = draw.normal(0, 1, (layers, experts))
    drift = draw.normal(0, 0.03, (layers, experts))
    fault = windows // 2
    for place in range(windows):
        share = place / max(1, windows - 1)
        window = Window.zeros(place * every, (place + 1) * every - 1, layers, experts)
        popular = popular + draw.normal(0, 0.02, popular.shape)
        for layer in range(layers):
            early = 0.9 * np.exp(-5 * share) + 0.12 + 0.1 * (layer / layers) * share
            load = _softmax(early * popular[layer] + 10 * share * drift[layer])
            if place >= fault:
                load = _planted(plant.get(layer), load, top_k)
            window.tokens[layer] = tokens
            requested = np.minimum(draw.multinomial(tokens * top_k, load), tokens)
            window.requested[layer] = requested
            slope = np.full(16, 0.004 if capacity else 0.0)
            if plant.get(layer) == "drops" and place >= fault:
                slope = np.linspace(0, 0.35, 16) ** 1.5
            asked = int(requested.sum()) // 16
            window.drops[layer, :, 1] = asked
            window.drops[layer, :, 0] = draw.binomial(asked, slope)
            kept = 1 - window.drops[layer, :, 0].sum() / max(1, asked * 16)
            window.counts[layer] = np.floor(requested * kept)
            _decisions(window, layer, load, share, experts, top_k, draw)
        window.losses = {"balance": np.full(layers, 0.01)}
        writer.window(window)
    steps = np.arange(0, windows * every, max(1, every // 2))
    loss = 2.5 * np.exp(-4 * steps / max(1, steps[-1])) + 1.1 + draw.normal(0, 0.03, len(steps))
    writer.scalars({"loss": (steps, loss), "lr": (steps, 1e-3 * np.cos(steps / max(1, steps[-1]) * 1.5))})
    last = windows * every
    if structure:
        writer.structure(last - 1, *_structure(layers, experts, top_k, draw))
    if probes:
        _probe(writer, layers, experts, top_k, probes, probe_tokens, last, plant, classes, draw)
    writer.close()
    return run


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _planted(fault: str | None, load: np.ndarray, top_k: int) -> np.ndarray:
    load = load.copy()
    if fault == "collapse":
        load[:] = 0.02 / len(load)
        load[2 : 2 + top_k] += 0.98 / top_k
    elif fault == "overload":
        load *= 0.76 / load.sum()
        load[[3, 41 % len(load)]] += 0.12
    elif fault == "starvation":
        load[[1, 5]] *= 0.001
    elif fault == "drift":
        load = np.roll(load, len(load) // 2) * np.linspace(0.4, 1.6, len(load))
    return load / load.sum()


def _decisions(window: Window, layer: int, load: np.ndarray, share: float, experts: int, top_k: int, draw) -> None:
    sampled = 512
    window.sampled[layer] = sampled
    window.score_sum[layer] = sampled * (0.7 * load + 0.3 / experts)
    sure = 0.97 - (0.25 + 0.3 * layer / (layer + 4)) * (1 - np.exp(-4 * share)) + draw.normal(0, 0.004)
    window.entropy_sum[layer] = sampled * np.log(experts) * sure
    window.mass_sum[layer] = sampled * min(1.0, top_k / experts + 0.6 * (1 - sure))
    window.z_sum[layer] = sampled * (np.log(experts) + 3 * share) ** 2
    window.logit_square_sum[layer] = sampled * (0.4 + 1.5 * share) ** 2
    margins = np.abs(draw.normal(0, 0.08 + 0.5 * share + 0.1 * layer / 8, sampled))
    window.margin_histogram[layer] = np.histogram(margins, MARGIN_EDGES)[0]
    window.active_histogram[layer, min(top_k, 16)] = sampled


def _structure(layers: int, experts: int, top_k: int, draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, group = 4096, max(1, experts // 8)
    chosen = np.zeros((layers, tokens, experts), dtype=bool)
    topic = draw.integers(0, 8, tokens)
    places = [draw.permutation(experts) for _ in range(layers)]
    rows = []
    for layer in range(layers):
        taste = np.zeros((8, experts))
        for t in range(8):
            taste[t, places[layer][t * group : (t + 1) * group]] = 1.4
        z = taste[topic] + draw.normal(0, 1, (tokens, experts))
        chosen[layer][np.arange(tokens)[:, None], np.argsort(-z, -1)[:, :top_k]] = True
        v = taste.T + 0.5 * draw.normal(0, 1, (experts, 8))
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        rows.append(v @ v.T)
    c = chosen.astype(np.float32)  # which holds these counts exactly
    together = (c.transpose(0, 2, 1) @ c).astype(np.int64)
    onwards = (
        np.stack([c[i].T @ c[i + 1] for i in range(layers - 1)]) if layers > 1 else np.zeros((0, experts, experts))
    )
    return together, onwards.astype(np.int64), np.stack(rows)


def _probe(writer, layers, experts, top_k, probes, tokens, last, plant, classes, draw) -> None:
    kinds = np.repeat(np.arange(len(classes)), -(-tokens // len(classes)))[:tokens].astype(np.int32)
    patch = (np.arange(tokens) % 16).astype(np.int32)
    word = (draw.zipf(1.3, tokens) % 60).astype(np.int32)
    labels = {
        "class": (kinds, list(classes)),
        "patch": (patch, [f"{i // 4},{i % 4}" for i in range(16)]),
        "token": (word, [f"tok{i}" for i in range(60)]),
    }
    final, start = [], []
    for layer in range(layers):
        likes = draw.normal(0, 1, (len(classes), experts)) * (0.3 + layer / layers)
        where = draw.normal(0, 1, (16, experts)) * (0.8 - 0.6 * layer / layers)
        words = draw.normal(0, 1, (60, experts)) * 0.6
        final.append(likes[kinds] + where[patch] + words[word] + draw.normal(0, 0.5, (tokens, experts)))
        start.append(draw.normal(0, 1, (tokens, experts)))
    for number in range(probes):
        share = number / max(1, probes - 1)
        ripe = 1 - np.exp(-6 * share)
        index = []
        for layer in range(layers):
            z = ripe * final[layer] + (1 - ripe) * start[layer] + 0.02 * draw.normal(0, 1, (tokens, experts))
            if plant.get(layer) == "drift" and number == probes - 1:
                z = np.roll(z, 3, axis=1)
            index.append(np.argsort(-z, -1)[:, :top_k].astype(np.int16))
        writer.probe(round(share * last), index, labels)
