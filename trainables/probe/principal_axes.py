"""Features in the coordinates of their principal axes, in which a logistic regression takes few steps."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axes:
    """Standardised images in the coordinates of their principal axes.

    A rotation changes neither logits nor penalty. Along these axes the objective's curvature is nearly diagonal, so
    scaling each axis by its own makes L-BFGS need a tenth of the steps where l2 is weak. With fewer images than
    features there are no more axes than images, and the smaller problem has the same solution.
    """

    coordinates: Tensor  # (images, axes)
    variances: Tensor  # (axes,), from small to large
    axes: Tensor  # (features, axes), orthonormal
    class_weights: Tensor | None  # (classes,)

    def only(self, images: Tensor) -> "Axes":
        """The same axes with some of the images."""
        return replace(self, coordinates=self.coordinates[images])

    def leading(self, share: float) -> "Axes":
        """The fewest axes that have this share of the variance."""
        largest = self.variances.flip(0).cumsum(0)
        first = -min(len(largest), int((largest < share * largest[-1]).sum()) + 1)
        return replace(
            self,
            coordinates=self.coordinates[:, first:].contiguous(),
            variances=self.variances[first:],
            axes=self.axes[:, first:],
        )

    def double(self) -> "Axes":
        weights = None if self.class_weights is None else self.class_weights.double()
        return Axes(self.coordinates.double(), self.variances.double(), self.axes.double(), weights)


def principal_axes(x: Tensor, class_weights: Tensor | None) -> Axes:
    n, d = x.shape
    if n < d:
        # In float64, since dividing by small singular values magnifies errors.
        wide = x.double()
        squares, left = torch.linalg.eigh(wide @ wide.T)
        kept = squares > max(float(squares[-1]) * 1e-10, 1e-30)
        squares, left = squares[kept], left[:, kept]
        parts = left * squares.sqrt(), squares / n, wide.T @ (left / squares.sqrt())
        coordinates, variances, axes = (part.float() for part in parts)
        return Axes(coordinates, variances, axes, class_weights)
    variances, axes = torch.linalg.eigh(x.T @ x / n)
    return Axes(x @ axes, variances.clamp(min=0), axes, class_weights)
