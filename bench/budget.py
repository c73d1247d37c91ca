"""Test error after 1, 3 and 10 minutes of one command, from its first second: this project beside what else one does.

    python bench/budget.py --data flowers=DIR --weights DIR --archs mobilenetv2_100,tf_efficientnet_lite0
    python bench/budget.py ... --before ../as-it-was      # also the searches of another checkout
    python bench/budget.py --report-only                  # the tables again, from budget.jsonl

A quarter of each set's images is for the test, drawn anew for each split; the rest is what a method is given, and it
makes its own validation split of that. Each method is a process (a search: several) of its own, and the clock starts
before its imports; labelling the test images takes no time. Every result is added to budget.jsonl as it comes, and a
benchmark that was interrupted goes on from there. Writes budget.json and budget.md. Wants a machine with nothing else
to do.
"""

import argparse
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

from budget_methods import ROOT, Failed, Record, Split, peer, search, split_folders, warm_up
from budget_table import ANYTIME, covers, markdown, rank, summarise
from common import RESULTS, command_line, hardware, versions, write

from trainables.data.layouts import find_images

FILE = "budget.jsonl"
METHODS = {
    "search": ("torch", "timm", "ray", "optuna", "finetune-search"),
    "before": ("torch", "timm", "ray", "optuna"),
    "probe": ("torch", "timm", "scikit-learn"),
    "fastai": ("torch", "timm", "fastai"),
    "autogluon": (),
}
"""The packages of each."""
MODULES = {"scikit-learn": "sklearn", "fastai": "fastai.vision.all", "finetune-search": "search"}


# --- Running ----------------------------------------------------------------------------------------------------------


def jobs_of(args: argparse.Namespace) -> Iterator[Record]:
    """All that is to be run, so that every set has its first split before any has its second."""
    for number in range(args.splits):
        for name in args.data:
            for method in args.methods:
                times = [max(args.minutes)] if method in ANYTIME else args.minutes
                yield from ({"set": name, "split": number, "method": method, "minutes": each} for each in times)


def words_of(args: argparse.Namespace, method: str) -> list[str]:
    """The arguments of a method, without the place of the weights."""
    settings = ["--set", f"arch={args.archs}", "--set", f"image_size={args.sizes}", "--set", f"presize={args.presize}"]
    if method == "search":
        return shlex.split(args.search_args) if args.search_args else ["--space", args.space, *settings]
    if method == "before":
        return shlex.split(args.before_args) if args.before_args else ["--space", args.before_space, *settings]
    if method == "probe":
        return ["--archs", args.archs, "--sizes", args.sizes, "--presize", str(args.presize)]
    return ["--archs", args.peer_arch, "--sizes", str(args.peer_size), "--presize", str(args.presize)]


def named_words(args: argparse.Namespace, method: str) -> str:
    """Its arguments as they are written down: of folders only the names."""
    return shlex.join(re.sub("[^=]*/", "", word.rstrip("/")) for word in words_of(args, method))


def run(args: argparse.Namespace, job: Record, part: Split) -> Record:
    method, minutes = job["method"], job["minutes"]
    words = words_of(args, method) + (["--weights", str(args.weights)] if args.weights else [])
    if method == "search":
        return search(ROOT, words, part, minutes=minutes, margin=args.margin)
    if method == "before":
        return search(args.before, words, part, minutes=minutes, margin=0)
    python = {"python": args.autogluon_python} if method == "autogluon" else {}
    return peer(f"budget_{method}.py", words, part, minutes=minutes, **python)


def run_all(args: argparse.Namespace, have: Sequence[Record], add: Callable[[Record], None]) -> int:
    """Runs what is not among the records `have`, and adds it there; how many commands failed, which are not added."""
    todo = [job for job in jobs_of(args) if not any(covers(record, job) for record in have)]
    failures = 0
    if not todo:
        return failures
    repos = [ROOT, *([args.before] if args.before else [])]
    packages = {package for method in args.methods for package in METHODS[method]}
    warm_up(sorted(MODULES.get(package, package) for package in packages), repos)
    for count, job in enumerate(todo, start=1):
        place = f"{count}/{len(todo)}  {job['set']}, split {job['split']}, {job['method']}, {job['minutes']:g} min"
        try:
            with split_folders(find_images(args.data[job["set"]]), job["split"]) as part:
                record = job | {"words": named_words(args, job["method"])} | part.counts | run(args, job, part)
        except Failed as error:
            failures += 1
            print(f"{place}: failed, {error}", flush=True)
            continue
        add(record)
        print(f"{place}: {told(record)}", flush=True)
    return failures


def told(record: Record) -> str:
    if not record["models"]:
        return f"no model after {record['seconds']:.0f} s; {record.get('log', '')}"
    best = min(record["models"], key=rank)
    return f"test error {best['test_error']:.4f}, {len(record['models'])} models in {record['seconds']:.0f} s"


def append(file: Path, record: Record) -> None:
    """A line more; one that a kill has cut off goes."""
    with file.open("a+b") as lines:
        lines.seek(0)
        lines.truncate(lines.read().rfind(b"\n") + 1)
        lines.write(json.dumps(record).encode() + b"\n")


def read_records(file: Path) -> tuple[list[Record], Record]:
    """The results, and what ran on what: as the last start told it, with the commands and packages of all of them."""
    text = file.read_text().rpartition("\n")[0] if file.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    header: Record = {}
    for start in (line for line in lines if "hardware" in line):
        commands = dict.fromkeys([*header.get("command", "").splitlines(), start["command"]])
        packages = header.get("versions", {}) | start["versions"]
        header = start | {"command": "\n".join(commands).strip(), "versions": packages}
    return [line for line in lines if "method" in line], header


def other_settings(args: argparse.Namespace, records: Sequence[Record]) -> str:
    """The first result that this command's settings would not give; empty if there is none."""
    for record in records:
        words = named_words(args, record["method"])
        if record["set"] in args.data and record["method"] in args.methods and record["words"] != words:
            return f"{record['method']} on {record['set']} ran with {record['words']!r}, not with {words!r}"
    return ""


# --- The command line -------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=named_folder, action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with <arch>.safetensors")
    parser.add_argument("--archs", metavar="A,B", help="from cheap to dear (default: all that --weights has)")
    parser.add_argument("--sizes", default="160,192,224", metavar="PX,PX", help="image sizes (160,192,224)")
    parser.add_argument("--presize", type=int, default=256, metavar="PX", help="256 without it")
    parser.add_argument("--methods", type=methods_of, default=list(METHODS)[:4], help="search,before,probe,fastai")
    parser.add_argument("--minutes", type=numbers, default=[1.0, 3.0, 10.0], metavar="N,N", help="1,3,10 without it")
    parser.add_argument("--splits", type=int, default=3, metavar="N", help="3 without it")
    parser.add_argument("--space", default="images", help="of the search (images)")
    parser.add_argument("--search-args", metavar="WORDS", help="arguments of the search, in place of space and --set")
    parser.add_argument("--margin", type=float, default=10.0, metavar="S", help=(
        "seconds that the search's own --time-budget is shorter than the minutes: its start and its end (10)"
    ))  # fmt: skip
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout; without it there is no `before`")
    parser.add_argument("--before-space", default="pets", help="of its search (pets)")
    parser.add_argument("--before-args", metavar="WORDS", help="as --search-args")
    parser.add_argument("--peer-arch", metavar="ARCH", help="of fastai and AutoGluon (default: the first of --archs)")
    parser.add_argument("--peer-size", type=int, metavar="PX", help="of fastai (default: the largest of --sizes)")
    parser.add_argument("--autogluon-python", metavar="PATH", help="a Python that has AutoGluon, for that method")
    parser.add_argument("--report-only", action="store_true", help=f"write the tables from {FILE}")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(argv)
    args.data = dict(args.data)
    if args.archs is None and args.weights:
        files = sorted(args.weights.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        args.archs = ",".join(file.stem for file in files)
    if not args.report_only and not (args.data and args.archs):
        parser.error("expected --data, and --archs or --weights with some <arch>.safetensors")
    needed = {"before": args.before, "autogluon": args.autogluon_python}
    args.methods = [method for method in args.methods if needed.get(method, True)]
    args.weights, args.before = (path and path.resolve() for path in (args.weights, args.before))
    args.peer_arch = args.peer_arch or (args.archs or "").split(",")[0]
    args.peer_size = args.peer_size or max(map(int, args.sizes.split(",")))
    return args


def named_folder(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, folder


def methods_of(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(METHODS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {','.join(METHODS)}")
    return text.split(",")


def numbers(text: str) -> list[float]:
    return sorted(float(word) for word in text.split(","))


def main() -> None:
    args, failures = parse_arguments(), 0
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / FILE
    records, _ = read_records(file)
    if not args.report_only:
        if problem := other_settings(args, records):
            raise SystemExit(f"{file} has other results: {problem}. Remove those lines, or choose another --out.")
        packages = sorted({package for method in args.methods for package in METHODS[method]})
        header = {"command": command_line(), "hardware": hardware(), "versions": versions(*packages)}
        append(file, header | {"margin": args.margin, "date": date.today().isoformat()})
        failures = run_all(args, records, lambda record: append(file, record))
    records, header = read_records(file)
    if not records:
        raise SystemExit(f"{file} has no results")
    result = summarise(records, args.minutes) | header
    result["runs"] = [{name: value for name, value in record.items() if name != "log"} for record in records]
    write(args.out, "budget", result, markdown(result))
    if failures:
        raise SystemExit(f"{failures} commands failed; the same command runs them again.")


if __name__ == "__main__":
    main()
