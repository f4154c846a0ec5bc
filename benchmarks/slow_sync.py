"""fusecache on an SSD whose sync takes longer: ``slow_sync.py MILLISECONDS fusecache's words...``.

A disk that is a file on another disk may sync in 0.1 ms, which is less than the way of one request
through the interpreter: then there is nothing to share. Many SSDs without a power-safe write cache
take 0.5 to 2 ms. Run by ``writes.py``.
"""

import os
import sys
import time

from fusecache.__main__ import main
from fusecache.store.cache_device import CacheDevice

_sync = CacheDevice.sync


def _late(device: CacheDevice) -> None:
    time.sleep(float(os.environ["SLOW_SYNC_MS"]) / 1e3)
    _sync(device)


if __name__ == "__main__":
    os.environ["SLOW_SYNC_MS"] = sys.argv.pop(1)
    CacheDevice.sync = _late  # type: ignore[assignment,method-assign]  # on purpose
    main()
