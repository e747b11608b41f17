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


# of these CUDA reads a result on the host: to size it, to check it, or because that is what they are for
_WAIT = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "multinomial",
    "_unique", "_unique2", "unique", "unique_dim", "unique_consecutive",
)  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Raises AssertionError at an operation inside the block, backward included, for which a GPU would be waited for.

    Args:
        device: of the tensors that stand for those on a GPU; "meta" ones also have no data that could be read.
        but: operations that only the path of a CPU runs.
    """

    def __init__(self, device: str, but: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.device, self.but = device, but

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        waits = name in _WAIT or name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        waits = waits and name not in self.but
        assert not (waits and any(tensor.device.type == self.device for tensor in given)), operation
        result = operation(*args, **kwargs)
        if name in ("_to_copy", "copy_", "index", "index_put", "index_put_"):
            here = {leaf.device.type for leaf in (*given, *tree_leaves(result)) if isinstance(leaf, Tensor)}
            assert self.device not in here or len(here) == 1, f"{operation} between {here}"
        return result
