"""On CPUs: a convolution, the batch norm after it in evaluation mode, and the activation, in one pass over memory.

A batch norm in evaluation mode scales and shifts each channel, which the convolution before it can do itself. Norms and
activations are bound by memory: they took two thirds of MobileNetV2's forward pass, and half of a training step whose
batch norms do not train. Parameters and buffers stay those of the separate layers, and so do their gradients, but for
rounding. GPUs keep the separate layers: computing the weights anew takes more launches of kernels than it saves.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS: tuple[type[_BatchNorm], ...] = (nn.BatchNorm2d, BatchNormAct2d)
ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Identity: ("none", []),
}
"""What oneDNN applies to the result of a convolution, and what has a gradient that the activation alone decides."""


def fuse_convolutions(model: nn.Module, size: int, norms: Iterable[type[_BatchNorm]] = NORMS) -> None:
    """Let the convolutions of a network on a CPU take in the batch norms after them, whenever these are in evaluation
    mode.

    Which ones follow each other, a forward pass of one image of `size` px shows. `norms` are the types of those that,
    in evaluation mode, do as torch's or timm's do.
    """
    for conv, norm in _pairs(model, size, tuple(norms)):
        pair = _Pair(conv, norm)
        conv.forward, norm.forward = pair.convolve, pair.normalize  # type: ignore[assignment, method-assign]


class _Pair:
    """A convolution and the batch norm that alone reads its result."""

    def __init__(self, conv: nn.Conv2d, norm: _BatchNorm) -> None:
        self.conv, self.norm = conv, norm

    def convolve(self, x: Tensor) -> Tensor:
        """In place of the convolution."""
        conv, norm = self.conv, self.norm
        if norm.training:
            return type(conv).forward(conv, x)
        assert norm.running_var is not None and norm.running_mean is not None  # see `_pairs`
        scale = (norm.running_var + norm.eps).rsqrt() * norm.weight
        weight = conv.weight * scale.view(-1, 1, 1, 1)
        mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
        bias = norm.bias - mean * scale
        padding = conv.padding
        if isinstance(conv, Conv2dSame):
            x, padding = pad_same(x, list(conv.kernel_size), list(conv.stride), list(conv.dilation)), (0, 0)
        how: tuple[Any, ...] = conv.stride, padding, conv.dilation, conv.groups
        if not _in_one_pass(x):
            return F.conv2d(x, weight, bias, *how)
        result: Tensor = _Convolution.apply(x, weight, bias, *how, self._activation)
        return result

    def normalize(self, x: Tensor) -> Tensor:
        """In place of the batch norm, which may have a dropout and an activation."""
        norm = self.norm
        if norm.training:
            return type(norm).forward(norm, x)
        if _in_one_pass(x) and self._activation != "none":
            return x
        return self._after("act", self._after("drop", x))

    def _after(self, name: str, x: Tensor) -> Tensor:
        layer: Callable[[Tensor], Tensor] | None = getattr(self.norm, name, None)
        return x if layer is None else layer(x)

    @property
    def _activation(self) -> str:
        """The one that the convolution applies, too."""
        drop, act = (type(getattr(self.norm, name, nn.Identity())) for name in ("drop", "act"))
        return ACTIVATIONS[act][0] if drop is nn.Identity and act in ACTIVATIONS else "none"


def _in_one_pass(x: Tensor) -> bool:
    """Whether oneDNN can compute the convolution with its activation."""
    return x.dtype == torch.float32 and bool(torch.backends.mkldnn.enabled) and not torch.is_autocast_enabled("cpu")


class _Convolution(torch.autograd.Function):
    """A convolution with its activation; torch's compiler uses the same operator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        activation: str,
    ) -> Tensor:
        limits = next(limits for name, limits in ACTIVATIONS.values() if name == activation)
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, padding, stride, dilation, groups, activation, limits, ""
        )
        ctx.save_for_backward(x, weight, *([] if activation == "none" else [result]))  # others may write to the result
        ctx.geometry = stride, padding, dilation, False, (0, 0), groups
        ctx.activation, ctx.limits = activation, limits
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *result = ctx.saved_tensors
        aten = torch.ops.aten
        if ctx.activation == "relu":
            gradient = aten.threshold_backward(gradient, *result, 0.0)
        elif ctx.activation == "hardtanh":
            gradient = aten.hardtanh_backward(gradient, *result, *ctx.limits)
        needed = ctx.needs_input_grad[:3]
        gradients = aten.convolution_backward(gradient, x, weight, [len(weight)], *ctx.geometry, needed)
        return *gradients, None, None, None, None, None


def _pairs(model: nn.Module, size: int, norms: tuple[type[_BatchNorm], ...]) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    """The convolutions of a network of whose result nothing but one batch norm makes another tensor."""
    parameter = next(model.parameters())
    candidates = [module for module in model.modules() if type(module) in norms and _has_own_statistics(module)]
    if parameter.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_convolution_pointwise") or not candidates:
        return []
    convolutions = [module for module in model.modules() if type(module) in CONVOLUTIONS and _pads_with_zeros(module)]
    before = {module: module.training for module in model.modules()}
    model.eval()
    with torch.inference_mode(), _Watched() as watched:
        hooks = [conv.register_forward_hook(watched.note_result) for conv in convolutions]
        hooks += [norm.register_forward_pre_hook(watched.note_input) for norm in candidates]
        model(torch.zeros(1, 3, size, size))
        for hook in hooks:
            hook.remove()
    for module, training in before.items():
        module.training = training
    found: list[tuple[nn.Conv2d, _BatchNorm]] = watched.pairs()
    return found


def _pads_with_zeros(conv: nn.Module) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _has_own_statistics(norm: nn.Module) -> bool:
    return all(isinstance(value, Tensor) for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias))


class _Watched(TorchFunctionMode):
    """Within it, notes which functions make tensors of the results of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[nn.Conv2d, Tensor]] = []
        self.readers: dict[int, list[nn.Module | None]] = {}
        """By the result's id: the batch norm that got it, and None for each function that read it."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        if any(isinstance(value, Tensor) for value in tree_leaves(result)):
            for value in tree_leaves((args, kwargs)):
                if id(value) in self.readers:
                    self.readers[id(value)].append(None)
        return result

    def note_result(self, conv: nn.Conv2d, inputs: Any, result: Tensor) -> None:
        self.results.append((conv, result))  # which keeps its id from being that of another one
        self.readers[id(result)] = []

    def note_input(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in self.readers:
            self.readers[id(inputs[0])].append(norm)

    def pairs(self) -> list[tuple[nn.Conv2d, _BatchNorm]]:
        """Of each result that one norm got, and one function read, its own; and of layers that ran once."""
        found = []
        for conv, result in self.results:
            match self.readers[id(result)]:
                case [_BatchNorm() as norm, None]:
                    found.append((conv, norm))
        layers = [layer for pair in found for layer in pair]
        ran = [conv for conv, _ in self.results]
        return [(conv, norm) for conv, norm in found if ran.count(conv) == 1 and layers.count(norm) == 1]
