"""Bars as an SVG file, written here: no plotting library is needed, and the file has no scripts and no fonts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#2563eb", "#9ca3af", "#f59e0b", "#10b981")
PANEL_WIDTH, PANEL_HEIGHT = 420, 260
LEFT, TOP, BOTTOM = 56, 48, 44
BAR_SHARE = 0.8
"""Part of a group's width that its bars fill."""


@dataclass(frozen=True)
class Panel:
    """Groups of bars, one bar a series in each."""

    title: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float]]
    """Name → a value a group; NaN: no bar."""
    limit: float | None = None
    """A dashed line at this value."""


def draw(panels: Sequence[Panel], *, columns: int = 2) -> str:
    """The SVG document of the panels, row by row, with one legend."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    rows = -(-len(panels) // columns)
    width, height = columns * PANEL_WIDTH, rows * PANEL_HEIGHT + 32
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, panel in enumerate(panels):
        x, y = index % columns * PANEL_WIDTH, index // columns * PANEL_HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel, colours), "</g>"]
    for index, (name, colour) in enumerate(colours.items()):
        x, y = LEFT + index * 180, height - 20
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 18, y + 10, name))
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, colours: Mapping[str, str]) -> list[str]:
    inner_width, inner_height = PANEL_WIDTH - LEFT - 16, PANEL_HEIGHT - TOP - BOTTOM
    known = [value for values in panel.series.values() for value in values if value == value]
    top = 1.1 * max([*known, panel.limit or 0.0, 1e-9])
    bottom = TOP + inner_height

    def height(value: float) -> float:
        return inner_height * value / top

    parts = [_text(LEFT, 24, panel.title, weight="bold")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - inner_height * share
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + inner_width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{top * share:.2g}", anchor="end"))
    slot = inner_width / max(1, len(panel.groups))
    bar = BAR_SHARE * slot / max(1, len(panel.series))
    for group, label in enumerate(panel.groups):
        start = LEFT + group * slot + (1 - BAR_SHARE) / 2 * slot
        parts.append(_text(LEFT + (group + 0.5) * slot, bottom + 18, label, anchor="middle"))
        for index, (name, values) in enumerate(panel.series.items()):
            value = values[group]
            if value != value:
                continue
            x, y = start + index * bar, bottom - height(value)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar - 2:.1f}" height="{height(value):.1f}" '
                f'fill="{colours[name]}"><title>{escape(name)}, {escape(label)}: {value:.3g}</title></rect>'
            )
            parts.append(_text(x + bar / 2 - 1, y - 4, f"{value:.2f}", anchor="middle", size=10))
    if panel.limit is not None:
        y = bottom - height(panel.limit)
        line = f'<line x1="{LEFT}" x2="{LEFT + inner_width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dc2626" '
        parts.append(line + 'stroke-dasharray="4 3"/>')
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" '
        f'fill="#111827">{escape(text)}</text>'
    )
