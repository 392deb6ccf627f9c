"""A small experiment whose data need not exist, and a folder of a sweep with made-up runs."""

from slmjax.config import Experiment
from slmjax.data.spec import PackedText, Part
from slmjax.models.families.llama import llama
from slmjax.optim.schedules import Cosine
from slmjax.serialise import to_json
from slmjax.sweeps.cells import Cell
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


def surface(params, tokens):
    """A loss as Chinchilla's law has it."""
    return 1.7 + 30.0 / params**0.35 + 90.0 / tokens**0.35


def noisy(cell):
    """The loss of a cell of `isoflops`, 0.02% off the surface."""
    return surface(cell.params, cell.tokens) * (1 + 2e-4 * (-1) ** cell.seed)


def isoflops(path):
    """Three budgets of five sizes each, and a held-out cell; none has run."""
    sizes = {c: [(c / 120) ** 0.5 * 2.0**k for k in range(-2, 3)] for c in (1e10, 1e11, 1e12)}
    points = [(round(n), round(c / 6 / n)) for c, several in sizes.items() for n in several]
    pairs = []
    for i, (n, d) in enumerate(points):
        cell = Cell(experiment=base(seed=i), tags={"budget": float(f"{6 * n * d:.2g}")})
        pairs.append((cell, planned(cell, params=n, tokens=d)))
    held = Cell(experiment=base(steps=11))
    pairs.append((held, planned(held, params=200_000, tokens=5_000_000, held_out=True)))
    return made_up(path, pairs)
