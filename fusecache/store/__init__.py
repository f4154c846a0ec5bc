"""Blocking I/O and nothing else: no trio, no decisions. SQLite stops at ``block_map``."""
