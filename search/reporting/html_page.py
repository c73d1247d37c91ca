"""Self-contained HTML pages: charts, styles and scripts in one file that opens without a network.

A page may show untrusted texts (class names, paths, reasons). They are escaped. As a second barrier, its content
security policy allows only the scripts that it lists by hash.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from search.reporting.chart_parts import Chart
from trainables.system.text import percent

FOLDER = Path(__file__).parent / "pages"
HEIGHT = 400  # px, of a chart that sets none


def render(template: str, charts: Sequence[Chart], **context: Any) -> str:
    """The HTML of `pages/<template>`, which refers to `charts` by name."""
    plotly, script = get_plotlyjs().replace("\r\n", "\n"), (FOLDER / "page.js").read_text(encoding="utf-8")
    sources = " ".join(f"'sha256-{_hash(text)}'" for text in (plotly, script))
    return _environment().get_template(template).render(
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        scripts=[plotly, script],
        policy=f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data:",
        charts={chart.name: chart for chart in charts},
        **context,
    )  # fmt: skip


def chart_data(chart: Chart) -> str:
    """A chart for the page's script."""
    figure = go.Figure(chart.figure)
    figure.update_layout(
        template=go.layout.Template(),
        height=figure.layout.height or HEIGHT,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    text: str = figure.to_json()
    return script_json(text)


def script_json(text: str) -> str:
    """JSON for the page's script, which cannot close its HTML element."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["chart_data"] = chart_data
    environment.filters["percent"] = percent
    return environment


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
