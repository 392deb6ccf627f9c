"""Generation from quantized weights in memory against the same weights as float32: `python benchmarks/packed.py`.

A Llama in the shape of SmolLM2-135M with random weights is rounded to 2 and to 4 bits (its tied table to 4) and written
as `slmjax quantize` does. One process runs it from the codes, one from their values as float32 arrays; each continues a
random prompt of 32 tokens by 64, in turns. The table gives median tokens/s, the ratio (median over rounds), and the
highest resident memory of each process above that after the imports. The bar: no slower than float32.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

PROMPT, NEW, VOCAB = 32, 64, 49152


def serve(folder: str, kind: str) -> None:
    """One side: generates on request, one line of JSON a request."""
    from slmjax import platform

    platform.configure()
    import time

    import jax
    import numpy as np

    from slmjax.data.tokenizer import Bytes, Tokenizer
    from slmjax.evals.generate import Generator
    from slmjax.runs.loading import generative, load

    jax.numpy.zeros(1).block_until_ready()
    before = memory("VmRSS")
    loaded = load(folder)
    params = loaded.weights if kind == "codes" else loaded.params
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    tokenizer = Tokenizer(Bytes().make([], pathlib.Path(folder)).raw, bos=None, eos=None)
    generator = Generator(generative(loaded.decoder), params, tokenizer)
    for line in sys.stdin:
        ids = json.loads(line)
        start = time.perf_counter()
        made = np.concatenate(list(generator.tokens(ids, limits=np.full(len(ids), NEW, np.int32))), axis=1)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "tokens": made[:, :NEW].tolist(), "held": held, "peak": memory("VmHWM") - before}
        print(json.dumps(answer), flush=True)


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def write(folder: str, bits: int) -> None:
    """A quantized model with random weights, as `slmjax quantize` writes it."""
    import jax

    from slmjax.compress.quant.uniform import Symmetric
    from slmjax.compress.quant.view import Rule
    from slmjax.models.families.llama import llama
    from slmjax.runs import packed_folder
    from slmjax.runs.quantizing import RTN, silent

    model = llama(layers=30, width=576, heads=9, kv_heads=3, hidden=1536, vocab=VOCAB, context=2048, tied=True)
    params = model.build().init(jax.random.key(0))
    rules = (Rule(quantizer=Symmetric(bits=bits)), Rule(quantizer=Symmetric(bits=4), patterns=("embed/table",)))
    rounded = RTN()(model, params, rules, (), silent)
    packed_folder.write(pathlib.Path(folder), model, rounded.params, rounded.packed, {})


class Side:
    """One process that generates on request."""

    def __init__(self, folder: str, kind: str):
        command = [sys.executable, __file__, "--serve", folder, kind]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, ids: list[list[int]]) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(ids), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate("")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return 0
    if args.write:
        write(args.write[0], int(args.write[1]))
        return 0
    import numpy as np

    worst = float("inf")
    print("bits batch  tokens/s: codes  float32  ratio  same tokens   MB: codes held, peak; float32 held, peak")
    for bits in args.bits:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "--write", folder, str(bits)], check=True)
            sides = [Side(folder, kind) for kind in ("codes", "float32")]
            for batch in args.batch:
                ids = np.random.default_rng(batch).integers(0, VOCAB, (batch, PROMPT)).tolist()
                first = [side(ids) for side in sides]  # compiles
                seconds = [[side(ids)["seconds"] for side in sides] for _ in range(args.rounds)]
                mine, theirs = (batch * NEW / statistics.median(s) for s in zip(*seconds, strict=True))
                ratio = statistics.median(b / a for a, b in seconds)
                worst = min(worst, ratio)
                same = np.mean(np.array(first[0]["tokens"]) == np.array(first[1]["tokens"]))
                sizes = " ".join(f"{x[name] / 1e6:6.0f}" for x in first for name in ("held", "peak"))
                print(f"{bits:4} {batch:5} {mine:16.1f} {theirs:8.1f} {ratio:6.2f} {same:12.0%}   {sizes}", flush=True)
            for side in sides:
                side.close()
    print(f"lowest ratio {worst:.2f}; bar 1.00: {'met' if worst >= 1 else 'MISSED'}")
    return 0 if worst >= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
