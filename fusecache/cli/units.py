"""``install-units``: systemd's unit, mount(8)'s helper, tmpfiles, the manual, what shells need for
completion, libvirt's hook: put in place."""

import os
import shutil
import sys
from pathlib import Path

import click

from fusecache.cli import completion, manual
from fusecache.cli.paths import absolute
from fusecache.errors import MountError, UsageError

_FILES = (
    ("fusecache@.service", "etc/systemd/system/fusecache@.service", 0o644),
    ("fusecache.tmpfiles", "etc/tmpfiles.d/fusecache.conf", 0o644),
    ("mount.fusecache", "sbin/mount.fusecache", 0o755),
)
_HOOK = (("hook", "etc/libvirt/hooks/qemu.d/fusecache", 0o755),)
_DIRECTORIES = (("etc/fusecache", 0o755),)
_COMPLETIONS = {
    "bash": "bash-completion/completions/fusecache",
    "zsh": "zsh/site-functions/_fusecache",
    "fish": "fish/vendor_completions.d/fusecache.fish",
}
"""Where each shell looks below a share directory."""
_BY_PATH = "/usr/bin/env fusecache"
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where systemd and mount(8) look for programs."""


@click.command("install-units", epilog="Example: fusecache install-units --root /tmp/package")
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/"),
    help="Install below this directory, for packages and tests. [/]",
)
@click.option(
    "--libvirt-hook",
    is_flag=True,
    help="Also the hook that evicts the disks of guests that have stopped, if they ask for it.",
)
def install_units(root: Path, libvirt_hook: bool) -> None:
    """Put the systemd unit, /sbin/mount.fusecache, the tmpfiles, the manual pages and the shells'
    completions in place.

    Says what to do next. Files of an earlier version are replaced; nothing is started.
    """
    files = [(_source("systemd", "systemd", _FILES), *file) for file in _FILES]
    if libvirt_hook:
        files += [(_source("docs/libvirt", "libvirt", _HOOK), *file) for file in _HOOK]
    here = absolute(root) == Path("/")
    program = _program() if here else _BY_PATH
    try:
        for name, mode in _DIRECTORIES:
            (root / name).mkdir(mode, parents=True, exist_ok=True)
        for source, name, place, mode in files:
            target = root / place
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, (source / name).read_text().replace(_BY_PATH, program), mode)
            click.echo(f"installed {target}")
        share = root / ("usr/local/share" if here else "usr/share")
        _write_all(share / "man/man8", manual.pages(_whole_program()))
        for shell in completion.SHELLS:
            file = share / _COMPLETIONS[shell]
            _write_all(file.parent, {file.name: completion.script(_whole_program(), shell)})
    except OSError as exc:
        hint = " Run it as root, or give --root." if isinstance(exc, PermissionError) else ""
        raise MountError(f"Cannot write {exc.filename}: {exc.strerror}.{hint}") from exc
    if here:
        _say_what_next(libvirt_hook)


def _write_all(directory: Path, texts: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        _write(directory / name, text, 0o644)
    names = next(iter(texts)) if len(texts) == 1 else f"{len(texts)} pages"
    click.echo(f"installed {directory}: {names}")


def _whole_program() -> click.Group:
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    return group


def _source(clone: str, share: str, files: tuple[tuple[str, str, int], ...]) -> Path:
    """Where the files lie: in the clone, or where the package was installed."""
    places = (
        Path(__file__).parents[2] / clone,
        Path(sys.prefix) / "share/fusecache" / share,
    )
    for place in places:
        if all((place / name).exists() for name, _, _ in files):
            return place
    raise UsageError(f"The files to install are in none of: {', '.join(map(str, places))}.")


def _program() -> str:
    """How the unit calls fusecache: by the path if it is on systemd's, else just this one."""
    if shutil.which("fusecache", path=_SYSTEM_PATH):
        return _BY_PATH
    beside = Path(sys.executable).with_name("fusecache")
    return str(beside) if beside.exists() else f"{sys.executable} -m fusecache"


def _write(target: Path, text: str, mode: int) -> None:
    """Whole or not at all; what reads it meanwhile sees the old one."""
    new = target.with_name(f".{target.name}.new")
    new.write_text(text)
    new.chmod(mode)
    os.replace(new, target)


def _say_what_next(libvirt_hook: bool) -> None:
    click.echo(
        "\nNext, for a mount called vms:\n"
        "  write /etc/fusecache/vms.toml with origin, mountpoint and cache\n"
        "  fusecache config check /etc/fusecache/vms.toml\n"
        "  systemd-tmpfiles --create fusecache.conf\n"
        "  systemctl daemon-reload\n"
        "  systemctl enable --now fusecache@vms\n"
        "or, in /etc/fstab:\n"
        "  /srv/images /mnt/cached fusecache cache=/dev/sdb,nofail,_netdev 0 0"
    )
    if libvirt_hook:
        click.echo(
            "\nlibvirt sees its first hook at its next start: systemctl restart libvirtd (or "
            "virtqemud); guests go on.\nThen, for each guest whose disks shall be evicted when it "
            "has stopped:\n"
            "  virsh metadata GUEST --config --uri urn:fusecache --key fusecache --set '<evict/>'"
        )
