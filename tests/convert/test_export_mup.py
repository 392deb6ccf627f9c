"""A model with the multipliers of CompleteP, through the gate of an export with stock transformers."""

import json

import pytest
from models.tiny import parameters

from slmjax.convert.export import export_hf
from slmjax.models.families.gpt2 import gpt2
from slmjax.models.families.llama import llama
from slmjax.models.parametrisation import CompleteP


def sizes(width, **more):
    return {"layers": width // 16, "width": width, "heads": width // 8, "vocab": 97, "context": 64, **more}


def lama(width, **more):
    return llama(**sizes(width, kv_heads=width // 16, hidden=3 * width, **more))


CASES = {
    "Llama, untied, wider heads": (lama(16, tied=False), lama(32, tied=False, head_dim=32), "granite", ()),
    "GPT-2": (gpt2(**sizes(16)), gpt2(**sizes(32)), "gpt2", ("branch_scale = 0.5", "logits.scale = 0.5")),
}


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_computes_it(name, tmp_path, reference):
    base, large, model_type, folded = CASES[name]
    model = CompleteP(base=base).model(large)
    assert (model.pattern[0].branch_scale, model.logits.scale) == (0.5, 0.5)
    params = parameters(model, model.build(), scale=0.4)
    made = export_hf(model, params, tmp_path / "hf", reference_python=reference.python)
    assert made.folded == folded
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == model_type
    stock = [check for check in made.checks if "transformers" in check.name]
    assert stock
    assert all(check.passed for check in made.checks if check.passed is not None)
    assert any(check.passed for check in stock)
