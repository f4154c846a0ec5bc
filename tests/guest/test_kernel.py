"""What the kernel of Debian 12 does with the mount: its own tests, and fio over the export."""

import pytest

from tests.guest.host import CACHED, EXPORT, MIB, ORIGIN, UNIT, Host, Server
from tests.guest.rootfs import CHECKOUT, VENV

_FILES = "test_smoke test_data test_attributes test_names test_outside test_noxattr test_writeback"
_FIO = f"""
[global]
directory={CACHED}
filesize=8M
bs=4k
rw=randrw
verify=crc32c
verify_fatal=1
do_verify=1
io_size=4M
[direct]
filename=direct.img
direct=1
ioengine=libaio
iodepth=8
[buffered]
filename=buffered.img
fsync=32
[mapped]
filename=mapped.img
ioengine=mmap
"""


def test_the_tests_of_the_mount_pass_on_this_kernel(host: Host) -> None:
    files = " ".join(f"tests/mount/{name}.py" for name in _FILES.split())
    done = host.machine.run(
        f"cd {CHECKOUT} && {VENV}/bin/python -m pytest -q -p no:cacheprovider -o timeout=600 "
        f"--basetemp=/var/tmp/pytest {files} 2>&1",
        seconds=1300,
    )
    assert done.code == 0, done.out[-8000:]
    assert " passed" in done.out


@pytest.mark.parametrize("mode", ["through", "back"])
def test_fio_finds_every_byte_over_an_export(server: Server, host: Host, mode: str) -> None:
    machine = host.machine
    host.mount_nfs()
    host.install(write_mode=mode, dirty_age=2)
    machine.sh(f"systemctl start {UNIT}")
    machine.write("/root/verify.fio", _FIO)
    machine.sh("fio --output-format=terse /root/verify.fio", seconds=600)
    sums = "cd {} && sha1sum direct.img buffered.img mapped.img"
    seen = machine.sh(sums.format(CACHED))
    machine.sh(f"truncate -s {MIB + 512} {CACHED}/mapped.img")
    machine.sh(f"truncate -s {8 * MIB} {CACHED}/mapped.img")
    cut = machine.sh(sums.format(CACHED))
    assert cut != seen
    assert machine.sh(f"tail -c +{MIB + 513} {CACHED}/mapped.img | tr -d '\\0' | wc -c") == "0"
    machine.sh("fusecache flush")
    assert server.machine.sh(sums.format(EXPORT)) == cut
    machine.sh("echo 3 > /proc/sys/vm/drop_caches")
    assert machine.sh(sums.format(CACHED)) == cut
    machine.sh(f"systemctl stop {UNIT}")
    assert machine.sh(sums.format(ORIGIN)) == cut
