"""Where core and store meet, under trio. ``block_cache.BlockCache`` is the door."""
