"""Measures of routing against values worked out by hand, and against published routing counts where at hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from gatewright.moe.metrics import collapse_aware_entropy, load_entropy, max_violation

COUNTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "olmoe_routing_counts.json"


def test_even_load():
    counts = torch.full((3, 8), 5)
    assert torch.allclose(load_entropy(counts), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(collapse_aware_entropy(counts, 2), torch.ones(3, dtype=torch.float64))
    assert torch.equal(max_violation(counts), torch.zeros(3, dtype=torch.float64))


def test_collapse():
    """Every token takes the same two of eight."""
    counts = torch.tensor([7, 7, 0, 0, 0, 0, 0, 0])
    assert load_entropy(counts).item() == pytest.approx(math.log(2) / math.log(8))
    assert collapse_aware_entropy(counts, 2).item() == pytest.approx(0)
    assert max_violation(counts).item() == pytest.approx(8 / 2 - 1)


def test_nothing_to_choose():
    assert collapse_aware_entropy(torch.tensor([4, 4]), 2).item() == 1
    assert load_entropy(torch.tensor([4])).item() == 1
    with pytest.raises(ValueError, match="top_k=3 with 2 experts"):
        collapse_aware_entropy(torch.tensor([4, 4]), 3)


def test_no_load_is_not_a_number():
    assert load_entropy(torch.zeros(4)).isnan()


PUBLISHED = {
    ("OLMoE-1B-7B", "c4"): ([0.990, 0.982, 0.968], [2.02, 1.66, 1.50]),
    ("OLMoE-1B-7B", "github"): ([0.961, 0.851, 0.853], [4.01, 5.16, 3.51]),
    ("OLMoE-1B-7B", "arxiv"): ([0.943, 0.866, 0.864], [6.81, 5.28, 6.49]),
    ("OLMoE-1B-7B", "book"): ([0.966, 0.930, 0.926], [2.63, 3.06, 1.93]),
    ("OLMoE-1B-7B", "wikipedia"): ([0.939, 0.913, 0.829], [5.18, 5.78, 3.65]),
    ("Mixtral-8x7B", "arxiv"): ([0.996, 0.998, 0.985], [0.27, 0.13, 0.17]),
}


@pytest.mark.parametrize(("model", "domain"), PUBLISHED)
def test_published_counts(model, domain):
    if not COUNTS.exists():
        pytest.skip(f"{COUNTS} is not on this machine")
    layers = json.loads(COUNTS.read_text())["models"][model]["domains"][domain]
    counts = torch.tensor([layers[layer] for layer in ("0", "7", "15")])
    entropy, violation = PUBLISHED[model, domain]
    assert [round(value, 3) for value in load_entropy(counts).tolist()] == entropy
    assert [round(value, 2) for value in max_violation(counts).tolist()] == violation


def test_null_of_random_choice():
    generator = torch.Generator().manual_seed(0)
    experts, k, tokens = 64, 8, 2048
    chosen = torch.rand(tokens, experts, generator=generator).topk(k).indices
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    expected = 1 - (experts - 1) * (1 - k / experts) / (2 * tokens * k * math.log(experts))
    assert load_entropy(counts).item() == pytest.approx(expected, abs=2e-4)
    assert max_violation(counts).item() < 1.3 * math.sqrt(
        2 * math.log(experts) * (1 - k / experts) / (tokens * k / experts)
    )
