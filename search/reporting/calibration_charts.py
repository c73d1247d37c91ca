"""What a report says about the winner's probabilities: calibration error, reliability diagram, and abstaining."""

import math
from typing import Any

import pandas as pd
from plotly.subplots import make_subplots

from search.reporting.chart_parts import BLUE, GREY, SKY, Chart
from search.runs.result_rows import CALIBRATION
from trainables.network.calibration import Calibration
from trainables.system.text import many, percent


def reliability(judged: Calibration) -> Chart:
    """The share of right labels over the probability that the model gives them, and how many images there are."""
    bins = judged.bins
    confidence, images = [found.confidence for found in bins], [found.images for found in bins]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.75, 0.25])
    figure.add_scatter(x=[0, 1], y=[0, 1], name="as good as it says", mode="lines", line={"color": GREY, "dash": "dot"})
    figure.add_scatter(
        x=confidence,
        y=[found.accuracy for found in bins],
        error_y={"array": [2 * found.deviation for found in bins], "thickness": 1},
        name="validation images",
        mode="markers",
        marker={"color": BLUE, "size": 9},
        customdata=[many(count, "image") for count in images],
        hovertemplate="%{y:.1%} right at %{x:.1%}, %{customdata}<extra></extra>",
    )
    middles, width = [(found.low + found.high) / 2 for found in bins], min(found.high - found.low for found in bins)
    figure.add_bar(x=middles, y=images, width=width, marker={"color": SKY}, showlegend=False, row=2, col=1)
    figure.update_yaxes(title_text="share that is right", tickformat=".0%", range=[-0.02, 1.02], row=1, col=1)
    figure.update_yaxes(title_text="images", row=2, col=1)
    figure.update_xaxes(title_text="probability of the label", tickformat=".0%", range=[0, 1.02], row=2, col=1)
    figure.update_xaxes(range=[0, 1.02], row=1, col=1)
    figure.update_layout(height=480)
    caption = (
        f"{many(judged.images, 'validation image')} by the probability of their label. On the line, as many are right "
        "as the probabilities say; below it, the model is too sure. A bar is two standard deviations of chance: where "
        "it reaches the line, the difference may be chance."
    )
    return Chart("reliability", "Reliability diagram", caption, figure)


def section(judged: Calibration | None, winner: "pd.Series[Any] | None") -> dict[str, Any] | None:
    """The winner's calibration in words, and rows of threshold, share that is answered, error of the answers, and
    images; None where it is not known."""
    if judged is None or winner is None:
        return None
    rows = [
        (f"{row.threshold:g}", percent(row.images / judged.images), _error(row.wrong, row.images), row.images)
        for row in judged.answered
    ]
    return {"text": describe(judged, winner), "rows": rows}


def describe(judged: Calibration, winner: "pd.Series[Any]") -> str:
    """The calibration error before and after the temperature, and what chance makes of it."""
    temperature, before, _ = (winner.get(name, math.nan) for name in CALIBRATION)
    error, images = percent(judged.error), many(judged.images, "validation image")
    chance = f"With so many images, chance alone makes it about {percent(judged.error_by_chance)}."
    if math.isnan(temperature):
        earlier = "without a temperature: an earlier version trained this model"
        return f"The expected calibration error is {error} on {images}, {earlier}. {chance}"
    return (
        f"The temperature is {temperature:.3g}. The expected calibration error is {error} on {images}, each judged by "
        f"a temperature fitted on the other half of them, and {percent(before)} without a temperature. {chance}"
    )


def _error(wrong: int, images: int) -> str:
    return percent(wrong / images) if images else ""
