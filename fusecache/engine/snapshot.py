"""What a mount looks like at one moment, in the form of ``status --json``. Asks nobody: a
stalled origin cannot hold it up (P6)."""

from typing import Any

from fusecache.engine.block_cache import BlockCache
from fusecache.engine.dirty_reads import unreadable_ranges
from fusecache.engine.image import Image


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
        "dirty_bytes": sum(_dirty_bytes(cache, image) for image in cache.images.all()),
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


def image_snapshot(cache: BlockCache, image: Image) -> dict[str, Any]:
    """One entry of ``images``. ``path`` is relative to the origin."""
    counters = image.counters
    usage = cache.core.usage(image.id)
    return {
        "path": image.row.path,
        "size": image.size,
        "cached_bytes": usage.pages << cache.core.geometry.page_shift,
        "cached_blocks": usage.blocks,
        "dirty_bytes": _dirty_bytes(cache, image),
        "dirty_age": _age(cache, image),
        "write_mode": image.write_mode.value,
        "own_write_mode": image.row.write_mode,
        "lost": [list(span) for span in cache.core.lost_ranges(image.id)],
        "unreadable": [list(span) for span in unreadable_ranges(cache.core, image)],
        "clean_error": image.clean_error,
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
    }


def _dirty_bytes(cache: BlockCache, image: Image) -> int:
    """What only the cache has; what a broken cache gave back to the origin no longer counts."""
    return 0 if image.rescued else cache.core.dirty_bytes(image.id)


def _age(cache: BlockCache, image: Image) -> float | None:
    """Seconds since the oldest dirty data was written; None if nothing is dirty."""
    return cache.core.dirty.oldest(image.id)
