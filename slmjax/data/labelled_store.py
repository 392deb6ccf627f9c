"""From files of labelled text to a folder of token ids, made once.

```
about.json                          written last: name, labels, vocabulary, splits, fingerprints
tokenizer.json tokenizer_config.json
{train,validation}_tokens.npy       ids of all texts, one after another, without BOS and EOS
{train,validation}_offsets.npy      [texts + 1]: where each text begins; the last is the number of tokens
{train,validation}_labels.npy       int32 [texts]: index of each label
```
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmjax.data.labelled_files import Example, examples
from slmjax.data.tokenizer import Tokenizer
from slmjax.data.work import Progress
from slmjax.errors import DataError

if TYPE_CHECKING:
    from slmjax.data.labelled import LabelledText

VERSION = 1  # raise it when the same texts give other arrays than before
ABOUT = "about.json"
CHUNK = 1024  # texts that are tokenised at once


def make(data: LabelledText, train: Sequence[Path], validation: Sequence[Path], folder: Path, show: Progress) -> None:
    """Reads, tokenises and writes; the folder appears when it is complete."""
    rows = list(_read(data, train, show))
    held = list(_read(data, validation, show))
    if not validation:
        rows, held = _split(rows, data.held_out)
    labels = data.labels or _sorted({row.label for row in rows})
    if len(labels) < 2:
        raise DataError(f"{data.title}: labels are {', '.join(labels) or 'none'}; a classifier needs at least two")
    texts = (row.text for row in rows)
    size = sum(len(row.text) for row in rows)
    step = max(1, -(-size // getattr(data.tokenizer, "sample_bytes", size or 1)))
    show("tokenizer", 0, 1)
    tokenizer = data.tokenizer.make(list(texts)[::step], Path())
    show("tokenizer", 1, 1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer.save(building)
        splits = {
            split: _write(building, split, some, labels, tokenizer, show)
            for split, some in (("train", rows), ("validation", held))
        }
        about = {
            "name": data.title,
            "licence": data.licence,
            "origin": data.origin,
            "labels": labels,
            "vocab": tokenizer.vocab,
            "bos": tokenizer.bos,
            "eos": tokenizer.eos,
            "splits": splits,
        }
        (building / ABOUT).write_text(json.dumps(about, indent=1) + "\n", "utf-8")
        os.rename(building, folder)
    except OSError:
        if not (folder / ABOUT).is_file():  # else another process has made it in the meantime
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _read(data: LabelledText, files: Sequence[Path], show: Progress) -> Iterator[Example]:
    for done, file in enumerate(files, 1):
        yield from examples(file, data.text, data.label)
        show("reading", done, len(files))


def _split(rows: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(train, held out): a row is held out if the hash of its text, as a fraction of 2^64, is below `share`."""
    out: tuple[list[Example], list[Example]] = ([], [])
    for row in rows:
        part = int.from_bytes(hashlib.sha256(row.text.encode()).digest()[:8], "little") / 2**64
        out[part < share].append(row)
    return out


def _sorted(labels: set[str]) -> tuple[str, ...]:
    """Whole numbers by value, anything else alphabetically."""
    numbers = all(re.fullmatch(r"-?\d+", label) for label in labels)
    return tuple(sorted(labels, key=int if numbers else str))


def _write(
    folder: Path, split: str, rows: Sequence[Example], labels: Sequence[str], tokenizer: Tokenizer, show: Progress
) -> dict[str, Any]:
    """The arrays of a split, and what about.json says of them."""
    number = {label: i for i, label in enumerate(labels)}
    digest = hashlib.sha256(f"{VERSION} {tokenizer.fingerprint} {json.dumps(list(labels))}\n".encode())
    for row in rows:
        if row.label not in number:
            raise DataError(f"{row.where}: unknown label {row.label!r}; expected one of: {', '.join(labels)}")
        digest.update(json.dumps([row.text, row.label]).encode())
    ids, lengths = [np.zeros(0, tokenizer.dtype)], [np.zeros(0, np.int64)]
    for start in range(0, len(rows), CHUNK):
        encodings = tokenizer.raw.encode_batch_fast(
            [row.text for row in rows[start : start + CHUNK]], add_special_tokens=False
        )
        for row, encoding in zip(rows[start : start + CHUNK], encodings, strict=True):
            if not encoding.ids:
                raise DataError(f"{row.where}: the tokenizer makes no token of its text; leave the row out")
        ids.append(np.array([i for encoding in encodings for i in encoding.ids], tokenizer.dtype))
        lengths.append(np.array([len(encoding.ids) for encoding in encodings], np.int64))
        show(f"tokenising {split}", min(start + CHUNK, len(rows)), len(rows))
    tokens, sizes = np.concatenate(ids), np.concatenate(lengths)
    np.save(folder / f"{split}_tokens.npy", tokens)
    np.save(folder / f"{split}_offsets.npy", np.append(0, np.cumsum(sizes)))
    np.save(folder / f"{split}_labels.npy", np.array([number[row.label] for row in rows], np.int32))
    return {"texts": len(rows), "tokens": len(tokens), "fingerprint": digest.hexdigest()}
