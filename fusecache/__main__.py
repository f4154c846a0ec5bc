"""``python -m fusecache`` is the ``fusecache`` command."""

from fusecache.cli.main import main

main()
