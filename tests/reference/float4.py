"""Run with the Python of the reference: REQUEST ANSWER. What stock libraries make of floats of 4 bits.

REQUEST is a safetensors file with float32 weights `w.NAME` [out, in], for NAME "nvfp4" with `global` [1], and int32
`tokens` [B, T]; its metadata lists folders. ANSWER gets `NAME.scale`, `NAME.packed`, `NAME.values` (dequantized), and
of each folder I its weights after unpacking `weights.I.KEY` and, loaded as bfloat16 and used as it is, `logits.I`; of
the last folder also `error`, the message of a product after loading in float32, as bytes.
"""

import json
import sys

import torch
import transformers
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import MXFP4A16, NVFP4A16
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open
from safetensors.torch import save_file

request, answer = sys.argv[1:]
transformers.logging.set_verbosity_error()
out = {}
with safe_open(request, "pt") as f:
    folders = json.loads(f.metadata()["folders"])
    tokens = f.get_tensor("tokens").long()
    given = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
for name, preset, compressor in (
    ("mxfp4", MXFP4A16, MXFP4PackedCompressor),
    ("nvfp4", NVFP4A16, NVFP4PackedCompressor),
):
    w, scheme = given[f"w.{name}"], QuantizationScheme(targets=["Linear"], **preset)
    grouped = w.unflatten(1, (-1, scheme.weights.group_size))
    one = {"global_scale": given["global"]} if name == "nvfp4" else {}
    scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights, **one)
    state = {"weight": w, "weight_scale": scale, **{f"weight_{key}": x for key, x in one.items()}}
    packed = compressor.compress(state, scheme)
    out[f"{name}.scale"] = packed["weight_scale"].view(torch.uint8)
    out[f"{name}.packed"] = packed["weight_packed"]
    out[f"{name}.values"] = compressor.decompress(packed, scheme)["weight"].float()
for i, folder in enumerate(folders):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    assert logits.dtype == torch.bfloat16
    out[f"logits.{i}"] = logits.float().contiguous()
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            out[f"weights.{i}.{name}.weight"] = module.weight.detach().float().clone().contiguous()
model = transformers.AutoModelForCausalLM.from_pretrained(folders[-1], dtype=torch.float32, local_files_only=True)
try:
    model(input_ids=tokens)
    error = "none"
except RuntimeError as e:
    error = str(e)
out["error"] = torch.tensor(list(error.encode()), dtype=torch.uint8)
save_file(out, answer)
