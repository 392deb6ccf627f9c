"""PyTorch's side of the step benchmark: LlamaForCausalLM of transformers. Run with a Python that has both.

python benchmarks/torch_step.py --workload B --dtype bfloat16 --compile

Fused AdamW, clipping by global norm, scaled-dot-product attention; bf16 is autocast over fp32 parameters. It reads
requests from stdin (see `workload.serve`); `benchmarks/step.py` drives it.
"""

from __future__ import annotations

import argparse
import contextlib
import os

import torch  # pyright: ignore[reportMissingImports]
import workload as w
from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(w.WORKLOADS), default="B")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--init", help="a Hugging Face folder with the initial parameters; random without")
    parser.add_argument("--steps", type=int, default=64, help="distinct batches")
    args = parser.parse_args()
    work = w.WORKLOADS[args.workload]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)

    config = LlamaConfig(
        vocab_size=work.vocab,
        hidden_size=work.width,
        intermediate_size=work.hidden,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        max_position_embeddings=work.length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32) if args.init else LlamaForCausalLM(config)
    model.config.use_cache = False
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": w.WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=w.PEAK_LR, betas=w.BETAS, eps=w.EPS, fused=True)
    low = args.dtype == "bfloat16"

    def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
            logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.float().view(-1, work.vocab), targets.reshape(-1))

    forward = torch.compile(loss_of) if args.compile else loss_of

    def step(rows) -> float:
        rows = torch.from_numpy(rows).long()
        loss = forward(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), w.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    w.serve(step, w.tokens(work, args.steps))


if __name__ == "__main__":
    main()
