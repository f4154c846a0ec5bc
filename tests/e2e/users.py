"""A plain user with directories of their own, fusermount3 for the mount, and no privileges."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import fusecache
from tests.e2e.helpers import NO_OTHERS, others_but
from tests.support.daemon import BLOCK
from tests.support.stamps import stamped

USER = 65534  # nobody: fusermount3 wants a user with a name
_SOURCE = Path(fusecache.__file__).parents[1]


class User:
    """Runs scripts as a plain user in a private mount namespace.

    There, /dev/fuse may be opened by everybody, as udev makes it, and the interpreter can be
    reached even if it lies below a home directory that is closed to others.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.log = ""
        for name in ("origin", "mnt", "run", "home"):
            (base / name).mkdir()
        os.mknod(base / "fuse", 0o020666, os.makedev(10, 229))
        os.chmod(base / "fuse", 0o666)
        (base / "origin" / "vm.img").write_bytes(stamped(1, 0, 4 * BLOCK, 1))
        for path in base.iterdir():
            if path.name != "fuse":
                shutil.chown(path, USER, USER)
        shutil.chown(base / "origin" / "vm.img", USER, USER)
        os.chmod(base, 0o755)

    def script(self, *commands: str, keep: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Shell commands in which ``fc`` is fusecache; ends at the first that fails.

        Args:
            keep: the one mount of a fusecache that is to be there, too.
        """
        python = shlex.join([sys.executable, "-m", "fusecache"])
        theirs = "\n".join(["set -e", f'fc() {{ {python} "$@"; }}', *commands])
        ours = [
            "set -e",
            NO_OTHERS if keep is None else others_but(keep),
            f"mount --bind {self.base}/fuse /dev/fuse",
            *_opened_up(self.base),
            f"exec setpriv --reuid={USER} --regid={USER} --clear-groups --inh-caps=-all "
            f"sh -c {shlex.quote(theirs)}",
        ]
        environment = {
            name: value for name, value in os.environ.items() if name != "FUSECACHE_RUNTIME_DIR"
        }
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", "\n".join(ours)],
            capture_output=True, text=True, timeout=90, check=False, cwd=self.base,
            env={**environment, "HOME": f"{self.base}/home", "PYTHONPATH": str(_SOURCE),
                 "PYTHONDONTWRITEBYTECODE": "1", "XDG_RUNTIME_DIR": f"{self.base}/run"},
        )  # fmt: skip


def _opened_up(base: Path) -> list[str]:
    """Commands that cover every closed directory above the interpreter and the source by one
    that holds only the way down."""
    commands = []
    for number, wanted in enumerate({Path(sys.base_prefix), Path(sys.prefix), _SOURCE}):
        closed = [p for p in reversed(wanted.parents) if not p.stat().st_mode & 0o001]
        if closed:
            held = base / f"held{number}"
            commands += [
                f"mkdir -p {held}", f"mount --bind {wanted} {held}",
                f"mount -t tmpfs -o mode=755 none {closed[0]}",
                f"mkdir -p {wanted}", f"mount --move {held} {wanted}",
            ]  # fmt: skip
    return commands
