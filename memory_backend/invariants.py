"""Invariants that users can ask for: they are checked under `python -O` too, which drops every assert."""


class InvariantError(AssertionError):
    """The state contradicts itself: a bug, or memory that somebody else has written to."""


def require(holds: object, what: object) -> None:
    """Raise InvariantError, which says `what`, unless it `holds`."""
    if not holds:
        raise InvariantError(what)
