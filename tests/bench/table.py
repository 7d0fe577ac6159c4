"""The table in docs/performance.md, between its two markers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


def update_page(page: Path, content: Mapping[str, Any]) -> None:
    """Replace what stands between the markers. Raises ValueError if they are missing."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no {BEGIN} ... {END}")
    page.write_text(f"{before}{BEGIN}\n{render(content)}\n{END}{after}", encoding="utf-8")


def render(content: Mapping[str, Any]) -> str:
    """One line for each figure, then where they were measured."""
    lines = ["| bench | what is compared | ratio | range | goal |", "|---|---|---|---|---|"]
    lines += [_line(figure) for figure in content["figures"]]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    machine = content["machine"]
    lines += ["", f"Measured on {machine['num_cores']} cores ({machine['processor']}) with {versions}."]
    if content["is_quick"]:
        lines.append("These are `--quick` figures: few repetitions, only good to see that the benches run.")
    return "\n".join(lines)


def _line(figure: Mapping[str, Any]) -> str:
    if figure["ratio"] is None:
        ratio, spread = f"not measured: {figure.get('not_measured', '')}", ""
    else:
        ratio = f"{figure['ratio']:.3g}"
        spread = f"{figure['min']:.3g} to {figure['max']:.3g} ({figure['repetitions']})"
    goal = "" if figure["goal"] is None else f"{figure['better']} {figure['goal']:g}"
    return f"| `{figure['name']}` | {figure['title']} | {ratio} | {spread} | {goal} |"


def summary(figures: Sequence[Mapping[str, Any]]) -> str:
    """The figures for a terminal."""
    width = max(len(figure["name"]) for figure in figures)
    lines = []
    for figure in figures:
        ratio = "-" if figure["ratio"] is None else f"{figure['ratio']:.3g}"
        goal = "" if figure["goal"] is None else f"goal {figure['better']} {figure['goal']:g}"
        lines.append(f"{figure['name']:{width}}  {ratio:>7}  {goal:18}  {figure['title']}".rstrip())
    return "\n".join(lines)
