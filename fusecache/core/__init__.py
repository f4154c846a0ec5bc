"""The pure part: no I/O, no clock, no trio, no SQLite, no logging. ``index`` is the only door."""
