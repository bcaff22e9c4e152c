"""Records the tensors with memory that operations return."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RealTensors(TorchDispatchMode):
    """The largest number of elements of a tensor that an operation of the block returned, views included."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) and not leaf.is_meta:
                self.largest = max(self.largest, leaf.numel())
        return result
