"""The few errors that a user can cause, each with the exit code that the command line returns for it.

A message is one line: the field or file, what was found, what is allowed, and, where there is one, the command that
fixes it. Invariants of the program are `assert`s and never appear here.
"""


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ClipctlError(Exception):
    """Base of all user errors. Raised itself only where another process of the run met a bug."""

    exit_code = 1
    told = False
    """Another process of the run says it already."""


class SpecError(ClipctlError):
    """Wrong usage or an impossible run spec."""

    exit_code = 2


class DependencyError(ClipctlError):
    """A package or engine that the run needs is not installed."""

    exit_code = 3


class DataError(ClipctlError):
    """Data that is missing, empty, or has no usable answer."""

    exit_code = 4


class ModelError(ClipctlError):
    """A model that is missing, unreachable, or of a kind that cannot be trained exactly."""

    exit_code = 4


class DivergedError(ClipctlError):
    """The run met a loss, gradient or reward that is not finite."""

    exit_code = 5


class EngineError(ClipctlError):
    """Out of memory, or an engine that was lost and could not be brought back."""

    exit_code = 6


class StoreError(ClipctlError):
    """A damaged store, a folder that cannot be written, or a full disk."""

    exit_code = 7


class AlarmStop(ClipctlError):
    """An alarm that `run.stop_on` names ended the run; what was measured and the model are kept."""

    exit_code = 8


class SweepFailed(ClipctlError):
    """Some runs of a sweep failed; all others are finished."""

    exit_code = 9


class Interrupted(ClipctlError):
    """The user stopped the run by hand (Ctrl-C); what was measured is kept."""

    exit_code = 130


class Preempted(ClipctlError):
    """A signal or the end of a job's time interrupted the run; the same command goes on with it."""

    exit_code = 75
