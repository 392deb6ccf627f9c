"""KV-cached greedy generation of slmjax against `generate` of transformers, on the same exported model, alternating.

python benchmarks/generate.py --reference-python PATH [--batch 1 8] [--rounds 5]

PATH is a Python that has torch and transformers. A Llama of 30M parameters (512 wide, 8 layers, vocabulary 8192) with
random weights is written as a Hugging Face folder; both sides load it, continue the same random prompts of 32 tokens by
128, and take turns. The table gives the median tokens/s of each and the ratio, the median over rounds. In float32 the
tokens of both sides are compared as well.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
PROMPT, NEW, VOCAB = 32, 128, 8192

TORCH = """
import json, sys, time, torch, transformers
folder, dtype, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
for line in sys.stdin:
    request = json.loads(line)
    ids = torch.tensor(request["ids"])
    start = time.perf_counter()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["new"],
                          min_new_tokens=request["new"], do_sample=False, pad_token_id=0, eos_token_id=None)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "tokens": made[:, ids.shape[1]:].tolist()}), flush=True)
"""


class Side:
    """One process that generates on request."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, ids: list[list[int]], new: int = NEW) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"ids": ids, "new": new}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate("")


def serve(folder: str, dtype: str) -> None:
    """slmjax's side: generates on request, one line of JSON a request."""
    from slmjax import platform

    platform.configure()
    import time

    from slmjax.data.tokenizer import Bytes, Tokenizer
    from slmjax.evals.generate import Generator
    from slmjax.nn.compute import Compute
    from slmjax.runs.loading import generative, load

    loaded = load(folder)
    tokenizer = Tokenizer(Bytes().make([], HERE).raw, bos=None, eos=None)  # no EOS: every row is made in full
    generator = Generator(generative(loaded.decoder), loaded.params, tokenizer, Compute(dtype=dtype))
    for line in sys.stdin:
        request = json.loads(line)
        limits = np.full(len(request["ids"]), request["new"], np.int32)
        start = time.perf_counter()
        made = np.concatenate(list(generator.tokens(request["ids"], limits=limits)), axis=1)[:, : request["new"]]
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": made.tolist()}), flush=True)


def export(folder: pathlib.Path) -> None:
    """A model with random weights whose next token depends on the tokens before."""
    import jax

    from slmjax.convert.hf import write_hf
    from slmjax.models.families.llama import llama

    model = llama(layers=8, width=512, heads=8, kv_heads=8, hidden=1408, vocab=VOCAB, context=1024)
    params = model.build().init(jax.random.key(0))
    write_hf(folder, model, jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, params))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return 0
    print(
        f"{'dtype':10} {'batch':>5} {'slmjax':>9} {'transformers':>13} {'ratio':>6}  same tokens   (tokens/s, medians)"
    )
    worst = float("inf")
    with tempfile.TemporaryDirectory() as tmp:
        export(pathlib.Path(tmp))
        for dtype in args.dtype:
            ours = Side([sys.executable, __file__, "--reference-python", "-", "--serve", tmp, dtype])
            theirs = Side([args.reference_python, "-c", TORCH, tmp, dtype, str(args.threads)])
            for batch in args.batch:
                ratio = compare(ours, theirs, dtype, batch, args.rounds)
                worst = min(worst, ratio)
            ours.close()
            theirs.close()
    print(f"lowest ratio {worst:.2f}; bar 1.00: {'met' if worst >= 1 else 'MISSED'}")
    return 0 if worst >= 1 else 1


def compare(ours: Side, theirs: Side, dtype: str, batch: int, rounds: int) -> float:
    ids = np.random.default_rng(batch).integers(0, VOCAB, (batch, PROMPT)).tolist()
    first = [side(ids) for side in (ours, theirs)]  # compilation, warm caches
    equal = np.mean(np.array(first[0]["tokens"]) == np.array(first[1]["tokens"]))
    seconds = [[side(ids)["seconds"] for side in (ours, theirs)] for _ in range(rounds)]
    mine, peer = (batch * NEW / statistics.median(s) for s in zip(*seconds, strict=True))
    ratio = statistics.median(b / a for a, b in seconds)
    print(f"{dtype:10} {batch:5} {mine:9.0f} {peer:13.0f} {ratio:6.2f}  {equal:.0%}", flush=True)
    return ratio


if __name__ == "__main__":
    sys.exit(main())
