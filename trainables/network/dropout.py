"""Dropout whose masks do not depend on how a batch is split over workers and parts.

Dropout, stochastic depth and all else that a network draws per image in training is drawn for the whole batch: all
parts start from the same random state, and each takes the rows of its own images. What is not drawn per image, such as
dropout on relative positions, is the same in all parts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import nn
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]


class WholeBatch(TorchFunctionMode):
    """Within it, a network sees the `rows` of a batch of `batch_size` images, and draws for all of them.

    It intercepts the functions that torch and timm use for dropout. The first dimension of what they draw is the part's
    images, or several rows per image, as for windows. Dropout inside fused attention is not covered: no timm network
    has any by default.
    """

    def __init__(self, rows: slice, batch_size: int) -> None:
        super().__init__()
        self.rows, self.batch_size = rows, batch_size
        self.has_drawn = False

    def __torch_function__(
        self, function: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = HANDLERS.get(function)
        result = NotImplemented if handler is None else handler(self, function, *args, **kwargs or {})
        return function(*args, **kwargs or {}) if result is NotImplemented else result

    def drawn(self, shape: tuple[int, ...], draw: Callable[..., torch.Tensor]) -> torch.Tensor:
        """This part's rows of what `draw` makes for the whole batch; `shape` is the part's."""
        self.has_drawn = True
        each, rest = divmod(shape[0] if shape else 0, self.rows.stop - self.rows.start)
        if rest or not each:
            return draw(*shape)  # not per image
        return draw(each * self.batch_size, *shape[1:])[each * self.rows.start : each * self.rows.stop]

    # The handlers return NotImplemented for calls that they leave to torch.

    def dropout(
        self, function: Function, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Any:
        if not training or not 0 < p < 1:
            return NotImplemented
        shape = x.shape if function is F.dropout else (*x.shape[:2], *[1] * (x.ndim - 2))  # or whole channels
        keep = self.drawn(shape, lambda *size: torch.rand(size, device=x.device)) >= p
        return x * keep / (1 - p)

    def bernoulli(self, function: Function, x: torch.Tensor, p: float = 0.5, **kwargs: Any) -> Any:
        if isinstance(p, torch.Tensor):
            return NotImplemented
        return x.copy_(self.drawn(x.shape, lambda *size: x.new_empty(size).bernoulli_(p, **kwargs)))

    def random(self, function: Function, *size: Any, **kwargs: Any) -> Any:
        if "out" in kwargs or "size" in kwargs:
            return NotImplemented
        shape = size if isinstance(size[0], int) else size[0]
        return self.drawn(tuple(shape), lambda *whole: function(whole, **kwargs))


HANDLERS: dict[Function, Callable[..., Any]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), WholeBatch.dropout),
    torch.Tensor.bernoulli_: WholeBatch.bernoulli,  # timm's DropPath and DropBlock
    **dict.fromkeys((torch.rand, torch.randn), WholeBatch.random),  # timm's PatchDropout
}


class SharedDropout(nn.Dropout):
    """Dropout with one mask for all images, which `WholeBatch` leaves alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return super().forward(x)


def share_position_dropout(model: nn.Module) -> None:
    """Replaces the dropout of MLPs over relative positions by `SharedDropout`: their rows are positions, not images."""
    for mlp in model.modules():
        if isinstance(mlp, Mlp) and getattr(mlp.fc1, "in_features", None) == 2:
            for module in mlp.modules():
                if type(module) is nn.Dropout:
                    module.__class__ = SharedDropout
