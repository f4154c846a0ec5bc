"""What a mount looks like at one moment, in the form of ``status --json``. Asks nobody: a
stalled origin cannot hold it up (P6)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.dirty_reads import unreadable_ranges
from fusecache.engine.image import Image
from fusecache.observe.counters import ImageCounters, Reason
from fusecache.observe.latency import (
    BOUNDS,
    LANE_BOUNDS,
    Call,
    Histogram,
    OriginLatency,
    quantile,
)
from fusecache.observe.windows import HOUR, MINUTE, ratio

_LATELY = 5.0
"""Seconds that ``rates`` are of."""
_STEPS = 60


def mount_snapshot(cache: BlockCache) -> dict[str, Any]:
    """What all images together did, and what runs beside the requests."""
    images = cache.images.counted()
    total = ImageCounters()
    total.add(cache.state.counters.forgotten)
    for image in images:
        if not image.counters.untouched:
            total.add(image.counters)
    sampler = cache.sampler
    totals = sampler.totals()
    grown, _, span = sampler.mount_over(_LATELY, totals)
    minute, calls, minute_span = sampler.mount_over(MINUTE, totals)
    hour, _, _ = sampler.mount_over(HOUR, totals)
    written_back = round(minute[8] / minute_span) if minute_span else 0
    latency = cache.state.counters.latency
    return {
        "seconds": round(sampler.age, 1),
        "images_known": len(images),
        "waiting": sum(image.waiting for image in images),
        "names_waiting": len(cache.threads.asking()),
        "origin_read_bytes": total.origin_read_bytes,
        "origin_write_bytes": total.origin_write_bytes,
        "read_ahead_bytes": total.read_ahead_bytes,
        "origin_errors": total.errors,
        **_served(total),
        "hit_ratio": _ratios(minute, hour, total),
        "rates": _rates(grown, span),
        "origin_latency": _latencies(latency),
        "origin_latency_minute": {
            call.name.lower(): _quantiles(calls[call], sum(calls[call])) for call in Call
        },
        "lane": None if cache.lane_counters is None else _lane(cache.lane_counters()),
        "cleaner": {**_cleaner(cache), "bytes_per_second": written_back},
        "reclaimer": {
            "doing": cache.reclaimer.doing,
            "slots_free": cache.core.free,
            "slots_leaving": cache.core.leaving,
            "slots_low": cache.reclaimer.low,
            "slots_high": cache.reclaimer.high,
            "blocks_reclaimed": cache.state.counters.reclaimed,
        },
    }


def history_snapshot(cache: BlockCache) -> dict[str, list[int]]:
    """Bytes in each of the last 60 seconds, the last one last."""
    steps = cache.sampler.mount_steps(_STEPS)
    return {
        "read_hit_bytes": [step[0] for step in steps],
        "read_miss_bytes": [step[1] for step in steps],
        "write_bytes": [step[4] for step in steps],
    }


def _lane(counters: dict[str, Any]) -> dict[str, Any]:
    """What compiled code served by itself, and what it handed on."""
    served: dict[str, Any] = {}
    for name, kind in (("reads", "read"), ("overwrites", "write")):
        buckets = counters[f"{kind}_ns"]
        served[name] = {
            **_quantiles(buckets, sum(buckets), LANE_BOUNDS),
            "seconds": counters[f"{kind}_ns_sum"] / 1e9,
            "buckets": buckets,
        }
    return {
        **served,
        "io_uring": counters["ring"],
        "fuse_over_io_uring": counters["queues"],
        "cold_reads_by_io_uring": counters["together"],
        "fsyncs": counters["fsyncs"],
        "syncs": counters["syncs"],
        "passed_to_engine": counters["queued"],
        "passed_to_pyfuse3": counters["forwarded"],
    }


def _cleaner(cache: BlockCache) -> dict[str, Any]:
    """What the cleaner does now, and when it has something to do again.

    ``doing``: ``idle`` (nothing is dirty), ``waiting`` for data to become old enough, ``writing``
    it back, ``retrying`` after a failure, or ``rescuing`` what a broken cache still has.
    """
    images = cache.images.counted()
    writing = [image for image in images if image.cleaning.locked()]
    failed = [image for image in images if image.clean_error and cache.dirty_bytes_of(image)]
    next_seconds: float | None = None
    if not cache.dirty_bytes:
        doing = "idle"
    elif not cache.state.usable:
        doing = "rescuing"
    elif writing:
        doing = "writing"
    elif failed:
        doing = "retrying"
        next_seconds = min(cache.cleaner.due_in(image) for image in failed)
    else:
        doing = "waiting"
        next_seconds = max(0.0, cache.tuning.dirty_age - max(cache.core.dirty.ages().values()))
    return {
        "doing": doing,
        "images": [image.name for image in writing or failed],
        "next_seconds": None if next_seconds is None else round(next_seconds, 1),
        "dirty_low_bytes": _limit(cache, cache.tuning.dirty_low),
        "dirty_limit_bytes": _limit(cache, cache.tuning.dirty_limit),
    }


def _limit(cache: BlockCache, share: float) -> int:
    return int(cache.core.slot_count * share) << cache.core.geometry.block_shift


def _served(counters: ImageCounters) -> dict[str, Any]:
    """Where reads and writes were served, and why not by the cache."""
    c = counters
    return {
        "reads": {
            "memory": _of(c.read_hits - c.ssd_reads, c.read_hit_bytes - c.ssd_read_bytes),
            "ssd": _of(c.ssd_reads, c.ssd_read_bytes),
            "origin": _of(c.read_misses, c.read_miss_bytes),
        },
        "read_past_bytes": c.past_read_bytes,
        "writes": {
            "back": _of(
                c.writes - c.through_writes - c.around_writes,
                c.write_bytes - c.through_write_bytes - c.around_write_bytes,
            ),
            "through": _of(c.through_writes, c.through_write_bytes),
            "around": _of(c.around_writes, c.around_write_bytes),
        },
        "discards": c.discards,
        "discard_bytes": c.discard_bytes,
        "written_back_bytes": c.written_back_bytes,
        "not_cached": _reasons(c.not_cached),
        "not_kept": _reasons(c.not_kept),
    }


def _of(requests: int, size: int) -> dict[str, int]:
    return {"requests": requests, "bytes": size}


def _reasons(counts: Sequence[int]) -> dict[str, int]:
    """Those that occurred, by what they are called."""
    return {reason.text: counts[reason] for reason in Reason if counts[reason]}


def _ratios(minute: Sequence[int], hour: Sequence[int], all_of_it: ImageCounters) -> dict[str, Any]:
    """The share of the bytes that guests read which the cache had, 0 to 1; None of nothing."""
    return {
        "minute": ratio(minute[0], minute[1]),
        "hour": ratio(hour[0], hour[1]),
        "start": ratio(all_of_it.read_hit_bytes, all_of_it.read_miss_bytes),
    }


def _rates(grown: Sequence[int], span: float) -> dict[str, float]:
    """A second, over the last few seconds."""
    return {
        "reads": _per(grown[2] + grown[3], span),
        "read_bytes": _per(grown[0] + grown[1], span),
        "writes": _per(grown[5], span),
        "write_bytes": _per(grown[4], span),
        "origin_read_bytes": _per(grown[6], span),
        "origin_write_bytes": _per(grown[7], span),
    }


def _per(count: int, span: float) -> float:
    return round(count / span, 1) if span > 0 else 0.0


def _latencies(latency: OriginLatency) -> dict[str, Any]:
    """By kind of call, since the start."""
    return {call.name.lower(): _histogram(latency.calls[call]) for call in Call}


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {
        **_quantiles(histogram.counts, histogram.count),
        "seconds": round(histogram.seconds, 6),
        "buckets": histogram.counts.tolist() if histogram.seconds else [],
    }


def _quantiles(
    counts: Sequence[int], count: int, bounds: Sequence[float] = BOUNDS
) -> dict[str, Any]:
    """Seconds; None without a call. See ``quantile`` for how exact they are."""
    p50, p99 = quantile(counts, 0.5, bounds), quantile(counts, 0.99, bounds)
    return {
        "calls": count,
        "p50": None if p50 is None else round(p50, 6),
        "p99": None if p99 is None else round(p99, 6),
    }


def image_snapshots(cache: BlockCache, images: Iterable[Image]) -> Iterator[dict[str, Any]]:
    """Entries of ``images``; what looks at every slot does so once for all of them."""
    ages, losers = _dirty_ages(cache), cache.core.dirty.losers()
    for image in images:
        image.count_lane()
        yield image_snapshot(cache, image, ages.get(image.id), lost=image.id in losers)


def cache_snapshot(cache: BlockCache) -> dict[str, Any]:
    """The ``cache`` member: the device, how full it is, and how it does."""
    core, counters = cache.core, cache.state.counters
    return {
        "path": str(cache.device.path),
        "uuid": str(cache.device.superblock.uuid),
        "slots_total": core.slot_count,
        "slots_used": core.used,
        "slots_free": core.free,
        "slots_retired": core.retired,
        "cached_bytes": sum(
            core.usage(image.id).pages << core.geometry.page_shift for image in cache.images.all()
        ),
        "dirty_bytes": cache.dirty_bytes,
        "dirty_age": max(_dirty_ages(cache).values(), default=None),
        "state": cache.state.name,
        "trouble": cache.state.trouble,
        "stored_bytes": counters.stored_bytes,
        "blocks_not_stored": counters.not_stored,
        "blocks_reclaimed": counters.reclaimed,
        "barriers": counters.barriers,
        "light_commits": counters.light_commits,
        "stable_commits": counters.stable_commits,
        "errors": counters.device_errors,
        "unexpected_errors": counters.unexpected,
    }


def image_snapshot(
    cache: BlockCache, image: Image, dirty_age: float | None, *, lost: bool
) -> dict[str, Any]:
    """One entry of ``images``. ``path`` is relative to the origin.

    Args:
        dirty_age: seconds since the oldest dirty data was written; None if nothing is dirty.
        lost: the cache device lost dirty data of the image.
    """
    counters = image.counters
    usage = cache.core.usage(image.id)
    grown, span = cache.sampler.image_over(image, _LATELY)
    minute, _ = cache.sampler.image_over(image, MINUTE)
    hour, _ = cache.sampler.image_over(image, HOUR)
    return {
        "path": image.row.path,
        "size": image.size,
        "cached_bytes": usage.pages << cache.core.geometry.page_shift,
        "cached_blocks": usage.blocks,
        "dirty_bytes": cache.dirty_bytes_of(image),
        "dirty_age": dirty_age,
        "write_mode": image.write_mode.value,
        "own_write_mode": image.row.write_mode,
        "lost": [list(span) for span in cache.core.lost_ranges(image.id)] if lost else [],
        "unreadable": [list(span) for span in unreadable_ranges(cache.core, image)],
        "clean_error": image.clean_error,
        "changed_elsewhere": image.changed_elsewhere,
        "read_hit_bytes": counters.read_hit_bytes,
        "read_miss_bytes": counters.read_miss_bytes,
        "write_bytes": counters.write_bytes,
        "origin_reads": counters.origin_reads,
        "origin_read_bytes": counters.origin_read_bytes,
        "read_ahead_bytes": counters.read_ahead_bytes,
        "origin_writes": counters.origin_writes,
        "origin_write_bytes": counters.origin_write_bytes,
        "errors": counters.errors,
        "last_error": counters.last_error,
        "open_handles": image.handles,
        "detached": image.detached,
        "bypassed": image.bypassed,
        "waiting": image.waiting,
        **_served(counters),
        "hit_ratio": _ratios(minute, hour, counters),
        "rates": _rates(grown, span),
        "origin_latency": _latencies(counters.latency),
    }


def _dirty_ages(cache: BlockCache) -> dict[int, float]:
    """By the number of every image of which the origin has not all: how old that is, in seconds."""
    ages = cache.core.dirty.ages()
    if cache.state.usable:
        return ages
    dirty = {image.id for image in cache.images.all() if cache.dirty_bytes_of(image)}
    return {number: age for number, age in ages.items() if number in dirty}
