"""What error rate to expect of a model on new images, from more images than those for validation.

A probe is cross-validated on the training images, so its error is known on all images, those of validation among them.
Where its validation images happen to be easy ones, they are easy for the models that are trained from it as well. So
their error on validation is corrected by the probe's luck, as far as the two make the same mistakes: the regression
estimator of two-phase sampling (Cochran 1977, "Sampling Techniques", section 12.6). On small sets this removes much of
the chance by which the best of many models is chosen.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reference:
    """The linear probe's mistakes."""

    wrong: torch.Tensor
    """(validation images,) bool, on the CPU."""
    error_rate: float
    """Over the images for validation and, each unseen by the fit that labels it, those for training."""
    balanced: tuple[float, float] | None = None
    """The balanced errors of the same: on the images for validation, and over all; None if unknown."""

    def expected(self, error_rate: float, both_wrong: float) -> float:
        """The expected error rate of a model with this one on the validation images; `both_wrong` is the share of them
        that the probe gets wrong as well.

        >>> probe = Reference(torch.tensor([True] * 10 + [False] * 90), error_rate=0.14)
        >>> probe.expected(0.1, both_wrong=0.1)  # of the probe itself
        0.14
        >>> round(probe.expected(0.06, both_wrong=0.033), 4)  # of a model that shares a part of its mistakes
        0.072
        """
        luck = self.error_rate - self._on_validation
        return _bounded(error_rate + self._slope(error_rate, both_wrong) * luck)

    def expected_balanced(self, balanced_error: float, error_rate: float, both_wrong: float) -> float | None:
        """The expected balanced error of a model with this one, likewise; None if the probe's is unknown."""
        if self.balanced is None:
            return None
        on_validation, over_all = self.balanced
        return _bounded(balanced_error + self._slope(error_rate, both_wrong) * (over_all - on_validation))

    @property
    def _on_validation(self) -> float:
        return float(self.wrong.double().mean())

    def _slope(self, error_rate: float, both_wrong: float) -> float:
        """How far a model's mistakes go with the probe's: from 0, not at all, to 1."""
        variance = self._on_validation * (1 - self._on_validation)
        return 0.0 if variance == 0 else min(max((both_wrong - error_rate * self._on_validation) / variance, 0.0), 1.0)


def _bounded(error: float) -> float:
    return min(max(error, 0.0), 1.0)


def reference(
    wrong: torch.Tensor, out_of_fold_error_rate: float, num_train: int, balanced: tuple[float, float] | None = None
) -> Reference:
    """Of a probe's mistakes (validation images,) and its error rate on as many training images, out of fold."""
    total = float(wrong.sum()) + out_of_fold_error_rate * num_train
    return Reference(wrong.cpu(), total / (len(wrong) + num_train), balanced)
