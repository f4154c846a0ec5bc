"""Fixtures of the end-to-end tests: several mounts, and a cache that has served."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.faulty import FaultyMount
from tests.e2e.helpers import processes_of
from tests.e2e.users import User
from tests.support.daemon import BLOCK, Mount, cleaned_up, end
from tests.support.stamps import check_stamps, stamped

MakeMount = Callable[[str], Mount]
MakeFaulty = Callable[[str], FaultyMount]


@pytest.fixture
def make_mount(tmp_path: Path) -> Iterator[MakeMount]:
    """Mounts by name, none started, all with one runtime directory; cleaned up in the end."""
    with contextlib.ExitStack() as stack:

        def make(name: str) -> Mount:
            mount = Mount(tmp_path / name)
            mount.runtime = tmp_path / "run"
            mount.runtime.mkdir(exist_ok=True)
            return stack.enter_context(cleaned_up(mount))

        yield make


@pytest.fixture
def make_faulty(tmp_path: Path) -> Iterator[MakeFaulty]:
    """Mounts by name whose origin can misbehave, none started; cleaned up in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(cleaned_up(FaultyMount(tmp_path / name)))


@pytest.fixture
def served(mount: Mount) -> Mount:
    """A cache that has served two images of 8 blocks and was stopped cleanly."""
    for number in (1, 2):
        image = mount.origin / f"vm{number}.img"
        image.write_bytes(stamped(number, 0, 8 * BLOCK, 1))
    mount.start()
    for number in (1, 2):
        data = (mount.mountpoint / f"vm{number}.img").read_bytes()
        check_stamps(data, number, 0)
    mount.stop()
    return mount


@pytest.fixture(scope="module")
def nonsense_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One mount for many requests that make no sense."""
    with cleaned_up(Mount(tmp_path_factory.mktemp("nonsense"))) as mount:
        yield mount.start()


@pytest.fixture
def user() -> Iterator[User]:
    """A user's directories; outside pytest's own, which are closed to others."""
    base = Path(tempfile.mkdtemp(prefix="fusecache-user-"))
    try:
        yield User(base)
    finally:
        for pid in processes_of(base):
            end(pid)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(base)
