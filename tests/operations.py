"""What a computation runs and how much it writes at once."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"


class Operations(TorchDispatchMode):
    """``names`` of the ATen operations run inside the block, backward included, and the elements of the ``largest``
    tensor that one of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        self.names.add(str(operation.overloadpacket))
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result

    def assert_fused(self, *, below: int) -> None:
        """Attention by the flash kernels, forward and backward, and no tensor of ``below`` elements or more."""
        missing = {FLASH, FLASH + "_backward"} - self.names
        assert not missing, f"not run: {missing}"
        assert self.largest < below, f"a tensor of {self.largest} elements was written"


def operations_of(compute, *inputs: Tensor) -> Operations:
    """Those of ``compute()`` and of the gradient of its sum of squares with respect to the inputs."""
    with Operations() as operations:
        torch.autograd.grad(compute().square().sum(), inputs)
    return operations
