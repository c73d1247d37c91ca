"""The documentation's pictures, from a real run of the quickstart: `python docs/make_pictures.py`.

terminal.png is what the run drew on a terminal when it was half done, report.png and dashboard.png are the pages of the
finished run. Needs chromium, and the extras quickstart and test.
"""

import argparse
import contextlib
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
COLUMNS, LINES = 118, 24
HALF_DONE = "14/18 probes and trials ended"
WITHOUT_HOME = """home => {
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) texts.currentNode.nodeValue = texts.currentNode.nodeValue.replaceAll(home, '~');
}"""
"""Paths on the page begin with ~, whoever makes the picture."""
UP_AND_CLEAR = re.compile(r"(?:\r?\x1b\[2K|\x1b\[1A\x1b\[2K)+")  # how rich takes a live table back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="keep the run in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, chromium() as browser:
        results = (args.results or Path(temporary)).resolve()
        command = ["python", "-m", "search.run", "--space", "quickstart", "--name", "quickstart"]
        picture_of_terminal(browser, drawn_when(HALF_DONE, [*command, "--results", str(results)]), " ".join(command))
        run = results / "quickstart"
        picture_of_page(browser, (run / "report.html").as_uri(), "html[data-drawn]", HERE / "report.png", 1180)
        with dashboard(run) as address:
            chart = ".js-plotly-plot .main-svg"
            picture_of_page(browser, f"{address}/dashboard/studies/0", chart, HERE / "dashboard.png", 900)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


def drawn_when(words: str, command: list[str]) -> str:
    """Run `command` in a terminal to its end: the last table that it drew with `words` in it, with its colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    words_of = [sys.executable, *command[1:]]
    child = subprocess.Popen(words_of, cwd=HERE.parent, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    chunks = []
    with contextlib.suppress(OSError):  # Linux's way to say that nobody writes any more
        while chunk := os.read(ours, 65536):
            chunks.append(chunk)
    if child.wait():
        raise RuntimeError(b"".join(chunks).decode(errors="replace"))
    frames = UP_AND_CLEAR.split(b"".join(chunks).decode(errors="replace"))
    return next(frame for frame in reversed(frames) if words in re.sub(r"\x1b\[[0-9;]*m", "", frame))


def picture_of_terminal(browser: Browser, frame: str, title: str) -> None:
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(Text.from_ansi(frame.replace("\r", "").rstrip("\n")))
    drawing = re.sub(r"src: .*?;", "", console.export_svg(title=title), flags=re.DOTALL)  # fonts from the network
    page = browser.new_page(viewport={"width": 1180, "height": 600})
    page.set_content(f"<body style='margin: 0'>{drawing}")
    page.locator("svg").first.screenshot(path=HERE / "terminal.png")
    compress(HERE / "terminal.png")


def picture_of_page(browser: Browser, address: str, ready: str, out: Path, height: int) -> None:
    page = browser.new_page(viewport={"width": 1180, "height": height}, color_scheme="light")
    page.goto(address)
    page.wait_for_selector(ready, timeout=60_000)
    page.wait_for_timeout(3000)  # charts fade in
    page.evaluate(WITHOUT_HOME, str(Path.home()))
    page.screenshot(path=out)
    compress(out)


def compress(path: Path) -> None:
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


@contextlib.contextmanager
def dashboard(run: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "search.dashboard", str(run)]
    process = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    try:
        yield next(found[0] for line in process.stdout if (found := re.search(r"http://127.0.0.1:\d+", line)))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
