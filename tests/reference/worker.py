"""Stock transformers and torch, in a Python of their own: JSON requests on stdin, one JSON answer a line on stdout.

Tensors travel through safetensors files. Run by tests/reference/client.py; knows nothing of slmjax.
"""

import inspect
import json
import os
import sys
import tempfile
import traceback

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints must not get between the answers

import paper_models  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

torch.set_num_threads(int(os.environ.get("SLMJAX_REFERENCE_THREADS", "1")))
transformers.logging.set_verbosity_error()


def version():
    """Of transformers."""
    return {"version": transformers.__version__}


def class_of(architectures):
    """The class that a config.json names; a decoder if it names none."""
    return getattr(transformers, architectures[0]) if architectures else AutoModelForCausalLM


def fresh(config):
    """A new model of the class that a config.json names."""
    kind = class_of(config.architectures)
    return kind.from_config(config) if kind is AutoModelForCausalLM else kind._from_config(config)


def load(folder):
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model, info = class_of(config.architectures).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    report = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return model.eval(), report


def takes_positions(model):
    """DistilBERT of transformers 4 does not: its tokens are counted from the left."""
    return transformers.__version__ >= "5" or "position_ids" in inspect.signature(model.forward).parameters


def make(folder, config, seed, dtype="float32", gain=1.2):
    """Random weights, large enough that every nonlinearity and bias shows in the logits.

    gain: of a matrix, where variance 1 goes in.
    """
    torch.manual_seed(seed)
    config = dict(config)
    made = AutoConfig.for_model(config.pop("model_type"), **config)
    model = fresh(made)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(("bias" not in name) + 0.3 * torch.randn_like(p))
            else:
                # torch stores Linear as [out, in], GPT-2's Conv1D as [in, out];
                fan_in = p.shape[0] if "c_" in name else p.shape[1]
                p.copy_(
                    torch.randn_like(p)
                    * (0.5 if "emb" in name or "wte" in name or "wpe" in name else gain / fan_in**0.5)
                )
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return {}


def logits(folder, tensors, out, hidden=False):
    """tensors: tokens, mask, positions (and token types) [B, T] -> logits [B, T, V], or what else the class tells, and
    the residual stream [L + 1, B, T, D]."""
    model, report = load(folder)
    x = load_file(tensors)
    more = {"position_ids": x["positions"].long()} if takes_positions(model) else {}
    if "types" in x:
        more["token_type_ids"] = x["types"].long()
    with torch.no_grad():
        answer = model(
            input_ids=x["tokens"].long(), attention_mask=x["mask"].long(), output_hidden_states=hidden, **more
        )
    told = next(answer[name] for name in ("logits", "pooler_output", "last_hidden_state") if name in answer)
    result = {"logits": told.float()}
    if hidden:
        result["hidden"] = torch.stack(answer.hidden_states)
    save_file({k: v.contiguous() for k, v in result.items()}, out)
    return report


def generate(folder, tensors, new_tokens):
    """Greedy continuation of left-padded prompts, never stopped early."""
    model, _ = load(folder)
    x = load_file(tensors)
    tokens = model.generate(
        input_ids=x["tokens"].long(),
        attention_mask=x["mask"].long(),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
        eos_token_id=None,
    )
    return {"tokens": tokens[:, x["tokens"].shape[1] :].tolist()}


def continuation(folder, prompt, new_tokens):
    """Greedy continuation of token ids, ended as the folder says; and what it says, as generate uses it."""
    model, _ = load(folder)
    made = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=new_tokens)
    return {"tokens": made[0, len(prompt) :].tolist(), "said": model.generation_config.to_dict()}


def saved_keys(folder):
    """What save_pretrained of the class writes, from the folder's configuration alone."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = fresh(config)
    with tempfile.TemporaryDirectory() as d:
        model.save_pretrained(d)
        return {"shapes": {k: list(v.shape) for k, v in load_file(f"{d}/model.safetensors").items()}}


def make_paper(kind, folder, config, seed):
    """A model of paper_models.py with random weights: config.json and model.safetensors."""
    os.makedirs(folder)
    save_file(paper_models.draw(kind, config, seed), f"{folder}/model.safetensors")
    with open(f"{folder}/config.json", "w") as f:
        json.dump(config, f)
    return {}


def paper_logits(kind, folder, tensors, out, new_tokens=0):
    """tensors: tokens, mask, positions [B, T] -> logits [B, T, V]; and a greedy continuation, each token anew."""
    weights, x = load_file(f"{folder}/model.safetensors"), load_file(tensors)
    with open(f"{folder}/config.json") as f:
        config = json.load(f)
    tokens, mask, positions = (x[name].long() for name in ("tokens", "mask", "positions"))
    model = paper_models.MODELS[kind]
    save_file({"logits": model.logits(config, weights, tokens, mask, positions).contiguous()}, out)
    for _ in range(new_tokens):
        best = model.logits(config, weights, tokens, mask, positions)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
        mask = torch.cat([mask, torch.ones_like(best)], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    return {"tokens": tokens[:, x["tokens"].shape[1] :].tolist()}


def train(folder, tensors, out, steps, lr, betas, eps, weight_decay, clip_norm, no_decay=()):
    """AdamW steps on the weighted mean of the cross-entropy; parameters whose name ends so are not decayed.

    tensors: tokens, targets, positions, weights [B, T], attend [B, T, T] (1 where i sees j).
    Writes grad/KEY of the first step before clipping, and param/KEY after the last.
    """
    model, _ = load(folder)
    x = load_file(tensors)
    # additive mask: isolation of documents is spelled out here, independent of ours
    bias = torch.where(x["attend"][:, None] > 0, 0.0, torch.finfo(torch.float32).min)
    named = dict(model.named_parameters())
    skip = {k for k in named if k.endswith(tuple(no_decay))} if no_decay else set()
    groups = [
        {"params": [p for k, p in named.items() if k not in skip], "weight_decay": weight_decay},
        {"params": [p for k, p in named.items() if k in skip], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=tuple(betas), eps=eps)
    result, losses, norms = {}, [], []
    for i in range(steps):
        optimizer.zero_grad()
        scores = model(
            input_ids=x["tokens"].long(), attention_mask=bias, position_ids=x["positions"].long(), use_cache=False
        ).logits
        nll = F.cross_entropy(scores.flatten(0, 1), x["targets"].long().flatten(), reduction="none")
        loss = (nll * x["weights"].flatten()).sum() / x["weights"].sum()
        loss.backward()
        if i == 0:
            result |= {f"grad/{k}": p.grad.clone() for k, p in named.items()}
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item())
        optimizer.step()
    result |= {f"param/{k}": p.detach().clone() for k, p in named.items()}
    save_file(result, out)
    return {"loss": losses, "grad_norm": norms}


def masked_step(folder, tensors, out):
    """The loss of a masked language model and its gradients: the mean cross-entropy of `targets` where `weights` is 1.

    tensors: tokens (already masked), targets, positions, weights [B, T], attend [B, T, T] (1 where i sees j).
    """
    model, _ = load(folder)
    x = load_file(tensors)
    bias = torch.where(x["attend"][:, None] > 0, 0.0, torch.finfo(torch.float32).min)
    scores = model(input_ids=x["tokens"].long(), attention_mask=bias, position_ids=x["positions"].long()).logits
    labels = torch.where(x["weights"] > 0, x["targets"].long(), -100)
    loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    save_file({k: p.grad.clone() for k, p in model.named_parameters()}, out)
    return {"loss": loss.item()}


def sentences(folder, texts, out, length):
    """Mean of the last layer over the tokens of each text, divided by its norm, as sentence-transformers does."""
    t = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True)
    batch = t(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    save_file({"vectors": F.normalize(mean, dim=1).contiguous()}, out)
    return {"ids": [row[m > 0].tolist() for row, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]}


def count(config):
    """Parameters of the class that a config.json names, nothing of which is allocated."""
    config = dict(config)
    made = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        return {"count": sum(p.numel() for p in class_of(made.architectures)(made).parameters())}


def tokenize(folder, texts):
    """What AutoTokenizer makes of texts."""
    t = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [t(text)["input_ids"] for text in texts]
    return {
        "ids": ids,
        "decoded": [t.decode(i, skip_special_tokens=True) for i in ids],
        "class": type(t).__name__,
        "bos": t.bos_token_id,
        "eos": t.eos_token_id,
    }


def chat(folder, conversations, generate):
    """Each conversation as the tokenizer's chat template writes it, and its ids."""
    t = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [t.apply_chat_template(c, tokenize=False, add_generation_prompt=generate) for c in conversations]
    return {"texts": texts, "ids": [t.encode(text, add_special_tokens=False) for text in texts]}


def gguf(folder, file, tensors, new_tokens):
    """A GGUF file as transformers unpacks it. tensors: tokens [B, T], prompt [1, P] -> the mean loss in nats of each
    row's tokens after the first [B], and the greedy continuation of the prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    x = {k: v.long() for k, v in load_file(tensors).items()}
    with torch.no_grad():
        # a row at a time, in float64: torch's float32 sum over a vocabulary is off by 1e-4
        losses = [
            F.cross_entropy(model(input_ids=row[None]).logits[0, :-1].double(), row[1:]).item() for row in x["tokens"]
        ]
        made = model.generate(
            input_ids=x["prompt"], attention_mask=torch.ones_like(x["prompt"]), do_sample=False,
            max_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip
    return {"losses": losses, "tokens": made[0, x["prompt"].shape[1] :].tolist()}


CALLS = {
    f.__name__: f
    for f in (
        version, make, logits, generate, saved_keys, make_paper, paper_logits, continuation, train, masked_step,
        sentences, count, tokenize, chat, gguf,
    )
}  # fmt: skip

for line in sys.stdin:
    request = json.loads(line)
    try:
        answer = {"ok": CALLS[request.pop("call")](**request)}
    except Exception:
        answer = {"error": traceback.format_exc()}
    answers.write(json.dumps(answer) + "\n")
