"""``python -m fusecache`` is the ``fusecache`` command, and this is its entry point."""

import signal


def main() -> None:
    """Runs the command line. An interrupt that comes while it is still being loaded ends the
    process like any other's; from then on the verbs deal with it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        from fusecache.cli.main import main as run

        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        from fusecache.cli.main import main as run
    run()


if __name__ == "__main__":
    main()
