"""What a source finds besides documents: records that are none, and what a user should know of the files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FIRST = 10
"""Bad records that are named"""


class Bad(NamedTuple):
    """A record that is no document."""

    where: str
    """File and line, or row"""
    why: str


class Remark(NamedTuple):
    """Something that is not wrong and yet may not be meant."""

    what: str
    """The same words for the same thing: equal remarks are counted"""
    where: str = ""
    """The first place is shown"""


@dataclass(kw_only=True)
class Report:
    """What was found while a source was read."""

    bad: int = 0
    """Records that are no documents"""
    first: list[Bad] = field(default_factory=list)
    """The first ten of them"""
    remarks: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Remark -> how often, and where first"""

    def add(self, found: Bad | Remark) -> None:
        if isinstance(found, Bad):
            self.bad += 1
            self.first += [found] if len(self.first) < FIRST else []
        else:
            times, where = self.remarks.get(found.what, (0, found.where))
            self.remarks[found.what] = (times + 1, where)

    @property
    def named(self) -> str:
        """The first bad records, those with one reason together: "a.jsonl:3, a.jsonl:7: not JSON"."""
        reasons: dict[str, list[str]] = {}
        for one in self.first:
            reasons.setdefault(one.why, []).append(one.where)
        return "; ".join(f"{', '.join(places)}: {why}" for why, places in reasons.items())

    def json(self) -> dict[str, Any]:
        """For the manifest of a store; empty if there is nothing to say."""
        bad = {"bad_records": {"count": self.bad, "first": [list(one) for one in self.first]}} if self.bad else {}
        return bad | ({"remarks": {what: list(found) for what, found in self.remarks.items()}} if self.remarks else {})


def lines(sources: Iterable[Mapping[str, Any]]) -> list[str]:
    """What to say of the sources in a manifest, in lines."""
    said = []
    for source in sources:
        name = source["name"]
        if bad := source.get("bad_records"):
            report = Report(first=[Bad(*one) for one in bad["first"]])
            more = f" and {bad['count'] - len(report.first):,} more" if bad["count"] > len(report.first) else ""
            said.append(f"{name}: {bad['count']:,} bad records were left out: {report.named}{more}")
        for what, (times, where) in source.get("remarks", {}).items():
            place = f" ({times:,} times, first in {where})" if times > 1 else f" ({where})" if where else ""
            said.append(f"{name}: {what}{place}")
        if source.get("licence") == UNKNOWN:
            said.append(f'{name}: its licence is unknown; set licence="..." before you share the data or a model')
    return said


UNKNOWN = "unknown"
"""The licence of a source that names none"""


def keys_twice(text: str | bytes) -> tuple[Any, list[str]]:
    """A JSON value, and the keys that an object in it holds twice: the last of them counts.

    Raises:
        ValueError: it is not JSON.
    """
    twice: list[str] = []

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            seen: set[str] = set()
            twice.extend(key for key, _ in pairs if key in seen or seen.add(key))
        return value

    return json.loads(text, object_pairs_hook=object_of), list(dict.fromkeys(twice))
