"""The superblock: what it says is what was written, or it is refused."""

import struct
import uuid
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecache.errors import NotACacheError, SuperblockError
from fusecache.store.superblock import MAGIC, SUPERBLOCK_SIZE, VERSION, Fence, Superblock

SUPERBLOCKS = st.builds(
    Superblock,
    st.sampled_from([4096 << shift for shift in range(9)]),
    st.integers(0, (1 << 64) - 1),
    st.uuids(),
    st.sampled_from(Fence),
)
ONE = Superblock(65536, 1600, uuid.UUID(int=0x1234), fence=Fence.NONE)


@given(SUPERBLOCKS)
def test_a_superblock_survives_a_round_trip(superblock: Superblock) -> None:
    packed = superblock.pack()
    assert len(packed) == SUPERBLOCK_SIZE
    assert Superblock.unpack(packed) == superblock
    assert Superblock.unpack(packed + b"slots") == superblock


@pytest.mark.parametrize("bit", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_seen_or_lies_in_the_padding(bit: int) -> None:
    packed = ONE.pack()
    used = len(packed.rstrip(b"\0"))
    for at in range(SUPERBLOCK_SIZE):
        damaged = bytearray(packed)
        damaged[at] ^= bit
        if at < len(MAGIC):
            with pytest.raises(NotACacheError):
                Superblock.unpack(bytes(damaged))
        elif at < used:
            with pytest.raises(SuperblockError, match="checksum"):
                Superblock.unpack(bytes(damaged))
        else:
            assert Superblock.unpack(bytes(damaged)) == ONE
    assert used == 48


def changed(layout: str, at: int, value: int) -> bytes:
    """A superblock with one field changed and a right checksum."""
    body = bytearray(ONE.pack()[:44])
    struct.pack_into(layout, body, at, value)
    return (bytes(body) + struct.pack("<I", zlib.crc32(body))).ljust(SUPERBLOCK_SIZE, b"\0")


@pytest.mark.parametrize("version", [0, VERSION + 1, 0xFFFFFFFF])
def test_another_format_version_is_refused_by_its_number(version: int) -> None:
    with pytest.raises(SuperblockError, match=f"version is {version}, .* version {VERSION}"):
        Superblock.unpack(changed("<I", 8, version))


@pytest.mark.parametrize("size", [0, 1, 2048, 65535, 65537, 2 << 20])
def test_an_impossible_block_size_is_refused(size: int) -> None:
    with pytest.raises(SuperblockError, match=f"impossible block size, {size}"):
        Superblock.unpack(changed("<I", 12, size))


def test_anything_without_the_magic_or_too_short_is_not_a_cache() -> None:
    for data in (b"", b"\0" * 4096, MAGIC, ONE.pack()[:-1], b"\x7fELF".ljust(4096)):
        with pytest.raises(NotACacheError):
            Superblock.unpack(data)
