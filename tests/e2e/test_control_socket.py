"""The control socket: who may talk to it, and what nonsense does to the daemon (nothing)."""

import json
import os
import signal
import socket
import stat
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from tests.e2e.helpers import COMMAND, answer_of, environment, process, wait_for
from tests.support.daemon import BLOCK, Mount
from tests.support.stamps import check_stamps, stamped

pytestmark = pytest.mark.mount


def _socket_of(mount: Mount) -> Path:
    (path,) = mount.runtime.glob("*.sock")
    return path


def _ask(mount: Mount, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(_socket_of(mount)))
        return answer_of(client, request)


def test_only_its_user_may_open_it(mount: Mount) -> None:
    mount.start()
    path = _socket_of(mount)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.name == f"{mount.pid}.sock"
    os.chmod(mount.base.parent, 0o755)
    with socket.socket(socket.AF_UNIX) as client:
        refusing = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "test", "-w", path],
            check=False,
        )
        assert refusing.returncode == 1
        client.connect(str(path))


@pytest.mark.parametrize(
    "request_line",
    [
        b"\n", b"nonsense\n", b"[]\n", b"1\n", b"{}\n", b'{"verb": 7}\n', b'{"verb": "none"}\n',
        b'{"verb": "evict", "images": 7}\n', b'{"verb": "evict", "images": [7]}\n',
        b'{"verb": "evict", "images": ["a\\u0000b"]}\n', b'{"verb": "resolve"}\n\xff',
        b'{"verb": "status", "images": ["../../etc/passwd"]}\n', b"\xff\xfe\n",
        b'{"verb": "status", "most": []}\n', b'{"verb": "status", "most": -1, "history": []}\n',
        b"[" * 60000 + b"\n", b'{"verb": "resolve", "path": {}}\n',
        b'{"verb": "evict", "images": ["' + b"x/" * 20000 + b'"]}\n',
    ],
)  # fmt: skip
def test_nonsense_gets_an_answer_and_the_daemon_goes_on(
    nonsense_mount: Mount, request_line: bytes
) -> None:
    answer = json.loads(_ask(nonsense_mount, request_line))
    assert answer.keys() <= {"error", "ok"} and len(answer) == 1
    assert nonsense_mount.status()["cache"]["unexpected_errors"] == 0


def test_an_oversized_request_is_refused(mount: Mount) -> None:
    mount.start()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(_socket_of(mount)))
        try:
            client.sendall(b"x" * (1 << 20))
            assert b"not understood" in client.recv(65536)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the daemon hung up before it had read it all
    assert mount.status()["cache"]["unexpected_errors"] == 0


def test_clients_that_say_nothing_or_hang_up_disturb_nobody(mount: Mount) -> None:
    mount.start()
    path = str(_socket_of(mount))
    silent = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    try:
        for client in silent:
            client.connect(path)
        silent[0].sendall(b'{"verb": "sta')
        assert mount.status()["state"] == "serving"
    finally:
        for client in silent:
            client.close()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(b'{"verb": "status"}\n')
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert mount.status()["cache"]["unexpected_errors"] == 0


def test_clients_that_never_read_their_answers_hold_up_neither_others_nor_the_end(
    mount: Mount,
) -> None:
    for number in range(50):
        (mount.origin / f"vm{number}.img").write_bytes(stamped(number, 0, 4096, 1))
    mount.start()
    for number in range(50):
        (mount.mountpoint / f"vm{number}.img").read_bytes()
    path = str(_socket_of(mount))
    slow = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    try:
        for client in slow:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect(path)
            client.sendall(b'{"verb": "status", "history": true}\n')
        assert mount.status()["state"] == "serving"
        check_stamps((mount.mountpoint / "vm7.img").read_bytes(), 7, 0)
        mount.stop()
    finally:
        for client in slow:
            client.close()


def test_two_hundred_clients_at_once_are_all_answered(mount: Mount) -> None:
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, BLOCK, 1))
    mount.start()
    (mount.mountpoint / "vm.img").read_bytes()
    answers: list[bytes] = []

    def ask() -> None:
        answers.append(_ask(mount, b'{"verb": "status"}\n'))

    threads = [threading.Thread(target=ask) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [json.loads(answer)["ok"]["state"] for answer in answers] == ["serving"] * 200


def test_an_interrupted_evict_leaves_things_fine(mount: Mount) -> None:
    names = [f"vm{number}.img" for number in range(20)]
    for number, name in enumerate(names):
        (mount.origin / name).write_bytes(stamped(number, 0, 8 * BLOCK, 1))
    mount.start()
    for round_trip in range(4):
        for name in names:
            (mount.mountpoint / name).read_bytes()
        with process(
            *COMMAND, "evict", "--all", env=environment(mount), stderr=subprocess.PIPE
        ) as evict:
            threading.Event().wait(0.3 + 0.05 * round_trip)
            evict.send_signal(signal.SIGINT)
            _, said = evict.communicate(timeout=30)
            assert evict.returncode in (0, 1, -signal.SIGINT)
            begun = b"fusecache: " in said  # else the interpreter was still starting
            early = said.strip() == b"fusecache: interrupted"  # before it had asked
            assert not begun or early or said.startswith(b"fusecache: interrupted: what was")
    for number, name in enumerate(names):
        check_stamps((mount.mountpoint / name).read_bytes(), number, 0)
    assert mount.run("evict", "--all").returncode == 0
    wait_for(lambda: mount.status()["cache"]["slots_used"] == 0, "an empty cache")
    assert mount.status()["cache"]["unexpected_errors"] == 0
