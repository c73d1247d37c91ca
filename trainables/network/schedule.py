"""The one-cycle schedule of rate and momentum, and the discriminative rates of layer groups. Imports no torch."""

from dataclasses import dataclass
from math import cos, pi

from trainables.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """The one-cycle policy (Smith 2018) as in fastai's `fit_one_cycle`; position in [0, 1) is steps done / steps.

    The rate follows cosines from lr_max / div up to lr_max at `pct_start` of the steps, then down to
    lr_max / div_final. The momentum mirrors it: mom_high, mom_low, mom_high.
    """

    pct_start: float
    div: float
    div_final: float
    mom_high: float
    mom_low: float

    def lr_factor(self, position: float) -> float:
        """Learning rate at `position`, as a share of a group's lr_max."""
        return self._rise_and_fall(position, 1 / self.div, 1.0, 1 / self.div_final)

    def momentum(self, position: float) -> float:
        return self._rise_and_fall(position, self.mom_high, self.mom_low, self.mom_high)

    def _rise_and_fall(self, position: float, start: float, peak: float, end: float) -> float:
        if position < self.pct_start:
            return _cosine(start, peak, position / self.pct_start)
        return _cosine(peak, end, (position - self.pct_start) / (1 - self.pct_start))


def _cosine(start: float, end: float, position: float) -> float:
    return start + (1 + cos(pi * (1 - position))) * (end - start) / 2


def stage_cycle(recipe: Recipe, *, frozen: bool) -> OneCycle:
    """The schedule of the frozen or the unfrozen stage."""
    return OneCycle(
        pct_start=recipe.pct_start_frozen if frozen else recipe.pct_start,
        div=recipe.div_frozen if frozen else recipe.div,
        div_final=recipe.div_final,
        mom_high=recipe.mom_high,
        mom_low=recipe.mom_low,
    )


def stage_rates(recipe: Recipe, num_groups: int, *, frozen: bool) -> list[float]:
    """One peak rate per layer group, earliest first. In the frozen stage, those before the head are norms."""
    if frozen:
        return [recipe.lr_max_frozen / recipe.lr_ratio_frozen] * (num_groups - 1) + [recipe.lr_max_frozen]
    return discriminative_rates(recipe.lr_min, recipe.lr_max, num_groups)


def discriminative_rates(lr_min: float, lr_max: float, num_groups: int) -> list[float]:
    """One peak rate per layer group, earliest first, geometric from lr_min to lr_max (fastai's `even_mults`)."""
    if num_groups == 1:
        return [lr_max]
    return [lr_min * (lr_max / lr_min) ** (i / (num_groups - 1)) for i in range(num_groups)]
