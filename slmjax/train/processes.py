"""Runs of several processes: how they connect, and how all of them end when one fails, so that none waits for ever.

A process that fails writes its error to the key-value store of JAX's coordination service (which runs in process 0) and
ends by `os._exit`: a clean shutdown would wait for the other processes, which wait for this one in a collective. A
process that dies without that (SIGKILL, a lost node) makes a collective of the others fail, at once with gloo, or
misses its heartbeat, whereupon JAX itself aborts the others: see `aborts`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from slmjax.errors import Diverged, Lost, Preempted, UserError
from slmjax.train import aborts

FAILED = "slmjax/failed"
"""The key under which the first process that fails writes its error"""
POLL = 0.5
"""Seconds between two reads of that key"""
GRACE = 10.0
"""Seconds that process 0 has to finish its tracking and logs once another process has failed"""
BROKEN = ("Gloo", "NCCL", "coordination", "Coordination", "closed by peer", "reset by peer", "Broken pipe")
"""Words by which the messages of broken collectives are recognised, since their exception types are not specific"""


@dataclass(frozen=True, kw_only=True)
class Local:
    """One process, with all devices of this machine that it can use."""

    def join(self) -> None:
        """Does nothing: there is no other process."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Processes started by SLURM, Open MPI, GKE or on a TPU pod: JAX detects their number and this one's index."""

    timeout: int = 300
    """Seconds in which all of them must have started"""
    heartbeat: int = 30
    """Seconds of silence after which a process counts as dead, and the others end"""

    def join(self) -> None:
        """Connects to the other processes.

        Raises:
            UserError: JAX detects no cluster.
        """
        with _in_time(self.timeout, "the cluster's processes"):
            try:
                _initialize(self.timeout, self.heartbeat)
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"runtime.distributed is cluster, but JAX detects none here ({_first_line(error)}); start the "
                    "command with srun, mpirun or on each host of a TPU pod, or use --runtime.distributed processes"
                ) from error


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Processes started by hand, each with its own index."""

    coordinator: str
    """host:port of process 0, the same for all: an address that all processes can reach, and a free port there"""
    count: int
    """Number of processes"""
    index: int
    """Index of this process, from 0"""
    timeout: int = 300
    """Seconds in which all of them must have started"""
    heartbeat: int = 30
    """Seconds of silence after which a process counts as dead, and the others end"""

    def join(self) -> None:
        """Connects to the other processes.

        Raises:
            UserError: the index is not below the count, or the coordinator's address is invalid or unknown.
        """
        if self.count < 1 or not 0 <= self.index < self.count:
            raise UserError(
                f"runtime.distributed has index {self.index} and count {self.count}; expected a count of at least 1 "
                "and an index from 0 to count - 1, another one for each process"
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(
                f"runtime.distributed.coordinator is {self.coordinator!r}; expected host:port, such as 10.0.0.1:1234"
            )
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
        except OSError as error:
            raise UserError(
                f"runtime.distributed.coordinator is {self.coordinator!r}, whose host is unknown here "
                f"({error.strerror}); give an address of process 0's machine"
            ) from None
        with _in_time(self.timeout, f"process {self.index} of {self.count}, with coordinator {self.coordinator},"):
            try:
                _initialize(
                    self.timeout,
                    self.heartbeat,
                    coordinator_address=self.coordinator,
                    num_processes=self.count,
                    process_id=self.index,
                    cluster_detection_method="deactivate",
                )
            except (ValueError, RuntimeError) as error:
                raise UserError(
                    f"runtime.distributed: process {self.index} cannot use coordinator {self.coordinator} "
                    f"({_first_line(error)}); choose another port"
                ) from error


Distributed = Local | Cluster | Processes


def _initialize(timeout: int, heartbeat: int, **options: Any) -> None:
    """`jax.distributed.initialize` with these options.

    Raises:
        UserError: the experiment's file has computed with JAX already.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # the training loop handles signals (consensus.py)
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=timeout + 30,  # JAX's limit aborts with a stack trace: `_in_time` must come first
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=120,
        )
    except RuntimeError as error:
        if "before" not in str(error):
            raise
        raise UserError(
            "the experiment's file computes with JAX while it is imported, before the processes are connected; "
            "move that computation into a function"
        ) from error


@contextlib.contextmanager
def _in_time(seconds: int, who: str) -> Iterator[None]:
    """Ends this process with a one-line message if the block takes longer, since it cannot be interrupted.

    Args:
        who: subject of the message.
    """

    def give_up() -> None:
        error = UserError(
            f"{who} did not connect to the others within {seconds} s; check that each of them runs with the same "
            "coordinator and count and its own index, and that no firewall is between them "
            "(--runtime.distributed.timeout waits longer)"
        )
        _exit(str(error), error.code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def together(distributed: Distributed) -> Iterator[None]:
    """Connects to the other processes before the block, and disconnects after it.

    `Preempted` and `Diverged`, which all processes raise at the same step, are passed on. Any other exception ends this
    process, and within seconds the others, each with a one-line message and the exit code of the first failure.

    Raises:
        UserError: the processes cannot connect.
    """
    distributed.join()
    if jax.process_count() == 1:
        yield
        return
    gone = _gone("JAX has ended this process, for the reason above")
    with aborts.explained(f"slmjax: error: {gone}", gone.code):
        watch = _Watch(_client())
        try:
            yield
        except (Preempted, Diverged):
            watch.stop()
            jax.distributed.shutdown()
            raise
        except BaseException as error:
            watch.leave(error)
        else:
            watch.stop()
            jax.distributed.shutdown()


def barrier(name: str) -> None:
    """Returns once every process has called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_the_first(value: Any) -> Any:
    """Returns process 0's value (JSON) in every process; all of them must call it."""
    if jax.process_count() == 1:
        return value
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(encoded.size)))
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(encoded, size))))


def _client() -> Any:
    """JAX's client of the coordination service, which has no public name in JAX."""
    from jax._src import distributed

    return distributed.global_state.client


class _Watch:
    """A thread that ends this process when another one has failed."""

    def __init__(self, client: Any, leave: Callable[[str, int], None] | None = None):
        self.client, self.index = client, jax.process_index()
        self.other_failed = threading.Event()
        self.failure: dict[str, Any] = {}
        self._exit = leave or _exit
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="processes", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def leave(self, error: BaseException) -> None:
        """Ends this process: with the failure of another one if there is one, else with its own error, which it writes
        to the key-value store for the others."""
        if _lost(error):  # a broken collective may be the first sign that another process has failed
            self.other_failed.wait(2 * POLL + 0.5)
        if self.other_failed.is_set():
            self._exit(*self._failure_of_other())
        self._stopped.set()
        if _lost(error):
            gone = _gone(_first_line(_lost(error) or error))
            self._exit(str(gone), gone.code)
        code = int(getattr(error, "code", 130 if isinstance(error, KeyboardInterrupt) else 1) or 0)
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, UserError | KeyboardInterrupt):
            traceback.print_exception(error)
            message = f"{type(error).__name__}: {message}"
        failure = {"process": self.index, "message": message, "code": code}
        with contextlib.suppress(Exception):  # another process has written its failure first, or the service is gone
            self.client.key_value_set(FAILED, json.dumps(failure))
        if self.index == 0:  # the service runs in this process: the others need time to read the failure
            time.sleep(4 * POLL)
        self._exit(message, code)

    def _work(self) -> None:
        while not self._stopped.wait(POLL):
            try:
                written = self.client.key_value_try_get(FAILED)
            except Exception:  # no process has failed, as usual; or the service is gone, which JAX handles
                continue
            self.failure = json.loads(written)
            if self.failure["process"] == self.index:
                return
            self.other_failed.set()
            if self.index == 0:
                time.sleep(GRACE)
            self._exit(*self._failure_of_other())

    def _failure_of_other(self) -> tuple[str, int]:
        return f"process {self.failure['process']} failed: {self.failure['message']}", int(self.failure["code"])


def _lost(error: BaseException | None) -> BaseException | None:
    """The first exception among an error and its causes that reports a broken collective; None if there is none."""
    while error is not None:
        if not isinstance(error, UserError) and any(word in str(error) for word in BROKEN):
            return error
        error = error.__cause__ or error.__context__
    return None


def _gone(why: str) -> Lost:
    return Lost(
        f"lost another process, which died or hangs ({why}); look at the logs of the others, then start all of them "
        "again: they go on from the last checkpoint"
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _exit(message: str, code: int) -> None:
    """Ends this process at once: a clean shutdown would wait for processes that may be gone."""
    print(f"slmjax: error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
