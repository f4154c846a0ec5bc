"""Stamped data: every 512 bytes say which image, which place and which version they are.

A wrong block, a block of another image, an old version or never-written slot contents is seen
wherever it turns up.
"""

import struct

STAMP = 512
_LAYOUT = struct.Struct("<8sIQI")
_MAGIC = b"STAMPED!"


def stamped(image: int, offset: int, length: int, version: int) -> bytes:
    """``length`` bytes as they stand at ``offset`` of an image; both multiples of 512."""
    assert offset % STAMP == 0 and length % STAMP == 0
    parts = []
    for place in range(offset, offset + length, STAMP):
        head = _LAYOUT.pack(_MAGIC, image, place, version)
        parts.append(head + bytes([version & 0xFF]) * (STAMP - len(head)))
    return b"".join(parts)


def read_stamp(data: bytes) -> tuple[int, int, int]:
    """(image, offset, version) of one stamp; asserts that it is one and whole."""
    magic, image, offset, version = _LAYOUT.unpack_from(data)
    assert magic == _MAGIC, f"not a stamp: {data[:32]!r}"
    rest = data[_LAYOUT.size : STAMP]
    assert rest == bytes([version & 0xFF]) * len(rest), "a torn stamp"
    return image, offset, version


def check_stamps(data: bytes, image: int, offset: int) -> list[int]:
    """Asserts that all of ``data`` belongs to this image and place; returns the versions."""
    versions = []
    for at in range(0, len(data), STAMP):
        found = read_stamp(data[at : at + STAMP])
        assert found[:2] == (image, offset + at), f"{found[:2]} at {(image, offset + at)}"
        versions.append(found[2])
    return versions
