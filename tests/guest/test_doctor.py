"""What doctor says of an NFS mount, as this kernel shows its options."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.host import EXPORT, MIB, ORIGIN, Host, Server, fresh_host
from tests.guest.rootfs import RootFilesystem


@pytest.fixture(scope="module")
def host(rig: Path, filesystem: RootFilesystem) -> Iterator[Host]:
    """One for all tests here: each mounts anew, and unmounts."""
    with fresh_host(rig, filesystem) as made:
        yield made


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", []),
        ("hard,actimeo=30", []),
        ("soft,timeo=50", ["wrong: .* 'soft'"]),
        ("noac", ["unwise: .* 'noac'"]),
        ("actimeo=0", ["unwise: .* 'actimeo=0'"]),
        ("actimeo=600", ["unwise: .* at 600 s"]),
        ("nocto,ro", ["wrong: .* 'nocto'", "unwise: .* read-only"]),
    ],
)
def test_doctor_tells_how_an_export_is_mounted(
    server: Server, host: Host, options: str, said: list[str]
) -> None:
    server.machine.stamp(f"{EXPORT}/vm.img", 1, MIB, 1)
    machine = host.machine
    host.mount_nfs(options)
    done = machine.run(f"fusecache doctor {ORIGIN} --cache /dev/vdb")
    lines = [line for line in done.out.splitlines() if f"The origin {ORIGIN} is" in line]
    for pattern in said:
        (line,) = [line for line in lines if re.match(pattern, line)]
        lines.remove(line)
    assert lines == [] and done.code == int(any(word.startswith("wrong") for word in said)), done
    machine.sh(f"umount {ORIGIN}")
