"""Text for people."""


def printable(text: object) -> str:
    """`text` for a terminal or a font: line breaks, control characters and bytes that are no UTF-8 as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def many(count: int, what: str) -> str:
    """Such as 1 trial, or 2 trials."""
    return f"{count} {what}{'' if count == 1 else 's'}"
