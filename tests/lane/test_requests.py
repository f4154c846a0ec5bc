"""What comes from the kernel and from pyfuse3, well formed or not."""

import random
import struct
from collections.abc import Callable

import pytest

from tests.lane.rig import (
    ANSWER,
    BATCH_FORGET,
    BLOCK,
    FALLOCATE,
    FLUSH,
    FSYNC,
    GETATTR,
    GETXATTR,
    HEADER,
    INIT,
    INTERRUPT,
    KILLPRIV_V2,
    LOOKUP,
    LSEEK,
    NODE,
    OPEN,
    PAGE,
    PID,
    READ,
    READLINK,
    RELEASE,
    WRITE,
    Rig,
    in_thread,
    read_body,
    request,
    write_body,
)
from tests.support.stamps import stamped

EIO, ENODATA = 5, 61
LARGEST = 1 << 20
CAPABILITY = b"security.capability\0"
FSYNC_BODY = struct.pack("<QII", 1, 1, 0)
FALLOCATE_BODY = struct.pack("<QQQII", 1, PAGE, 3 * PAGE, 3, 0)
LSEEK_BODY = struct.pack("<QQII", 1, PAGE, 4, 0)
FORGETS_BODY = struct.pack("<IIQQQQ", 2, 0, 9, 1, 10, 3)
OPEN_BODY = struct.pack("<II", 0o100002, 0)
RELEASE_BODY = struct.pack("<QIIQ", 1, 0, 0, 0)
BODIES = {
    READ: read_body(1, 0, PAGE),
    WRITE: write_body(1, 0, bytes(PAGE)),
    FSYNC: FSYNC_BODY,
    FALLOCATE: FALLOCATE_BODY,
    LSEEK: LSEEK_BODY,
}


def flush_body(handle: int) -> bytes:
    """``struct fuse_flush_in``."""
    return struct.pack("<QIIQ", handle, 0, 0, 0)


BAD_BODIES = {
    **BODIES,
    BATCH_FORGET: FORGETS_BODY,
    OPEN: OPEN_BODY,
    FLUSH: flush_body(1),
    RELEASE: RELEASE_BODY,
}


def works(rig: Rig) -> None:
    """The lane serves on."""
    assert rig.read(0, PAGE) == stamped(5, 0, PAGE, 1)


@pytest.fixture
def rig(new_rig: Callable[..., Rig]) -> Rig:
    made = new_rig()
    made.fill(5, 0)
    made.open(5, 1)
    return made


# -- for Python ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opcode", "body", "expected"),
    [
        (FSYNC, FSYNC_BODY, (1, 0, 0, 1, None)),
        (FALLOCATE, FALLOCATE_BODY, (1, PAGE, 3 * PAGE, 3, None)),
        (LSEEK, LSEEK_BODY, (1, PAGE, 0, 4, None)),
        (READ, read_body(1, BLOCK, 17), (1, BLOCK, 17, 0, None)),
        (READ, read_body(1, 0, LARGEST), (1, 0, LARGEST, 0, None)),
        (LOOKUP, b"abc\0", (NODE, 0, 3, 0, b"abc")),
        (LOOKUP, b"\0", (NODE, 0, 0, 0, b"")),
        (LOOKUP, bytes(range(1, 256)) * 4 + b"\0", (NODE, 0, 1020, 0, bytes(range(1, 256)) * 4)),
        (GETATTR, bytes(16), (NODE, 0, 0, 0, None)),
        (OPEN, OPEN_BODY, (NODE, 0, PID, 0o100002, None)),
        (FLUSH, flush_body(1), (1, 0, 0, 0, None)),
        (RELEASE, RELEASE_BODY, (1, 0, 0, 0, None)),
        (WRITE, write_body(1, 3, b"abc"), (1, 3, 3, 0, b"abc")),
        (WRITE, write_body(1, 0, bytes(LARGEST)), (1, 0, LARGEST, 0, bytes(LARGEST))),
    ],
)
def test_python_gets_what_the_request_says(
    rig: Rig, opcode: int, body: bytes, expected: tuple[object, ...]
) -> None:
    if opcode == READ and expected[2] == LARGEST:
        rig.lane.close(1)
    assert rig.left_to_python(opcode, body)[2:] == expected


def test_what_python_answers_comes_to_the_kernel(rig: Rig) -> None:
    unique = rig.left_to_python(READ, read_body(1, BLOCK, PAGE))[0]
    assert rig.lane.reply(unique, 0, b"data") == 0
    assert rig.answer_to(unique) == (0, b"data")
    assert rig.lane.reply(unique, EIO, b"") == 0
    assert rig.answer_to(unique) == (EIO, b"")
    large = bytes(range(256)) * 4096
    assert rig.lane.reply(unique, 0, memoryview(large)) == 0
    assert rig.answer_to(unique) == (0, large)


def test_many_writes_at_once_all_come_with_their_data(rig: Rig) -> None:
    """More than there are buffers: readers wait until Python takes some."""
    sent = {}
    for number in range(200):
        data = stamped(5, number * BLOCK, PAGE, number)
        sent[rig.send(WRITE, write_body(9, number * BLOCK, data))] = (number * BLOCK, data)
    while sent:
        for unique, opcode, handle, offset, length, _, data in rig.take():
            assert (opcode, handle, length) == (WRITE, 9, PAGE)
            assert sent.pop(unique) == (offset, data)
    works(rig)


def test_requests_of_one_reader_come_in_order(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(readers=1, spares=0)
    sent = [rig.send(FSYNC, FSYNC_BODY) for _ in range(300)]
    came: list[int] = []
    while len(came) < len(sent):
        came += [taken[0] for taken in rig.take()]
    assert came == sent
    assert rig.lane.take() == []


# -- for pyfuse3 -----------------------------------------------------------------------------------


def test_all_else_goes_to_pyfuse3_unchanged_and_back(rig: Rig) -> None:
    rng = random.Random(1)
    for opcode in [READLINK, 4, 17, 27, 28, 30, 41, 44, 45, 47, 48, 4096, 2**32 - 1]:
        message = request(opcode, rng.randbytes(rng.randrange(5000)), unique=opcode + 2)
        rig.kernel.send(message)
        assert rig.pyfuse3.recv(LARGEST) == message
        answer = ANSWER.pack(ANSWER.size + 3, -2, opcode + 2) + b"abc"
        rig.pyfuse3_answers(answer)
        assert rig.kernel.recv(LARGEST) == answer
    assert rig.lane.counters()["forwarded"] == 13
    assert not rig.lane.take()


# -- closes ----------------------------------------------------------------------------------------


def test_a_close_of_who_only_reads_is_answered(rig: Rig) -> None:
    """But for the last one, RELEASE, and those of handles that the lane does not know."""
    rig.open(6, 1, handle=2, writes=False)
    for handle in (1, 3, 2 + (1 << 16), 2):
        if handle == 2:
            assert rig.answer_to(rig.send(FLUSH, flush_body(2))) == (0, b"")
            rig.lane.close(2)
        assert rig.left_to_python(FLUSH, flush_body(handle))[2] == handle
    assert rig.lane.counters()["queued"] == 4


@pytest.mark.parametrize("offered", [0, KILLPRIV_V2, 0xFFFFFFFF, None])
def test_the_answer_to_init_says_that_privileges_are_our_concern(
    rig: Rig, offered: int | None
) -> None:
    """If the kernel knows what that means."""
    body = b"" if offered is None else struct.pack("<IIII", 7, 38, 131072, offered)
    unique = rig.send(INIT, body)
    assert rig.pyfuse3.recv(LARGEST)
    init = struct.pack("<IIIIHHIIHHII", 7, 38, 131072, 5, 12, 9, 1 << 20, 1, 256, 0, 0, 0)
    rig.pyfuse3_answers(ANSWER.pack(ANSWER.size + 64, 0, unique) + init.ljust(64, b"\0"))
    (flags,) = struct.unpack_from("<I", rig.kernel.recv(LARGEST), ANSWER.size + 12)
    assert flags == 5 | (KILLPRIV_V2 if offered else 0)


def test_the_answer_to_init_gets_a_larger_background(rig: Rig) -> None:
    unique = rig.send(INIT, bytes(64))
    assert rig.pyfuse3.recv(LARGEST)
    init = struct.pack("<IIIIHHIIHHII", 7, 38, 131072, 5, 12, 9, 1 << 20, 1, 256, 0, 0, 0)
    answer = ANSWER.pack(ANSWER.size + 64, 0, unique) + init.ljust(64, b"\0")
    rig.pyfuse3_answers(answer)
    got = rig.kernel.recv(LARGEST)
    assert struct.unpack_from("<HH", got, ANSWER.size + 16) == (64, 48)
    assert got[: ANSWER.size + 16] + got[ANSWER.size + 20 :] == (
        answer[: ANSWER.size + 16] + answer[ANSWER.size + 20 :]
    )
    rig.send(READLINK)
    assert rig.pyfuse3.recv(LARGEST)
    rig.pyfuse3_answers(answer)  # no answer to INIT
    assert rig.kernel.recv(LARGEST) == answer


@pytest.mark.parametrize(
    ("write", "pages", "expected"),
    [
        (LARGEST, 256, (LARGEST, 256)),
        (LARGEST + 1, 257, (LARGEST, 256)),
        (2**32 - 1, 2**16 - 1, (LARGEST, 256)),
        (1 << 17, 32, (1 << 17, 32)),
        (4096, 0, (4096, 0)),
    ],
)
def test_the_answer_to_init_asks_for_nothing_that_we_have_no_room_for(
    rig: Rig, write: int, pages: int, expected: tuple[int, int]
) -> None:
    unique = rig.send(INIT, bytes(64))
    assert rig.pyfuse3.recv(LARGEST)
    init = struct.pack("<IIIIHHIIHHII", 7, 38, 131072, 5, 12, 9, write, 1, pages, 3, 0, 0)
    rig.pyfuse3_answers(ANSWER.pack(ANSWER.size + 64, 0, unique) + init.ljust(64, b"\0"))
    got = struct.unpack_from("<IIIIHHIIHHII", rig.kernel.recv(LARGEST), ANSWER.size)
    assert (got[6], got[8]) == expected
    assert got[:4] + got[7:8] + got[9:] == (7, 38, 131072, 5, 1, 3, 0, 0)


@pytest.mark.parametrize("error", [0, -5])
def test_a_short_or_failed_answer_to_init_is_left_alone(rig: Rig, error: int) -> None:
    unique = rig.send(INIT, bytes(64))
    assert rig.pyfuse3.recv(LARGEST)
    short = 0 if error else 12
    answer = ANSWER.pack(ANSWER.size + short, error, unique) + bytes(short)
    rig.pyfuse3_answers(answer)
    assert rig.kernel.recv(LARGEST) == answer


def test_an_answer_that_is_none_is_dropped(rig: Rig) -> None:
    for _ in range(2):
        rig.send(READLINK)
        assert rig.pyfuse3.recv(LARGEST)
    rig.pyfuse3_answers(b"short")
    answer = ANSWER.pack(ANSWER.size, 0, 2**64 - 1)
    rig.pyfuse3_answers(answer)
    assert rig.kernel.recv(LARGEST) == answer
    works(rig)


def test_a_read_after_an_answer_with_attributes_waits_a_moment(rig: Rig) -> None:
    for _ in range(20):
        unique = rig.left_to_python(GETATTR, bytes(16))[0]
        assert rig.lane.reply(unique, 0, b"") == 0
        assert rig.answer()[0] == unique
        works(rig)


@pytest.mark.parametrize("name", [b"", b"abc", b"a\0bc", b"abc\0\0", b"\0abc", bytes(100)])
def test_a_name_that_does_not_end_where_the_request_ends_is_refused(rig: Rig, name: bytes) -> None:
    assert rig.answer_to(rig.send(LOOKUP, name)) == (EIO, b"")
    works(rig)
    assert not rig.lane.take()


def test_an_interrupt_has_no_answer(rig: Rig) -> None:
    rig.send(INTERRUPT, struct.pack("<Q", 4))
    works(rig)
    assert not rig.lane.take()
    assert rig.lane.counters()["forwarded"] == 0


def test_the_question_before_every_write_is_answered(rig: Rig) -> None:
    """Images have no file capabilities; what is no image, or another name, is pyfuse3's."""
    body = struct.pack("<II", 0, 0)
    assert rig.answer_to(rig.send(GETXATTR, body + CAPABILITY)) == (ENODATA, b"")
    for node, name in [
        (NODE + 1, CAPABILITY),
        (NODE, b"security.capabilit\0"),
        (NODE, b"security.capability2\0"),
        (NODE, b"security.selinux\0\0\0\0\0"),
        (NODE, b"security.capability"),
        (NODE, b""),
    ]:
        rig.send(GETXATTR, body + name, node=node)
        assert rig.pyfuse3.recv(LARGEST)[HEADER.size :] == body + name
    rig.lane.close(1)  # the node lives on
    assert rig.answer_to(rig.send(GETXATTR, body + CAPABILITY)) == (ENODATA, b"")


def test_without_extended_attributes_the_question_is_pyfuse3s(
    new_rig: Callable[..., Rig],
) -> None:
    rig = new_rig(capability=False)
    rig.open(5, 1)
    rig.send(GETXATTR, struct.pack("<II", 0, 0) + CAPABILITY)
    assert rig.pyfuse3.recv(LARGEST)


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 5000, (LARGEST - 48) // 16])
def test_forgets_go_to_pyfuse3_in_parts_that_it_can_take(rig: Rig, count: int) -> None:
    """The pair may refuse what is larger, and libfuse has no room for the largest."""
    entries = b"".join(struct.pack("<QQ", number + 2, number * 7) for number in range(count))
    message = request(BATCH_FORGET, struct.pack("<II", count, 0) + entries, unique=8)
    sender = in_thread(lambda: rig.kernel.send(message))
    came = b""
    while len(came) < len(entries):
        part = rig.pyfuse3.recv(LARGEST)
        inside = len(part) - HEADER.size - 8
        assert len(part) <= 20000
        assert HEADER.unpack_from(part) == (len(part), BATCH_FORGET, 8, NODE, 0, 0, PID, 0, 0)
        assert struct.unpack_from("<II", part, HEADER.size) == (inside // 16, 0)
        came += part[HEADER.size + 8 :]
    assert came == entries
    sender.join()
    works(rig)  # they have no answer


@pytest.mark.parametrize("count", [0, 1, 3, 1024, 2**28, 2**28 + 2, 2**31, 2**32 - 1])
def test_forgets_that_lie_about_their_number_go_nowhere(rig: Rig, count: int) -> None:
    """2**28 of them have no bytes, if one counts in 32 bits."""
    for entries in (FORGETS_BODY[8:], FORGETS_BODY[8:-1]):
        body = struct.pack("<II", count, 0) + entries
        assert rig.answer_to(rig.send(BATCH_FORGET, body)) == (EIO, b"")
    works(rig)
    assert rig.lane.counters()["forwarded"] == 0


def test_without_pyfuse3_its_requests_fail(rig: Rig) -> None:
    rig.pyfuse3.close()
    assert rig.answer_to(rig.send(READLINK)) == (EIO, b"")
    rig.lane.bring_answers()
    works(rig)


# -- malformed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", BAD_BODIES)
def test_a_request_cut_short_anywhere_fails(rig: Rig, opcode: int) -> None:
    """In the body: an error. In the header: nobody to tell it to."""
    whole = request(opcode, BAD_BODIES[opcode], unique=2)
    for size in [*range(1, min(len(whole), 200)), len(whole) - 1]:
        cut = whole[:size]
        if size >= HEADER.size:
            for length in (size, len(whole)):  # as long as it says, or shorter
                rig.kernel.send(struct.pack("<I", length) + cut[4:])
                assert rig.answer_to(2) == (EIO, b"")
        else:
            rig.kernel.send(cut)
    works(rig)
    assert not rig.lane.take()


@pytest.mark.parametrize("opcode", [*BAD_BODIES, READLINK, LOOKUP, GETATTR, GETXATTR, 26, 36, 9999])
def test_a_request_with_a_wrong_length_fails(rig: Rig, opcode: int) -> None:
    body = BAD_BODIES.get(opcode, bytes(100))
    size = HEADER.size + len(body)
    for length in (0, 1, HEADER.size - 1, HEADER.size, size - 1, size + 1, 2**31, 2**32 - 1):
        rig.kernel.send(request(opcode, body, unique=2, length=length))
        assert rig.answer_to(2) == (EIO, b"")
    rig.kernel.send(request(opcode, body, unique=0, length=size + 1))  # cannot be answered
    works(rig)
    assert not rig.lane.take()


@pytest.mark.parametrize("length", [LARGEST + 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_sizes_beyond_the_largest_fail(rig: Rig, length: int) -> None:
    for opcode, body in [
        (READ, read_body(1, 0, length)),
        (WRITE, write_body(1, 0, bytes(PAGE), length)),
    ]:
        assert rig.answer_to(rig.send(opcode, body)) == (EIO, b"")
    works(rig)


@pytest.mark.parametrize("length", [0, 1, PAGE - 1, PAGE + 1, LARGEST])
def test_a_write_whose_data_is_longer_or_shorter_fails(rig: Rig, length: int) -> None:
    unique = rig.send(WRITE, write_body(1, 0, bytes(PAGE), length))
    assert rig.answer_to(unique) == (EIO, b"")
    works(rig)
    assert not rig.lane.take()


def test_numbers_at_their_limits(rig: Rig) -> None:
    most = 2**64 - 1
    for offset in (most, 2**63, 2**48, 2**32 * BLOCK, 2**32 * BLOCK - 1):
        rig.read_is_pythons(offset, LARGEST)
        rig.left_to_python(WRITE, write_body(1, offset, bytes(PAGE)))
        rig.left_to_python(FALLOCATE, struct.pack("<QQQII", most, offset, most, 2**32 - 1, 0))
        rig.left_to_python(LSEEK, struct.pack("<QQII", most, offset, 2**32 - 1, 0))
    works(rig)


@pytest.mark.parametrize("seed", range(4))
def test_the_lane_survives_anything(rig: Rig, seed: int) -> None:
    """Random requests, near the border between good and bad."""
    rng = random.Random(seed)
    opcodes = [*BAD_BODIES, READLINK, LOOKUP, GETATTR, GETXATTR, INIT, INTERRUPT, 77]
    numbers = [0, 1, 2, PAGE - 1, PAGE, BLOCK, LARGEST, LARGEST + 1, 2**32 - 1, 2**63, 2**64 - 1]
    for _ in range(3000):
        opcode = rng.choice(opcodes)
        body = bytearray(BAD_BODIES.get(opcode, bytes(64)))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(0, 40, 8)
            body[at : at + 8] = struct.pack("<Q", rng.choice(numbers))
        if rng.random() < 0.3:
            del body[rng.randrange(len(body)) :]
        length = None if rng.random() < 0.8 else rng.choice(numbers) & 0xFFFFFFFF
        rig.kernel.send(request(opcode, bytes(body), unique=rng.choice((0, 2, 4)), length=length))
        rig.lane.take()
        while rig.nothing_came():
            pass
        rig.pyfuse3.settimeout(0)
        try:
            while message := rig.pyfuse3.recv(LARGEST):
                assert len(message) >= HEADER.size
        except BlockingIOError:
            pass
    rig.kernel.send(request(READ, read_body(1, 0, PAGE), unique=1 << 40))
    while (found := rig.answer())[0] != 1 << 40:
        pass
    assert found[1:] == (0, stamped(5, 0, PAGE, 1))
