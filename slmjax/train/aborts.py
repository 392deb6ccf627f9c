"""A one-line error message when JAX itself aborts this process because another one is gone.

When process 0 dies or a heartbeat is missing, a thread of JAX's coordination service calls `abort()`: no exception
reaches Python, and the service's callback for this (`missed_heartbeat_callback`) cannot be a Python function (jaxlib
0.10 to 0.12: `std::bad_cast`). But `abort()` raises SIGABRT in that thread, and a handler of this signal can print the
message before the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


@contextlib.contextmanager
def explained(message: str, code: int) -> Iterator[None]:
    """If a thread that Python did not start aborts the process inside the block, the process prints `message` on stderr
    and exits with `code`.

    An abort in one of Python's own threads is an error of the program itself, and stays a plain abort.
    """

    @_Handler
    def answer(_: int) -> None:
        if threading.get_native_id() in {thread.native_id for thread in threading.enumerate()}:
            return  # abort() goes on
        os.write(2, f"{message}\n".encode())  # not sys.stderr, which another thread may be holding
        os._exit(code)

    # Not signal.signal: its handlers run in the main thread, later, and abort() does not wait for them.
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = install(signal.SIGABRT, ctypes.cast(answer, ctypes.c_void_p))
    try:
        yield
    finally:
        install(signal.SIGABRT, before)
