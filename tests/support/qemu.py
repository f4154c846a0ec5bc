"""QEMU as another who has an image open."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A qemu-io has a qcow2 image open and has written 512 bytes of 1 to its beginning; it is let
    to end in peace."""
    command = ["qemu-io", "-f", "qcow2", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        try:
            holder.stdin.write(b"write -P 1 0 512\n")
            holder.stdin.flush()
            while b"wrote" not in holder.stdout.readline():
                assert holder.poll() is None
            yield
            holder.communicate(b"quit\n", timeout=30)
        finally:
            holder.kill()


def refused_to_write(path: Path) -> bool:
    """Whether another QEMU is kept from writing to it by a lock."""
    second = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return "lock" in second.stderr
