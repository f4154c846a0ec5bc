"""``libvirt-hook``: what libvirt's hook runs when a guest has stopped; see docs/libvirt.md.

libvirt hands the guest's XML on standard input. Nothing here calls libvirt, which may be waiting.
"""

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

import click

from fusecache.control import client
from fusecache.control.protocol import make_runtime_directory, readable
from fusecache.errors import ControlError, UsageError
from fusecache.observe import logs

log = logging.getLogger("fusecache.libvirt")

NAMESPACE = "urn:fusecache"
_LARGEST = 16 << 20
_CLOSING = 5.0
"""Seconds in which the kernel tells of the end of a process's handles."""


@dataclass(frozen=True, slots=True)
class Guest:
    """What a domain's XML says of interest here."""

    name: str
    wants_eviction: bool
    disks: tuple[str, ...]
    """Paths of the image files that the guest alone writes."""


def parse(xml: bytes) -> Guest:
    """Reads the XML of a domain.

    Disks that are read-only or shared with other guests, and what an overlay lies upon, are left
    out: others may read them from the cache.

    Raises:
        UsageError: it is no domain.
    """
    try:
        domain = ElementTree.fromstring(xml)
    except ElementTree.ParseError as exc:
        raise UsageError(f"The guest's XML on standard input cannot be read: {exc}.") from exc
    if domain.tag != "domain":
        raise UsageError("Standard input is not the XML of a libvirt domain.")
    return Guest(
        domain.findtext("name", ""),
        domain.find(f"metadata/{{{NAMESPACE}}}evict") is not None,
        tuple(_disks(domain)),
    )


def _disks(domain: ElementTree.Element) -> Iterator[str]:
    for disk in domain.iterfind("devices/disk"):
        source = disk.find("source")
        if source is None or disk.find("readonly") is not None:
            continue
        if disk.find("shareable") is None and source.get("file"):
            yield source.attrib["file"]


@click.command("libvirt-hook", hidden=True)
def libvirt_hook() -> None:
    """Evict the disks of the guest whose XML is on standard input, if its metadata asks for it."""
    guest = parse(sys.stdin.buffer.read(_LARGEST))
    if not guest.wants_eviction:
        return
    logs.to_system("info", make_runtime_directory())
    try:
        for path in guest.disks:
            _evict(guest.name, path)
    except Exception:
        log.exception("the disks of guest %s were not evicted", guest.name)
        raise
    finally:
        logging.shutdown()


def _evict(guest: str, path: str) -> None:
    """One image, and one line in the log."""
    about = logs.fields("guest-stopped", guest=guest, image=readable(path)[0])
    try:
        daemon, image = client.locate(path, *client.choose(None))
    except ControlError as exc:
        log.warning("the guest has stopped; its disk is not evicted: %s", exc, extra=about)
        return
    request = {"verb": "evict", "images": [image], "only_closed": True}
    until = time.monotonic() + _CLOSING
    while True:
        try:
            answer = client.ask(daemon.socket_path, request)
        except ControlError as exc:
            log.error("the guest has stopped; its disk is not evicted: %s", exc, extra=about)
            return
        failed = answer["failed"][0] if answer["failed"] else None
        if failed is None:
            log.info(
                "the guest has stopped; its disk is evicted, %d blocks",
                answer["blocks"],
                extra=about,
            )
            return
        if failed["open"] and time.monotonic() < until:
            time.sleep(0.2)
            continue
        if failed["open"]:
            log.info("the guest's disk is open again and stays cached", extra=about)
        else:
            log.error("the disk is not evicted: %s", failed["error"], extra=about)
        return
