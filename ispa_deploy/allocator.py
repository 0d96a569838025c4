"""Memory that was freed and should leave the process: the C library keeps it otherwise."""

from __future__ import annotations

import ctypes
import platform
import sys


def give_back() -> bool:
    """Hand freed pages back to the system; True if some were. Only glibc keeps them, and only it can be asked.

    For moments when much has been freed for good, as at the transition: some milliseconds, and what is allocated next
    is mapped anew.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).malloc_trim(0))
