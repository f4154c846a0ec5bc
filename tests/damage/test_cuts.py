"""A repair that is cut at any step: the cache is still refused, or already repaired."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusecache.store import cache_device, repair
from tests.damage.place import Place, named
from tests.damage.test_files import DEVICE
from tests.damage.test_maps import rewrite


class Cut(BaseException):
    """The power is gone."""


def steps(patched: pytest.MonkeyPatch, cut_at: int) -> list[str]:
    """Every call that changes something on a disk counts; the one with this number never runs."""
    done: list[str] = []

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if len(done) == cut_at:
                raise Cut
            done.append(name)
            return real(*args, **kwargs)

        patched.setattr(owner, name, call)

    for owner, name in (
        (repair.BlockMap, "create"),
        (repair.BlockMap, "restore"),
        (Path, "replace"),
        (repair, "_sync"),
        (cache_device, "_put"),
    ):
        counted(owner, name)
    return done


def several(place: Place) -> None:
    """Superblock and map at once."""
    rewrite(place, 1, 0, lambda was: (3, was[1], was[2]))
    DEVICE["checksum"](place)


def cut_short(place: Place) -> None:
    os.truncate(place.cache, place.cache.stat().st_size - 25 * 16384)


DAMAGES = {
    "map": lambda place: rewrite(place, 1, 0, lambda was: (3, was[1], was[2])),
    "map and superblock": several,
    "witness": DEVICE["witness flipped"],
    "cut short": cut_short,
    "fewer slots": DEVICE["fewer slots"],
    "database missing": lambda place: place.database.unlink(),
}


@pytest.mark.parametrize("kind", ["kept", "killed"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_repair_that_is_cut_anywhere_can_be_run_again(
    place_of: Callable[[str], Place],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    damage: str,
) -> None:
    model = place_of(kind)
    DAMAGES[damage](model)
    whole = model.copy(tmp_path / "whole")
    told = whole.repair()
    survivors = whole.start().dirty
    for cut_at in range(40):
        place = model.copy(tmp_path / str(cut_at))
        with monkeypatch.context() as patched:
            done = steps(patched, cut_at)
            try:
                place.repair()
            except Cut:
                pass
            else:
                assert cut_at > 5
                break
        between = place.copy(tmp_path / f"{cut_at}-started").start()
        if between.refusal is None:
            assert between.dirty == survivors, done
        place.repair()
        after = place.start()
        assert after.refusal is None and after.dirty == survivors, (done, after.refusal)
        assert all(named(told, tag) for tag in place.must_stay() - after.dirty)
        assert not place.inspect().findings
