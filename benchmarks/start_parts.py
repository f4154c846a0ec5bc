"""Where a start's time goes: the same calls as a mount makes, one by one. Run by ``scale.py``.

Prints a name and seconds a line. The cache must not be mounted, and is left as it was: the
database is only read, in a transaction that is never committed.
"""

import subprocess
import sys
import time
from pathlib import Path


def main(path: Path) -> None:
    """``path`` is the cache file."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    python = time.perf_counter()
    import fusecache.cli.daemon  # noqa: F401  # what a mount imports

    imported = time.perf_counter()
    from fusecache.cli.cache import default_database
    from fusecache.core.geometry import Geometry
    from fusecache.core.index import CacheIndex
    from fusecache.store import cache_device
    from fusecache.store.block_map import BlockMap

    with path.open("rb") as file:
        superblock = cache_device.read_superblock(file.fileno(), path)
    block_map = BlockMap.open(default_database(path, superblock), superblock)
    opened = time.perf_counter()
    index = CacheIndex(Geometry.of(superblock.block_size), superblock.slot_count)
    made = time.perf_counter()
    reading = loading = 0.0
    rows = block_map.load()
    while True:
        at = time.perf_counter()
        part = next(rows, None)
        reading += time.perf_counter() - at
        if part is None:
            break
        at = time.perf_counter()
        index.load(part)
        loading += time.perf_counter() - at
    loaded = time.perf_counter()
    index.finish_load(block_map.load_order())
    done = time.perf_counter()
    block_map.close()
    print("Python itself", python - begin)
    print("imports", imported - python)
    print("opening the database", opened - imported)
    print("making the index", made - opened)
    print("reading rows", reading)
    print("loading rows into the index", loading)
    print("order and free list", done - loaded)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
