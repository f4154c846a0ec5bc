"""Names: images that are found elsewhere from now on."""

import logging

from fusecache.core.index import CacheIndex
from fusecache.engine.committer import Committer
from fusecache.engine.image import Image
from fusecache.engine.images import Images
from fusecache.errors import DatabaseError

log = logging.getLogger(__name__)


class Names:
    """Keeps the path of every known image true, which dirty data is brought to."""

    def __init__(self, core: CacheIndex, images: Images, committer: Committer) -> None:
        self._core = core
        self._images = images
        self._committer = committer

    async def moved(self, identity: bytes, path: bytes) -> None:
        """The image has a new name: that is where its dirty data will be brought, also by the
        successor of a killed daemon."""
        image = self._images.find(identity)
        if image is None or image.row.path == path:
            return
        self._move(image, path)
        if self._core.dirty.pages(image.id):
            await self._commit_names()

    async def moved_below(self, directories: dict[bytes, bytes]) -> None:
        """As ``moved``, of every image in directories that have new names: old name to new."""
        dirty = False
        for image in self._images.all():
            for before, after in directories.items():
                if image.row.path.startswith(before + b"/"):
                    self._move(image, after + image.row.path[len(before) :])
                    dirty = dirty or self._core.dirty.pages(image.id) > 0
                    break
        if dirty:
            await self._commit_names()

    def _move(self, image: Image, path: bytes) -> None:
        image.row.path = path
        image.row_owed = image.row_owed or image.row.recorded_ns != 0

    async def _commit_names(self) -> None:
        try:
            await self._committer.commit_owed()
        except DatabaseError:
            log.debug("new names are not recorded: the cache is unusable")
