"""Which syncs the daemon asks the kernel for."""

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def traced(pid: int, output: Path) -> Iterator[None]:
    """The daemon's fsync and fdatasync calls, with the paths, go to ``output``."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync", "-p", str(pid), "-o", str(output)],
        stderr=subprocess.PIPE,
    )
    try:
        assert tracer.stderr is not None
        assert b"attached" in tracer.stderr.readline()
        yield
        tracer.send_signal(signal.SIGINT)
        tracer.wait(timeout=20)
    finally:
        if tracer.poll() is None:
            tracer.kill()
            tracer.wait()
        if tracer.stderr is not None:
            tracer.stderr.close()


def syncs(trace: Path, name: str) -> int:
    """How many of the traced calls were for a file of this name."""
    return len(re.findall(rf"f(?:data)?sync\(\d+<[^>]*/{re.escape(name)}>", trace.read_text()))
