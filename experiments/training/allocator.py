"""The C library's allocator."""

import ctypes

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_NEVER = 2**31 - 1
_TOP_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next allocation; tells whether it took effect.

    By default glibc returns freed activations to the operating system and gets them back, page by
    page, in the next step: tens of thousands of page faults a step. Other C libraries have no such
    settings and are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (
        AttributeError,
        OSError,
        TypeError,
    ):  # musl and macOS; Windows refuses CDLL(None)
        return False
    settings = {
        _M_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD,
        _M_TRIM_THRESHOLD: _NEVER,
        _M_TOP_PAD: _TOP_PAD,
    }
    taken = [mallopt(parameter, value) == 1 for parameter, value in settings.items()]
    return all(taken)


def page_faults() -> int:
    """How many pages this process has been given so far without reading from disk."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
