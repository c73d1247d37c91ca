"""The report as a person meets it: in a browser, from disk, with a mouse, a keyboard, a phone or a printer.

The run is a real one of the quickstart, cut short; `pytest -m browser --screenshots DIR` keeps the pictures.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from browser import DESKTOP, PHONE, Complaints, chromium, opened
from run_tables import write_run

from search.report import main as report
from search.runs.run_record import load

pytestmark = [pytest.mark.browser]

ROOT = Path(__file__).resolve().parents[2]
LABELS = ["<script>alert(1)</script>", 'a"b', "<b>bold</b>"]


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def quickstart(browser, tmp_path_factory, request) -> Path:
    """The folder of a real run of the quickstart: two probes, then three trials of an epoch each."""
    ray_head = request.getfixturevalue("ray_head")  # not before it is known that there is a browser
    results = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "search.run", "--space", "quickstart", "--results", results, "--name", "quick"]
    command += ["--address", ray_head]
    command += ["--trials", 3, "--set", "epochs=1", "--set", "image_size=96"]
    command += ["--set", "arch=tf_efficientnet_lite0"]
    child = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 0, child.stdout + child.stderr
    return results / "quick"


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A run of ten trials with names that are no names."""
    folder = write_run(
        tmp_path_factory.mktemp("many") / "run", labels=LABELS, reason=f"{LABELS[0]}<img src=x onerror=alert(2)>"
    )
    assert report([str(folder)]) == 0
    return folder


@pytest.fixture
def complaints():
    """Empty at the end of a test, or it fails."""
    found = Complaints()
    yield found
    assert not found


def shown(page) -> list[str]:
    return page.locator("#trials-table tbody tr:visible td:first-child").all_inner_texts()


def shown_trials(page) -> list[int]:
    return [int(text) for text in shown(page)]


@pytest.mark.ray
def test_the_report_of_a_quickstart_run_opens_without_a_complaint(browser, quickstart, complaints):
    assert (quickstart / "report.html").stat().st_size < 8e6
    run = load(quickstart)
    with opened(browser, (quickstart / "report.html").as_uri(), complaints) as page:
        assert page.locator("#best-card .figure").inner_text() == f"{100 * run.best['error_rate']:.1f} %"
        assert "still going on" not in page.inner_text("main")
        schedule = ("schedule",) if run.best["kind"] == "trial" else ()  # a probe has none
        for name in ("incumbent", "learning-curves", "parallel", "cost", "confusion", *schedule):
            assert page.locator(f"#{name} svg.main-svg").count() > 0, name
        losses = page.locator("[aria-labelledby=top-losses]")
        assert losses.locator("li").count() == 12
        assert 24 <= losses.locator("img").count() <= 36  # each with one heat map, or two
        assert page.locator("[aria-labelledby=suspects] li").count() > 0  # two probes of few images doubt some
        widths = page.eval_on_selector_all(".thumbnails img", "images => images.map(image => image.naturalWidth)")
        assert min(widths) > 0
        assert sorted(shown(page)) == ["0", "1", "2", "probe 1", "probe 2"]


@pytest.mark.ray
@pytest.mark.parametrize(("name", "viewport"), [("desktop", DESKTOP), ("phone", PHONE)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_at_phone_and_desktop_width(
    browser, quickstart, complaints, screenshots, name, viewport, scheme
):
    address = (quickstart / "report.html").as_uri()
    with opened(browser, address, complaints, viewport, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        for box in (place.bounding_box() for place in page.locator("h1, h2, h3, .card, figcaption, #theme").all()):
            assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"]
        page.screenshot(path=screenshots / f"report-{name}-{scheme}.png", full_page=True)
        assert (screenshots / f"report-{name}-{scheme}.png").stat().st_size > 50_000


def test_the_table_sorts_by_any_column_and_back(browser, many, complaints):
    with opened(browser, (many / "report.html").as_uri(), complaints) as page:
        best_first = shown_trials(page)
        assert best_first[0] == load(many).best.name
        header = page.locator("#trials-table th", has_text="trial")
        header.get_by_role("button").click()
        assert shown_trials(page) == list(range(10)) and header.get_attribute("aria-sort") == "ascending"
        header.get_by_role("button").press("Enter")  # by keyboard
        assert shown_trials(page) == list(range(9, -1, -1)) and header.get_attribute("aria-sort") == "descending"
        page.locator("#trials-table th", has_text="lr_max").get_by_role("button").click()
        rates = load(many).trials["lr_max"].sort_values()
        assert shown_trials(page) == list(rates.index)
        page.locator("#trials-table th", has_text="error").get_by_role("button").click()
        assert shown_trials(page)[-1] == 5  # it failed, and has no error


def test_the_table_filters_by_words_and_by_status(browser, many, complaints):
    with opened(browser, (many / "report.html").as_uri(), complaints) as page:
        assert page.inner_text("#shown") == "10 of 10 trials"
        page.select_option("#status-filter", "stopped early")
        assert sorted(shown_trials(page)) == [3, 8] and page.inner_text("#shown") == "2 of 10 trials"
        page.select_option("#status-filter", "")
        page.fill("#filter", "RESNET34 completed")
        assert sorted(shown_trials(page)) == [0, 2, 4, 6]
        page.fill("#filter", "no such thing")
        assert shown_trials(page) == [] and page.inner_text("#shown") == "0 of 10 trials"


def test_the_theme_switches_everywhere_and_is_remembered(browser, many, complaints):
    with opened(browser, (many / "report.html").as_uri(), complaints, color_scheme="light") as page:
        text = "getComputedStyle(document.querySelector('#incumbent .xtick text')).fill"
        ground = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(f"[{text}, {ground}]")
        page.get_by_role("button", name="Switch to dark colours").click()
        page.wait_for_function(f"{text} !== {light[0]!r}")
        dark = page.evaluate(f"[{text}, {ground}]")
        assert dark[1] == "rgb(20, 23, 27)" and light[1] == "rgb(255, 255, 255)"
        page.reload()
        page.wait_for_selector("html[data-drawn]")
        assert page.evaluate(f"[{text}, {ground}]") == dark


def test_names_that_look_like_markup_are_shown_and_not_run(browser, many, complaints):
    with opened(browser, (many / "report.html").as_uri(), complaints) as page:
        labels = page.locator("#confusion .ytick text").all_text_contents()
        assert sorted(labels) == sorted(LABELS)
        assert LABELS[0] in page.inner_text("#confused") and 'a"b' in page.inner_text("#confused")
        assert LABELS[0] in page.inner_text(".thumbnails") and LABELS[0] in page.inner_text("#failures + ul")
        assert page.locator("main b, main img[src='x']").count() == 0


def test_a_script_that_slipped_in_would_not_run(browser, many, tmp_path):
    html = (many / "report.html").read_text()
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(html.replace("<main>", "<main><script>document.title = 'run'</script><p onclick='x()'>", 1))
    complaints = Complaints()
    with opened(browser, spoilt.as_uri(), complaints) as page:
        assert page.title() != "run"
    assert any("Content Security Policy" in said for said in complaints)


def test_paper_is_white_whatever_the_screen(browser, many, complaints, screenshots):
    with opened(browser, (many / "report.html").as_uri(), complaints, color_scheme="dark") as page:
        page.pdf(path=screenshots / "report.pdf")
        assert (screenshots / "report.pdf").read_bytes().startswith(b"%PDF")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate("document.documentElement.dataset.theme") == "light"
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_every_chart_has_a_text_and_every_control_a_name(browser, many, complaints):
    with opened(browser, (many / "report.html").as_uri(), complaints) as page:
        for chart in page.locator(".chart").all():
            assert len(chart.get_attribute("aria-label")) > 60
        assert page.get_by_label("Filter").count() == 1 and page.get_by_label("Status").count() == 1
        assert page.locator("img:not([alt]), button:empty").count() == 0


def test_a_thousand_trials_are_drawn_and_sorted_in_seconds(browser, tmp_path, complaints):
    folder = write_run(tmp_path / "run", num_trials=1000)
    assert report([str(folder)]) == 0
    with opened(browser, (folder / "report.html").as_uri(), complaints) as page:
        page.locator("#trials-table th", has_text="trial").get_by_role("button").click()
        assert shown_trials(page)[:3] == [0, 1, 2] and len(shown(page)) == 200
        assert page.inner_text("#shown") == "1000 of 1000 trials, the first 200 of them here"
        page.locator("#more").click()
        assert shown_trials(page) == list(range(400))
        page.fill("#filter", "resnet34 failed")
        assert 0 < len(shown(page)) < 100 and not page.locator("#more").is_visible()
