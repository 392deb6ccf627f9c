"""Trees of arrays by path: `layers/attn/q`."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax

from slmjax.errors import UserError


def path_of(key_path: Sequence[Any]) -> str:
    """The keys of a jax key path joined by `/`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Tree -> {path: leaf}, in the tree's own order."""
    return {path_of(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """{path: leaf} -> nested dict. The inverse of `flatten` for nested dicts."""
    out: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = out
        *parents, last = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return out


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`jax.tree.map` whose function takes the path first."""
    return jax.tree_util.tree_map_with_path(lambda p, *xs: f(path_of(p), *xs), tree, *rest, is_leaf=is_leaf)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether any glob (`layers/attn/*`; `*` crosses `/`) matches the path."""
    return any(fnmatch.fnmatchcase(path, p) for p in patterns)


def mask(tree: Any, patterns: Sequence[str]) -> Any:
    """A tree of bools: True where a pattern matches the path.

    Raises:
        UserError: a pattern matches nothing.
    """
    paths = list(flatten(tree))
    for p in patterns:
        if not any(fnmatch.fnmatchcase(path, p) for path in paths):
            raise UserError(f"pattern {p!r} matches no parameter; the parameters are: {', '.join(paths)}")
    return map_with_path(lambda path, _: matches(path, patterns), tree)


def without(tree: Any, paths: Set[str]) -> Any:
    """A nested dict without the leaves at these paths."""
    return unflatten({path: x for path, x in flatten(tree).items() if path not in paths})


def is_axes(x: Any) -> bool:
    """Whether x is one parameter's tuple of logical axes."""
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


def count(tree: Any) -> int:
    """Number of array elements."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves (arrays or ShapeDtypeStructs)."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
