"""Run by the Python that has transformers: safetensors in, what its own logits processors make of them out.

usage: reference_sampling.py IN OUT CASES, where CASES is JSON {name: generation_config fields}.
IN holds logits [B, V] and input_ids [B, T]; OUT gets one array [B, V] a case.
"""

import json
import sys

from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

source, out, cases = sys.argv[1:]
x = load_file(source)
model = GPT2LMHeadModel(
    GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=x["logits"].shape[1], bos_token_id=0, eos_token_id=0)
)
result = {}
for name, fields in json.loads(cases).items():
    config = GenerationConfig(do_sample=True, top_k=0, **{k: v for k, v in fields.items() if k != "top_k"})
    config.top_k = fields.get("top_k", 0)
    processors = model._get_logits_processor(config, input_ids_seq_length=x["input_ids"].shape[1], device="cpu")
    result[name] = processors(x["input_ids"].long(), x["logits"].clone()).contiguous()
save_file(result, out)
