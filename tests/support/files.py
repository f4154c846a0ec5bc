"""A real cache file and a real database below one directory, with the engine over them."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

from fusecache.config import Tuning, WriteMode
from fusecache.engine.block_cache import BlockCache, open_cache
from fusecache.store.block_map import BlockMap
from fusecache.store.cache_device import CacheDevice, open_locked, write_superblock
from fusecache.store.superblock import DATA_OFFSET, Superblock

SLOTS = 64


@asynccontextmanager
async def cache_on_files(
    directory: Path, block: int, *, origin: Path, write_mode: WriteMode, tuning: Tuning
) -> AsyncIterator[BlockCache]:
    """A new cache of 64 blocks of ``block`` bytes, for images of ``origin``."""
    superblock = Superblock(block, SLOTS, uuid4())
    store = directory / "cache"
    store.touch()
    os.truncate(store, DATA_OFFSET + SLOTS * block)
    fd = open_locked(store)
    write_superblock(fd, store, superblock)
    BlockMap.create(directory / "map.sqlite", superblock).close()
    block_map = BlockMap.open(directory / "map.sqlite", superblock)
    device = CacheDevice(store, fd, superblock)
    try:
        async with open_cache(
            device,
            block_map,
            pid=os.getpid(),
            mountpoint=b"/mnt",
            origin=bytes(origin),
            write_mode=write_mode,
            tuning=tuning,
        ) as cache:
            yield cache
    finally:
        block_map.close()
        device.close()
