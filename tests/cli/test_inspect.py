"""`slmjax inspect` on a run and on an experiment."""

from running import ROOT, slmjax

from slmjax.experiment_file import load_experiment
from slmjax.models.flops import flops_per_token
from slmjax.runs.loading import load

ENCODER = ROOT / "experiments" / "pretrain" / "encoder.py"


def test_every_parameter_is_listed_and_the_counts_add_up(tiny, tiny_run):
    decoder = load(tiny_run).decoder
    for model in (tiny_run, tiny.file):
        done = slmjax("inspect", model)
        assert done.code == 0, done.err
        rows = [
            [c.strip() for c in line.strip("│ ").split("│")] for line in done.out.splitlines() if line.startswith("│")
        ]
        parameters = {row[0]: row for row in rows if row[0] in decoder.paths()}
        assert set(parameters) == set(decoder.paths())
        assert parameters["layers/attn/q"][1:5] == [
            "2 x 32 x 2 x 16",
            "float32",
            "layers, embed, heads, head_dim",
            "normal(0.02)",
        ]
        total = sum(int(row[5].replace(",", "")) for row in parameters.values())
        assert f"{total:,} parameters, {4 * total:,} bytes" in done.out
        flops = flops_per_token(decoder, 32)
        assert [row[1] for row in rows if row[0].startswith("(")] == [f"{n:,}" for n in flops]
    assert "slmjax doctor" in done.out


def test_the_head_of_an_encoder_is_counted_where_the_objective_reads_it():
    share, every = (slmjax("inspect", model, "--length", "128") for model in (ENCODER, "bert/base"))
    assert "sequences of 128, the head at 0.15 of all tokens" in share.out, share.err
    experiment, _ = load_experiment(str(ENCODER))
    assert f"{flops_per_token(experiment.model, 128, 0.15).attention:,}" in share.out
    assert "sequences of 128, the head at all tokens" in every.out, every.err


def test_length_changes_attention_alone(tiny):
    short, long = (slmjax("inspect", tiny.file, "--length", n).out for n in (16, 64))
    changed = [a for a, b in zip(short.splitlines(), long.splitlines(), strict=True) if a != b]
    assert len(changed) == 2
    assert "attention" in changed[1]


def test_published_sizes_are_inspected_without_being_made():
    done = slmjax("inspect", "llama/smollm2-135m")
    assert done.code == 0, done.err
    assert "134,515,008 parameters" in done.out
    assert "from slmjax.models.families.llama import smollm2_135m" in done.out
    typo = slmjax("inspect", "llama/smollm-135m")
    assert typo.code == 2
    assert "did you mean llama/smollm2-135m?" in typo.err
