"""The engine over real files and threads: whatever a guest does, a plain file does the same."""

import errno
import os
import random
from pathlib import Path

import pytest

from fusecache.config import Tuning, WriteMode
from fusecache.engine.block_cache import BlockCache
from fusecache.engine.image import Image
from fusecache.errors import OriginError
from fusecache.store import syscalls
from tests.support.files import cache_on_files

BLOCK = 16384
SIZE = 40 * BLOCK + 700
MODES = (
    syscalls.FALLOC_PUNCH_HOLE | syscalls.FALLOC_KEEP_SIZE,
    syscalls.FALLOC_ZERO_RANGE | syscalls.FALLOC_KEEP_SIZE,
    syscalls.FALLOC_ZERO_RANGE,
    syscalls.FALLOC_KEEP_SIZE,
    0,
)


class _Twins:
    """An image in the cache, and a plain file to which the same is done."""

    def __init__(self, cache: BlockCache, image: Image, plain: int, seed: int) -> None:
        self.cache, self.image, self.plain = cache, image, plain
        self.chance = random.Random(seed)
        self.freed = 0

    def _span(self) -> tuple[int, int]:
        """Somewhere, often at the bounds of pages; now and then past the end."""
        chance = self.chance
        size = os.fstat(self.plain).st_size
        offset = chance.randrange(size + chance.choice([0, 0, 0, 2 * BLOCK]))
        length = chance.choice([1, 511, 4096, 8192, BLOCK, 3 * BLOCK, chance.randrange(1, SIZE)])
        if chance.random() < 0.6:
            offset -= offset % chance.choice([512, 4096, BLOCK])
        return offset, length

    async def step(self) -> None:
        chance = self.chance
        kind = chance.random()
        offset, length = self._span()
        if kind < 0.3:
            data = chance.randbytes(min(length, 3 * BLOCK))
            assert await self.cache.write(self.image, offset, data) == len(data)
            os.pwrite(self.plain, data, offset)
        elif kind < 0.6:
            await self._allocate(chance.choice(MODES), offset, length)
        elif kind < 0.75:
            expected = os.pread(self.plain, length, offset)
            assert await self.cache.read(self.image, offset, length) == expected
        elif kind < 0.9:
            await self._seek(offset)
        elif kind < 0.94:
            await self.cache.truncate(self.image, offset)
            os.ftruncate(self.plain, offset)
            if offset < SIZE // 2:
                await self._allocate(0, 0, SIZE)
        elif kind < 0.97:
            await self.cache.fsync(self.image, metadata=chance.random() < 0.5)
        else:
            await self.cache.flush(self.image)

    async def _allocate(self, mode: int, offset: int, length: int) -> None:
        try:
            syscalls.fallocate(self.plain, mode, offset, length)
        except OSError as exc:
            assert exc.errno == errno.EOPNOTSUPP
            with pytest.raises(OriginError) as caught:
                await self.cache.allocate(self.image, mode, offset, length)
            assert caught.value.errno == errno.EOPNOTSUPP
        else:
            await self.cache.allocate(self.image, mode, offset, length)
            self.freed += mode > syscalls.FALLOC_KEEP_SIZE

    async def _seek(self, offset: int) -> None:
        """What is no data is zeros, and what is said to begin somewhere does."""
        content = os.pread(self.plain, 2 * SIZE + offset, 0)
        hole = await self._found(offset, os.SEEK_HOLE)
        data = await self._found(offset, os.SEEK_DATA)
        if offset >= len(content):
            assert hole is data is None
            return
        assert hole is not None and offset <= hole <= len(content)
        assert (hole == offset) != (data == offset)
        assert not any(content[offset : len(content) if data is None else data])
        if hole < len(content):
            after = await self._found(hole, os.SEEK_DATA)
            assert not any(content[hole:after])

    async def _found(self, offset: int, whence: int) -> int | None:
        try:
            return await self.cache.seek(self.image, offset, whence)
        except OSError as exc:
            assert exc.errno == errno.ENXIO
            return None


@pytest.mark.parametrize("mode", list(WriteMode))
@pytest.mark.parametrize("seed", range(2))
async def test_an_image_behaves_as_a_plain_file(tmp_path: Path, mode: WriteMode, seed: int) -> None:
    place, plain = tmp_path / "vm.img", tmp_path / "plain"
    content = random.Random(seed).randbytes(SIZE)
    place.write_bytes(content)
    plain.write_bytes(content)
    path_fd = os.open(place, os.O_PATH | os.O_CLOEXEC)
    plain_fd = os.open(plain, os.O_RDWR | os.O_CLOEXEC)
    try:
        async with cache_on_files(
            tmp_path,
            BLOCK,
            origin=tmp_path,
            write_mode=mode,
            tuning=Tuning(dirty_age=1.0, settle_age=0.1),
        ) as cache:
            image = await cache.open(b"id1", b"vm.img", path_fd, write=True)
            twins = _Twins(cache, image, plain_fd, seed)
            for _ in range(400):
                await twins.step()
            assert twins.freed > 10
            assert image.size == plain.stat().st_size
            assert await cache.read(image, 0, 4 * SIZE) == plain.read_bytes()
            cache.core.check()
            await cache.evict(image, path_fd)
            assert place.read_bytes() == plain.read_bytes()
            await cache.close(image, write=True)
    finally:
        os.close(plain_fd)
        os.close(path_fd)
