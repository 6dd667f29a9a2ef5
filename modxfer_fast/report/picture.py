"""Writes figures as PNG files."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_png(figure: "Figure", path: Path) -> None:
    """Draws once. `Figure.savefig` draws a laid out figure twice, the first time for its layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(120)
    FigureCanvasAgg(figure).print_png(path)
