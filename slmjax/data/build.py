"""From a recipe to a token store: clean -> deduplicate -> tokenizer -> tokenise -> write.

Intermediate results are kept in a folder beside the target, in parts of a few megabytes of text, each written under a
temporary name and renamed when complete. A build that follows a killed one uses them; since every part is a pure
function of the recipe and the files, the store is byte for byte the same. The manifest is written last, then the folder
is renamed: a store is either complete or absent.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from slmjax import __version__
from slmjax.data import stages, writing
from slmjax.data.recipe import Recipe, digest, load_recipe
from slmjax.data.token_store import CHUNK, SHARD, TokenStore, files_of, read_file, url_of
from slmjax.data.work import PART_BYTES, Context, Progress, silent, write_bytes
from slmjax.errors import DataError
from slmjax.files import at
from slmjax.lock import hold


def build(
    recipe: Recipe,
    out: str | Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    shard: int = SHARD,
    part_bytes: int = PART_BYTES,
    work: str | Path | None = None,
) -> TokenStore:
    """Build the store at `out`, a folder or URL; if it exists already, from the same recipe, it is opened.

    Args:
        workers: number of processes; default: one for each core this process may use.
        shard: values in one file of the store, a multiple of `token_store.CHUNK`.
        part_bytes: text in one unit of work.
        work: folder for intermediate files, removed at the end; default beside `out`, or in the cache for a URL.

    Raises:
        DataError: a source is missing or malformed, the corpus is empty, or `out` exists and is not this store.
    """
    if shard < 1 or shard % CHUNK:
        raise DataError(f"shard is {shard}; expected a multiple of {CHUNK} values")
    show = progress or silent
    files = recipe.files()
    show("checking files", 0, sum(map(len, files)))
    identity = {
        "recipe": recipe.identity(),
        "files": writing.describe_files(files, at(recipe.root), show),
        "shard": shard,
        "part_bytes": part_bytes,
    }
    if tokenizer_files := recipe.tokenizer_files():
        identity["tokenizer"] = writing.describe_files([tokenizer_files], at(recipe.root), silent)[0]
    local = _local_folder(out)
    if (existing := _existing(out, local, digest(identity))) is not None:
        return existing
    folder = at(work) if work else local.with_name(local.name + ".building") if local else _remote_work(out)
    with _locked(folder):
        _keep_or_clear(folder, digest(identity))
        context = Context(
            recipe=recipe,
            folder=folder,
            workers=workers or cores(),
            show=show,
            shard=shard,
            part_bytes=part_bytes,
        )
        parts = stages.clean(context)
        selection = stages.select(context, parts)
        tokenizer = stages.make_tokenizer(context, parts, selection)
        stages.tokenise(context, parts, selection)
        location = url_of(folder / "store") if local else url_of(out)
        arrays = writing.write(context, parts, location, tokenizer)
        writing.write_manifest(
            context,
            parts,
            selection,
            tokenizer,
            location,
            arrays,
            identity | {"digest": digest(identity), "version": __version__},
        )
        if local:
            local.parent.mkdir(parents=True, exist_ok=True)
            if local.exists():
                local.rmdir()  # it is empty, or `_existing` would have raised
            os.rename(folder / "store", local)
    shutil.rmtree(folder)
    return TokenStore(out)


def open_source(source: str | Recipe, cache: str | Path | None = None, progress: Progress | None = None) -> TokenStore:
    """A token store by folder or URL; a recipe, or recipe file, is built into the cache unless it is there.

    Raises:
        DataError: see `TokenStore` and `build`.
    """
    if isinstance(source, str) and not source.endswith(".py"):
        return TokenStore(source)
    recipe = load_recipe(source) if isinstance(source, str) else source
    groups = [*recipe.files(), *([files] if (files := recipe.tokenizer_files()) else [])]
    stats = [[(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in group] for group in groups]
    folder = cache_folder(cache) / "stores" / f"{recipe.name}-{digest([recipe.identity(), stats])[:12]}"
    return TokenStore(folder) if (folder / "manifest.json").is_file() else build(recipe, folder, progress=progress)


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where built stores and packing plans are kept: `cache`, else $SLMJAX_CACHE, else ~/.cache/slmjax."""
    return at(cache or os.environ.get("SLMJAX_CACHE") or "~/.cache/slmjax")


def cores() -> int:
    """Number of CPU cores that this process may use; all of them where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _local_folder(out: str | Path) -> Path | None:
    text = str(out)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return None if "://" in text else at(text).resolve()


def _remote_work(out: str | Path) -> Path:
    return cache_folder() / "building" / digest(url_of(out))[:12]


def _existing(out: str | Path, local: Path | None, wanted: str) -> TokenStore | None:
    if read_file(files_of(out), "manifest.json") is None:
        if local and local.exists() and (not local.is_dir() or any(local.iterdir())):
            raise DataError(f"{out}: exists and is not a token store; choose another --out")
        return None
    store = TokenStore(out)
    if store.manifest["build"]["digest"] != wanted:
        raise DataError(f"{out}: holds a store of another recipe or of other text; choose another --out or delete it")
    return store


def _locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """One build at a time works in a folder. The lock dies with its process."""
    advice = "is building there; wait for it, or choose another --out"
    return hold(folder / "lock", lambda owner: DataError(f"{folder}: {owner} {advice}"))


def _keep_or_clear(folder: Path, identity: str) -> None:
    """Keeps the files of an interrupted build if its identity is the same, and else removes them."""
    mark = folder / "identity"
    if mark.is_file() and mark.read_text() == identity:
        return
    for path in folder.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_bytes(mark, identity.encode())
