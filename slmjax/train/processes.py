"""Which processes train together: how they meet, and how they part so that none waits for one that is gone.

A process that fails tells the others through the key-value store of JAX's coordination service (it lives in process 0)
and leaves by `os._exit`: a clean shutdown would wait for the others, which wait for it in a collective. A process that
dies without a word (SIGKILL, a lost node) is noticed by the collective that breaks, at once with gloo, or by its
heartbeat, when JAX itself aborts the others: see `aborts`.
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
"""The key under which the first process that fails says why"""
POLL = 0.5
"""Seconds between two looks at it"""
GRACE = 10.0
"""Seconds that process 0 has to close its records once another has failed"""
BROKEN = ("Gloo", "NCCL", "coordination", "Coordination", "closed by peer", "reset by peer", "Broken pipe")
"""What the errors of a broken collective have in common: their types do not tell"""


@dataclass(frozen=True, kw_only=True)
class Local:
    """One process, with every device that it sees."""

    def join(self) -> None:
        """Nothing to join."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes that SLURM, Open MPI, GKE or a TPU pod has started: JAX finds out by itself how many and which."""

    timeout: int = 300
    """Seconds in which all of them must have started"""
    heartbeat: int = 30
    """Seconds of silence after which a process counts as dead, and the others end"""

    def join(self) -> None:
        """
        Raises:
            UserError: no cluster is found.
        """
        with _in_time(self.timeout, "the cluster's processes"):
            try:
                _initialize(self.timeout, self.heartbeat)
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"runtime.distributed is cluster, but JAX finds none here ({_first_line(error)}); start the "
                    "command with srun, mpirun or on each host of a TPU pod, or use --runtime.distributed processes"
                ) from error


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Processes started by hand, each with its own index."""

    coordinator: str
    """host:port of process 0, the same for all: an address that all reach, and a port that is free there"""
    count: int
    """Processes together"""
    index: int
    """Of this process, from 0"""
    timeout: int = 300
    """Seconds in which all of them must have started"""
    heartbeat: int = 30
    """Seconds of silence after which a process counts as dead, and the others end"""

    def join(self) -> None:
        """
        Raises:
            UserError: count and index do not fit, or the coordinator's address means nothing here.
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


def _initialize(timeout: int, heartbeat: int, **given: Any) -> None:
    """
    Raises:
        UserError: the experiment's file has computed something already.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # the loop agrees on signals by itself
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=timeout + 30,  # JAX's own limit aborts with a stack trace: ours comes first
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=120,
        )
    except RuntimeError as error:
        if "before" not in str(error):
            raise
        raise UserError(
            "the experiment's file computes with JAX while it is read, before the processes have met; "
            "move that into a function"
        ) from error


@contextlib.contextmanager
def _in_time(seconds: int, who: str) -> Iterator[None]:
    """Ends this process in one line if what is inside takes longer: it cannot be interrupted."""

    def give_up() -> None:
        error = UserError(
            f"{who} did not meet the others within {seconds} s; check that each of them runs with the same "
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
    """Joins the other processes for what is inside, and parts from them.

    What all of them raise alike at the same step (`Preempted`, `Diverged`) goes on upwards. Any other failure of one
    ends this process, and within seconds the others, each in one line and with the exit code of the first failure.

    Raises:
        UserError: they cannot meet.
    """
    distributed.join()
    if jax.process_count() == 1:
        yield
        return
    gone = _gone("JAX has ended this one, for the reason above")
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
    """The JSON value that process 0 gives, in every process; all of them must call it."""
    if jax.process_count() == 1:
        return value
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(mine.size)))
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(mine, size))))


def _client() -> Any:
    """JAX's connection to the coordination service: it has no public name, and all its users go there."""
    from jax._src import distributed

    return distributed.global_state.client


class _Watch:
    """Looks, in a thread, whether another process has failed."""

    def __init__(self, client: Any, leave: Callable[[str, int], None] | None = None):
        self.client, self.index = client, jax.process_index()
        self.heard = threading.Event()
        self.reason: dict[str, Any] = {}
        self._exit = leave or _exit
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="processes", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def leave(self, error: BaseException) -> None:
        """Ends the process: with the failure of another one if there is one, else with its own, of which it tells."""
        if _lost(error):  # that may be how the failure of another one shows first
            self.heard.wait(2 * POLL + 0.5)
        if self.heard.is_set():
            self._exit(*self._said())
        self._stopped.set()
        if _lost(error):
            gone = _gone(_first_line(_lost(error) or error))
            self._exit(str(gone), gone.code)
        code = int(getattr(error, "code", 130 if isinstance(error, KeyboardInterrupt) else 1) or 0)
        said = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, UserError | KeyboardInterrupt):
            traceback.print_exception(error)
            said = f"{type(error).__name__}: {said}"
        with contextlib.suppress(Exception):  # another one was first, or the service is gone
            self.client.key_value_set(FAILED, json.dumps({"process": self.index, "said": said, "code": code}))
        if self.index == 0:  # the service lives here
            time.sleep(4 * POLL)
        self._exit(said, code)

    def _work(self) -> None:
        while not self._stopped.wait(POLL):
            try:
                found = self.client.key_value_try_get(FAILED)
            except Exception:  # not there, which is the rule; or the service is gone, which JAX deals with
                continue
            self.reason = json.loads(found)
            if self.reason["process"] == self.index:
                return
            self.heard.set()
            if self.index == 0:
                time.sleep(GRACE)
            self._exit(*self._said())

    def _said(self) -> tuple[str, int]:
        return f"process {self.reason['process']} failed: {self.reason['said']}", int(self.reason["code"])


def _lost(error: BaseException | None) -> BaseException | None:
    """The broken collective among the causes of an error."""
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


def _exit(said: str, code: int) -> None:
    """At once: nothing is waited for, since what would be waited for may be gone."""
    print(f"slmjax: error: {said}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
