"""Dropout whose masks do not depend on how a batch is shared out over workers and parts.

Dropout, stochastic depth and whatever else a network draws for each image in training is drawn for the whole batch: all
parts start from the same random state, and each one takes the rows of its own images. What is drawn for no image in
particular, such as dropout on relative positions, is the same in all parts.
"""

from collections.abc import Callable
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


class WholeBatch(TorchFunctionMode):
    """Within it, a network sees the `rows` of a batch of `batch_size` images, and draws for all of them.

    It intercepts the functions with which torch and timm drop things; the first dimension of what they draw is the
    part's images, or several rows for each of them, as in windows. Dropout inside fused attention is not among them: no
    timm network has any by itself.
    """

    def __init__(self, rows: slice, batch_size: int) -> None:
        super().__init__()
        self.rows, self.batch_size = rows, batch_size
        self.has_drawn = False

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        handler = HANDLERS.get(function)
        result = NotImplemented if handler is None else handler(self, function, *args, **kwargs or {})
        return function(*args, **kwargs or {}) if result is NotImplemented else result

    def drawn(self, shape: tuple[int, ...], draw: Callable[..., torch.Tensor]) -> torch.Tensor:
        """This part's rows of what `draw` makes in the shape of the whole batch; `shape` is the part's."""
        self.has_drawn = True
        each, rest = divmod(shape[0] if shape else 0, self.rows.stop - self.rows.start)
        if rest or not each:
            return draw(*shape)  # of no image in particular
        return draw(each * self.batch_size, *shape[1:])[each * self.rows.start : each * self.rows.stop]

    def dropout(
        self, function: Callable, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or not 0 < p < 1:
            return NotImplemented
        shape = x.shape if function is F.dropout else (*x.shape[:2], *[1] * (x.ndim - 2))  # or whole channels
        keep = self.drawn(shape, lambda *size: torch.rand(size, device=x.device)) >= p
        return x * keep / (1 - p)

    def bernoulli(self, function: Callable, x: torch.Tensor, p: float = 0.5, **kwargs: Any) -> torch.Tensor:
        if isinstance(p, torch.Tensor):
            return NotImplemented
        return x.copy_(self.drawn(x.shape, lambda *size: x.new_empty(size).bernoulli_(p, **kwargs)))

    def noise(self, function: Callable, *size: Any, **kwargs: Any) -> torch.Tensor:
        if "out" in kwargs or "size" in kwargs:
            return NotImplemented
        shape = size if isinstance(size[0], int) else size[0]
        return self.drawn(tuple(shape), lambda *whole: function(whole, **kwargs))


HANDLERS = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), WholeBatch.dropout),
    torch.Tensor.bernoulli_: WholeBatch.bernoulli,  # timm's DropPath and DropBlock
    **dict.fromkeys((torch.rand, torch.randn), WholeBatch.noise),  # timm's PatchDropout
}


class SharedDropout(nn.Dropout):
    """Dropout with one mask for all images, which `WholeBatch` leaves alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return super().forward(x)


def share_position_dropout(model: nn.Module) -> None:
    """Make the dropout of MLPs over relative positions a `SharedDropout`: their rows are positions, not images."""
    for mlp in model.modules():
        if isinstance(mlp, timm.layers.Mlp) and getattr(mlp.fc1, "in_features", None) == 2:
            for module in mlp.modules():
                if type(module) is nn.Dropout:
                    module.__class__ = SharedDropout
