"""Text for people."""


def printable(text: object) -> str:
    """`text` for a terminal or a font: line breaks, control characters and bytes that are no UTF-8 as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
