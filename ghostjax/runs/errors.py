"""The errors of runs. The message of either is one line and says why."""


class UsageError(ValueError):
    """The caller's options or files cannot be used."""


class TerminatedError(KeyboardInterrupt):
    """The process is to end, as SIGTERM says: like Ctrl-C, but for the exit code."""


class StoppedError(RuntimeError):
    """Training cannot go on: what follows would mean nothing."""
