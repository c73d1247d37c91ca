"""`finetune-search COMMAND ARGS`, or `python -m search COMMAND ARGS`: all commands under one name."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "run": "search a space, or resume a search",
    "check": "look at the images before training on them",
    "lr-find": "find a learning rate for one architecture",
    "report": "write a run as one page that opens without a network",
    "export": "write a trained model for timm, ONNX Runtime or torch.export",
    "predict": "label images with a trained model",
    "compare": "compare runs of one data set",
    "dashboard": "show a run in optuna-dashboard and TensorBoard",
}
BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> NoReturn:
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"The commands are: {', '.join(COMMANDS)}."
        print(f"error: there is no command {name!r}. {hint}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    # Not before it is known which command it is: some import for a second.
    from trainables.system.command_line import run_cli

    command = importlib.import_module(f"search.{name.replace('-', '_')}").main
    run_cli(lambda: command(rest))


def usage() -> str:
    """What `--help` prints: one line for each command."""
    lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: finetune-search COMMAND [ARGS]",
            "",
            "Fine-tune many image classifiers, stop the hopeless ones early, keep the best.",
            "",
            "commands:",
            *lines,
            "",
            "finetune-search COMMAND --help explains a command. python -m search.COMMAND is the same command.",
        ]
    )


if __name__ == "__main__":
    main()
