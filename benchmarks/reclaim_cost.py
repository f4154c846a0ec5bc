"""What a full cache costs in memory, array by array, and what a victim costs. Run by ``scale.py``.

Loads the map of a cache that is not mounted, reclaims as the engine does (from ``low`` free slots
to ``high``, 256 victims at a time, one commit and one merge a batch) and prints what it found as
JSON. The syncs of the cache device are left out: nothing is written to it. The database is
changed: this is the last thing that is done with it.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from fusecache.cli.cache import default_database
from fusecache.core.geometry import Geometry
from fusecache.core.index import CacheIndex
from fusecache.engine.reclaimer import Reclaimer
from fusecache.store import cache_device
from fusecache.store.block_map import Batch, BlockMap

BATCHES = 8
_PART = 256


def arrays(core: CacheIndex) -> dict[str, int]:
    """Bytes of every flat array, by name."""
    found: dict[str, int] = {}
    for part in (core, core._slots, core._tags):
        for name in [*vars(type(part)).get("__slots__", ()), *getattr(part, "__dict__", ())]:
            value: Any = getattr(part, name)
            if isinstance(value, np.ndarray):
                found[f"{type(part).__name__}.{name}"] = value.nbytes
    return found


def reclaim(core: CacheIndex, block_map: BlockMap) -> dict[str, float]:
    """Microseconds a victim in the core and in the database, and the longest single step."""
    limits = Reclaimer(core, cast(Any, None), cast(Any, None))  # only to ask it for these
    victims, in_core, in_database, longest = 0, 0.0, 0.0, 0.0
    wanted = min(limits.high - limits.low, max(1, core.used // (2 * BATCHES)))
    for _ in range(BATCHES):
        missing = wanted
        while missing > 0:
            begin = time.perf_counter()
            got = core.reclaim(min(missing, _PART))
            spent = time.perf_counter() - begin
            in_core, longest = in_core + spent, max(longest, spent)
            missing -= got
            victims += got
        begin = time.perf_counter()
        block_map.merge(block_map.commit(Batch(rows=core.take_owed()), stable=False))
        in_database += time.perf_counter() - begin
        begin = time.perf_counter()
        core.release(core.take_leaving())
        in_core += time.perf_counter() - begin
    return {
        "victims": victims,
        "core_us": in_core * 1e6 / victims,
        "database_us": in_database * 1e6 / victims,
        "longest_step_ms": longest * 1e3,
    }


def main(path: Path) -> None:
    """``path`` is the cache file."""
    with path.open("rb") as file:
        superblock = cache_device.read_superblock(file.fileno(), path)
    block_map = BlockMap.open(default_database(path, superblock), superblock)
    core = CacheIndex(Geometry.of(superblock.block_size), superblock.slot_count)
    for rows in block_map.load():
        core.load(rows)
    core.finish_load(block_map.load_order())
    found = {"arrays": arrays(core), **reclaim(core, block_map)}
    block_map.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
