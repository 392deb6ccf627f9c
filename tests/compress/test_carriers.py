"""Which formats hold a quantization exactly is said before training, and agrees with what the export then does."""

from dataclasses import replace

import pytest
from running import slmjax

from slmjax.compress.quant.blocks import PerGroup
from slmjax.compress.quant.float4 import MXFP4, NVFP4
from slmjax.compress.quant.learned import LSQ, SEQ, Balanced, Binary
from slmjax.compress.quant.uniform import Asymmetric, BitNet, Symmetric
from slmjax.compress.quant.view import Quantize, Rule, quantizes
from slmjax.experiment_file import load_experiment
from slmjax.models.families.llama import llama
from slmjax.runs.carriers import check, fits, lines
from slmjax.views import EMA, Chain, Identity

WIDE = llama(layers=1, width=256, heads=4, kv_heads=4, hidden=512, vocab=384, context=64)


@pytest.fixture
def base(tiny):
    return replace(load_experiment(str(tiny.file))[0], model=WIDE)


@pytest.mark.parametrize(
    ("quantizer", "hf", "gguf"),
    [
        (Symmetric(bits=8), "int8", "Q8_0"),
        (LSQ(bits=4), "int4", "Q4_0"),
        (LSQ(bits=3), "int3", "Q3_K"),
        (LSQ(bits=2), "int2", "TQ2_0"),
        (SEQ(), "int3", "Q2_K"),
        (Balanced(), "int3", "Q2_K"),
        (BitNet(), "int2", "TQ1_0"),
        (Binary(), "int2", "Q1_0"),
        (Asymmetric(bits=4), "int5", "Q4_K"),
        (LSQ(bits=4, granularity=PerGroup(size=32)), "int4", "Q4_0"),
        (LSQ(bits=2, granularity=PerGroup(size=64)), "int2", "Q2_0"),
        (MXFP4(), "MXFP4", "MXFP4"),
        (NVFP4(), "NVFP4", "NVFP4"),
    ],
    ids=str,
)
def test_the_carriers_of_the_specification(base, quantizer, hf, gguf):
    found = fits(replace(base, view=Quantize(rules=(Rule(quantizer=quantizer),))))
    assert len(found) == 7
    assert {fit.hf.name for fit in found} == {hf}
    assert {fit.gguf.name for fit in found} == {gguf}
    known = {"Q1_0": 1.125, "TQ1_0": 1.6875, "TQ2_0": 2.0625, "Q2_0": 2.25, "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_0": 4.5,
             "Q4_K": 4.5, "Q8_0": 8.5, "MXFP4": 4.25, "NVFP4": 4.5}  # fmt: skip
    assert all(fit.gguf.bits == known[gguf] for fit in found)
    least = known[hf] if hf in known else int(hf[3:])
    assert all(least <= fit.hf.bits < least + 1.2 for fit in found)


def test_one_format_is_enough(base):
    view = Quantize(rules=(Rule(quantizer=Asymmetric(bits=8)),))  # 9 bits in compressed-tensors
    found = fits(replace(base, view=Quantize(rules=(Rule(quantizer=LSQ(bits=4, granularity=PerGroup(size=16))),))))
    assert all(fit.hf.name and not fit.gguf.name for fit in found)
    assert any("cannot hold" in line for line in lines(found))
    with pytest.raises(Exception, match="no file format holds layers/attn/k exactly"):
        check(replace(base, view=view))


def test_a_run_that_no_format_holds_does_not_begin(tiny, tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from slmjax.compress.quant.uniform import Asymmetric\n"
        "from slmjax.compress.quant.view import Quantize, Rule\n"
        "from slmjax.experiment_file import load_experiment\n"
        "def experiment():\n"
        f"    base, _ = load_experiment({str(tiny.file)!r})\n"
        "    return replace(base, view=Quantize(rules=(Rule(quantizer=Asymmetric(bits=8)),)))\n"
    )
    done = slmjax("train", file, "--runtime.workdir", tmp_path / "run", "--runtime.data-dir", tiny.data_dir)
    assert done.code == 2
    assert "no file format holds" in done.err
    assert not (tmp_path / "run").exists()


def test_every_quantize_in_a_view_is_found():
    one, two = Quantize(rules=(Rule(quantizer=SEQ()),)), Quantize(rules=(Rule(quantizer=BitNet()),))
    assert quantizes(Chain(views=(EMA(of=one), Identity(), two))) == [one, two]
    assert quantizes(EMA()) == []
