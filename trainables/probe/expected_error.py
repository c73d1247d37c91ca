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

    def expected(self, error_rate: float, both_wrong: float) -> float:
        """The expected error rate of a model with this one on the validation images; `both_wrong` is the share of them
        that the probe gets wrong as well.

        >>> probe = Reference(torch.tensor([True] * 10 + [False] * 90), error_rate=0.14)
        >>> probe.expected(0.1, both_wrong=0.1)  # of the probe itself
        0.14
        >>> round(probe.expected(0.06, both_wrong=0.033), 4)  # of a model that shares a part of its mistakes
        0.072
        """
        on_validation = float(self.wrong.double().mean())
        variance = on_validation * (1 - on_validation)
        if variance == 0:
            return error_rate
        slope = (both_wrong - error_rate * on_validation) / variance
        corrected = error_rate + min(max(slope, 0.0), 1.0) * (self.error_rate - on_validation)
        return min(max(corrected, 0.0), 1.0)


def reference(wrong: torch.Tensor, out_of_fold_error_rate: float, num_train: int) -> Reference:
    """Of a probe's mistakes (validation images,) and its error rate on as many training images, out of fold."""
    total = float(wrong.sum()) + out_of_fold_error_rate * num_train
    return Reference(wrong.cpu(), total / (len(wrong) + num_train))
