"""What the kernels' tests share: poisoned memory."""

import pytest
import torch


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
