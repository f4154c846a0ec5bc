"""What the kernel of Debian 12 does with the mount: its own tests, and fio over the export."""

import pytest

from tests.guest.host import CACHED, EXPORT, MIB, ORIGIN, UNIT, Host, Server
from tests.guest.rootfs import CHECKOUT, VENV

# Every file starts mounts of its own; under emulation each call of the command line takes seconds.
_PARTS = {
    "data": "test_smoke.py test_data.py",
    "attributes": "test_attributes.py test_noxattr.py",
    "outside": "test_outside.py",
    "writeback": "test_writeback.py -k 'sync or map or truncate or direct or crash or kill'",
}
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


@pytest.mark.parametrize("part", _PARTS)
def test_the_tests_of_the_mount_pass_on_this_kernel(host: Host, part: str) -> None:
    done = host.machine.run(
        f"cd {CHECKOUT}/tests/mount && {VENV}/bin/python -m pytest -q -p no:cacheprovider "
        f"-o timeout=600 --basetemp=/var/tmp/pytest {_PARTS[part]} 2>&1",
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
