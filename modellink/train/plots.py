"""The loss curve of a run as a picture, drawn from ``metrics.jsonl``; redrawn at each save."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modellink.errors import ModelLinkError
from modellink.files import atomic_path
from modellink.train.metrics import VALIDATION_FILE, read_lines

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

RAW, SMOOTH, VALIDATION, RATE, INK, GRID = "#b9cbe4", "#1f4e8c", "#c8501e", "#4a7c59", "#333333", "#e6e6e6"


def _moving_average(values: np.ndarray, span: float) -> np.ndarray:
    """Exponential moving average over about `span` points; NaN counts as absent."""
    import numpy as np

    decay, total, weight = 1 - 1 / max(span, 1.0), 0.0, 0.0
    averaged = np.empty_like(values)
    for position, value in enumerate(values):
        if np.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        averaged[position] = total / weight if weight else np.nan
    return averaged


def _smooth(values: np.ndarray, span: float) -> np.ndarray:
    """Moving average run from both ends: an average of the past alone lags behind a falling loss."""
    return (_moving_average(values, span) + _moving_average(values[::-1], span)[::-1]) / 2


def _column(entries: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    import numpy as np

    return np.array([np.nan if entry.get(key) is None else entry[key] for entry in entries], dtype=float)


def _count(value: float, _: object = None) -> str:
    """Write 1500000 as 1.5M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _draw_losses(axes: Axes, entries: list[dict[str, Any]], validations: list[dict[str, Any]]) -> None:
    import numpy as np

    iterations, losses = _column(entries, "iteration"), _column(entries, "lm_loss")
    few = len(entries) <= 60
    smooth = _smooth(losses, span=len(entries) / 80)
    if few:
        axes.plot(iterations, losses, color=SMOOTH, linewidth=1.6, marker="o", markersize=3, label="training loss")
    else:
        axes.plot(iterations, losses, color=RAW, linewidth=0.8, label="training loss")
        axes.plot(iterations, smooth, color=SMOOTH, linewidth=1.8, label="smoothed")
    points = _column(validations, "lm_loss")
    if np.isfinite(points).any():
        axes.plot(
            _column(validations, "iteration"), points, color=VALIDATION, linewidth=1.0, linestyle=":", marker="D",
            markersize=5, markeredgecolor="white", label="validation loss",
        )  # fmt: skip
    # a single spike must not flatten the rest of the curve
    shown = np.concatenate([losses[np.isfinite(losses)], points[np.isfinite(points)]])
    if len(shown):
        low, high = shown.min(), np.nanmax(losses if few else np.append(smooth, np.nanquantile(losses, 0.995)))
        high = max(high, *points[np.isfinite(points)], low)
        margin = max(0.06 * (high - low), 0.02)
        axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, loc="best" if few else "upper right")  # "best" is slow on long curves


def _add_progress_axis(axes: Axes, entries: list[dict[str, Any]], sequence_length: int | None) -> None:
    """Put tokens (or samples) consumed on top; batch-size ramp-up makes them a bent function of the iteration."""
    import numpy as np

    iterations = np.append(0.0, _column(entries, "iteration"))
    consumed = np.append(0.0, _column(entries, "consumed_samples")) * (sequence_length or 1)
    known = np.isfinite(consumed) & (np.append(1.0, np.diff(iterations)) > 0)
    iterations, consumed = iterations[known], consumed[known]
    if len(iterations) < 2 or consumed[-1] <= 0:
        return
    slope = consumed[-1] / iterations[-1]

    def forward(x: Any) -> Any:
        inside = np.interp(x, iterations, consumed)
        return inside + slope * (np.minimum(x, 0) + np.maximum(np.asarray(x) - iterations[-1], 0))

    def backward(y: Any) -> Any:
        inside = np.interp(y, consumed, iterations)
        return inside + (np.minimum(y, 0) + np.maximum(np.asarray(y) - consumed[-1], 0)) / slope

    top = axes.secondary_xaxis("top", functions=(forward, backward))
    top.xaxis.set_major_formatter(_count)
    top.set_xlabel("tokens" if sequence_length else "samples", color=INK)
    top.tick_params(colors=INK, length=3)
    top.spines["top"].set_visible(False)


def draw_loss(
    metrics_jsonl: str | os.PathLike[str],
    png: str | os.PathLike[str],
    *,
    sequence_length: int | None = None,
    title: str = "Training loss",
) -> None:
    """Draw loss and learning rate over iterations into `png`, which is replaced atomically.

    Validation losses come from ``validation.jsonl`` beside `metrics_jsonl`. With `sequence_length` the top axis counts
    tokens, else samples. Raises ModelLinkError when there is nothing to draw or matplotlib is missing.
    """
    source = Path(metrics_jsonl)
    entries = read_lines(source)
    if not entries:
        raise ModelLinkError(f"{source} has no iteration to draw; give the metrics.jsonl of a run.")
    validations = read_lines(source.parent / VALIDATION_FILE)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError as error:
        raise ModelLinkError("drawing loss.png needs the package matplotlib; run `pip install matplotlib`.") from error

    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    _draw_losses(loss_axes, entries, validations)
    _add_progress_axis(loss_axes, entries, sequence_length)
    iterations, rates = _column(entries, "iteration"), _column(entries, "learning_rate")
    rate_axes.plot(iterations, rates, color=RATE, linewidth=1.6, marker="o" if len(entries) == 1 else "", markersize=3)
    rate_axes.fill_between(iterations, rates, color=RATE, alpha=0.12, linewidth=0)
    rate_axes.set_ylim(bottom=0)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("iteration")
    rate_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    rate_axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    rate_axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    rate_axes.set_xlim(0, iterations[-1] * 1.02)
    for axes in (loss_axes, rate_axes):
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.align_ylabels()
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    with atomic_path(png) as temporary:
        canvas.print_figure(temporary, format="png")
