"""The common style of all figures, and the figures of results."""

from rasa_theory.plotting import style
from rasa_theory.plotting.extractions import plot_extraction
from rasa_theory.plotting.results import plot_iterations
from rasa_theory.plotting.spectrum_figure import plot_inspection

__all__ = [
    "plot_extraction",
    "plot_inspection",
    "plot_iterations",
    "style",
]
