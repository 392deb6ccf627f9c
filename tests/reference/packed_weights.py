"""Run with the Python of the reference: REQUEST ANSWER. What stock libraries make of packed weights.

REQUEST is a safetensors file with int8 `codes.BITS.NAME` [rows, n], int32 `tokens` [B, T] and the packed arrays of a
matrix `matrix.BITS.GROUP.NAME` with zero points; its metadata lists folders. ANSWER gets `codes.BITS.NAME` packed along
the rows; `matrix`, unpacked; of each folder I its weights after loading in float32 `weights.I.KEY`, and `logits.I`.
"""

import json
import sys

import torch
import transformers
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors import safe_open
from safetensors.torch import save_file

request, answer = sys.argv[1:]
transformers.logging.set_verbosity_error()
out = {}
with safe_open(request, "pt") as f:
    folders = json.loads(f.metadata()["folders"])
    tokens = f.get_tensor("tokens").long()
    for key in f.keys():  # noqa: SIM118
        if key.startswith("codes."):
            bits = int(key.split(".")[1])
            out[key] = pack_to_int32(f.get_tensor(key), bits)
    matrix = {key.rpartition(".")[2]: f.get_tensor(key) for key in f.keys() if key.startswith("matrix.")}  # noqa: SIM118
    bits, group = next(key.split(".")[1:3] for key in f.keys() if key.startswith("matrix."))  # noqa: SIM118
    args = QuantizationArgs(num_bits=int(bits), symmetric=False, strategy="group", group_size=int(group))
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    out["matrix"] = PackedQuantizationCompressor.decompress(matrix, scheme)["weight"]
for i, folder in enumerate(folders):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.eval()
    with torch.no_grad():
        out[f"logits.{i}"] = model(input_ids=tokens).logits.contiguous()
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            out[f"weights.{i}.{name}.weight"] = module.weight.detach().clone().contiguous()
save_file(out, answer)
