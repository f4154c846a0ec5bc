"""The results as a picture: a panel of bars for each job, medians with the range of the rounds."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import harness
from harness import BenchmarkError

OURS, THEIRS = "#1f6fb4", "#b9bdc4"
_COLUMNS = 2
_FAR_ABOVE = 3.0
"""A bar so many times as long as all others is cut off, so that the others can be told apart."""


@dataclass(frozen=True)
class Bar:
    """The median and the range of some rounds."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Bar":
        """From one value a round."""
        return cls(harness.median(values), min(values), max(values))


def available(present: bool) -> bool:
    """Whether pictures can be drawn. Asked before anything is measured.

    Raises:
        BenchmarkError: they cannot, and ``present`` does not say to do with what is there.
    """
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    if not present:
        raise BenchmarkError("the picture needs matplotlib: pip install -e '.[bench]'")
    print("left out: the picture needs matplotlib, not installed")
    return False


def draw(title: str, panels: dict[str, dict[str, Bar]], path: Path) -> None:
    """Writes a PNG: ``panels`` by heading, in each the bars by name; fusecache's stand out.

    The numbers are the medians.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen
    from matplotlib import pyplot

    rows = -(-len(panels) // _COLUMNS)
    most = max(len(bars) for bars in panels.values())
    figure, axes = pyplot.subplots(
        rows, _COLUMNS, figsize=(12, rows * (0.9 + 0.27 * most)), squeeze=False
    )
    for place, (heading, bars) in zip(axes.flat, panels.items(), strict=False):
        shown = list(bars.values())
        errors = [
            [bar.middle - bar.low for bar in shown],
            [bar.high - bar.middle for bar in shown],
        ]
        place.barh(
            list(bars),
            [bar.middle for bar in shown],
            xerr=errors,
            color=[OURS if name.startswith("fusecache") else THEIRS for name in bars],
            error_kw={"ecolor": "#555555", "capsize": 2, "linewidth": 1},
        )
        *others, longest = sorted(bar.high for bar in shown)
        second = others[-1] if others else longest
        end = 1.15 * (second if longest > _FAR_ABOVE * second else longest)
        place.set_xlim(0, end)
        for row, bar in enumerate(shown):
            cut = bar.high > end
            said = f"{bar.middle:.3g}" if bar.middle < 100 else f"{bar.middle:.0f}"
            place.annotate(
                f"{said} →" if cut else said,
                (end if cut else bar.high, row),
                xytext=(-4 if cut else 4, 0),
                textcoords="offset points",
                ha="right" if cut else "left",
                va="center",
                fontsize=8,
            )
        place.invert_yaxis()
        place.set_title(heading, fontsize=10, loc="left")
        place.tick_params(labelsize=8)
        place.spines[["top", "right"]].set_visible(False)
    for place in list(axes.flat)[len(panels) :]:
        place.set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    harness.written(path)
