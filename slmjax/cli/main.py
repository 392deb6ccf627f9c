"""`slmjax VERB ...`: finds the verb's file and hands it the rest of the command line.

Imports nothing heavy: `slmjax --help` has to answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys

from slmjax import __version__
from slmjax.cli.args import fail
from slmjax.errors import Preempted, StorageError, UserError

VERBS = {  # verb -> (module, what it does)
    "data": ("data", "build a token store from text, show one, or write a teacher's predictions of it"),
    "train": ("train", "train an experiment; resumes by itself"),
    "eval": ("eval", "loss, perplexity and bits per byte of a model, with standard errors"),
    "generate": ("generate", "sample text from a model"),
    "embed": ("embed", "vectors of texts, of norm 1"),
    "quantize": ("quantize", "round the weights of a trained model to few bits (post-training quantization)"),
    "prune": ("prune", "remove weights, layers or channels of a trained model"),
    "export": ("export", "write a Hugging Face folder or a GGUF file, reload it and compare the logits"),
    "import": ("import_", "read a Hugging Face folder or a GGUF file"),
    "inspect": ("inspect", "parameters and FLOPs of a model or an experiment"),
    "doctor": ("doctor", "will this experiment fit, how long will it take, what will it cost"),
    "verify": ("verify", "prove that an experiment resumes bit-exactly, or that muP transfers its learning rate"),
    "fit": ("fit", "fit a scaling law to a table of runs, with intervals, and predict"),
    "sweep": ("sweep", "plan many runs, run them, and fit a scaling law to them"),
    "launch": ("launch", "a sweep or a run on SLURM, or a run in several processes of this machine"),
    "report": ("report", "rebuild a run's report.html from its records, or compare several runs"),
}

TRAINING = (["train"], ["sweep", "cells"])
"""Commands that restart the process with other settings of malloc, which make steps faster"""

USAGE = """usage: slmjax VERB ...

Train small language models from scratch in JAX, and export what you trained.

{verbs}

`slmjax VERB --help` lists a verb's fields, with an example. Start with:
  slmjax train experiments/pretrain/quickstart.py --runtime.workdir runs/quickstart
Every verb takes --code FILE: a Python file of yours that defines types a run's config.json names."""


def usage() -> str:
    width = max(map(len, VERBS))
    return USAGE.format(verbs="\n".join(f"  {verb:{width}}  {what}" for verb, (_, what) in VERBS.items()))


def take_code(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits `--code FILE` pairs off."""
    rest, files = [], []
    words = iter(argv)
    for word in words:
        if word == "--code" or word.startswith("--code="):
            value = word.partition("=")[2] if "=" in word else next(words, None)
            if not value:
                raise UserError("--code needs a value: the Python file that defines your types")
            files.append(value)
        else:
            rest.append(word)
    return rest, files


def run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"slmjax {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the verbs are: {', '.join(VERBS)}"
        raise UserError(f"unknown verb {verb!r}; {hint}")
    rest, code = take_code(rest)

    from slmjax import platform

    if any(argv[: len(words)] == words for words in TRAINING):
        platform.tune_malloc()
    platform.configure()
    if code:
        from slmjax.experiment_file import load_module

        for file in code:
            load_module(file)
    module = importlib.import_module(f"slmjax.cli.{VERBS[verb][0]}")
    return module.main(rest)


def main() -> None:
    """The `slmjax` command. Exit codes: 0 done, 2 mistake, 3 diverged, 4 data, 5 storage, 75 stopped and resumable."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not be able to show every character
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except (UserError, Preempted) as error:
        fail(error)
        code = error.code
    except KeyboardInterrupt:
        fail(KeyboardInterrupt("interrupted"))
        code = 130
    except BrokenPipeError:  # `slmjax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(StorageError(f"{where}{error.strerror or error}"))
        code = StorageError.code
    sys.exit(code)


if __name__ == "__main__":
    main()
