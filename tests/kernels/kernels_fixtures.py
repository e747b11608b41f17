"""What the kernels' tests share: poisoned memory, and banks of drawn sizes."""

import pytest
import torch
from hypothesis import strategies as st

from gatewright.kernels.activation import ACTIVATIONS
from gatewright.tools.expert_case import VARIANTS, ExpertCase


@pytest.fixture(scope="class")
def poisoned():
    """Fresh floating-point memory is NaN, so that a result which a kernel forgot to write shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **options: poison(empty(*args, **options)))
        patch.setattr(torch, "empty_like", lambda *args, **options: poison(empty_like(*args, **options)))
        patch.setattr(torch.Tensor, "new_empty", lambda *args, **options: poison(new_empty(*args, **options)))
        yield


@st.composite
def accuracy_cases(draw, aligned=False):
    """Banks of odd sizes, empty experts among them; tokens and rows enough that their rounding averages out."""
    counts = draw(st.lists(st.one_of(st.just(0), st.integers(0, 120)), min_size=1, max_size=5))
    counts.insert(draw(st.integers(0, len(counts))), draw(st.integers(64, 130)))
    width = st.integers(2, 12).map(lambda eighth: 8 * eighth) if aligned else st.integers(16, 90)
    return ExpertCase(
        counts,
        num_tokens=draw(st.integers(16, 80)),
        dim=draw(width),
        hidden=draw(width),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        bias=draw(st.booleans()),
        weighted=draw(st.booleans()),
        variant=draw(st.sampled_from(VARIANTS)),
        seed=draw(st.integers(0, 1000)),
    )
