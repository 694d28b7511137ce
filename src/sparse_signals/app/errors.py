"""What goes wrong at the command line, in one line."""

PROGRAM = "sparse-signals"


class UsageError(ValueError):
    """Bad usage or bad input; the message is one line and says what to do."""


class Stopped(KeyboardInterrupt):
    """The user stopped a run; the message says what is kept of it."""
