"""From fine-tuned weights to an adapter, with a report of what it misses."""

from rasa_theory.extraction.adapter_folder import ExtractionFolder
from rasa_theory.extraction.conversion import extract_stack
from rasa_theory.extraction.extract_settings import FORMATS, STORED, ExtractSettings
from rasa_theory.extraction.job import Job, check, forecast
from rasa_theory.extraction.report import extraction_csv, extraction_table, model_card

__all__ = [
    "FORMATS",
    "STORED",
    "ExtractSettings",
    "ExtractionFolder",
    "Job",
    "check",
    "extract_stack",
    "extraction_csv",
    "extraction_table",
    "forecast",
    "model_card",
]
