"""Text of others in messages of ours: one line, of bounded length."""

LONGEST = 400  # characters


def in_one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return _cut(" ".join(str(error).split()) or type(error).__name__)


def shown(value: object) -> str:
    """A value as Python writes it."""
    return _cut(repr(value))


def file_name(name: str) -> str:
    """The name of a file of others: as it is, or as Python writes it if it would not print as one line."""
    return _cut(name) if name.isprintable() else shown(name)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
