"""Numbers as people read them, the same everywhere."""


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """Such as 3 h 20 min, 3 min 8 s, or 8 s."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def megabytes(count: float) -> str:
    """Bytes, such as 8.5 MB, 85 MB or 1.2 GB."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.{0 if count >= 1e7 else 1}f} MB"
