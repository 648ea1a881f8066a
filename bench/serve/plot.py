"""A run as one SVG: the share of TTFT, ITL and E2E latencies under each time, and tokens per second over time. Pure: figures to text.

Written by hand, since four line charts need no plotting library: an SVG opens in every browser and diffs in git.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from bench.serve.answers import Answer
from bench.serve.metrics import Times, tokens_by_second

_PANEL_W, _PANEL_H, _LEFT, _TOP, _GAP = 330, 190, 56, 46, 74
_MAX_POINTS = 400
_TICKS = 5
_MARKED = (0.5, 0.9, 0.99)
_BINS = 120

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart. points: by x. marks: values of y at which x is written beside the line."""

    title: str
    x_label: str
    points: Points
    top: float
    marks: Sequence[float] = ()


def picture(answers: Sequence[Answer], title: str) -> str:
    """The SVG's text. Answers that failed are left out."""
    good = [answer for answer in answers if answer.succeeded]
    times = [Times.of(answer) for answer in good]
    panels = [
        _shares("time to first token", [item.ttft_s for item in times]),
        _shares("inter-token latency", [gap for item in times for gap in item.itl_s]),
        _shares("end-to-end latency", [item.e2el_s for item in times]),
        _throughput(good),
    ]
    width, height = _LEFT + 2 * (_PANEL_W + _GAP), _TOP + 2 * (_PANEL_H + _GAP)
    drawn = [
        _drawn(panel, _LEFT + column * (_PANEL_W + _GAP), _TOP + 24 + row * (_PANEL_H + _GAP)) for (row, column), panel in _placed(panels)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{_LEFT}" y="24" font-size="14">{escape(title)}</text>',
            *drawn,
            "</svg>\n",
        ]
    )


def shares(seconds: Sequence[float]) -> list[tuple[float, float]]:
    """(milliseconds, share of values up to there), of all values or of as many as can be seen."""
    values = np.sort(np.array(seconds, np.float64)) * 1e3
    spaced = np.linspace(0, len(values) - 1, min(len(values), _MAX_POINTS)).round()
    return [(float(values[i]), (i + 1) / len(values)) for i in np.unique(spaced.astype(np.int64)).tolist()]


def _shares(title: str, seconds: Sequence[float]) -> Panel:
    return Panel(f"{title}: share of values", "ms", shares(seconds), 1.0, _MARKED)


def _throughput(answers: Sequence[Answer]) -> Panel:
    span_s = max((answer.end_s for answer in answers), default=0.0) - min((answer.due_s for answer in answers), default=0.0)
    width_s = max(span_s / _BINS, 0.05)
    rates = tokens_by_second(answers, width_s)
    return Panel("output tokens per second", "s", [((i + 0.5) * width_s, rate) for i, rate in enumerate(rates)], max(rates, default=1.0))


def _placed(panels: Sequence[Panel]) -> Sequence[tuple[tuple[int, int], Panel]]:
    return [(divmod(number, 2), panel) for number, panel in enumerate(panels)]


def _drawn(panel: Panel, left: float, top: float) -> str:
    right = max((x for x, _ in panel.points), default=1.0) or 1.0
    bottom = top + _PANEL_H

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / right * _PANEL_W, bottom - y / panel.top * _PANEL_H

    parts = [f'<text x="{left}" y="{top - 8}">{escape(panel.title)}</text>']
    for value in ticks(right):
        x, _ = place(value, 0)
        parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{value:g}</text>')
    for value in ticks(panel.top):
        _, y = place(0, value)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + _PANEL_W}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="{left + _PANEL_W}" y="{bottom + 28}" text-anchor="end">{panel.x_label}</text>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in panel.points))
    parts.append(f'<polyline points="{path}" fill="none" stroke="#1f5fa8" stroke-width="1.6"/>')
    for mark in panel.marks:
        found = next((x for x, y in panel.points if y >= mark), None)
        if found is not None:
            x, y = place(found, mark)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#c0392b"/>')
            parts.append(f'<text x="{x - 6:.1f}" y="{y + 13:.1f}" fill="#c0392b" text-anchor="end">p{mark * 100:g} {found:.3g}</text>')
    return "\n".join(parts)


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to `most`, a handful."""
    step = 10.0 ** math.floor(math.log10(most / _TICKS)) if most > 0 else 1.0
    step *= next(factor for factor in (1, 2, 5, 10) if most / (step * factor) <= _TICKS)
    return [round(step * i, 10) for i in range(int(most / step + 1e-9) + 1)]
