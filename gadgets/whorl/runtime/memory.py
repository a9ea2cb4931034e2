"""Memory of a process that lives long."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_free_memory() -> None:
    """Give memory that is free back to the system; some milliseconds. Without glibc nothing is done.

    glibc takes arrays from the heaps of the threads once a larger one was freed, and keeps the gaps between
    those that are left. Arrays that always come from the system (a fixed `M_MMAP_THRESHOLD`) leave no gaps,
    but make the fit of the INR half as slow again.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
