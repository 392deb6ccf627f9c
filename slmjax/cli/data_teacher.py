"""`slmjax data teacher MODEL --data DIR --out DIR`: writes the predictions of a teacher beside a token store."""

# Annotations stay objects (no `from __future__`): tyro reads them.

import shlex
from dataclasses import dataclass
from typing import Literal

import tyro

from slmjax.cli.args import parse
from slmjax.errors import UserError
from slmjax.files import at

EXAMPLE = """slmjax data teacher runs/teacher --data runs/data/english_classics --out runs/targets
  slmjax data teacher runs/teacher --data runs/data/english_classics --out runs/hidden --targets hidden
  slmjax data teacher runs/teacher --data runs/data/english_classics --out runs/targets --share 2/8  # of 8 processes"""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Arguments of `data teacher`."""

    model: tyro.conf.Positional[str]
    """The teacher: a run folder, a checkpoint, a Hugging Face folder or a GGUF file"""
    data: str
    """The token store whose text it reads: folder or URL; both splits"""
    out: str
    """Folder of the targets"""
    targets: Literal["top-k", "sampled", "tail", "hidden"] = "sampled"
    """top-k: the k likeliest tokens with log-probabilities (biased). tail: also the sum of all others. sampled: tokens
    drawn from the teacher's distribution (unbiased). hidden: the last hidden state, from which every logit follows"""
    k: int | None = None
    """Tokens kept by top-k and tail; default 64"""
    draws: int | None = None
    """Tokens drawn by sampled; default 64"""
    dtype: Literal["bfloat16", "float16"] | None = None
    """Of hidden states; default bfloat16"""
    length: int | None = None
    """Tokens of a window, the longest context of a prediction: each document is read in windows from its start. The
    same as `data.length` of the student is best. Default: as the teacher was trained, or its context up to 1024"""
    batch: int = 16
    """Rows of `length` tokens that are computed at once"""
    compute: Literal["bfloat16", "float32"] | None = None
    """Type of activations and matrix products; default: the fastest on this machine"""
    seed: int = 0
    """Seed of what is drawn by sampled"""
    share: str = "1/1"
    """I/N: of N processes this is the I-th, and computes every N-th shard"""
    shard: int | None = None
    """Tokens of a file, a multiple of 128; default: those of about 64 MiB"""
    step: int | None = None
    """The checkpoint of a run; default: the latest"""


def main(argv: list[str]) -> int:
    args = parse(
        Teacher,
        argv,
        prog="slmjax data teacher",
        description="Writes a teacher's predictions of every token of a store, to train students from without the "
        "teacher. Run the same command again to go on after an interruption, or to check every file of the result.",
        example=EXAMPLE,
    )
    from slmjax.data.build_progress import show_progress
    from slmjax.data.token_store import TokenStore
    from slmjax.runs.evaluating import compute_of
    from slmjax.runs.loading import load
    from slmjax.runs.target_options import kind_of
    from slmjax.runs.teacher_targets import Writing, write

    stored = kind_of(args.targets, k=args.k, draws=args.draws, dtype=args.dtype)
    share = _share(args.share)
    if "://" in args.out:
        raise UserError(f"--out {args.out} is a URL; expected a folder, which may lie on a disk that machines share")
    loaded, store = load(args.model, step=args.step), TokenStore(args.data)
    run = loaded.experiment
    length = (run.data.length if run else min(loaded.decoder.context, 1024)) if args.length is None else args.length
    writing = Writing(
        loaded=loaded,
        name=args.model,
        store=store,
        out=at(args.out),
        stored=stored,
        length=length,
        compute=compute_of(args.compute),
        batch=args.batch,
        seed=args.seed,
        shard=args.shard,
    )
    with show_progress() as progress:
        targets = write(writing, share, progress)
    if targets is None:
        print(f"{args.out}: share {args.share} is complete; the last share that is completes the folder")
        return 0
    found, splits = targets.manifest, targets.manifest["splits"]
    print(
        f"{args.out}: {args.targets} targets of {splits['train']['tokens']:,} tokens for training and "
        f"{splits['validation']['tokens']:,} for validation\n"
        f"bytes a token      {found['bytes_per_token']:.1f} on disk, "
        f"{found['uncompressed_bytes_per_token']} uncompressed\n"
        f"KL(stored || full) {found['kl']:.3g} nats a token\n"
        f"calibration error  {found['calibration_error']:.3g} (both on {found['measured_on']:,} tokens)\n"
        f"{stored.about}"
    )
    extra = f'data:       PackedText(..., length={length}, extra=TeacherTargets(folders=("{args.out}",)))'
    head = f'Distill(teachers=("{args.out}/head",), source=OnDisk())'
    objective = head if args.targets == "hidden" else "DistillOffline()"
    print(f"next, in an experiment:\n  {extra}\n  objective:  {objective}")
    print(f"next, to train it:\n  slmjax train EXPERIMENT.py --data.extra.folders {shlex.quote(args.out)}")
    return 0


def _share(text: str) -> tuple[int, int]:
    first, _, last = text.partition("/")
    if not (first.isdecimal() and last.isdecimal()):
        raise UserError(f"--share is {text!r}; expected I/N, such as 2/8")
    return int(first), int(last)
