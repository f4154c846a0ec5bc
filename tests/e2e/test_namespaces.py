"""A command line in another PID namespace, as in a container that shares /run."""

import json
import subprocess

import pytest

from tests.e2e.helpers import COMMAND, environment
from tests.support.daemon import Mount

pytestmark = pytest.mark.mount


def test_a_client_in_another_pid_namespace_reaches_the_daemon(mount: Mount) -> None:
    mount.start()
    inside = ("unshare", "--pid", "--fork", "--mount-proc")
    done = subprocess.run(
        [*inside, *COMMAND, "status", "--json", "-m", mount.mountpoint],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(mount),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [entry["pid"] for entry in json.loads(done.stdout)["mounts"]] == [mount.pid]
    assert mount.status()["state"] == "serving", "its socket is still there"
    mount.kill()
    assert json.loads(mount.run("status", "--json").stdout)["mounts"] == []
    assert list(mount.runtime.glob("*.sock")) == []
