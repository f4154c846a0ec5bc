"""The core hits exactly what a plain LRU hits, in every write mode, and the check can tell."""

import lzma
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import block_trace
import harness
import replay
from block_trace import Trace

from fusecache.core.replacement import Lru

BLOCK = 65536
MIB = 1 << 20


def generated(requests: int = 4000, pause: int = 50_000) -> Trace:
    """Small and large, aligned and not, on two volumes: half of it on a tenth of the blocks.

    ``pause`` in microseconds lies between two requests, on average.
    """
    random = np.random.default_rng(1)
    hot = random.random(requests) < 0.5
    offset = random.integers(0, np.where(hot, 2 * MIB, 20 * MIB)) & ~np.int64(511)
    offset[::3] &= ~np.int64(4095)
    length = random.choice(
        [512, 4096, 8192, 65536, 300 * 1024], requests, p=[0.2, 0.4, 0.2, 0.1, 0.1]
    )
    return Trace(
        "generated",
        np.cumsum(random.integers(0, 2 * pause, requests)),
        random.integers(0, 2, requests),
        offset,
        length.astype(np.int64),
        (random.random(requests) < 0.4).astype(np.int64),
    )


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("mode", replay.MODES)
@pytest.mark.parametrize("slots", [64, 400])
def test_every_hit_is_one_of_a_plain_lru_and_the_other_way_round(
    slots: int, mode: str, reserve: bool
) -> None:
    counts = replay.check(generated(), BLOCK, slots, mode, 1000, reserve=reserve)
    assert counts.reclaimed > 100
    assert 0 < counts.read_hits < counts.reads
    assert 0 < counts.write_hits < counts.writes
    assert (counts.writeback_pages > 0) == (mode == "back")


def test_dirty_blocks_stay_until_they_are_written_back_and_then_leave_in_their_turn() -> None:
    counts = replay.check(generated(pause=500), BLOCK, 300, "back", 1000, reserve=False)
    assert counts.reclaimed > 100 and counts.writeback_pages > 0


def test_small_blocks_are_checked_as_well() -> None:
    counts = replay.check(generated(1500), 16384, 700, "back", 1000, reserve=True)
    assert counts.reclaimed > 700


def test_the_check_fails_with_a_policy_that_is_not_quite_lru(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = Lru.victims

    def second(self: Lru, count: int) -> list[int]:
        """The last victim stays, and the next one leaves in its place."""
        found = exact(self, count + 1)
        return found[:-2] + found[-1:]

    monkeypatch.setattr(Lru, "victims", second)
    with pytest.raises(harness.BenchmarkError, match="a plain LRU"):
        replay.check(generated(), BLOCK, 64, "through", 1000, reserve=True)


def test_the_check_fails_if_what_was_written_back_does_not_leave_in_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Lru, "returned", lambda self, slot: None)
    with pytest.raises(harness.BenchmarkError, match="a plain LRU"):
        replay.check(generated(pause=500), BLOCK, 300, "back", 1000, reserve=False)


def test_what_is_counted_of_a_few_requests_is_what_one_counts_by_hand() -> None:
    made = replay.Replay(BLOCK, 64, "back", {0: 16 * BLOCK})
    made.request(0, 4096, 4096, write=False)  # block 0 is filled
    made.request(0, 0, 2 * BLOCK, write=False)  # half of it hits, block 1 is filled
    made.request(0, 512, 512, write=True)  # part of a valid page
    made.request(0, 5 * BLOCK + 512, 512, write=True)  # the rest of this page is fetched
    made.request(0, 5 * BLOCK + 4096, 4096, write=True)
    made.finish()
    counts = made.counts
    assert (counts.reads, counts.read_hits, counts.read_pages, counts.read_page_hits) == (
        2,
        0,
        33,
        16,
    )
    assert (counts.read_bytes, counts.read_hit_bytes) == (4096 + 2 * BLOCK, BLOCK)
    assert (counts.writes, counts.write_hits, counts.write_page_hits) == (3, 1, 1)
    assert (counts.fill_bytes, counts.ssd_write_bytes) == (2 * BLOCK, 512 + 4096 + 4096)
    assert (counts.origin_reads, counts.origin_read_bytes) == (3, 2 * BLOCK + 4096)
    assert (counts.origin_writes, counts.origin_write_bytes) == (2, 3 * 4096)


def test_a_packed_trace_and_a_plain_one_are_read_alike(tmp_path: Path) -> None:
    trace = generated(50)
    packed, plain = tmp_path / "a.fct.xz", tmp_path / "a.csv"
    columns = [
        trace.time.astype("<i8"),
        trace.volume.astype("<u2"),
        trace.offset.astype("<u8"),
        trace.length.astype("<u4"),
        trace.operation.astype("u1"),
    ]
    data = b"FCTRACE1" + struct.pack("<Q", len(trace)) + b"".join(c.tobytes() for c in columns)
    packed.write_bytes(lzma.compress(data))
    lines = [f"{t},{v},{o},{n},{'rw?'[k]}" for t, v, o, n, k in trace.rows()]
    plain.write_text("\n".join(["time_us,volume_id,offset_bytes,length_bytes,op", *lines]))
    assert block_trace.read_trace(packed).rows() == trace.rows()
    assert block_trace.read_trace(plain).rows() == trace.rows()
    packed.write_bytes(lzma.compress(data[:-1]))
    with pytest.raises(harness.BenchmarkError, match="do not hold 50 requests"):
        block_trace.read_trace(packed)


def test_unique_bytes_are_those_of_the_pages_that_were_touched() -> None:
    trace = generated(700)
    pages = set()
    for _, volume, offset, length, _ in trace.rows():
        pages |= {(volume, page) for page in range(offset // 4096, -(-(offset + length) // 4096))}
    assert trace.unique_bytes(4096) == 4096 * len(pages)
