"""The metrics endpoint: what it tells, and that nobody who asks can hold anything up."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.helpers import answer_of, refused, refused_mount, wait_for
from tests.support.daemon import BLOCK, Mount, cleaned_up
from tests.support.stamps import stamped

pytestmark = pytest.mark.mount

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def free_port() -> int:
    """A port of this host that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount with metrics that has read and written a little."""
    mount = Mount(tmp_path_factory.mktemp("metrics"), metrics=str(free_port()))
    (mount.origin / 'vm "1".img').write_bytes(stamped(1, 0, 4 * BLOCK, 1))
    with cleaned_up(mount):
        mount.start()
        with open(mount.mountpoint / 'vm "1".img', "r+b", buffering=0) as guest:
            guest.read(BLOCK)
            guest.write(stamped(1, BLOCK, 4096, 2))
        yield mount


def connected(mount: Mount) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(mount.options["metrics"])), timeout=30)


def asked(mount: Mount, request: bytes) -> bytes:
    """Everything that comes back for a request."""
    with connected(mount) as client:
        return answer_of(client, request)


def text(mount: Mount) -> str:
    """What Prometheus would get."""
    client = http.client.HTTPConnection("127.0.0.1", int(mount.options["metrics"]), timeout=30)
    try:
        client.request("GET", "/metrics")
        answer = client.getresponse()
        assert (answer.status, answer.getheader("Content-Type", "")[:24]) == (
            200, "text/plain; version=0.0.",
        )  # fmt: skip
        return answer.read().decode()
    finally:
        client.close()


def values(mount: Mount) -> Values:
    """By name and labels without the mount, which must be this one."""
    found: Values = {}
    for family in text_string_to_metric_families(text(mount)):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("mount") == str(mount.mountpoint)
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def test_the_metrics_say_what_status_says(served: Mount) -> None:
    time.sleep(1.1)  # the text may be a second old
    found, status = values(served), served.status()

    def value(name: str, **labels: str) -> float:
        return found[f"fusecache_{name}", frozenset(labels.items())]

    (image,) = status["images"]
    name = 'vm "1".img'
    for place, shown in status["reads"].items():
        assert value("reads_total", served=place) == shown["requests"]
        assert value("image_reads_total", served=place, image=name) == shown["requests"]
        assert value("read_bytes_total", served=place) == shown["bytes"]
    assert value("image_write_bytes_total", served="through", image=name) == 4096
    assert value("not_cached_requests_total", reason="cold") == status["not_cached"]["cold"]
    assert value("image_cached_bytes", image=name) == image["cached_bytes"]
    assert value("cache_state", state="ok") == value("mount_state", state="serving") == 1
    latency = status["origin_latency"]["read"]
    assert value("origin_latency_seconds_count", call="read") == latency["calls"] > 0
    assert value("origin_latency_seconds_bucket", call="read", le="+Inf") == latency["calls"]
    assert value("image_origin_latency_seconds_sum", call="read", image=name) == pytest.approx(
        latency["seconds"]
    )
    assert value("flushes") == value("dirty_bytes") == 0


def test_dashboard_and_alerts_use_only_what_is_there(served: Mount) -> None:
    families = list(text_string_to_metric_families(text(served)))
    there = {family.name for family in families}
    there |= {sample.name for family in families for sample in family.samples}
    labels: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    for file in ("dashboard.json", "alerts.yml", "alerts_test.yml"):
        said = (MONITORING / file).read_text().replace('\\"', '"')
        names = set(re.findall(r"\bfusecache_[a-z_]+", said))
        assert len(names) > 10
        assert names - there == set(), file
        for label, value in re.findall(r'\b(served|state|reason|call|strength)=~?"([^"$]+)"', said):
            assert set(value.split("|")) <= labels[label], (file, label, value)
    json.loads((MONITORING / "dashboard.json").read_text())
    tested = set(re.findall(r"Fusecache[A-Za-z]+", (MONITORING / "alerts_test.yml").read_text()))
    assert tested == set(re.findall(r"Fusecache[A-Za-z]+", (MONITORING / "alerts.yml").read_text()))


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /metrics HTTP/1.0\r\n\r\n", b"200"), (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n", b"200"), (b"\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404"), (b"POST /metrics HTTP/1.1\r\n\r\n", b"400"),
        (b"\0\xff\r\n\r\n", b"400"), (b"\x16\x03\x01" * 4000, b"400"),
        (b"GET " + b"/x" * 5000 + b" HTTP/1.1\r\n\r\n", b"400"),
    ],
)  # fmt: skip
def test_nonsense_gets_an_answer(served: Mount, request_bytes: bytes, status: bytes) -> None:
    try:
        answer = asked(served, request_bytes)
    except ConnectionError:
        assert len(request_bytes) > 8192  # it hung up before it had read it all
        return
    assert answer.split(b" ", 2)[1] == status
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Connection: close" in head and bool(body) is not request_bytes.startswith(b"HEAD")


def test_two_hundred_at_once_are_all_answered_and_the_mount_goes_on(served: Mount) -> None:
    answers: list[int] = []

    def ask() -> None:
        answers.append(text(served).count("\n"))

    threads = [threading.Thread(target=ask) for _ in range(200)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    with open(served.mountpoint / 'vm "1".img', "rb", buffering=0) as guest:
        for _ in range(50):
            began = time.monotonic()
            guest.seek(0)
            assert len(guest.read(BLOCK)) == BLOCK
            slowest = max(slowest, time.monotonic() - began)
    for thread in threads:
        thread.join(30)
    assert len(answers) == 200 and min(answers) > 100
    assert slowest < 5


def test_slow_and_vanishing_clients_hold_up_nobody(served: Mount) -> None:
    slow = [connected(served) for _ in range(300)]  # more than may be there at a time
    try:
        slow[-1].sendall(b"GET /metr")
        slow[-2].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow[-2].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")  # and never reads the answer
        assert "fusecache_mount_info" in text(served)
        slow[0].settimeout(20)
        assert slow[0].recv(1) == b"", "who is there for longest has to go"
    finally:
        for client in slow:
            client.close()
    assert "fusecache_mount_info" in text(served)
    assert served.status()["cache"]["unexpected_errors"] == 0


def test_a_port_in_use_refuses_the_mount(mount: Mount) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        mount.options["metrics"] = f"127.0.0.1:{port}"
        words = (f"127.0.0.1:{port}", "Address already in use", "--metrics")
        refused_mount(mount, *words)
    assert not mount.cache.exists(), "refused before anything was made"
    mount.start()
    wait_for(lambda: "fusecache_images" in text_at(port), "metrics at the port that is free now")


def text_at(port: int) -> str:
    """The metrics at a port of this host."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        client.request("GET", "/metrics")
        return client.getresponse().read().decode()
    finally:
        client.close()


@pytest.mark.parametrize(
    "address", ["", "x", "1.2.3.4:", ":9469", "70000", "0", "127.0.0.1:9469:1", "[::1]", "-1"]
)
def test_an_address_that_is_none_is_refused(mount: Mount, address: str) -> None:
    mount.options["metrics"] = address
    refused(mount.run("mount", *mount.arguments()), "ADDRESS:PORT", code=2)


def test_an_address_of_another_host_is_refused(mount: Mount) -> None:
    mount.options["metrics"] = "192.0.2.7:9469"  # RFC 5737: nobody's
    refused_mount(mount, "192.0.2.7:9469", "annot assign")


def test_the_configuration_file_may_say_it(mount: Mount, tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "mount.toml"
    file.write_text(f'cache = "{mount.cache}"\nsize = "64M"\nmetrics = {port}\n')
    done = mount.run("mount", mount.origin, mount.mountpoint, "--config", file)
    assert done.returncode == 0, done.stderr
    assert "fusecache_images" in text_at(port)
