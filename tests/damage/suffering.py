"""What every damaged cache is put through."""

from pathlib import Path

from fusecache.store.repair import Plan
from tests.damage.place import Damage, Place, Started, named


def suffer(place: Place, damage: Damage, *, hint: bool = False) -> tuple[Started, Plan]:
    """Damages the cache and asserts:

    - ``check`` changes no byte, and finds something, unless the damage hit only a hint or bytes
      without a meaning (``hint``) and a start does not mind it;
    - a start is refused with what to do, or serves no wrong byte and misses no dirty page;
    - after ``repair`` it starts, serves no wrong byte, and every dirty page that is not there any
      more was named; ``check`` finds nothing.
    """
    damage(place)
    before = place.hashes()
    found = place.inspect()
    assert place.hashes() == before, "check has changed the cache"
    started = place.copy(Path(f"{place.base}-started")).start()
    if started.refusal is None:
        vanished = place.must_stay() - started.dirty
        assert not vanished, f"the damage is not noticed, and {len(vanished)} dirty pages are gone"
    if not hint or started.refusal is not None:
        assert found.findings, f"check finds nothing; the start says: {started.refusal}"
    made = place.repair()
    again = place.start()
    assert again.refusal is None, (again.refusal, found.findings)
    unnamed = [tag for tag in place.must_stay() - again.dirty if not named(made, tag)]
    assert not unnamed, f"dirty pages are gone that nobody named: {sorted(unnamed)}, {made.losses}"
    left = place.inspect().findings
    assert not left, left
    return started, made
