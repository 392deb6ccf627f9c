"""What a run came from, and that no secret gets into it."""

import json
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmjax.track.environment import REDACTED, collect, git, git_diff, redact, redact_argv, redact_json

pytestmark = pytest.mark.fast

WANDB = "0123456789abcdef" * 2 + "01234567"
SECRETS = [
    "hf_" + "AbCdEfGhIj" * 3,
    "sk-" + "proj-Ab12" * 5,
    "AKIA" + "ABCDEFGHIJKLMNOP",
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2_" * 8,
    "AIza" + "Sy-a1B2c3" * 4,
    "xoxb-1234567890-abcdef",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3.SflKxwRJSMeKKF2QT4",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("where", ["{}", "--flag={}", '+    client = Client("{}")', "see {}, please"])
def test_known_kinds_of_keys(secret, where):
    assert secret not in redact(where.format(secret), {})
    assert REDACTED in redact(where.format(secret), {})


@pytest.mark.parametrize(
    "text",
    [
        f"WANDB_API_KEY={WANDB}",
        f'"wandb_api_key": "{WANDB}"',
        f"export AWS_SECRET_ACCESS_KEY={WANDB}",
        f"--tracking.api-key={WANDB}",
        f"hub_token = '{WANDB}'",
        f"https://user:{WANDB}@host/x",
        f"Authorization: Bearer {WANDB}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{WANDB}\n-----END RSA PRIVATE KEY-----",
        f"password: '{WANDB}'",
    ],
)
def test_keys_known_by_their_name(text):
    assert WANDB not in redact(text, {})


@pytest.mark.parametrize(
    "text",
    [
        "commit 692af3c1b2d3e4f5061728394a5b6c7d8e9fa0b1",
        "slmjax train experiments/pretrain/quickstart.py --schedule.peak-lr 3e-3",
        "tokens = tokenizer.encode(text)",
        "max_tokens=100000000",
        "eos_token: '<|endoftext|>'",
        "token_store=runs/data/english-0123456789abcdef",
        "key = jax.random.fold_in(key, state.step)",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text, {}) == text


def test_values_of_secret_variables_wherever_they_show_up():
    environ = {"WANDB_API_KEY": WANDB, "HOME": "/home/someone", "MY_TOKEN": "short", "DEPLOY_KEY": "correct-horse"}
    text = f"python x.py {WANDB} correct-horse /home/someone short"
    assert redact(text, environ) == f"python x.py {REDACTED} {REDACTED} /home/someone short"


def test_a_flag_and_its_value_in_two_words():
    argv = ["train", "x.py", "--hub.token", "abc", "--steps", "5", "--password", "pw"]
    assert redact_argv(argv, {}) == ["train", "x.py", "--hub.token", REDACTED, "--steps", "5", "--password", REDACTED]


def test_json_by_name_and_by_look():
    data = {"api_key": "abc", "nested": [{"note": SECRETS[0]}], "tokens": 5, "token": "", "n": None}
    assert redact_json(data, {}) == {
        "api_key": REDACTED, "nested": [{"note": REDACTED}], "tokens": 5, "token": "", "n": None,
    }  # fmt: skip


@given(st.text(max_size=80))
def test_redaction_is_stable(text):
    assert redact(redact(text, {}), {}) == redact(text, {})


class Device:
    platform, device_kind = "gpu", "NVIDIA H100"


def test_collect_says_what_it_ran_on_and_never_the_environment(monkeypatch):
    monkeypatch.setenv("HARMLESS_NAME", "some-private-value")
    monkeypatch.setenv("SERVICE_TOKEN", "very-secret-value")
    found = collect(["slmjax", "train", "x.py", "--note", "very-secret-value"], devices=[Device(), Device()])
    text = json.dumps(found)
    assert "very-secret-value" not in text
    assert "some-private-value" not in text
    assert found["command"] == f"slmjax train x.py --note '{REDACTED}'"
    assert found["devices"] == ["gpu: NVIDIA H100"] * 2
    assert found["packages"]["jax"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28


@pytest.fixture
def repository(tmp_path):
    def run(*command):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@x", *command], check=True)

    run("init", "-q")
    (tmp_path / "a.py").write_text("lr = 1\n")
    run("add", "a.py")
    run("commit", "-qm", "start")
    return tmp_path


def test_git_commit_and_diff(repository):
    clean = git(repository)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] == []
    assert git_diff(repository) == ""
    (repository / "a.py").write_text(f"lr = 2\nwandb_api_key = '{WANDB}'\n")
    (repository / "new.py").write_text("")
    assert git(repository)["dirty"] == [" M a.py", "?? new.py"]
    diff = git_diff(repository)
    assert "-lr = 1\n+lr = 2\n" in diff
    assert WANDB not in diff


def test_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git(tmp_path) is None
    assert git_diff(tmp_path) == ""
