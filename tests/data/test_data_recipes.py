"""The recipes that ship: the embedded corpus for real, the hub's data sets on local folders of the same layout."""

import hashlib
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_corpora import sentences

from slmjax.data.build import build
from slmjax.data.recipe import load_recipe
from slmjax.data.sources import Hub

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "data" / "recipes"


def module(name):
    namespace = {}
    exec(compile((RECIPES / f"{name}.py").read_text(), name, "exec"), namespace)
    return namespace["recipe"]


@pytest.mark.fast
def test_the_embedded_corpus_is_what_its_manifest_says():
    folder = ROOT / "data" / "english_classics"
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in manifest["files"]:
        raw = (folder / file["path"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == file["sha256"]
        assert len(raw) == file["bytes"] <= 3_000_000
        assert file["licence"] == "public domain"
    listed = {f["path"] for f in manifest["files"]}
    assert {p.name for p in folder.iterdir()} == listed | {"manifest.json", "LICENCE"}


def test_the_quickstart_recipe_builds(tmp_path):
    recipe = load_recipe(RECIPES / "english_classics.py")
    manifest = build(recipe, tmp_path / "out").manifest
    listed = json.loads((ROOT / "data" / "english_classics" / "manifest.json").read_text())
    assert manifest["documents"]["read"] == listed["documents"]
    assert [s["files"][0]["sha256"] for s in manifest["sources"]] == [f["sha256"] for f in listed["files"]]
    assert sum(s["bytes_read"] for s in manifest["sources"]) == listed["text_bytes"]
    assert manifest["tokenizer"]["vocab"] == 4096
    assert manifest["dtype"] == "uint16"
    assert 2_900_000 < manifest["tokens"] < 3_500_000
    assert manifest["splits"]["validation"]["tokens"] > 20_000


def hub_folder(folder, config, texts):
    """A data set as the hub has it: Parquet files, and configurations in the card."""
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.table({"text": texts, "id": list(map(str, range(len(texts))))}), folder / "data" / "0.parquet")
    entry = f"- config_name: {config}\n  data_files:\n  - split: train\n    path: data/*.parquet\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{entry}---\n")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "config"), [("tinystories", None), ("fineweb_edu", "sample-10BT"), ("wikipedia", "20231101.en")]
)
def test_hub_recipes_on_local_folders_of_the_same_layout(tmp_path, name, config):
    texts = [f"{t} " * 20 for t in sentences(60)]
    if config is None:
        (tmp_path / "copy" / "data").mkdir(parents=True)
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "copy" / "data" / "train-0.parquet"))
    else:
        hub_folder(tmp_path / "copy", config, texts)
    recipe = module(name)(path=str(tmp_path / "copy"))
    (source,) = recipe.sources
    assert isinstance(source, Hub)
    assert source.config == config
    store = build(recipe, tmp_path / "out", workers=1)
    assert store.manifest["documents"]["read"] == 60
    assert store.manifest["sources"][0]["licence"] == source.licence
    assert load_recipe(RECIPES / f"{name}.py").sources[0].path.count("/") == 1
