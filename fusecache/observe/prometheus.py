"""Metrics in Prometheus' text format, made from the same data as ``status --json``.

Names follow the conventions: base units, ``_total`` for what only grows. What is said of a mount
as a whole has a name of its own beside what is said of its images, so that a sum over a name
counts nothing twice. Nothing is kept here: what a request adds to are the counters alone.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from fusecache.observe.counters import NOT_CACHED, NOT_KEPT
from fusecache.observe.latency import BOUNDS, LANE_BOUNDS, Call

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The one that every Prometheus understands: no name or label here needs a later one."""

_LANE_BUCKETS = [*(f"{bound:g}" for bound in LANE_BOUNDS), "+Inf"]
_BUCKETS = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
_IMAGES_AT_ONCE = 4
_CACHE_STATES = ("ok", "paused", "degraded")
_MOUNT_STATES = ("starting", "serving", "unmounting", "stopping", "flushing")
_CLEANER = ("idle", "waiting", "writing", "retrying", "rescuing")
_RECLAIMER = ("idle", "reclaiming", "stuck")


@dataclass(frozen=True, slots=True)
class _Status:
    """A prometheus_client registry of one moment."""

    families: list[Metric]

    def collect(self) -> Iterable[Metric]:
        """All families."""
        return self.families


def render(status: dict[str, Any], version: str) -> Iterator[bytes]:
    """The exposition of one mount, as ``status --json`` has it.

    In parts that take a millisecond or two each, so that others get their turn in between: a
    thread that makes all at once would keep the interpreter from the guests' requests for 5 ms
    each time.
    """
    for family in _mount(status, version):
        yield _text(family)
    mount, images = str(status["mountpoint"]), status["images"]
    parts = [
        _images(mount, images[first : first + _IMAGES_AT_ONCE])
        for first in range(0, max(1, len(images)), _IMAGES_AT_ONCE)
    ]
    for family in parts[0]:
        yield _text(family)
        for part in parts[1:]:
            # The same family of the next images, without saying again what it is.
            yield _text(next(part)).split(b"\n", 2)[2]


def _text(family: Metric) -> bytes:
    return bytes(generate_latest(_Status([family])))


def _counter(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = CounterMetricFamily(f"fusecache_{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(f"fusecache_{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _by(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    text: str,
    mount: str,
    label: str,
    values: dict[str, float],
) -> Metric:
    """One family of a mount with one more label."""
    family = kind(f"fusecache_{name}", text, labels=["mount", label])
    for value, number in values.items():
        family.add_metric([mount, value], number)
    return family


def _one_of(
    name: str, text: str, mount: str, label: str, all_of: Iterable[str], now: str
) -> Metric:
    """1 for what is the case and 0 for all else."""
    values = {value: float(value == now) for value in all_of}
    return _by(GaugeMetricFamily, name, text, mount, label, values)


def _mount(status: dict[str, Any], version: str) -> Iterator[Metric]:
    mount, cache = str(status["mountpoint"]), status["cache"]
    only = {"mount": mount}
    about = {
        "mount": mount,
        "origin": str(status["origin"]),
        "cache": str(cache["path"]),
        "write_mode": str(status["write_mode"]),
        "version": version,
    }
    yield _gauge("mount_info", "What this mount is; always 1.", about, 1)
    yield _gauge("uptime_seconds", "Since the mount began.", only, status["seconds"])
    yield _one_of(
        "mount_state", "What the mount is doing.", mount, "state", _MOUNT_STATES, status["state"]
    )
    yield _one_of(
        "cache_state", "How the cache does.", mount, "state", _CACHE_STATES, cache["state"]
    )
    yield from _sizes(status, only)
    yield from _served(status, mount)
    for key, name, text in _CACHE_COUNTERS:
        yield _counter(name, text, only, cache[key])
    for key, name, text in _MOUNT_COUNTERS:
        yield _counter(name, text, only, status[key])
    commits = {"light": cache["light_commits"], "stable": cache["stable_commits"]}
    text = "Commits of the block map, by what they survive."
    yield _by(CounterMetricFamily, "commits", text, mount, "strength", commits)
    yield _histograms("origin_latency_seconds", _LATENCY, [(only, status["origin_latency"])])
    yield from _workers(status, only)
    if status["lane"] is not None:
        yield from _lane(status["lane"], only)


_LATENCY = "How long calls of the origin took, without the wait for a thread."
_CACHE_COUNTERS = (
    ("stored_bytes", "stored_bytes", "Written to the cache device for reads and through-writes."),
    ("blocks_reclaimed", "reclaimed_blocks", "Blocks that left the cache to make room."),
    ("barriers", "barriers", "Points where device and block map were both made stable."),
    ("errors", "cache_errors", "Errors of the cache device or its database."),
    ("unexpected_errors", "unexpected_errors", "Errors nobody foresaw; see the log."),
)
_MOUNT_COUNTERS = (
    ("origin_read_bytes", "origin_read_bytes", "Read from the origin."),
    ("read_ahead_bytes", "read_ahead_bytes", "Asked of the origin ahead of guests."),
    ("origin_write_bytes", "origin_write_bytes", "Written to the origin."),
    ("written_back_bytes", "written_back_bytes", "Of these, what was dirty in the cache."),
    ("read_past_bytes", "read_past_bytes", "Read by guests past the cache."),
    ("origin_errors", "origin_errors", "Calls the origin failed."),
)
_LANE_COUNTERS = (
    ("fsyncs", "lane_fsyncs", "Fsyncs that the lane served by itself."),
    ("syncs", "lane_syncs", "Syncs of the cache device that these shared."),
)


def _lane(lane: dict[str, Any], only: dict[str, str]) -> Iterator[Metric]:
    text = "How long what the lane served by itself took, from request to answer."
    family = HistogramMetricFamily("fusecache_lane_seconds", text, labels=["mount", "served"])
    for kind in ("reads", "overwrites"):
        total, buckets = 0, []
        for bound, count in zip(_LANE_BUCKETS, lane[kind]["buckets"], strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric([only["mount"], kind], buckets, lane[kind]["seconds"])
    yield family
    text = "Requests that the lane handed on, by to whom."
    passed = {"engine": lane["passed_to_engine"], "pyfuse3": lane["passed_to_pyfuse3"]}
    yield _by(CounterMetricFamily, "lane_passed_requests", text, only["mount"], "to", passed)
    for key, name, text in _LANE_COUNTERS:
        yield _counter(name, text, only, lane[key])


def _sizes(status: dict[str, Any], only: dict[str, str]) -> Iterator[Metric]:
    cache, block = status["cache"], status["block_size"]
    blocks = {
        "used": cache["slots_used"], "free": cache["slots_free"], "retired": cache["slots_retired"],
    }  # fmt: skip
    text = "Blocks the cache has room for, by what they are; those about to be free are neither."
    yield _by(GaugeMetricFamily, "cache_blocks", text, only["mount"], "state", blocks)
    size = cache["slots_total"] * block
    yield _gauge("cache_size_bytes", "What the cache has room for.", only, size)
    yield _gauge("cached_bytes", "What is cached.", only, cache["cached_bytes"])
    yield _gauge("dirty_bytes", "What the origin does not have.", only, cache["dirty_bytes"])
    limit = status["cleaner"]["dirty_limit_bytes"]
    yield _gauge("dirty_limit_bytes", "What may be dirty; then writes go through.", only, limit)
    text = "Since the oldest dirty data was written; 0 if nothing is dirty."
    yield _gauge("dirty_age_seconds", text, only, cache["dirty_age"] or 0.0)
    images = status["images"]
    lost = sum(length for image in images for _, length in image["lost"] + image["unreadable"])
    text = "Dirty data that the cache device cannot give back."
    yield _gauge("lost_bytes", text, only, lost)
    yield _gauge("waiting_requests", "Requests that wait for the origin.", only, status["waiting"])
    text = "Lookups, listings and attribute calls that the origin has not answered yet."
    yield _gauge("waiting_names", text, only, status["names_waiting"])
    failing = sum(1 for image in images if image["clean_error"])
    text = "Images whose last writeback failed."
    yield _gauge("failing_images", text, only, failing)
    yield _gauge("images", "Images that are open or cached.", only, status["images_known"])
    text = "Of these, the ones without metrics of their own, because they are too many."
    yield _gauge("images_left_out", text, only, status["images_known"] - len(images))


def _served(status: dict[str, Any], mount: str) -> Iterator[Metric]:
    counter = CounterMetricFamily
    for kind, verb in (("reads", "read"), ("writes", "write")):
        places = status[kind].items()
        requests = {place: served["requests"] for place, served in places}
        text = f"Guests' {kind}, by where they were served."
        yield _by(counter, kind, text, mount, "served", requests)
        sizes = {place: served["bytes"] for place, served in places}
        text = f"Bytes of guests' {kind}, by where they were served."
        yield _by(counter, f"{verb}_bytes", text, mount, "served", sizes)
    text = "Guests' requests that the cache could not serve alone, by why."
    reasons = {reason.text: status["not_cached"].get(reason.text, 0) for reason in NOT_CACHED}
    yield _by(counter, "not_cached_requests", text, mount, "reason", reasons)
    text = "Blocks that were fetched and not kept, by why."
    reasons = {reason.text: status["not_kept"].get(reason.text, 0) for reason in NOT_KEPT}
    yield _by(counter, "not_kept_blocks", text, mount, "reason", reasons)


def _workers(status: dict[str, Any], only: dict[str, str]) -> Iterator[Metric]:
    cleaner, reclaimer, mount = status["cleaner"], status["reclaimer"], only["mount"]
    text = "What the cleaner is doing."
    yield _one_of("cleaner_state", text, mount, "state", _CLEANER, cleaner["doing"])
    text = "What the reclaimer is doing."
    yield _one_of("reclaimer_state", text, mount, "state", _RECLAIMER, reclaimer["doing"])
    running = [work for work in (*status["running"], status["flushing"]) if work is not None]
    text = "Flushes and evictions under way."
    yield _gauge("flushes", text, only, len(running))
    text = "What they have still to bring to the origin."
    yield _gauge("flush_left_bytes", text, only, sum(work["left"] for work in running))
    left = [math.nan if work["seconds_left"] is None else work["seconds_left"] for work in running]
    text = "How long they still take, if they go on as they went; NaN before that is known."
    yield _gauge("flush_left_seconds", text, only, max(left, default=0.0))


def _images(mount: str, images: list[dict[str, Any]]) -> Iterator[Metric]:
    labels = ["mount", "image"]
    for key, name, text in _IMAGE_GAUGES:
        gauge = GaugeMetricFamily(f"fusecache_image_{name}", text, labels=labels)
        for image in images:
            gauge.add_metric([mount, image["path"]], float(image[key] or 0))
        yield gauge
    for key, name, text in _IMAGE_COUNTERS:
        counter = CounterMetricFamily(f"fusecache_image_{name}", text, labels=labels)
        for image in images:
            counter.add_metric([mount, image["path"]], image[key])
        yield counter
    for kind, verb in (("reads", "read"), ("writes", "write")):
        for unit, name in (("requests", kind), ("bytes", f"{verb}_bytes")):
            text = f"Guests' {kind} of an image ({unit}), by where they were served."
            counter = CounterMetricFamily(
                f"fusecache_image_{name}", text, labels=[*labels, "served"]
            )
            for image in images:
                for place, served in image[kind].items():
                    counter.add_metric([mount, image["path"], place], served[unit])
            yield counter
    for key, name, text in _IMAGE_REASONS:
        counter = CounterMetricFamily(f"fusecache_image_{name}", text, labels=[*labels, "reason"])
        for image in images:
            for reason, count in image[key].items():
                counter.add_metric([mount, image["path"], reason], count)
        yield counter
    yield _histograms(
        "image_origin_latency_seconds",
        _LATENCY,
        [({"mount": mount, "image": image["path"]}, image["origin_latency"]) for image in images],
        only_used=True,
    )


_IMAGE_GAUGES = (
    ("size", "size_bytes", "Size of the image."),
    ("cached_bytes", "cached_bytes", "What of the image is cached."),
    ("dirty_bytes", "dirty_bytes", "What of the image the origin does not have."),
    ("dirty_age", "dirty_age_seconds", "Since its oldest dirty data was written; 0 without any."),
    ("open_handles", "open_handles", "How often the image is open."),
    ("waiting", "waiting_requests", "Requests of the image that wait for the origin."),
    ("detached", "detached", "1 while the image is open and not cached."),
)
_IMAGE_COUNTERS = (
    ("origin_read_bytes", "origin_read_bytes", "Read from the origin."),
    ("origin_write_bytes", "origin_write_bytes", "Written to the origin."),
    ("written_back_bytes", "written_back_bytes", "Of these, what was dirty in the cache."),
    ("errors", "origin_errors", "Calls the origin failed."),
)
_IMAGE_REASONS = (
    ("not_cached", "not_cached_requests", "Requests the cache could not serve alone, by why."),
    ("not_kept", "not_kept_blocks", "Blocks that were fetched and not kept, by why."),
)


def _histograms(
    name: str,
    text: str,
    parts: list[tuple[dict[str, str], dict[str, Any]]],
    *,
    only_used: bool = False,
) -> Metric:
    """Latencies by kind of call; ``only_used`` leaves out what was never called."""
    family = HistogramMetricFamily(
        f"fusecache_{name}", text, labels=[*(parts[0][0] if parts else ()), "call"]
    )
    for labels, latency in parts:
        for call in Call:
            kind = call.name.lower()
            histogram = latency[kind]
            if only_used and not histogram["calls"]:
                continue
            total, buckets = 0, []
            counts = histogram["buckets"] or [0] * len(_BUCKETS)
            for bound, count in zip(_BUCKETS, counts, strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric([*labels.values(), kind], buckets, histogram["seconds"])
    return family
