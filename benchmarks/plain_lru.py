"""A block cache in the plainest form: an OrderedDict of blocks, each a set of page numbers.

What ``replay.py`` is checked against. It shares no code with the core and knows nothing of slots,
masks or ticks; it follows these rules, which are what the documents promise:

- a block is an aligned piece of an image, a page an aligned piece of a block; a read hits if all
  pages that it touches are cached;
- a read that misses brings, of those blocks of which it lacks a page, all that were not cached
  when it began;
- a write-through makes the pages valid that it covers whole; those it touches in part stay as
  they were. A write-around forgets the pages it touches. A write-back makes every page it
  touches valid and dirty;
- the block that was used longest ago and has no dirty page leaves first. In one request the blocks
  that were there count as used before those that come;
- ``low`` > 0: room is made after a request that brought something, as soon as fewer than ``low``
  places are free, until ``high`` are; a block that finds no place is not cached. ``low`` 0: room
  is made for one block when it is needed.
"""

from collections import OrderedDict

Block = tuple[int, int]


class PlainLru:
    """Counts hits as ``replay.Replay`` does.

    Args:
        block: bytes of a block; page: bytes of a page; places: how many blocks fit.
        mode: ``through``, ``around`` or ``back``.
        most_dirty: in write-back, with so many dirty blocks new pages go through.
    """

    def __init__(
        self, block: int, page: int, places: int, mode: str, low: int, high: int, most_dirty: int
    ) -> None:
        self.block, self.page, self.places, self.mode = block, page, places, mode
        self.low, self.high, self.most_dirty = low, high, most_dirty
        self.cached: OrderedDict[Block, set[int]] = OrderedDict()
        self.dirty: dict[Block, set[int]] = {}
        self.hits = {"read": 0, "write": 0}
        """Requests all of whose pages were cached."""
        self.page_hits = {"read": 0, "write": 0}
        self.filled_pages = 0
        self.cleaned_pages = 0

    def request(self, volume: int, offset: int, length: int, *, write: bool) -> None:
        """One read or write of ``length`` > 0 bytes."""
        kind = "write" if write else "read"
        touched = self._touched(volume, offset, offset + length)
        there = {at: pages & self.cached.get(at, set()) for at, pages in touched.items()}
        self.page_hits[kind] += sum(len(pages) for pages in there.values())
        self.hits[kind] += there == touched
        if not write:
            self._read(touched)
        elif self.mode == "around":
            self._around(touched)
        else:
            self._write(touched, offset, offset + length)

    def _touched(self, volume: int, begin: int, end: int) -> dict[Block, set[int]]:
        found: dict[Block, set[int]] = {}
        for page in range(begin // self.page, (end - 1) // self.page + 1):
            found.setdefault((volume, page * self.page // self.block), set()).add(page)
        return found

    def _all_pages(self, at: Block) -> set[int]:
        first = at[1] * self.block // self.page
        return set(range(first, first + self.block // self.page))

    def _read(self, touched: dict[Block, set[int]]) -> None:
        lacking = {
            at: self._all_pages(at) - self.cached.get(at, set())
            for at, pages in touched.items()
            if not pages <= self.cached.get(at, set())
        }
        for at in touched:
            if at not in lacking:
                self.cached.move_to_end(at)
        for at, new in lacking.items():
            if self._put(at, new):
                self.filled_pages += len(new)
        if lacking:
            self._make_reserve()

    def _around(self, touched: dict[Block, set[int]]) -> None:
        for at, pages in touched.items():
            if at in self.cached:
                self.cached[at] -= pages
                if not self.cached[at]:
                    del self.cached[at]

    def _write(self, touched: dict[Block, set[int]], begin: int, end: int) -> None:
        back = self.mode == "back"
        soils = back and len(self.dirty) < self.most_dirty
        for at, pages in touched.items():
            held = pages if soils else pages & self.dirty.get(at, set())
            if held and self._put(at, held):
                self.dirty.setdefault(at, set()).update(held)
            else:
                held = set()
            whole = {
                page
                for page in pages - held
                if begin <= page * self.page and (page + 1) * self.page <= end
            }
            through = whole | ((pages - held) & self.cached.get(at, set()))
            if through:
                self._put(at, through)
        self._make_reserve()

    def _put(self, at: Block, pages: set[int]) -> bool:
        """The pages are cached and the block is the last used one; False: there is no place."""
        if at not in self.cached:
            if len(self.cached) >= self.places and (self.low or not self._leave()):
                return False
            self.cached[at] = set()
        self.cached[at] |= pages
        self.cached.move_to_end(at)
        return True

    def _leave(self) -> bool:
        for at in self.cached:
            if at not in self.dirty:
                del self.cached[at]
                return True
        return False

    def _make_reserve(self) -> None:
        if self.places - len(self.cached) < self.low:
            while self.places - len(self.cached) < self.high and self._leave():
                pass

    def clean(self) -> None:
        """All that is dirty goes back."""
        self.cleaned_pages += sum(len(pages) for pages in self.dirty.values())
        self.dirty.clear()
