"""What to draw of a sensitivity run: a row per layer, a column per ratio, the loss as colour and number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.plots import DPI, INK, new_figure, tidy

TICKS = (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1)  # of the colours
ROWS = 36  # of a panel; more layers make more panels side by side


def plot_sensitivity(
    names: Sequence[str], ratios: Sequence[float], drops: np.ndarray, shares: Sequence[float], base: float, path: str | Path
) -> None:
    """Save the heat map of `drops` (layers, ratios), the mAP@.5 lost, in the order of `names`; beside each row its proposed share.

    Colours go with the square root of the loss: most layers lose little, and that is where the choice lies.
    """
    from matplotlib.colors import PowerNorm

    drops = np.asarray(drops, float).reshape(len(names), len(ratios))
    panels = max(-(-len(names) // ROWS), 1)
    rows = -(-len(names) // panels)
    widest = max((len(name) for name in names), default=0)
    figure = new_figure(((0.07 * widest + 0.62 * len(ratios) + 1.1) * panels + 0.9, 1.5 + 0.24 * rows))
    norm = PowerNorm(0.5, 0, max(float(drops.max(initial=0.0)), 0.01), clip=True)
    grid = figure.subplots(1, panels, squeeze=False)[0]
    for panel, axes in enumerate(grid):
        part = slice(panel * rows, (panel + 1) * rows)
        picture = axes.imshow(drops[part].clip(0), norm=norm, cmap="YlOrRd", aspect="auto")
        for (i, j), value in np.ndenumerate(drops[part]):
            dark = norm(max(value, 0)) > 0.6
            axes.text(
                j,
                i,
                f"{value + 0.0:.3f}".replace("-0.000", "0.000"),
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else INK,
            )
        for i, share in enumerate(shares[part]):
            axes.text(len(ratios) - 0.35, i, f"{share:.0%}", va="center", fontsize=8, color=INK)
        axes.text(len(ratios) - 0.35, -0.75, "share", va="bottom", fontsize=8, color=INK)
        axes.set_xticks(range(len(ratios)), [f"{r:.0%}" for r in ratios], fontsize=8.5)
        axes.set_yticks(range(len(names[part])), names[part], fontsize=8)
        axes.set_xlim(-0.5, len(ratios) + 0.35)
        axes.set_ylim(rows - 0.5, -0.5)
        tidy(axes, "", "pruned of the layer", "")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(False)
    figure.suptitle(f"mAP@.5 lost when one layer alone is pruned (of {base:.3f})", fontsize=13)
    ticks = [tick for tick in TICKS if tick <= norm.vmax]
    bar = figure.colorbar(picture, ax=list(grid), pad=0.02, fraction=0.03, aspect=40, label="mAP@.5 lost", ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks])
    figure.savefig(path, dpi=DPI)
