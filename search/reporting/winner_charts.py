"""The charts of a report about its winner: learning rate schedule and confusion matrix."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from search.reporting.chart_parts import BLUE, GREEN, ORANGE, SKY, Chart, plain
from trainables.network.schedule import stage_cycle
from trainables.recipe import Recipe
from trainables.system.text import many

RIGHT_COLOURS = [[0, "#e3f2fc"], [1, SKY]]  # dark numbers are legible on all of them
WRONG_COLOURS = [[0, "#fdf0d5"], [0.5, ORANGE], [1, ORANGE]]
MAX_CLASSES = 40  # of a legible confusion matrix


def schedule(recipe: Recipe) -> Chart:
    """Learning rates of the first layers and of the head, and the momentum, over the winner's epochs."""
    epochs, first_layers, head, momentum = schedule_curves(recipe)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for name, values, colour in (("rate of the head", head, BLUE), ("rate of the first layers", first_layers, ORANGE)):
        figure.add_scatter(x=epochs, y=values, name=name, mode="lines", line={"color": colour}, row=1, col=1)
    figure.add_scatter(x=epochs, y=momentum, name="momentum", mode="lines", line={"color": GREEN}, row=2, col=1)
    figure.update_yaxes(title_text="learning rate", type="log", exponentformat="power", row=1, col=1)
    figure.update_yaxes(title_text="momentum", row=2, col=1)
    figure.update_xaxes(title_text="epoch", row=2, col=1)
    frozen = f"{many(recipe.freeze_epochs, 'epoch')} frozen up to {recipe.lr_max_frozen:.3g}, then "
    caption = (
        f"{frozen if recipe.freeze_epochs else ''}{many(recipe.epochs, 'epoch')} unfrozen up to "
        f"{recipe.lr_max:.3g} for the head and {recipe.lr_min:.3g} for the first layers; momentum falls from "
        f"{recipe.mom_high} to {recipe.mom_low} and rises again."
    )
    return Chart("schedule", "Learning rate and momentum", caption, figure)


def schedule_curves(recipe: Recipe, points: int = 100) -> tuple[list[float], ...]:
    """Epoch, rate of the first layers, rate of the head, and momentum; `points` of each per stage."""
    stages = [(True, 0, recipe.freeze_epochs, recipe.lr_max_frozen / recipe.lr_ratio_frozen, recipe.lr_max_frozen)]
    stages.append((False, recipe.freeze_epochs, recipe.epochs, recipe.lr_min, recipe.lr_max))
    rows = []
    for frozen, start, length, low, high in stages:
        cycle = stage_cycle(recipe, frozen=frozen)
        for position in np.linspace(0, 1, points, endpoint=False) if length else ():
            factor = cycle.lr_factor(position)
            rows.append((start + position * length, low * factor, high * factor, cycle.momentum(position)))
    return tuple(map(list, zip(*rows, strict=True)))


def confusion(counts: npt.NDArray[np.int64], classes: Sequence[str]) -> Chart:
    """(classes, classes) images as a matrix: rows are the actual classes, columns the predicted ones.

    Of many classes, it shows those with the most errors.
    """
    wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MAX_CLASSES])
    part = counts[np.ix_(shown, shown)]
    share = part / np.maximum(counts[shown].sum(axis=1, keepdims=True), 1)
    names, places = [plain(classes[i]) for i in shown], list(range(len(shown)))
    hover = [[f"{n} of {actual} taken for {predicted}" for predicted, n in zip(names, row, strict=True)]
             for actual, row in zip(names, part, strict=True)]  # fmt: skip
    on_diagonal = np.eye(len(shown), dtype=bool)
    figure = go.Figure()
    for name, where, colours in (("right", on_diagonal, RIGHT_COLOURS), ("wrong", ~on_diagonal, WRONG_COLOURS)):
        figure.add_heatmap(
            name=name,
            x=places,
            y=places,
            z=np.where(where & (part > 0), share, np.nan),
            text=np.where(part > 0, part.astype(str), ""),
            texttemplate="%{text}",
            textfont={"color": "#1c2128"},
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=colours,
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            showscale=False,
        )
    figure.update_xaxes(title_text="predicted", tickvals=places, ticktext=names, tickangle=-60, automargin=True)
    figure.update_yaxes(title_text="actual", tickvals=places, ticktext=names, autorange="reversed", automargin=True)
    size = max(360, 150 + 24 * len(shown))
    figure.update_layout(height=size, meta={"min_width": size})
    total, right = int(counts.sum()), int(counts.diagonal().sum())
    caption = f"{total - right} of {total} validation images are wrong. "
    caption += "Rows are the actual classes, columns the predicted ones."
    if len(shown) < len(classes):
        caption += f" Of {len(classes)} classes, the {len(shown)} with the most errors are shown."
    return Chart("confusion", "Confusion matrix", caption, figure)
