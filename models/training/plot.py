"""Plots as PNG files, by matplotlib: the optional extra `nsa[train]`."""

from collections.abc import Sequence
from pathlib import Path


class NoPlot(Exception):
    """Why there is no plot; the numbers are in the metrics all the same."""


def plot_losses(records: Sequence[dict], file: Path) -> None:
    """Every part of the loss over steps. records: lines of metrics.jsonl."""
    figure = _figure(8, 5)
    axes = figure.subplots()
    parts = [p for p in ("loss", "text", "answer", "kl", "hidden") if any(p in record for record in records)]
    for part in parts:
        points = [(record["step"], record[part]) for record in records if part in record]
        axes.plot(*zip(*points, strict=True), label=part, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    if parts:
        axes.legend()
    _save(figure, file)


def plot_heat_map(
    rows: Sequence[str], columns: Sequence[str], shares: Sequence[Sequence[float | None]], file: Path, title: str
) -> None:
    """Shares of right answers, 0 to 1: rows of depths over columns of lengths."""
    figure = _figure(1.5 + 0.8 * len(columns), 1.5 + 0.5 * len(rows))
    axes = figure.subplots()
    values = [[float("nan") if share is None else share for share in row] for row in shares]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
    axes.set_title(title, fontsize=9)
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            if share is not None:
                axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image)
    _save(figure, file)


def _figure(width: float, height: float):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise NoPlot("no plot: matplotlib is not installed; pip install 'nsa[train]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, file: Path) -> None:
    staging = file.with_name(file.name + ".new")
    try:
        figure.savefig(staging, format="png", dpi=120)
        staging.replace(file)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise NoPlot(f"no plot: {file}: {error.strerror}") from None
