"""``check``, ``dump`` and ``repair``: a cache that no daemon has open, as it lies there."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from fusecache.cli import completion
from fusecache.cli.cache import default_database, one_of, open_locked, possible_databases
from fusecache.cli.paths import absolute
from fusecache.cli.progress import Progress, interruptible
from fusecache.config import format_size
from fusecache.control.protocol import readable
from fusecache.core.rows import Rows, pages_in
from fusecache.engine.recovery import boot_id
from fusecache.errors import CacheDeviceError, DatabaseError, NotACacheError, SuperblockError
from fusecache.store import repair as mending
from fusecache.store.candidates import in_use
from fusecache.store.inspection import Inspection, inspect
from fusecache.store.repair import Loss, Plan
from fusecache.store.superblock import SUPERBLOCK_SIZE, Superblock, named

_LEFT = {
    "clean": "stopped cleanly",
    "killed": "its daemon was killed, in this boot",
    "cut": "its daemon did not stop cleanly, and the host was started since",
    "unknown": "how it was left is not known",
}
_UNCHANGED = "nothing was changed."
_UNKNOWN = "not known"
_argument = click.argument("cache", type=Path, shell_complete=completion.files)
_db = click.option("--db", "database", type=Path, help="Where its database lies.")


@contextlib.contextmanager
def _inspected(
    verb: str, cache: Path, database: Path | None
) -> Iterator[tuple[int, Inspection, Progress]]:
    """The cache, locked: its daemon must not change it while we look."""
    cache = absolute(cache)
    if not os.path.lexists(cache):
        raise CacheDeviceError(f"The cache {cache} does not exist.")
    fd = open_locked(cache)
    try:
        place = _database(fd, verb, cache, None if database is None else absolute(database))
        with Progress() as line:
            found = inspect(fd, cache, place, boot_id(), partial(line.follow, verb))
            line.show("")
            mending.refuse_foreign(found)
            yield fd, found, line
    finally:
        os.close(fd)


def _database(fd: int, verb: str, cache: Path, chosen: Path | None) -> Path | None:
    """None for a block device whose superblock does not tell its uuid.

    Raises:
        DatabaseError: the one that was chosen is another cache's; or none was, and there are some
            of which nobody can say whether they are this one's.
    """
    if chosen is not None:
        if in_use(chosen):
            raise DatabaseError(
                f"{chosen} is in use by another cache: name the right database with --db."
            )
        return chosen
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return Path(f"{cache}.sqlite")
    try:
        return default_database(cache, Superblock.unpack(os.pread(fd, SUPERBLOCK_SIZE, 0)))
    except (SuperblockError, NotACacheError) as exc:
        if found := possible_databases(fd, cache, None):
            raise DatabaseError(
                f"{cache} cannot say which database is its own, because its superblock is damaged "
                f"or missing. It may be {one_of(found)}: "
                f"fusecache {verb} {named(cache, found[0].path)}"
            ) from exc
        return None


# -- check -----------------------------------------------------------------------------------------


@click.command(epilog="Example: fusecache check /dev/sdb")
@_argument
@_db
@click.pass_context
def check(context: click.Context, cache: Path, database: Path | None) -> None:
    """Say everything that is wrong with CACHE; change nothing.

    Exit code 1 if anything is. Data that is dirty is not wrong, and is counted.
    """
    with interruptible(_UNCHANGED), _inspected("check", cache, database) as (_, found, _line):
        for finding in found.findings:
            example = f" ({finding.example})" if finding.example else ""
            click.echo(f"{finding.count} x {finding.what}{example}")
        rows = found.rows()
        dirty = pages_in(rows.dirty & rows.valid) * _page_size(found)
        if dirty:
            click.echo(f"dirty, and only here: {format_size(dirty)}")
        if not found.findings:
            click.echo(f"{found.path}: nothing is wrong")
            return
        kinds = len(found.findings)
        click.echo(
            f"{found.path}: {kinds} kind{'s' * (kinds != 1)} of inconsistency. "
            f"To mend it: fusecache repair {_named(found)}"
        )
    context.exit(1)


def _named(found: Inspection) -> str:
    """The cache for a command line."""
    known = found.database != Path(os.devnull)
    return named(found.path, found.database if known else None)


def _page_size(found: Inspection) -> int:
    return 0 if found.geometry is None else found.geometry.page_size


# -- dump ------------------------------------------------------------------------------------------


@click.command(epilog="Example: fusecache dump /dev/sdb --json")
@_argument
@_db
@click.option("--json", "as_json", is_flag=True, help="Every block, as lines of JSON.")
def dump(cache: Path, database: Path | None, as_json: bool) -> None:
    """Show the block map of CACHE, as far as it can be read; change nothing.

    With --json: one line about the cache, one for each image, one for each cached block.
    """
    with interruptible(_UNCHANGED), _inspected("dump", cache, database) as (_, found, _line):
        rows = found.rows()
        images = list(_images(found, rows))
        header = _header(found, rows)
        if not as_json:
            _summary(header, images)
            return
        for line in (header, *images):
            click.echo(json.dumps(line))
        names = {image["image"]: image["path"] for image in images}
        for image, block, slot, valid, dirty in zip(*(c.tolist() for c in rows), strict=True):
            line = {"image": image, "block": block, "slot": slot, "valid": valid, "dirty": dirty}
            click.echo(json.dumps(line | {"path": names.get(image)}))


def _header(found: Inspection, rows: Rows) -> dict[str, Any]:
    meta = None if found.read is None else found.read.meta
    superblock = found.superblock
    origin = None if meta is None else os.fsdecode(meta.origin)
    return {
        "cache": readable(str(found.path))[0],
        "database": _database_name(found),
        "uuid": str(superblock.uuid) if superblock else meta.uuid if meta else None,
        "block_size": None if found.geometry is None else found.geometry.block_size,
        "slots_total": found.slot_count,
        "slots_used": int(rows.slot.size),
        "left": found.left,
        "origin": None if origin is None else readable(origin)[0],
        "fence": None if superblock is None else superblock.fence.name.lower(),
        "findings": [finding.what for finding in found.findings],
    }


def _database_name(found: Inspection) -> str | None:
    return None if found.database == Path(os.devnull) else readable(str(found.database))[0]


def _images(found: Inspection, rows: Rows) -> Iterator[dict[str, Any]]:
    page = _page_size(found)
    names = found.image_names()
    sound = {} if found.read is None else {image.id: image for image in found.read.images}
    for number in sorted(set(names) | set(rows.image.tolist())):
        mine = rows.where(rows.image == number)
        line: dict[str, Any] = {"image": number, "path": None}
        if number in names:
            line["path"], escaped = readable(os.fsdecode(names[number]))
            if escaped:
                line["path_escaped"] = True
        if (row := sound.get(number)) is not None:
            line |= {"size": row.size, "write_mode": row.write_mode or None}
        yield line | {
            "blocks": int(mine.slot.size),
            "cached_bytes": pages_in(mine.valid) * page,
            "dirty_bytes": pages_in(mine.dirty & mine.valid) * page,
            "lost_bytes": pages_in(mine.dirty & ~mine.valid) * page,
        }


def _summary(header: dict[str, Any], images: list[dict[str, Any]]) -> None:
    size = header["block_size"]
    blocks = "blocks of unknown size" if size is None else f"blocks of {format_size(size)}"
    click.echo(f"{header['cache']}: {header['slots_used']} of {header['slots_total']} {blocks}")
    click.echo(f"database {header['database'] or _UNKNOWN}, uuid {header['uuid'] or _UNKNOWN}")
    click.echo(f"origin {header['origin'] or _UNKNOWN}; {_LEFT[header['left']]}")
    for image in images:
        name = f"'{image['path']}'" if image["path"] is not None else "an unknown image"
        parts = [f"cached {format_size(image['cached_bytes'])}"]
        some = [what for what in ("dirty", "lost") if image[f"{what}_bytes"]]
        parts += [f"{what} {format_size(image[f'{what}_bytes'])}" for what in some]
        click.echo(f"image {image['image']} {name}: {', '.join(parts)}")
    for what in header["findings"]:
        click.echo(f"wrong: {what}")


# -- repair ----------------------------------------------------------------------------------------


@click.command(epilog="Example: fusecache repair /dev/sdb --yes")
@_argument
@_db
@click.option("--yes", is_flag=True, help="Do it. Without: only say what would be done.")
@click.pass_context
def repair(context: click.Context, cache: Path, database: Path | None, yes: bool) -> None:
    """Make a damaged CACHE usable again, and keep what is surely right.

    Says first which data, that the origin does not have, cannot be saved.
    """
    state = _UNCHANGED
    if yes:
        again = named(absolute(cache), None if database is None else absolute(database))
        state = f"go on with fusecache repair {again} --yes"
    with interruptible(state), _inspected("repair", cache, database) as (fd, found, line):
        made = mending.plan(found, fd)
        if not made.needed:
            click.echo(f"{found.path}: nothing is wrong, nothing to do")
            return
        if found.foreign and database is not None:
            raise CacheDeviceError(
                f"{found.database} belongs to another cache: name the right one with --db."
            )
        command = _named(found)
        if found.database == Path(os.devnull):
            found = replace(found, database=default_database(found.path, made.superblock))
        _tell(found, made)
        if yes:
            mending.carry_out(made, found, fd, partial(line.follow, "repair"))
            line.show("")
            usual = default_database(found.path, made.superblock)
            mount = "" if found.database == usual else f"; mount it with --db {found.database}"
            click.echo(f"{found.path}: repaired{mount}")
            return
        click.echo(f"Nothing was done. To do it: fusecache repair {command} --yes")
    context.exit(1)


def _tell(found: Inspection, made: Plan) -> None:
    """What cannot be saved, then what will be done."""
    for loss in made.losses:
        click.echo(f"cannot be saved: {describe(loss)}")
    for what in made.unnamed:
        click.echo(f"cannot be saved: {what}")
    if made.rows is not None and found.geometry is not None:
        dirty = pages_in(made.rows.dirty) * _page_size(found)
        if dirty:
            click.echo(f"kept, and dirty: {format_size(dirty)}")
    for step in made.steps:
        click.echo(f"to do: {step}")


def describe(loss: Loss) -> str:
    """One line: image, byte ranges, reason."""
    name = (
        f"image number {loss.image}, whose name is not known"
        if loss.path is None
        else f"'{readable(os.fsdecode(loss.path))[0]}'"
    )
    ranges = [f"{first}-{end - 1}" for first, end in loss.ranges]
    size = format_size(sum(end - first for first, end in loss.ranges))
    return f"{name}, {size} at bytes {', '.join(ranges)}: {loss.why}"
