"""A real Prometheus, from Debian's package: rules and their tests, a scrape, the dashboard."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.helpers import process, run, wait_for
from tests.e2e.test_metrics import MONITORING, free_port, text
from tests.support.daemon import BLOCK, Mount
from tests.support.direct import opened, read_direct
from tests.support.stamps import stamped

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("promtool") is None, reason="needs Prometheus: apt-get install prometheus"
    ),
]


def test_the_rules_load_and_do_what_they_are_for() -> None:
    assert "SUCCESS" in run("promtool", "check", "rules", MONITORING / "alerts.yml")
    assert "SUCCESS" in run("promtool", "test", "rules", MONITORING / "alerts_test.yml")
    assert "SUCCESS" in run("promtool", "check", "config", MONITORING / "prometheus.yml")


def test_prometheus_finds_nothing_to_mend_in_the_metrics(served_with_metrics: Mount) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text(served_with_metrics), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def served_with_metrics(mount: Mount) -> Mount:
    """A mount with metrics that has read, and has something dirty."""
    mount.options |= {"metrics": str(free_port()), "write_mode": "back", "dirty_age": "3600"}
    (mount.origin / "vm.img").write_bytes(stamped(1, 0, 8 * BLOCK, 1))
    mount.start()
    with open(mount.mountpoint / "vm.img", "r+b", buffering=0) as guest:
        guest.read(4 * BLOCK)
        guest.write(stamped(1, 4 * BLOCK, BLOCK, 2))
    return mount


def test_it_scrapes_a_mount_and_answers_every_query_of_the_dashboard(
    served_with_metrics: Mount, tmp_path: Path
) -> None:
    mount, port = served_with_metrics, free_port()
    config = (MONITORING / "prometheus.yml").read_text()
    config = config.replace("127.0.0.1:9469", f"127.0.0.1:{mount.options['metrics']}")
    (tmp_path / "prometheus.yml").write_text(config.replace("15s", "1s"))
    shutil.copy(MONITORING / "alerts.yml", tmp_path)

    def query(expression: str) -> list[dict[str, Any]]:
        given = urllib.parse.urlencode({"query": expression})
        address = f"http://127.0.0.1:{port}/api/v1/query?{given}"
        with urllib.request.urlopen(address, timeout=20) as answer:
            told = json.load(answer)
        assert told["status"] == "success"
        return list(told["data"]["result"])

    def value(expression: str) -> float | None:
        with contextlib.suppress(OSError):
            found = query(expression)
            return float(found[0]["value"][1]) if found else None
        return None

    with (
        open(tmp_path / "prometheus.log", "wb") as log,
        process(
            "prometheus", f"--config.file={tmp_path}/prometheus.yml", "--log.level=warn",
            f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}",
            ends=15, stdout=log, stderr=log,
        ),
    ):  # fmt: skip
        wait_for(lambda: value('up{job="fusecache"}') == 1, "a scrape", 60)
        wait_for(lambda: value("count_over_time(up[1m])") in range(3, 60), "some scrapes", 60)
        # Past the kernel's pages: it keeps them once the image's record is trusted.
        with opened(mount.mountpoint / "vm.img", os.O_RDONLY | os.O_DIRECT) as guest:
            assert len(read_direct(guest, 0, BLOCK)) == BLOCK
        wait_for(
            lambda: value("sum(rate(fusecache_read_bytes_total[1m]))") not in (None, 0.0), "a rate"
        )
        assert value("fusecache_dirty_bytes") == BLOCK
        empty = []
        for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
            for target in panel["targets"]:
                expression = re.sub(r"\$(instance|mount)", ".*", target["expr"])
                if not query(expression.replace("$__rate_interval", "1m")):
                    empty.append(target["expr"])
        # Nothing is flushed here, and neither cleaner nor reclaimer need be at work.
        assert all("flush_left" in gap or "reclaimer_state" in gap for gap in empty), empty
        assert query('ALERTS{alertname="FusecacheDown"}') == []
