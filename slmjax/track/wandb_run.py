"""Weights & Biases, such that its failures never stop training.

All calls are made by one background thread. Online with an API key, offline without; where the server cannot be reached
or the key is refused, it reports that and goes on offline (`wandb sync` uploads later). The run's id lies in the run
folder and in each checkpoint, so a resumed run continues the same W&B run. Steps are logged as `global_step`, which
every chart uses as its axis: W&B drops rows below its own last step, and after a resume there are some.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import queue
import secrets
import threading
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from slmjax.track.environment import redact_json
from slmjax.track.tracker import Tracker

Mode = Literal["auto", "online", "offline", "disabled"]

MAX_WAITING = 100_000
"""Calls that may wait for a slow W&B; further ones are dropped, which is reported once"""


class Server:
    """What the W&B runs of a process know of the server. They open one after the other, and once it has not answered
    they all go on offline: giving up on it ends W&B's own service, which they share."""

    def __init__(self):
        self.opening = threading.Lock()
        self.silent = False


class WandbRun(Tracker):
    """The tracker that writes to W&B."""

    def __init__(
        self,
        folder: str | Path,
        *,
        mode: Mode = "auto",
        project: str = "slmjax",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        summary: Mapping[str, Any] | None = None,
        artifacts: bool = False,
        start_timeout: float = 30.0,
        finish_timeout: float = 60.0,
        say: Callable[[str], None] = print,
        server: Server | None = None,
    ):
        """Returns at once; W&B starts at the first call of `resume` or `log`.

        Args:
            folder: the run folder; W&B's files go to `wandb/` in it.
            mode: "auto" follows WANDB_MODE, else is online with an API key and offline without.
            config: JSON; secrets are taken out.
            summary: what is shown beside the run's name, with the last value of each metric.
            artifacts: whether `artifact` records checkpoints and exports, as references to where they lie.
            start_timeout: seconds that its server gets to answer, before it goes on offline.
            finish_timeout: seconds that W&B gets to upload what is left; `wandb sync` does it later.
            server: shared by the runs that are open in this process at the same time; None: there is one.
        """
        self.folder = Path(folder)
        self.mode = resolve(mode)
        if mode == "online" and self.mode == "offline":
            say("W&B is offline: there is no API key; set WANDB_API_KEY or run `wandb login`, and `wandb sync` later")
        # An agent of a W&B sweep has made the run already, and names it to the one run of its process.
        named = os.environ.get("WANDB_RUN_ID", "") if server is None else ""
        self.id = _read_id(self.folder) or named or _new_id()
        self._init = {"project": project, "entity": entity, "group": group, "tags": list(tags), "name": name}
        self._config = redact_json(dict(config or {}))
        self._summary, self._artifacts, self._say = dict(summary or {}), artifacts, say
        self._shared, self._server = server is not None, server or Server()
        self._start_timeout, self._finish_timeout = start_timeout, finish_timeout
        self._calls: queue.Queue[Callable[[Any], None] | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._dropped = False

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes the run id of a checkpoint, before the first `resume` or `log`."""
        if self._thread is None and state.get("id"):
            self.id = str(state["id"])

    def state(self) -> dict[str, Any]:
        return {} if self.mode == "disabled" else {"id": self.id}

    def resume(self, step: int) -> None:
        self._start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"global_step": step, **metrics}
        self._put(lambda run: run.log(row))

    def summary(self, values: Mapping[str, Any]) -> None:
        """What is shown beside the run's name."""
        values = dict(values)
        self._put(lambda run: run.summary.update(values))

    def artifact(self, path: Path, kind: str, metadata: Mapping[str, Any]) -> None:
        """Records where a checkpoint or an export lies, and how big its files are; they are not uploaded."""
        if not self._artifacts:
            return
        where, about = Path(path).resolve(), redact_json(dict(metadata))

        def record(run):
            import wandb

            made = wandb.Artifact(f"{kind}-{self.id}", type=kind, metadata=about)
            made.add_reference(where.as_uri(), checksum=False)
            run.log_artifact(made)

        self._put(record)

    def finish(self, status: str) -> None:
        """Waits for W&B, but not longer than the time-out."""
        if self._thread is None:
            return
        self._put(lambda run: run.summary.update({"status": status}))
        self._put(None)
        self._thread.join(self._finish_timeout)
        if self._thread.is_alive():
            say, self._say = self._say, lambda text: None  # the thread is abandoned, and prints no more
            _stop_service()
            say(
                f"W&B did not finish within {self._finish_timeout:g} s; "
                f"`wandb sync {self.folder}/wandb/*run-*` uploads it"
            )
        self._thread = None

    def _put(self, call: Callable[[Any], None] | None) -> None:
        if self.mode == "disabled":
            return
        self._start()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._dropped:
                self._say("W&B is too slow; some of its rows are dropped (metrics.jsonl has them all)")
            self._dropped = True

    def _start(self) -> None:
        if self._thread is not None or self.mode == "disabled":
            return
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            with self._server.opening:
                run = self._open()
                run.summary.update(self._summary)
        except Exception as error:
            self._say(f"W&B does not start ({_short(error)}); training goes on without it")
            run = None
        reported = run is None
        while (call := self._calls.get()) is not None:
            if run is None:
                continue
            try:
                call(run)
            except Exception as error:
                if not reported:
                    self._say(f"W&B fails ({_short(error)}); training goes on")
                reported = True
        if run is not None:
            try:
                run.finish(exit_code=0)
            except Exception as error:
                self._say(f"W&B does not finish ({_short(error)})")

    def _open(self) -> Any:
        # W&B's reports on its own errors wait half a minute at exit for a server that does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        _write_id(self.folder, self.id)
        settings = wandb.Settings(
            silent=True,
            quiet=True,
            console="off",
            init_timeout=self._start_timeout,
            # Its own metadata hold the whole command line; ours, in the config, is redacted and has the commit.
            x_disable_meta=True,
            x_save_requirements=False,
            disable_git=True,
            save_code=False,
            reinit="create_new" if self._shared else "default",
        )
        start = {**self._init, "dir": str(self.folder), "id": self.id, "config": self._config, "settings": settings}
        wandb.setup(settings)  # else it prints a greeting before `init` has read them
        if self.mode == "online" and self._server.silent:
            self.mode = "offline"
        if self.mode == "online":
            try:
                return _defined(wandb.init(mode="online", resume="allow", **start))
            except Exception as error:
                self._say(f"W&B cannot be reached ({_short(error)}); going on offline")
            self.mode, self._server.silent = "offline", True
            _stop_service()  # it holds the run id, and would go on trying
            with contextlib.suppress(Exception, SystemExit):  # its connection was closed on purpose
                wandb.teardown()
            wandb.setup(settings)
        return _defined(wandb.init(mode="offline", **start))


def _defined(run: Any) -> Any:
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    return run


def _stop_service() -> None:
    """Ends this process's own W&B service, which would wait for its server forever. What was logged is on disk."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.terminate()
                child.wait(5)


def resolve(mode: Mode, environ: Mapping[str, str] = os.environ) -> Literal["online", "offline", "disabled"]:
    """What "auto" means here; other modes are returned as they are, but without a key there is no "online"."""
    if mode == "auto":
        requested = environ.get("WANDB_MODE", "").lower()
        if environ.get("WANDB_DISABLED", "").lower() in ("true", "1") or requested in ("disabled", "dryrun-disabled"):
            return "disabled"
        mode = "offline" if requested in ("offline", "dryrun") else "online"
    return "offline" if mode == "online" and not has_key(environ) else mode


def has_key(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether an API key is in WANDB_API_KEY or in the netrc file. The key itself is not kept."""
    if environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlparse(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _new_id() -> str:
    return "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8))


def _id_file(folder: Path) -> Path:
    return folder / "wandb" / "run-id"


def _read_id(folder: Path) -> str | None:
    try:
        return _id_file(folder).read_text().strip() or None
    except OSError:
        return None


def _write_id(folder: Path, run_id: str) -> None:
    _id_file(folder).parent.mkdir(exist_ok=True)
    _id_file(folder).write_text(run_id + "\n")
