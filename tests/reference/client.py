"""The `reference` fixture: stock transformers in its own Python, started once a session, spoken to through files.

Its Python is $SLMJAX_REFERENCE_PYTHON, or .venv-ref/bin/python in the repository (made by `make test`). `reference4` is
the newest transformers 4: $SLMJAX_REFERENCE4_PYTHON, or .venv-ref4/bin/python.
"""

import json
import os
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]


def reference_python(variable: str = "SLMJAX_REFERENCE_PYTHON", folder: str = ".venv-ref") -> str:
    """The interpreter that has torch and transformers: what the environment variable says, or of a folder here."""
    path = os.environ.get(variable) or str(ROOT / folder / "bin" / "python")
    assert pathlib.Path(path).exists(), f"{path} is missing: `make test` makes it, or set {variable}"
    return path


class Reference:
    """Calls of worker.py. Folders are Hugging Face folders."""

    def __init__(self, folder: pathlib.Path, python: str) -> None:
        """folder: for the tensors that travel; python: an interpreter with torch and transformers."""
        self._folder = folder
        self.python = python
        self._files = 0
        self._process = subprocess.Popen(
            [self.python, str(pathlib.Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def version(self) -> str:
        """Of its transformers."""
        return self._call("version")["version"]

    def close(self) -> None:
        """Ends the worker."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def make(
        self,
        folder: pathlib.Path,
        config: Mapping[str, Any],
        seed: int = 0,
        dtype: str = "float32",
        gain: float = 1.2,
    ) -> None:
        """Writes a model of this config.json with random weights, as save_pretrained does."""
        self._call("make", folder=folder, config=dict(config), seed=seed, dtype=dtype, gain=gain)

    def logits(
        self,
        folder: pathlib.Path,
        tokens: np.ndarray,
        mask: np.ndarray | None = None,
        hidden: bool = False,
        types: np.ndarray | None = None,
    ) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        """Arrays `logits` [B, T, V] (and `hidden` [L + 1, B, T, D]), and the report of from_pretrained.

        mask [B, T] is 0 at padding; positions count the tokens that are none. types [B, T]: token types.
        """
        mask = np.ones_like(tokens) if mask is None else mask
        out = self._path()
        more = {} if types is None else {"types": types}
        batch = self._save(tokens=tokens, mask=mask, positions=positions_of(mask), **more)
        report = self._call("logits", folder=folder, tensors=batch, out=out, hidden=hidden)
        return load_file(out), report

    def generate(
        self, folder: pathlib.Path, tokens: np.ndarray, new_tokens: int, mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Greedy continuation [B, new_tokens]."""
        mask = np.ones_like(tokens) if mask is None else mask
        answer = self._call(
            "generate", folder=folder, tensors=self._save(tokens=tokens, mask=mask), new_tokens=new_tokens
        )
        return np.array(answer["tokens"])

    def continuation(self, folder: pathlib.Path, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """`tokens`: a greedy continuation of token ids, ended as the folder says; `said`: its generation_config."""
        return self._call("continuation", folder=folder, prompt=list(prompt), new_tokens=new_tokens)

    def saved_keys(self, folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
        """{key: shape} of what save_pretrained writes for the config.json in the folder."""
        return {k: tuple(v) for k, v in self._call("saved_keys", folder=folder)["shapes"].items()}

    def make_paper(self, kind: str, folder: pathlib.Path, config: Mapping[str, Any], seed: int = 0) -> None:
        """Writes a model of paper_models.py with random weights: config.json and model.safetensors."""
        self._call("make_paper", kind=kind, folder=folder, config=dict(config), seed=seed)

    def paper_logits(
        self, kind: str, folder: pathlib.Path, tokens: np.ndarray, mask: np.ndarray, new_tokens: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(logits [B, T, V], greedy continuation [B, new_tokens]) of a model of paper_models.py."""
        out = self._path()
        batch = self._save(tokens=tokens, mask=mask, positions=positions_of(mask))
        answer = self._call("paper_logits", kind=kind, folder=folder, tensors=batch, out=out, new_tokens=new_tokens)
        return load_file(out)["logits"], np.array(answer["tokens"])

    def train(
        self, folder: pathlib.Path, arrays: Mapping[str, np.ndarray], **options: Any
    ) -> tuple[dict[str, list[float]], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(losses and gradient norms, first gradients by key, parameters after AdamW by key). See worker.train."""
        out = self._path()
        scalars = self._call("train", folder=folder, tensors=self._save(**arrays), out=out, **options)
        loaded = load_file(out)
        part = lambda name: {k.removeprefix(name): v for k, v in loaded.items() if k.startswith(name)}  # noqa: E731
        return scalars, part("grad/"), part("param/")

    def masked_step(
        self, folder: pathlib.Path, arrays: Mapping[str, np.ndarray]
    ) -> tuple[float, dict[str, np.ndarray]]:
        """(loss, gradients by key). See worker.masked_step."""
        out = self._path()
        answer = self._call("masked_step", folder=folder, tensors=self._save(**arrays), out=out)
        return answer["loss"], load_file(out)

    def sentences(
        self, folder: pathlib.Path, texts: Sequence[str], length: int = 512
    ) -> tuple[np.ndarray, list[list[int]]]:
        """Vectors [N, D] of texts, and their token ids. See worker.sentences."""
        out = self._path()
        answer = self._call("sentences", folder=folder, texts=list(texts), out=out, length=length)
        return load_file(out)["vectors"], answer["ids"]

    def count(self, config: Mapping[str, Any]) -> int:
        """Parameters of the stock model of a config.json."""
        return self._call("count", config=dict(config))["count"]

    def tokenize(self, folder: pathlib.Path, texts: Sequence[str]) -> dict[str, Any]:
        """ids, decoded, class, bos, eos of AutoTokenizer."""
        return self._call("tokenize", folder=folder, texts=list(texts))

    def chat(
        self, folder: pathlib.Path, conversations: Sequence[Any], generate: bool
    ) -> tuple[list[str], list[list[int]]]:
        """Texts and ids of apply_chat_template."""
        answer = self._call("chat", folder=folder, conversations=list(conversations), generate=generate)
        return answer["texts"], answer["ids"]

    def gguf(
        self, file: pathlib.Path, tokens: np.ndarray, prompt: np.ndarray, new_tokens: int
    ) -> tuple[list[float], list[int]]:
        """The mean loss of each row of tokens [B, T], and the greedy continuation of prompt [1, P]."""
        tensors = self._save(tokens=tokens, prompt=prompt)
        answer = self._call("gguf", folder=file.parent, file=file.name, tensors=tensors, new_tokens=new_tokens)
        return answer["losses"], answer["tokens"]

    def _call(self, call: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": call, **arguments}, default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the reference worker died in {call} with exit code {self._process.poll()}"
        answer = json.loads(line)
        assert "error" not in answer, answer.get("error")
        return answer["ok"]

    def _path(self) -> pathlib.Path:
        self._files += 1
        return self._folder / f"{self._files}.safetensors"

    def _save(self, **arrays: np.ndarray) -> pathlib.Path:
        path = self._path()
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)
        return path


def positions_of(mask: np.ndarray) -> np.ndarray:
    """[B, T] 0 at padding -> positions that count the other tokens."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Stock transformers and torch, see `Reference`."""
    client = Reference(tmp_path_factory.mktemp("reference"), reference_python())
    yield client
    client.close()


@pytest.fixture(scope="session")
def reference4(tmp_path_factory):
    """Stock transformers 4, see `Reference`."""
    python = reference_python("SLMJAX_REFERENCE4_PYTHON", ".venv-ref4")
    client = Reference(tmp_path_factory.mktemp("reference4"), python)
    yield client
    client.close()
