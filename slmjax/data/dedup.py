"""Exact and near-duplicate removal. Of each group of duplicates the first document, in source order, stays.

Near duplicates: MinHash over word n-grams with locality-sensitive hashing (Broder 1997; Leskovec et al., "Mining of
Massive Datasets", ch. 3; Lee et al. 2021, arXiv:2107.06499). `datasketch` does the permutations and picks bands and
rows; shingles are hashed and buckets are grouped in numpy, since its own index keeps a Python dict entry for each
document and band, which is slow and large at millions of documents.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import xxhash

_SHINGLES_AT_ONCE = 1 << 13  # bounds the [shingles, permutations] array of a very long document
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Documents whose sets of word n-grams have a Jaccard similarity of at least `threshold` count as duplicates."""

    threshold: float = 0.8
    """1.0 removes exact duplicates only"""
    ngram: int = 5
    """Words of a shingle"""
    permutations: int = 128

    @property
    def near(self) -> bool:
        """Whether near duplicates are removed too."""
        return self.threshold < 1.0


def exact_hash(text: str) -> tuple[int, int]:
    """128 bits of the text as two uint64."""
    value = xxhash.xxh3_128_intdigest(text.encode())
    return value >> 64, value & 0xFFFFFFFFFFFFFFFF


def shingles(text: str, ngram: int) -> np.ndarray:
    """uint32 hashes of the word n-grams of a text, case folded; a shorter text is one shingle."""
    digest = xxhash.xxh3_64_intdigest
    words = np.fromiter((digest(w) for w in text.lower().encode().split()), np.uint64)
    n = min(ngram, len(words))
    if n == 0:
        return np.zeros(1, np.uint32)
    rolled = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        rolled = (rolled ^ words[i : i + len(rolled)]) * _MIX
        rolled ^= rolled >> np.uint64(29)
    return (rolled >> np.uint64(32)).astype(np.uint32)


@cache
def _minhash(permutations: int) -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=permutations, seed=1, scheme="affine32", hashfunc=_identity)


def _identity(value: Any) -> Any:
    return value


@cache
def _bands(threshold: float, permutations: int) -> tuple[int, int]:
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=permutations)
    return index.b, index.r


def signature(text: str, dedup: Dedup) -> np.ndarray:
    """uint32 [permutations]: the MinHash of one document."""
    minhash = _minhash(dedup.permutations).copy()
    hashes = np.unique(shingles(text, dedup.ngram))
    for start in range(0, len(hashes), _SHINGLES_AT_ONCE):
        minhash.update_batch(hashes[start : start + _SHINGLES_AT_ONCE])
    return minhash.hashvalues.astype(np.uint32)


def band_keys(signatures: np.ndarray, dedup: Dedup) -> np.ndarray:
    """[n, permutations] -> uint64 [n, bands]: documents that share a key in a band are candidates."""
    bands, rows = _bands(dedup.threshold, dedup.permutations)
    values = signatures[:, : bands * rows].reshape(len(signatures), bands, rows).astype(np.uint64)
    keys = np.zeros(values.shape[:2], np.uint64)
    for i in range(rows):
        keys = (keys ^ values[:, :, i]) * _MIX
        keys ^= keys >> np.uint64(32)
    return keys


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """uint64 [n, 2] -> bool [n]: True where an earlier document has the same hash."""
    pairs = np.ascontiguousarray(hashes).view([("high", np.uint64), ("low", np.uint64)]).reshape(-1)
    _, first = np.unique(pairs, return_index=True)
    duplicate = np.ones(len(pairs), bool)
    duplicate[first] = False
    return duplicate


def near_duplicates(signatures: np.ndarray, keys: np.ndarray, skip: np.ndarray, dedup: Dedup) -> np.ndarray:
    """bool [n]: True where an earlier kept document shares a band and agrees in `threshold` of the permutations.

    Args:
        signatures: uint32 [n, permutations], may be a memory map: only candidates are read.
        keys: uint64 [n, bands].
        skip: bool [n], documents that have been dropped before.
    """
    alive = np.flatnonzero(~skip)
    # document -> its (band, bucket) pairs that other documents share
    shared: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for band in range(keys.shape[1]):
        _, bucket, count = np.unique(keys[alive, band], return_inverse=True, return_counts=True)
        for i in np.flatnonzero(count[bucket] > 1):
            shared[int(alive[i])].append((band, int(bucket[i])))
    duplicate = np.zeros(len(skip), bool)
    kept: dict[tuple[int, int], list[int]] = defaultdict(list)
    for document in sorted(shared):
        candidates = sorted({c for bucket in shared[document] for c in kept[bucket]})
        if candidates:
            agreement = (signatures[candidates] == signatures[document]).mean(axis=1)
            duplicate[document] = bool((agreement >= dedup.threshold).any())
        if not duplicate[document]:
            for bucket in shared[document]:
                kept[bucket].append(document)
    return duplicate
