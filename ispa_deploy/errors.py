"""The two ways a command can end badly, and nothing else.

`InputError` is the user's to mend: one line that says what was given, what was expected and what to do.
`RunError` is ours or the machine's: the input was fine, the run could not be finished.
"""

from __future__ import annotations


class IspaError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is what the CLI ends with."""

    exit_code = 1


class InputError(IspaError, ValueError):
    """Something the user gave cannot be used. The message is one line: given, expected, what to do."""

    exit_code = 2


class RunError(IspaError, RuntimeError):
    """The input was fine and the run failed all the same (a solver, a kernel, a full disk)."""


def known_names(kind: str, given: str, known: object) -> InputError:
    """The error for a name that is not in a table: exact look-up, a miss lists what is there."""
    names = ", ".join(sorted(str(name) for name in known))  # type: ignore[attr-defined]
    return InputError(f"unknown {kind} '{given}': expected one of {names}")


def reason_of(error: Exception, nothing: str) -> str:
    """Why a file cannot be read, in the system's or a library's words; `nothing` where it lacks what was asked."""
    if isinstance(error, (IndexError, StopIteration)):
        return nothing
    return (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
