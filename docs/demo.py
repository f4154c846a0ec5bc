"""The demonstration behind ``make demo``: two real VM images, one cache, everything shown.

All it makes lies in one temporary directory, the control socket too, and is removed at the end,
after an error or Ctrl-C as well. It touches no other mount or daemon of the machine.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

MIB = 1 << 20
DISK = 64 * MIB
FILESYSTEM = 48 * MIB
"""The guests' filesystems; the rest of each disk is free for what the demo writes."""
WRITE_AT = 52 * MIB
WRITTEN = 4 * MIB
PATTERN = 90
"""The byte that qemu-io writes."""
SETTLE = 3.0
"""Seconds. A change younger than 2 s, by the origin's clock, is not trusted at the next open."""

QCOW2, RAW = "vm1.qcow2", "vm2.img"


class DemoError(Exception):
    """A step did not do what it should have."""


class Demo:
    """The steps and what they share. ``base`` is the temporary directory."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.origin = base / "origin"
        self.mountpoint = base / "cached"
        self.cache = base / "ssd.cache"
        self.scratch = base / "scratch"
        self.runtime = base / "run"
        self.before: dict[str, dict[str, int]] = {}
        for directory in (self.origin, self.mountpoint, self.scratch, self.runtime):
            directory.mkdir()

    # -- running and telling -----------------------------------------------------------------------

    def run(self, *command: object, shown: bool = True) -> str:
        """Runs a command, prints it as it would be typed and what it says, and returns that."""
        # Run in the demo's directory, with short names that can be read.
        words = [str(word).replace(f"{self.base}/", "") for word in command]
        if shown:
            print(f"    $ {shlex.join(words)}", flush=True)
        if words[0] == "fusecache":
            words = [sys.executable, "-m", *words]
        # A session of its own: Ctrl-C reaches the demo alone, which then ends things in order.
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd=self.base,
            env={**os.environ, "FUSECACHE_RUNTIME_DIR": str(self.runtime)},
        )
        try:
            said, _ = process.communicate()
        except BaseException:
            if words[0] != sys.executable:
                process.terminate()
            process.wait()  # fusecache's own verbs are let finish: they are short
            raise
        if shown and said.strip():
            print(textwrap.indent(said.rstrip(), "    "), flush=True)
        if process.returncode != 0:
            hint = "" if shown else f" {said.strip()}"
            raise DemoError(f"'{shlex.join(words)}' failed.{hint}")
        return said

    def image(self, name: str) -> dict[str, Any]:
        """What ``fusecache status --json`` says of an image."""
        answer = json.loads(
            self.run("fusecache", "status", "--json", "-m", self.mountpoint, shown=False)
        )
        found = [image for image in answer["mounts"][0]["images"] if image["path"] == name]
        return found[0] if found else {}

    def read(self, name: str) -> None:
        """Reads a whole disk through the mount, as a guest with cache=none would."""
        fmt = "qcow2" if name == QCOW2 else "raw"
        source, target = self.mountpoint / name, self.scratch / "read.raw"
        self.run("qemu-img", "convert", "-T", "none", "-f", fmt, "-O", "raw", source, target)

    def counted(self, name: str) -> tuple[int, int]:
        """Bytes read from the cache and from the origin since the last call for this image."""
        image = self.image(name)
        now = {key: int(image[key]) for key in ("read_hit_bytes", "origin_read_bytes")}
        last = self.before.get(name, dict.fromkeys(now, 0))
        self.before[name] = now
        hit, miss = (now[key] - last[key] for key in now)
        return hit, miss

    # -- steps -------------------------------------------------------------------------------------

    def make_images(self) -> None:
        """Two disks with an ext4 filesystem each, one raw and one qcow2."""
        files = self.scratch / "files"
        files.mkdir()
        for name in (QCOW2, RAW):
            (files / "hello.txt").write_text(f"Hello from inside {name}.\n")
            (files / "data.bin").write_bytes(os.urandom(24 * MIB))
            disk = self.scratch / f"{name}.disk"
            with disk.open("wb") as file:
                file.truncate(DISK)
            blocks = f"{FILESYSTEM // 1024}k"
            self.run("mkfs.ext4", "-q", "-F", "-d", files, disk, blocks, shown=False)
        disk = self.scratch / f"{QCOW2}.disk"
        target = self.origin / QCOW2
        self.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, target, shown=False)
        shutil.copyfile(self.scratch / f"{RAW}.disk", self.origin / RAW)
        self.run("ls", "-l", self.origin)

    def read_twice(self) -> None:
        """First the origin is read, then the cache, and both give the same bytes."""
        for turn in ("first", "second"):
            print(f"  The {turn} read of both images:")
            for name in (QCOW2, RAW):
                self.read(name)
                original = self.scratch / f"{name}.disk"
                self.run("cmp", self.scratch / "read.raw", original, shown=False)
            for name in (QCOW2, RAW):
                hit, miss = self.counted(name)
                if turn == "first":
                    print(f"  {name}: {mib(miss)} came from the origin.")
                else:
                    print(f"  {name}: {mib(hit)} came from the cache, {mib(miss)} from the origin.")
                    if miss or not hit:
                        raise DemoError(f"the second read of {name} should have been all hits")

    def write(self) -> None:
        """Through qemu-io into the qcow2 image, through dd into the raw one."""
        numbers = f"write -P {PATTERN} {WRITE_AT} {WRITTEN}"
        image = self.mountpoint / QCOW2
        self.run("qemu-io", "-t", "none", "-f", "qcow2", "-c", numbers, "-c", "flush", image)
        payload = self.scratch / "payload"
        payload.write_bytes(os.urandom(WRITTEN))
        place = ("bs=1M", f"seek={WRITE_AT // MIB}", "conv=notrunc,fsync", "status=none")
        self.run("dd", f"if={payload}", f"of={self.mountpoint / RAW}", *place)

    def still_cached(self) -> None:
        """The image that was not evicted is read again, and the origin is not asked."""
        self.counted(QCOW2)
        self.read(QCOW2)
        hit, miss = self.counted(QCOW2)
        print(f"  {QCOW2}: {mib(hit)} came from the cache, {mib(miss)} from the origin.")
        if miss or not hit:
            raise DemoError(f"{QCOW2} should still have been cached")

    def look_at_origin(self) -> None:
        """Without the cache: both images are whole and hold everything written."""
        numbers = f"read -P {PATTERN} {WRITE_AT} {WRITTEN}"
        said = self.run("qemu-io", "-r", "-f", "qcow2", "-c", numbers, self.origin / QCOW2)
        if "verification failed" in said:
            raise DemoError(f"the origin's {QCOW2} lacks what was written")
        self.run("qemu-img", "check", "-q", self.origin / QCOW2)
        skip = ("-i", f"{WRITE_AT}:0", "-n", WRITTEN)
        self.run("cmp", *skip, self.origin / RAW, self.scratch / "payload")
        said = self.run("debugfs", "-R", "cat /hello.txt", self.origin / RAW)
        if f"Hello from inside {RAW}." not in said:
            raise DemoError(f"the filesystem inside the origin's {RAW} cannot be read")

    # -- the end -----------------------------------------------------------------------------------

    def clean_up(self) -> None:
        """Ends the daemon, detaches the mount, removes the directory; works in any state."""
        for socket in self.runtime.glob("*.sock"):
            if socket.stem.isdigit():
                _end(int(socket.stem))
        while self._mounted():
            if subprocess.run(["umount", "-l", str(self.mountpoint)], check=False).returncode:
                print(f"{self.mountpoint} cannot be unmounted and stays.", file=sys.stderr)
                return
        shutil.rmtree(self.base, ignore_errors=True)

    def _mounted(self) -> bool:
        return f" {self.mountpoint} " in Path("/proc/self/mounts").read_text()


def _end(pid: int) -> None:
    """Ends one daemon by its id and waits for it, at most 10 s; first as umount would."""
    try:
        os.kill(pid, signal.SIGTERM)
        for attempt in range(100):
            if attempt == 50:
                os.kill(pid, signal.SIGKILL)
            os.kill(pid, 0)
            time.sleep(0.1)
    except ProcessLookupError:
        return


def mib(size: int) -> str:
    """Bytes in words; anything but nothing is at least 0.1 MiB."""
    return "nothing" if size == 0 else f"{max(0.1, size / MIB):.1f} MiB"


def tell(text: str) -> None:
    """A paragraph."""
    print(textwrap.fill(" ".join(text.split()), 92, break_on_hyphens=False), flush=True)


def wait(why: str) -> None:
    """Waits until a change is old enough to be trusted, and says so."""
    print(f"  (Waiting {SETTLE:.0f} seconds: {why})", flush=True)
    time.sleep(SETTLE)


_step = 0


def step(before: str) -> None:
    """What comes next, in plain words."""
    global _step
    _step += 1
    print()
    tell(f"{_step}. {before}")


def shown(after: str) -> None:
    """What was just seen."""
    tell(f"=> {after}")


def show(demo: Demo) -> None:
    """All the steps, in order."""
    young = "fusecache does not trust a file that changed less than 2 seconds ago."
    tell(
        "This shows fusecache with two small VM images. The directory 'origin' stands for your "
        "shared storage, the file 'ssd.cache' for the SSD in this host. Everything lies in "
        f"{demo.base}, where the commands below are run, and is removed at the end."
    )

    step("Make two disk images in the origin, one qcow2 and one raw, each with a filesystem.")
    demo.make_images()
    wait(young)
    shown("The origin holds two ordinary images. Nothing about them is particular to fusecache.")

    step("Mount the origin at 'cached', through a cache of 256 MiB.")
    demo.run(
        *("fusecache", "mount", demo.origin, demo.mountpoint),
        *("--cache", demo.cache, "--size", "256M"),
    )
    demo.run("ls", "-l", demo.mountpoint)
    shown("The same two images are there. A hypervisor would open them in 'cached'.")

    step("Read both images whole, twice, as a guest would (past the kernel's own cache).")
    demo.read_twice()
    demo.run("fusecache", "status", "-m", demo.mountpoint)
    shown(
        "The first read fetched every block from the origin once. The second was served from "
        "the cache alone, byte for byte the same. (The table counts since the mount. Some of the "
        "first read are hits, too: several small reads found the block one of them had fetched.)"
    )

    step("Write 4 MiB to each image: into the qcow2 with qemu-io, into the raw one with dd.")
    demo.write()
    wait(young)
    shown("Both writes went to the origin and to the cache (write-through) before they returned.")

    step(f"Evict {RAW} alone, as you would before its VM migrates to another host.")
    demo.run("fusecache", "evict", RAW)
    demo.still_cached()
    demo.run("fusecache", "status", "-m", demo.mountpoint)
    shown(
        f"Nothing of {RAW} is cached any more and the origin has all of it; {QCOW2} kept its "
        "blocks, the written ones too, and was read again without asking the origin."
    )

    step("Unmount, and look at the origin without the cache.")
    demo.run("fusecache", "umount", demo.mountpoint)
    demo.look_at_origin()
    shown(
        "Everything written is on the origin, the qcow2 image has no errors, and the filesystem "
        "inside the raw one is whole. Losing the SSD now would lose nothing."
    )


def next_steps() -> None:
    """What to type for one's own images."""
    programs = Path(sys.executable).parent
    print(
        f"""
That was all; the demo's files are removed. With your own images, as root (ORIGIN is where
they lie now; /dev/sdb is an empty SSD, or name a new file there and add --size 20G):

    export PATH="{programs}:$PATH"
    mkdir -p /mnt/cached

    fusecache mount ORIGIN /mnt/cached --cache /dev/sdb
    fusecache evict {RAW}
    fusecache umount /mnt/cached

Let the hypervisor open the images below /mnt/cached. 'fusecache status' shows what is cached;
README.md says the rest."""
    )


def main() -> int:
    """Runs the demo; 0 if all of it was as promised, 130 after Ctrl-C."""
    missing = [tool for tool in ("qemu-img", "qemu-io", "mkfs.ext4") if shutil.which(tool) is None]
    if missing:
        print(f"The demo needs {', '.join(missing)}: run it with 'make demo'.", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    # resolve: the mount table names real paths
    demo = Demo(Path(tempfile.mkdtemp(prefix="fusecache-demo-")).resolve())
    status = 1
    try:
        show(demo)
        status = 0
    except DemoError as exc:
        print(f"\nThe demo failed: {exc}", file=sys.stderr)
        log = demo.runtime / "fusecache.log"
        if log.exists():
            print(f"The daemon's log:\n{log.read_text()}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nInterrupted; cleaning up.", file=sys.stderr)
        status = 130
    finally:
        ignore: Callable[[int, FrameType | None], None] | signal.Handlers = signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, ignore)
        demo.clean_up()
    if status == 0:
        next_steps()
    return status


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
