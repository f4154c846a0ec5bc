"""Times as people read them. By itself, since ``report`` needs a library that takes its time."""


def time_text(seconds: float | None) -> str:
    """A time for people, with two digits that count: ``0.42 ms``, ``75 s``, ``3 h 12 min``."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
