"""What a script of this folder prints: what held, and what did not."""

import sys


def expect(held: object, what: str) -> None:
    """Raises `SystemExit` unless it held."""
    say(f"{'held' if held else 'NOT SO'}: {what}")
    if not held:
        sys.exit(1)


def say(text: str) -> None:
    print(text, flush=True)
