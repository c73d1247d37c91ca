"""What a search minimises, in words and figures: the error rate, or what another metric lacks to its best value."""

from dataclasses import dataclass

from search.runs.result_rows import CONFIRMED, CONFIRMED_OBJECTIVE, EXPECTED
from trainables.ray.trial import EXPECTED_OBJECTIVE, OBJECTIVE
from trainables.system.text import percent

NAMES = {
    "error_rate": "error",
    "balanced_error": "balanced error",
    "macro_f1": "1 - macro F1",
    "auroc": "1 - AUROC",
    "log_loss": "log loss",
    "top5_error": "top-5 error",
    "map": "1 - mAP",
}
"""Of each metric's objective, which is the lower the better."""


@dataclass(frozen=True)
class Objective:
    """The objective of a search with this metric."""

    metric: str

    @property
    def is_error_rate(self) -> bool:
        return self.metric == "error_rate"

    @property
    def column(self) -> str:
        """In both tables."""
        return "error_rate" if self.is_error_rate else OBJECTIVE

    @property
    def expected_column(self) -> str:
        """The column of what is expected of it on new images, which tables may lack."""
        return EXPECTED if self.is_error_rate else EXPECTED_OBJECTIVE

    @property
    def confirmed_column(self) -> str:
        """The column of its mean over retrainings, which tables may lack."""
        return CONFIRMED if self.is_error_rate else CONFIRMED_OBJECTIVE

    @property
    def name(self) -> str:
        return NAMES[self.metric]

    @property
    def is_share(self) -> bool:
        """Whether it is shown in percent."""
        return self.metric != "log_loss"

    def text(self, value: float) -> str:
        """Such as "4.3 %", or "0.127" of a log loss."""
        return percent(value) if self.is_share else f"{value:.3f}"

    def lead(self, value: float, other: float, *, than: str) -> str:
        """How much better a value is than another one, in words."""
        side = "better" if value <= other else "worse"
        size = f"{100 * abs(other - value):.1f} points" if self.is_share else f"{abs(other - value):.3f}"
        return f"{size} {side} than {than} in {self.name}"
