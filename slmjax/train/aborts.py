"""What is said when JAX itself ends this process because another one is gone.

Where process 0 dies, or a heartbeat stays away, a thread of JAX's coordination service calls `abort()`: no exception
reaches Python, and its callback for this (`missed_heartbeat_callback`) cannot be called from Python (jaxlib 0.10 to
0.12: `std::bad_cast`). But the signal that `abort()` raises, in that very thread and not in the midst of anything else,
can be answered before the process ends.
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
def explained(said: str, code: int) -> Iterator[None]:
    """Ends this process with `said` on stderr and with `code`, should a thread that is not Python's abort it inside.

    An abort of one of Python's own threads is a mistake of the program itself, and goes its way.
    """

    @_Handler
    def answer(_: int) -> None:
        if threading.get_native_id() in {thread.native_id for thread in threading.enumerate()}:
            return  # abort() goes on
        os.write(2, f"{said}\n".encode())  # not sys.stderr, which another thread may be holding
        os._exit(code)

    # Not signal.signal: its handlers wait for the main thread, and abort() waits for nobody.
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = install(signal.SIGABRT, ctypes.cast(answer, ctypes.c_void_p))
    try:
        yield
    finally:
        install(signal.SIGABRT, before)
