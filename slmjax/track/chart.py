"""Line charts as inline SVG that follows the page's colours, light or dark. No library, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 44
COLOURS = 10
"""Of `report_style`; further series take them again"""
POINTS = 300
"""A longer line is drawn as this many means, with a band from the least to the greatest value behind"""


class Series(NamedTuple):
    """One line. Points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False
    """Whether points are marked, which suits few points"""
    half_widths: Sequence[float] = ()
    """Of the intervals of y, drawn as a band; of a single point, as a bar. nan: none"""
    text: str = ""
    """Written beside the last point"""


class Bucket(NamedTuple):
    """Neighbouring points taken together."""

    x: float
    mean: float
    low: float
    high: float


def downsample(
    x: Sequence[float], y: Sequence[float], points: int = POINTS, half_widths: Sequence[float] = ()
) -> list[Bucket]:
    """At most `points` buckets of equally many points each, without those that are not finite."""
    around = [h if math.isfinite(h) else 0.0 for h in half_widths] or [0.0] * len(x)
    pairs = [(a, b, h) for a, b, h in zip(x, y, around, strict=True) if math.isfinite(a) and math.isfinite(b)]
    size = max(1, math.ceil(len(pairs) / points))
    buckets = []
    for start in range(0, len(pairs), size):
        xs, ys, hs = zip(*pairs[start : start + size], strict=True)
        low, high = (min(y - h for y, h in zip(ys, hs, strict=True)), max(y + h for y, h in zip(ys, hs, strict=True)))
        buckets.append(Bucket(math.fsum(xs) / len(xs), math.fsum(ys) / len(ys), low, high))
    return buckets


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, between the two."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A tick's number: 0.002, 3.5, 12 k, 4 M."""
    if value == 0:
        return "0"
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size * 0.9999:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.0e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:.4g}"


def chart(title: str, series: Sequence[Series], *, x_label: str = "step", from_zero: bool = False) -> str:
    """An SVG element for a page with the style sheet of `report_style`. Empty series are left out."""
    drawn = [(s, buckets) for s in series if (buckets := downsample(s.x, s.y, half_widths=s.half_widths))]
    if not drawn:
        return (
            f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="empty">no data yet</p></figure>'
        )
    x_low, x_high = (f(x for s, _ in drawn for x in s.x if math.isfinite(x)) for f in (min, max))
    x_high = x_high if x_high > x_low else x_low + 1
    low, high = _range([b for _, buckets in drawn for b in buckets], from_zero)

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (high - min(max(y, low), high)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(px, py, ticks(x_low, x_high, 6), ticks(low, high), x_label)]
    for number, (s, buckets) in enumerate(drawn):
        parts.append(_line(px, py, buckets, f"s{number % COLOURS}", s.dots))
        parts.append(_beside(px(buckets[-1].x), py(buckets[-1].mean), s.text) if s.text else "")
    legend = "".join(f'<span class="key s{n % COLOURS}">{escape(s.name)}</span>' for n, (s, _) in enumerate(drawn))
    legend = legend if len(drawn) > 1 else ""
    summary = ", ".join(f"{s.name} ends at {b[-1].mean:.4g}" for s, b in drawn)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {summary}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _range(buckets: Sequence[Bucket], from_zero: bool) -> tuple[float, float]:
    """Limits of the y axis: all values, but a few extreme ones (compilation, spikes) may be cut off."""
    lows, highs = sorted(b.low for b in buckets), sorted(b.high for b in buckets)
    low, high = lows[0], highs[-1]
    usual_low, usual_high = lows[len(lows) // 50], highs[-1 - len(highs) // 50]
    if high - usual_high > 1.5 * (usual_high - usual_low) > 0:
        high = usual_high + 0.1 * (usual_high - usual_low)
    low = min(0.0, low) if from_zero else low
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - margin), high + margin


def _grid(px, py, xs: Sequence[float], ys: Sequence[float], x_label: str) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = [f'<path class="grid" d="M{LEFT} {py(y):.1f}H{right}"/>' for y in ys]
    lines += [f'<text x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{label(y)}</text>' for y in ys]
    lines += [_below(px(x), bottom + 18, label(x)) for x in xs]
    lines.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    lines.append(f'<text class="name" x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    return "".join(lines)


def _line(px, py, buckets: Sequence[Bucket], style: str, dots: bool) -> str:
    points = [f"{px(b.x):.1f} {py(b.mean):.1f}" for b in buckets]
    out = ""
    if any(b.high > b.low for b in buckets):
        edge = [f"{px(b.x):.1f} {py(b.high):.1f}" for b in buckets]
        edge += [f"{px(b.x):.1f} {py(b.low):.1f}" for b in reversed(buckets)]
        out += f'<path class="band {style}" d="M{"L".join(edge)}Z"/>'
    out += f'<path class="line {style}" d="M{"L".join(points)}"/>'
    if len(points) == 1 and buckets[0].high > buckets[0].low:
        low, high = py(buckets[0].low), py(buckets[0].high)
        out += f'<path class="line {style}" d="M{px(buckets[0].x):.1f} {low:.1f}V{high:.1f}"/>'
    if (dots and len(points) <= 60) or len(points) == 1:
        out += "".join(f'<circle class="{style}" cx="{p.split()[0]}" cy="{p.split()[1]}" r="3"/>' for p in points)
    return out


def _below(x: float, y: float, text: str) -> str:
    """The number of a tick, centred below it where the picture is wide enough for that."""
    beyond = x + 3.3 * len(text) > WIDTH - 2
    anchor, at = ("end", WIDTH - 2.0) if beyond else ("middle", x)
    return f'<text x="{at:.1f}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _beside(x: float, y: float, text: str) -> str:
    """A word to the right of a point, or to its left where the picture ends."""
    left = x > WIDTH - RIGHT - 9 * len(text) - 8
    anchor, dx = ("end", -6) if left else ("start", 6)
    return f'<text x="{x + dx:.1f}" y="{y - 4:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
