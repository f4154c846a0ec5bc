"""The picture of ``scale.py``: what a cache costs, over its size."""

from pathlib import Path
from typing import Any

PANELS = {
    "memory, MiB": "rss_mib",
    "mount to first hit, s": "first_hit_s",
    "4 KiB random hits at depth 32, kIOPS": "kiops",
    "reclaim, us a victim": "reclaim_us",
    "database, MiB": "database_mib",
    "making the database, s": "build_s",
}
_COLUMNS = 3


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """A PNG at ``path``: a panel for each of ``PANELS``, a bar for each size in order."""
    import matplotlib

    matplotlib.use("Agg")  # no screen
    from matplotlib import pyplot

    rows = -(-len(PANELS) // _COLUMNS)
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(13, 3.6 * rows), squeeze=False)
    names = list(found)
    for place, (title, key) in zip(axes.flat, PANELS.items(), strict=True):
        values = [found[name][key] for name in names]
        place.bar(names, values, width=0.5, color="#1f6fb4")
        for at, value in enumerate(values):
            label = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
            place.annotate(
                label, (at, value), textcoords="offset points", xytext=(0, 4), ha="center"
            )
        place.set_title(title, fontsize=10)
        place.set_ylim(0, 1.25 * max(values))
        place.margins(x=0.15)
        place.grid(axis="y", alpha=0.3)
        place.set_xlabel("cached, in blocks of 64 KiB", fontsize=8)
    figure.suptitle("fusecache: cost over the size of the cache")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
