"""What another user does: run in a child process that always ends."""

import os
import subprocess
import sys
from pathlib import Path

_BECOME = """
import os, sys
os.fchdir(int(sys.argv[1]))
os.setgroups([]); os.setgid({gid}); os.setuid({uid}); os.umask({umask})
"""


def as_user(code: str, directory: Path, *, uid: int, gid: int, umask: int = 0o022) -> str:
    """Runs Python code as somebody else, in ``directory``; returns what it printed.

    pytest's own directories are closed to others, so the child enters by a descriptor; and so
    may be the interpreter's, so it becomes somebody else only after it has started.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _BECOME.format(uid=uid, gid=gid, umask=umask) + code, str(fd)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            pass_fds=(fd,),
        )
    finally:
        os.close(fd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
