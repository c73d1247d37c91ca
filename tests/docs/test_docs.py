"""The documentation is true: its commands parse, its Python runs, its links, files and names exist.

Commands are parsed by the real parsers, in this process, and not run. Python runs on a tiny run that is made here.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NAMES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "results/README.md"]
NAMES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
COMMANDS = ("run", "check", "lr_find", "report", "export", "predict", "compare", "dashboard")
MODULES = [f"search.{name}" for name in COMMANDS] + ["trainables.finetune", "trainables.interpret"]
ELSEWHERE = ("cd", ".", "ssh", "ray", "kubectl", "docker", "sed", "ruff", "mypy")
"""Programs that are not ours. What `ray` and `kubectl` are told is tested with the cluster files."""
OF_EXTRAS = ("cleanlab", "fastai", "playwright")
FILE = re.compile(
    r"(?:search|trainables|tests|bench|docs|cluster|results/bench|\.ci)/[\w./*-]*|[A-Z]+\.md|[\w.-]+\.(?:toml|yaml)"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MACHINE = re.compile(r"/root\b|/work\b|/home/\w+/(?!disk)|\.\./shared|/tmp/")


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a page in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(name), re.DOTALL | re.MULTILINE)


def prose(name: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(name), flags=re.DOTALL | re.MULTILINE)


def code_spans(name: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(name))]


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without redirections."""
    for line in block.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "||", "|", ";"):
                command.append(word)
                continue
            if ">" in command:
                command = command[: command.index(">")]
            if command:
                yield command
            command = []


SHELL = [(name, shlex.join(words)) for name in NAMES for block in blocks(name, "sh") for words in commands(block)]
SHELL += [
    (name, span)
    for name in NAMES
    for span in code_spans(name)
    if re.match(r"(python|torchrun|pytest|pip|finetune-search) \S", span) and "|" not in span
]


# --- Shell ------------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Raised in place of running a command whose arguments are good."""


def parse(module: ModuleType, arguments: list[str], monkeypatch) -> argparse.Namespace:
    """What the parser of a command or script makes of `arguments`; fails with its message where it refuses them."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        raise Parsed(parse_args(parser, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        try:
            module.main()
        except Parsed as parsed:
            return parsed.args[0]
    pytest.fail(f"{module.__name__} refuses {shlex.join(arguments)}: {said.getvalue()}")


def script(path: Path, monkeypatch) -> ModuleType:
    """A file of bench/ or tests/ as a module."""
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if error.name in OF_EXTRAS:
            pytest.skip(f"needs {error.name}")
        raise
    return module


def check_settings(args: argparse.Namespace) -> None:
    """That a space has what a command asks of it."""
    from search.spaces.space import load_space

    if getattr(args, "recipes", None):
        load_space(args.space).of_recipes(args.recipes, args.set)
    elif getattr(args, "space", None):
        load_space(args.space).with_settings(args.set)


def check_python(words: list[str], monkeypatch) -> None:
    if words[0] != "-m":
        parse(script(ROOT / words[0], monkeypatch), words[1:], monkeypatch)
        return
    name, *arguments = words[1:]
    if name == "pytest":
        check_pytest(arguments)
    elif name != "venv":
        assert name in MODULES
        if arguments:  # else it is but its name
            check_settings(parse(importlib.import_module(name), arguments, monkeypatch))


def check_pytest(words: list[str]) -> None:
    known = tomllib.loads(text_of("pyproject.toml"))["tool"]["pytest"]["ini_options"]["markers"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-n")
    parser.add_argument("-m", default="")
    parser.add_argument("paths", nargs="*")
    args = parser.parse_args(words)
    markers = set(re.findall(r"\w+", args.m)) - {"not", "and", "or"}
    assert markers <= {line.partition(":")[0] for line in known}
    assert all((ROOT / path).exists() for path in args.paths)


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    for asked in re.findall(r"\.\[([\w,]+)\]", shlex.join(words)):
        assert set(asked.split(",")) <= extras.keys()


@pytest.mark.parametrize(("page", "command"), SHELL)
def test_a_command_is_one_that_its_parser_takes(page, command, monkeypatch):
    program, *words = shlex.split(command)
    match Path(program).name or program:
        case "python" | "python3":
            check_python(words, monkeypatch)
        case "finetune-search":
            check_python(["-m", f"search.{words[0].replace('-', '_')}", *words[1:]], monkeypatch)
        case "torchrun":
            check_python(words[words.index("-m") :], monkeypatch)
        case "pytest":
            check_pytest(words)
        case "pip":
            check_pip(words)
        case other:
            assert other in ELSEWHERE


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """Every option in the --help of our commands."""
    found = set()
    for module in MODULES:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
            patch.setattr(sys, "argv", [module, "--help"])
            with pytest.raises(SystemExit):
                importlib.import_module(module).main()
        found |= set(OPTION.findall(said.getvalue()))
    return found


@pytest.mark.parametrize("page", NAMES)
def test_options_exist(page, known_options):
    ours = " ".join(prose(page).split())
    for name, command in SHELL:  # these are parsed as a whole
        ours = ours.replace(f"`{command}`", "") if name == page else ours
    assert set(OPTION.findall(ours)) - known_options == set()


def test_the_two_commands_of_the_readme_install_and_then_search_and_test():
    for marker, last in (("quickstart", "search.run"), ("tests", "pytest")):
        block = text_of("README.md").partition(f"<!-- {marker} -->\n```sh\n")[2].partition("```")[0]
        assert block.count("\n") == 1  # .ci/run evaluates the second one
        *_, words = commands(block)
        assert words[:3] == [".venv/bin/python", "-m", last]


def test_the_readme_is_one_screen():
    assert len(text_of("README.md").splitlines()) <= 150


# --- Other examples ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example_folder(data, cache, tmp_path_factory) -> Path:
    """What the examples speak of: results/first, its export in exported/, and my_images/."""
    import run_tables
    import tiny_run

    folder = tmp_path_factory.mktemp("examples")
    run_tables.write_run(folder / "results" / "first")
    (folder / "trained").mkdir()
    (tiny_run.make_run(folder / "trained", data) / "best").rename(folder / "exported")
    (folder / "my_images").symlink_to(data)
    return folder


@pytest.mark.parametrize("page", [name for name in NAMES if blocks(name, "python")])
def test_the_python_of_a_page_runs(page, example_folder, monkeypatch, capsys):
    monkeypatch.chdir(example_folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page}, example {number}", "exec"), names)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("page", NAMES)
def test_yaml_and_json_parse(page):
    for block in blocks(page, "ya?ml"):
        yaml.safe_load(block)
    for block in blocks(page, "json"):
        json.loads(block)


@pytest.mark.parametrize("page", NAMES)
def test_every_block_is_in_a_language_that_is_tested(page):
    found = re.findall(r"^```(.*)$", text_of(page), re.MULTILINE)
    assert set(found[::2]) <= {"sh", "python", "text", "yaml", "json"}
    assert set(found[1::2]) <= {""}


# --- Links, files, names ----------------------------------------------------------------------------------------------


def anchors(name: str) -> set[str]:
    """What links to a heading of a page end with, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        inside = target.resolve().relative_to(ROOT.resolve()).as_posix()
        if not target.exists() or (anchor and anchor not in anchors(inside)):
            broken.append(link)
    assert broken == []


def test_each_page_can_be_found_from_the_readme():
    linked = {link.partition("#")[0] for link in LINK.findall(text_of("README.md"))}
    assert {name for name in NAMES if name.startswith("docs/")} <= linked


@pytest.mark.parametrize("page", [name for name in NAMES if re.search(r"^- \[", text_of(name), re.MULTILINE)])
def test_a_contents_list_has_every_section(page):
    listed = set(re.findall(r"\]\(#([\w-]+)\)", prose(page)))
    sections = re.findall(r"^## (.+)$", prose(page), re.MULTILINE)
    assert {re.sub(r"[^\w\- ]", "", section.lower()).replace(" ", "-") for section in sections} <= listed


@pytest.mark.parametrize("page", NAMES)
def test_files_that_are_named_exist(page):
    named = [span for span in code_spans(page) if FILE.fullmatch(span)]
    folders = (ROOT, (ROOT / page).parent)
    assert [name for name in named if not any(list(folder.glob(name.rstrip("/"))) for folder in folders)] == []


@pytest.mark.parametrize("page", NAMES)
def test_modules_and_their_contents_that_are_named_exist(page):
    for span in code_spans(page):
        if re.fullmatch(r"(search|trainables)(\.\w+)+", span):
            resolve(span)


def resolve(dotted: str) -> object:
    """A module, or something in one; raises where there is none."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, attribute = dotted.rpartition(".")
        return getattr(resolve(module), attribute)


@pytest.mark.parametrize("page", NAMES)
def test_no_page_names_a_place_of_one_machine(page):
    assert MACHINE.findall(text_of(page)) == []


def test_every_setting_is_in_the_table_with_its_default_and_range():
    from trainables.recipe import Recipe

    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| ([^|]*) \|", text_of("docs/recipes.md"), re.MULTILINE)
    expected = {}
    for spec in fields(Recipe):
        meta, default = spec.metadata, spec.default
        allowed = tuple(meta["choices"]) or (("true", "false") if spec.type is bool else (meta["low"], meta["high"]))
        expected[spec.name] = str(default).lower() if isinstance(default, bool) else default, allowed
    assert sorted(name for name, *_ in rows) == sorted(expected)
    for name, default, allowed in rows:
        value, limits = expected[name]
        assert (float(default) if isinstance(value, int | float) else default) == value, name
        if limits == (None, None):
            assert allowed.strip() == "", name
        elif isinstance(limits[0], str):
            assert tuple(re.findall(r"\w+", allowed)) == limits, name
        else:
            assert tuple(map(float, allowed.split(" to "))) == limits, name


def test_the_console_script_has_the_commands_of_the_page():
    from search.__main__ import COMMANDS as known

    scripts = tomllib.loads(text_of("pyproject.toml"))["project"]["scripts"]
    assert scripts == {"finetune-search": "search.__main__:main"}
    assert list(known) == [name.replace("_", "-") for name in COMMANDS]
    assert [name for name in known if f"`{name}`" not in prose("docs/searching.md") and name != "run"] == []


def test_every_space_searcher_and_scheduler_is_on_the_page_about_searching():
    from search.options.strategy import SCHEDULERS, SEARCHERS
    from search.spaces.space import space_names

    page = text_of("docs/searching.md")
    assert [name for name in (*space_names(), *SEARCHERS, *SCHEDULERS) if f"| `{name}`" not in page] == []


def test_every_column_of_the_tables_is_described(tmp_path):
    from search.runs.paths import RunFolder
    from search.runs.result_rows import EPOCH_COLUMNS
    from search.runs.results_table import ResultsTable

    table = ResultsTable(RunFolder(tmp_path), settings={}, dimensions=[], labels=[], confirm=1, front=True)
    for section, columns in (("trials.csv", table.columns), ("epochs.csv", EPOCH_COLUMNS)):
        described = text_of("results/README.md").partition(f"## {section}")[2].partition("\n## ")[0]
        assert [name for name in columns if f"`{name}`" not in described] == []


def test_the_rooms_are_those_whose_order_is_tested():
    rooms = runpy.run_path(str(ROOT / "tests" / "house" / "test_rooms.py"))["ROOMS"]
    section = text_of("CONTRIBUTING.md").partition("## Where things are")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| (?:`\w+/`)? ?\| `(\w+)/` \|", section, re.MULTILINE)
    assert listed == [room for package in ("trainables", "search") for room in rooms[package] if room]


def test_every_dependency_earns_its_place():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    page = text_of("CONTRIBUTING.md").partition("## Dependencies")[2]
    names = [re.match(r"[\w-]+", dependency)[0] for dependency in project["dependencies"]]
    assert [name for name in names if name.removesuffix("-python-headless") not in page] == []
