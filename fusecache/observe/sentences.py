"""Text for people that has names in it, which may be anything."""


def printable(text: str) -> str:
    """A name without what a terminal would take for a command."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def line(text: str) -> bytes:
    """A sentence as it goes to a terminal: one line, whatever the names in it are.

    Names need not be UTF-8, either; they must not turn an error into a traceback.
    """
    readable = text.encode("utf-8", "backslashreplace").decode()
    return printable(readable).encode() + b"\n"
