"""``evict``, ``flush`` and ``set``: what is done to single images."""

import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from fusecache.cli import completion
from fusecache.cli.paths import absolute, mount_path
from fusecache.cli.progress import Progress, count_text, interruptible
from fusecache.config import WriteMode, format_size
from fusecache.control import client, protocol
from fusecache.control.client import Daemon
from fusecache.errors import ControlError, UsageError
from fusecache.observe import sentences

mount_option = click.option(
    "-m",
    "--mountpoint",
    type=Path,
    shell_complete=completion.running_mounts,
    help="Which mount is meant, if several run.",
)
_cache_options = (
    click.option(
        "--cache",
        type=Path,
        shell_complete=completion.files,
        help="A cache that no daemon has open.",
    ),
    click.option(
        "--db", type=Path, shell_complete=completion.files, help="With --cache: its database."
    ),
)


def _with_cache(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_cache_options):
        command = option(command)
    return command


@click.command(epilog="Example: fusecache evict vm2.img")
@click.argument("images", nargs=-1, metavar="IMAGE...", shell_complete=completion.images)
@click.option("--all", "everything", is_flag=True, help="Every image of the mount.")
@click.option(
    "--discard-dirty",
    is_flag=True,
    help="Throw away what the origin does not have, instead of writing it back.",
)
@mount_option
@_with_cache
def evict(
    images: tuple[str, ...],
    everything: bool,
    discard_dirty: bool,
    mountpoint: Path | None,
    cache: Path | None,
    db: Path | None,
) -> None:
    """Flush an image and drop its blocks alone, before its VM migrates.

    An image that is open goes on uncached until it is closed.
    """
    if bool(images) == everything:
        raise UsageError("Name the images to evict, or say --all.")
    request = {"verb": "evict", "discard_dirty": discard_dirty}
    with interruptible(
        "what was evicted by then stays evicted, everything else is served as before and nothing "
        "is lost. Evict again before a migration."
    ):
        answers = _work(request, images, mountpoint, cache, db)
    count, failed = _outcome(answers)
    if count or not failed:
        blocks = sum(answer["blocks"] for answer in answers)
        click.echo(f"evicted {count_text(count)}, {blocks} blocks")
    _fail(f"'{image['image']}' was not evicted: {_why(image, 'Evict')}" for image in failed)


@click.command(epilog="Example: fusecache flush vm2.img")
@click.argument("images", nargs=-1, metavar="[IMAGE...]", shell_complete=completion.images)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Also over what was changed elsewhere after the cache had stopped.",
)
@mount_option
@_with_cache
def flush(
    images: tuple[str, ...],
    overwrite: bool,
    mountpoint: Path | None,
    cache: Path | None,
    db: Path | None,
) -> None:
    """Bring everything written to the images, or to all, onto the origin's stable storage."""
    if overwrite and not images:
        raise UsageError("Name the images that --overwrite is meant for.")
    request = {"verb": "flush", "overwrite": overwrite}
    with interruptible("what is not on the origin yet stays on the cache; nothing is lost."):
        answers = _work(request, images, mountpoint, cache, db)
    count, failed = _outcome(answers)
    if count or not failed:
        click.echo(f"flushed {count_text(count)}")
    _fail(f"'{image['image']}' was not flushed: {_why(image, 'Flush')}" for image in failed)


@click.command("set", epilog="Example: fusecache set vm2.img --write-mode back")
@click.argument(
    "images", nargs=-1, required=True, metavar="IMAGE...", shell_complete=completion.images
)
@click.option(
    "--write-mode",
    type=click.Choice([*(mode.value for mode in WriteMode), "default"]),
    help="How the image's writes go from now on; default: as the mount's.",
)
@mount_option
def set_image(images: tuple[str, ...], write_mode: str | None, mountpoint: Path | None) -> None:
    """Give an image a write mode of its own, now and for every later mount of this cache.

    An image that leaves write-back is flushed.
    """
    if write_mode is None:
        raise UsageError("Say which: --write-mode through, around, back or default.")
    request = {"verb": "set", "write_mode": write_mode}
    with interruptible("see fusecache status for the images' write modes; nothing is lost."):
        answers = _for_images(request, images, mountpoint)
    count, failed = _outcome(answers)
    mode = "the mount's write mode" if write_mode == "default" else f"write-{write_mode}"
    if count:
        click.echo(f"{count_text(count)}: {mode}")
    _fail(f"'{image['image']}' is not in {mode} yet: {_why(image, 'Set')}" for image in failed)


def _outcome(answers: list[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """How many images it was done for, and those it was not, with names for people and for
    commands: with their whole paths, which mean the same from everywhere."""
    failed = []
    for answer in answers:
        for image in answer.get("failed", []):
            name = protocol.readable(image["image"])[0]
            whole = shlex.quote(os.path.join(answer["root"], name))
            where = answer.get("where", "")
            failed.append(
                {
                    **image,
                    "image": name,
                    "look": answer.get("look", f"fusecache status {whole}"),
                    "give_up": f"fusecache evict {whole}{where} --discard-dirty",
                    "overwrite": f"fusecache flush {whole}{where} --overwrite",
                }
            )
    return sum(answer["images"] for answer in answers), failed


def _why(image: dict[str, Any], again: str) -> str:
    """The reason, and what to do."""
    reason = str(image["error"]).rstrip(".")
    if reason.startswith(name := f"'{image['image']}' "):
        reason = f"it {reason.removeprefix(name)}"
    if image["lost"]:
        return (
            f"{reason}. Which bytes: {image['look']}. To give up all that the origin does not "
            f"have: {image['give_up']}"
        )
    if image.get("changed"):
        return (
            f"{reason} ({format_size(image['dirty_bytes'])}). To write that over the change: "
            f"{image['overwrite']}. To keep the change, and give that up: {image['give_up']}"
        )
    if image["dirty_bytes"]:
        return (
            f"{reason}. {format_size(image['dirty_bytes'])} of it stay on the cache until then. "
            f"{again} it again when the origin works, or give them up: {image['give_up']}"
        )
    return f"{reason}. {again} it again when that is mended."


def _fail(reasons: Iterable[str]) -> None:
    """Every failure in a line of its own, and exit code 1 if there is any."""
    failed = False
    for sentence in reasons:
        failed = True
        click.echo(sentences.line(f"fusecache: {sentence}"), err=True, nl=False)
    if failed:
        click.get_current_context().exit(1)


def _work(
    request: dict[str, Any],
    images: tuple[str, ...],
    mountpoint: Path | None,
    cache: Path | None,
    db: Path | None,
) -> list[dict[str, Any]]:
    """By the running daemons, or on a cache that none has open."""
    if cache is None:
        if db is not None:
            raise UsageError("--db goes with --cache, for a cache that no daemon has open.")
        return _for_images(request, images, mountpoint)
    if mountpoint is not None:
        raise UsageError(
            "Say -m for a cache that is mounted, or --cache for one that no daemon has open."
        )
    from fusecache.cli import offline  # numpy and SQLite take their time to load

    database = None if db is None else absolute(db)
    if request["verb"] == "flush":
        overwrite = bool(request["overwrite"])
        answer = offline.flush(absolute(cache), database, images, overwrite=overwrite)
    else:
        discard = bool(request["discard_dirty"])
        answer = offline.evict(absolute(cache), database, images, discard_dirty=discard)
    more = "" if database is None else f" --db {shlex.quote(str(database))}"
    place = f"{shlex.quote(str(absolute(cache)))}{more}"
    return [{**answer, "where": f" --cache {place}", "look": f"fusecache check {place}"}]


def _for_images(
    request: dict[str, Any], images: tuple[str, ...], mountpoint: Path | None
) -> list[dict[str, Any]]:
    """Sends a request to the daemons that have the images, with progress on a terminal."""
    running, silent = client.choose(None if mountpoint is None else mount_path(mountpoint))
    work: dict[Daemon, list[str]] = {}
    for name in images:
        daemon, path = client.locate(name, running, silent)
        work.setdefault(daemon, []).append(path)
    if not images:
        client.refuse(silent)
        if len(running) > 1:
            places = ", ".join(str(daemon.mountpoint) for daemon in running)
            raise ControlError(f"There are several mounts ({places}): choose one with -m.")
        work = {running[0]: []}
    with Progress() as line:
        of = 0

        def progress(news: dict[str, Any]) -> None:
            nonlocal of
            of = max(of, news["left"])
            more = f" ({news['done']} of {count_text(news['of'])})"
            line.write_back(request["verb"], news["left"], of, more)

        answers = []
        for daemon, paths in work.items():
            wanted = {**request, "images": paths}
            answer = client.ask(daemon.socket_path, wanted, progress=progress)
            answers.append({**answer, "root": str(daemon.mountpoint)})
        return answers
