"""A small experiment whose data need not exist, and a folder of a sweep with made-up runs."""

from slmjax.config import Experiment
from slmjax.data.spec import PackedText, Part
from slmjax.models.families.llama import llama
from slmjax.optim.schedules import Cosine
from slmjax.serialise import to_json
from slmjax.sweeps.folder import Folder, Planned, save
from slmjax.track.jsonl import encode

VOCAB, LENGTH, BATCH = 264, 32, 4


def base(**fields):
    given = {
        "name": "base",
        "model": llama(layers=1, width=16, heads=2, kv_heads=1, hidden=24, vocab=VOCAB, context=LENGTH),
        "data": PackedText(train=(Part(source="nowhere"),), length=LENGTH, batch=BATCH),
        "schedule": Cosine(peak_lr=1e-2),
        "steps": 10,
    }
    return Experiment(**{**given, **fields})


def planned(cell, *, params=1000, tokens=20000, flops=None, held_out=False, **fields):
    """A cell as sweep.json has it, with sizes that need not be those of its model."""
    sizes = {"params_nonembedding": params // 2, "vocab": VOCAB, "width": 16, "layers": 1, "length": LENGTH}
    given = {
        "hash": cell.hash, "label": cell.label, "steps": cell.experiment.steps, "seed": cell.experiment.seed,
        "params": params, "tokens": tokens, "flops": flops or 6.0 * params * tokens, "unique_tokens": float(tokens),
        "sizes": sizes, "seconds": 10.0, "memory": 1e6, "tags": dict(cell.tags), "held_out": held_out,
        "rung": None if cell.rung is None else vars(cell.rung),
    }  # fmt: skip
    return Planned(**(given | fields))


def made_up(path, cells, name="made-up", source=""):
    """A sweep's folder of planned cells, by (cell, planned)."""
    folder = Folder(path, name, tuple(p for _, p in cells), source)
    save(folder, {p.hash: to_json(c.experiment) for c, p in cells})
    return folder


def ran(folder, cell, *, loss=3.0, event="complete", step=None, elapsed=20.0, **fields):
    """Writes the records of a run of the cell, as training leaves them."""
    run = folder.run(cell)
    run.mkdir(parents=True, exist_ok=True)
    step = cell.steps if step is None else step
    rows = [{"step": n, "elapsed": elapsed * n / max(step, 1), "loss": 4.0} for n in range(1, step + 1)]
    if rows and event in ("complete", "started"):
        rows[-1] |= {"validation/loss": loss, "validation/loss_se": 0.01} if step == cell.steps else {}
    (run / "metrics.jsonl").write_bytes(b"".join(map(encode, rows)))
    events = [{"event": "created"}, {"event": "started"}, {"event": event, **fields}]
    (run / "ledger.jsonl").write_bytes(b"".join(map(encode, events)))
