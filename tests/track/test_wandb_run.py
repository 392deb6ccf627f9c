"""W&B: an offline run is read back whole; a resume keeps the id; no failure of it reaches training."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import wandb_file

from slmjax.track import wandb_run
from slmjax.track.wandb_run import WandbRun, has_key, resolve

KEY = "0123456789abcdef" * 2 + "01234567"
CONFIG = {"experiment": {"name": "tiny", "steps": 300, "lr": 3e-3}, "environment": {"git": {"commit": "abc"}}}


@pytest.fixture(autouse=True, scope="module")
def service():
    """Ends W&B's service before the interpreter complains of it."""
    yield
    import wandb

    wandb.teardown()


def logged(folder):
    return wandb_file.read(folder / "wandb")


def test_an_offline_run_holds_the_config_and_every_step(tmp_path, capfd):
    run = WandbRun(tmp_path, mode="offline", project="p", group="g", tags=("a", "b"), name="n", config=CONFIG)
    run.resume(0)
    for step in range(1, 301):
        run.log(step, {"loss": 1 / step, "lr": 3e-3})
    run.summary({"energy": 0.5})
    run.finish("complete")
    ids, config, rows, summary = logged(tmp_path)
    assert ids == [run.id]
    assert {k: config[k] for k in CONFIG} == CONFIG
    assert [row["global_step"] for row in rows] == list(range(1, 301))
    assert [row["loss"] for row in rows] == [1 / step for step in range(1, 301)]
    assert (summary["energy"], summary["status"]) == (0.5, "complete")
    assert capfd.readouterr() == ("", "")


def test_runs_of_one_process_are_runs_of_their_own(tmp_path):
    server = wandb_run.Server()
    runs = [
        WandbRun(tmp_path / name, mode="offline", name=name, summary={"flops": i}, server=server)
        for i, name in enumerate("ab")
    ]  # fmt: skip
    for run in runs:
        run.resume(0)
    for step in (1, 2):
        for i, run in enumerate(runs):
            run.log(step, {"loss": step + 10.0 * i})
    runs[0].finish("diverged")
    runs[1].log(3, {"loss": 13.0})
    runs[1].finish("complete")
    for i, (run, losses) in enumerate(zip(runs, ([1.0, 2.0], [11.0, 12.0, 13.0]), strict=True)):
        ids, _, rows, summary = logged(run.folder)
        assert ids == [run.id]
        assert [row["loss"] for row in rows] == losses
        assert (summary["flops"], summary["loss"]) == (i, losses[-1])
    assert runs[0].id != runs[1].id


def test_an_agent_of_a_sweep_names_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "given123")
    assert WandbRun(tmp_path / "a", mode="offline").id == "given123"
    assert WandbRun(tmp_path / "b", mode="offline", server=wandb_run.Server()).id != "given123"


def test_group_tags_and_axis_are_set(tmp_path):
    run = WandbRun(tmp_path, mode="offline", project="p", entity="e", group="g", tags=("a", "b"), name="n")
    run.resume(0)
    run.finish("complete")
    found = [r for path in tmp_path.glob("wandb/*run-*/*.wandb") for r in wandb_file.records(path)]
    about = next(r.run for r in found if r.WhichOneof("record_type") == "run")
    assert (about.project, about.entity, about.run_group, list(about.tags), about.display_name) == (
        "p", "e", "g", ["a", "b"], "n",
    )  # fmt: skip
    metrics = [r.metric for r in found if r.WhichOneof("record_type") == "metric"]
    assert {m.step_metric for m in metrics if m.glob_name == "*" or m.name == "*"} == {"global_step"}


@pytest.mark.parametrize("by", ["checkpoint", "folder"])
def test_a_resume_continues_the_same_run_and_drops_no_step(tmp_path, by):
    first = WandbRun(tmp_path, mode="offline")
    first.resume(0)
    for step in range(1, 8):
        first.log(step, {"loss": 1.0})
    first.finish("preempted")

    second = WandbRun(tmp_path, mode="offline")
    if by == "checkpoint":
        (tmp_path / "wandb" / "run-id").unlink()
        second = WandbRun(tmp_path, mode="offline")
        assert second.id != first.id
        second.restore(first.state())
    second.resume(5)
    time.sleep(1.1)  # W&B names folders by the second
    for step in range(6, 11):
        second.log(step, {"loss": 2.0})
    second.finish("complete")
    ids, _, rows, _ = logged(tmp_path)
    assert set(ids) == {first.id}
    assert [row["global_step"] for row in rows] == [*range(1, 8), *range(6, 11)]


def test_secrets_reach_no_file(tmp_path, monkeypatch):
    secret = "hf_" + "AbCdEfGhIj" * 3
    monkeypatch.setattr("sys.argv", ["slmjax", "train", "x.py", "--note", secret])
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = WandbRun(tmp_path, mode="offline", config={"note": secret, "api_key": "short"})
    run.resume(0)
    run.log(1, {"loss": 1.0})
    run.finish("complete")
    config = logged(tmp_path)[1]
    text = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"loss" in text
    assert secret.encode() not in text
    assert KEY.encode() not in text
    assert config["api_key"] == "[redacted]"


def test_artifacts_are_references(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "10"
    checkpoint.mkdir(parents=True)
    (checkpoint / "params.bin").write_bytes(b"x" * 1000)
    run = WandbRun(tmp_path, mode="offline", artifacts=True)
    run.artifact(checkpoint, "checkpoint", {"step": 10})
    run.finish("complete")
    found = [r for path in tmp_path.glob("wandb/*run-*/*.wandb") for r in wandb_file.records(path)]
    (artifact,) = [
        r.request.log_artifact.artifact if r.WhichOneof("record_type") == "request" else r.artifact
        for r in found
        if "artifact" in str(r.WhichOneof("record_type")) or r.request.WhichOneof("request_type") == "log_artifact"
    ]
    assert (artifact.type, artifact.name) == ("checkpoint", f"checkpoint-{run.id}")
    assert '"step": 10' in artifact.metadata or '"step":10' in artifact.metadata
    (entry,) = artifact.manifest.contents
    assert entry.ref == checkpoint.as_uri() or entry.ref == (checkpoint / "params.bin").as_uri()


def test_disabled_does_nothing(tmp_path):
    run = WandbRun(tmp_path / "run", mode="disabled")
    run.resume(0)
    run.log(1, {"loss": 1.0})
    run.artifact(tmp_path, "checkpoint", {})
    run.finish("complete")
    assert run.state() == {}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "environ", "resolved"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_DISABLED": "true"}, "disabled"),
        ("online", {}, "offline"),
        ("offline", {"WANDB_API_KEY": KEY}, "offline"),
        ("disabled", {"WANDB_API_KEY": KEY}, "disabled"),
    ],
)
def test_mode(mode, environ, resolved, tmp_path):
    assert resolve(mode, {"NETRC": str(tmp_path / "none"), **environ}) == resolved


@pytest.mark.parametrize(("mode", "lines"), [("online", 1), ("auto", 0), ("offline", 0)])
def test_who_asks_for_online_is_told_that_there_is_no_key(mode, lines, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said = []
    assert WandbRun(tmp_path, mode=mode, say=said.append).mode == "offline"
    assert len(said) == lines
    assert all("WANDB_API_KEY" in line for line in said)


def test_a_key_in_the_netrc_file_counts(tmp_path):
    file = tmp_path / "netrc"
    file.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    file.chmod(0o600)
    assert has_key({"NETRC": str(file)})
    assert not has_key({"NETRC": str(file), "WANDB_BASE_URL": "https://wandb.example.com"})


class Refuses(http.server.BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_POST(self):
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST

    def log_message(self, *args): ...


@pytest.fixture(params=["nothing listens", "never answers", "refuses the key"])
def server(request):
    """The address of a W&B server that is of no use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "never answers":
            listener.listen(50)
        if request.param != "refuses the key":
            port = listener.getsockname()[1]
            if request.param == "nothing listens":
                listener.close()
            yield f"http://127.0.0.1:{port}"
            return
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as refusing:
        refusing.daemon_threads = True
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{refusing.server_port}"
        refusing.shutdown()


TRAIN = """
import sys
from slmjax.track.wandb_run import WandbRun

run = WandbRun(sys.argv[1], start_timeout=3.0)
print(run.mode)
run.resume(0)
for step in range(1, 21):
    run.log(step, {"loss": 1.0})
run.finish("complete")
print(run.mode)
"""


def test_online_without_a_server_goes_on_offline_and_the_process_ends(tmp_path, server):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environ |= {"WANDB_BASE_URL": server, "WANDB_API_KEY": KEY}
    command = [sys.executable, "-c", TRAIN, str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=True)
    first, said, last = done.stdout.splitlines()
    assert (first, last) == ("online", "offline")
    assert said.startswith("W&B cannot be reached (")
    assert said.endswith("); going on offline")
    assert done.stderr == ""
    assert KEY not in said
    rows = [row for path in tmp_path.glob("wandb/offline-run-*/*.wandb") for row in wandb_file.records(path)]
    assert sum(r.WhichOneof("record_type") == "history" for r in rows) == 20


def test_a_broken_wandb_reaches_no_caller(tmp_path, monkeypatch):
    import wandb

    def broken(**_):
        raise RuntimeError("broken\nbadly")

    monkeypatch.setattr(wandb, "init", broken)
    said = []
    run = WandbRun(tmp_path, mode="offline", say=said.append)
    run.resume(0)
    run.log(1, {"loss": 1.0})
    run.finish("complete")
    assert said == ["W&B does not start (broken badly); training goes on without it"]


def test_rows_that_a_slow_wandb_cannot_take_are_dropped_with_a_word(tmp_path, monkeypatch):
    import wandb

    release = threading.Event()

    def slow(**_):
        release.wait()
        raise RuntimeError("gave up")

    monkeypatch.setattr(wandb, "init", slow)
    monkeypatch.setattr(wandb_run, "MAX_WAITING", 10)
    said = []
    run = WandbRun(tmp_path, mode="offline", finish_timeout=0.1, say=said.append)
    for step in range(100):
        run.log(step, {"loss": 1.0})
    assert said == ["W&B is too slow; some of its rows are dropped (metrics.jsonl has them all)"]
    release.set()


def test_finishing_is_not_waited_for_without_end(tmp_path, monkeypatch):
    import wandb

    release = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: release.wait())
    said = []
    monkeypatch.setattr(wandb_run, "_stop_service", lambda: said.append("service ended"))
    run = WandbRun(tmp_path, mode="offline", finish_timeout=0.2, say=said.append)
    run.log(1, {"loss": 1.0})
    run.finish("complete")
    release.set()
    assert said[0] == "service ended"
    assert said[1].startswith("W&B did not finish within 0.2 s; `wandb sync ")
    assert len(said) == 2
