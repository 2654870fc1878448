"""From fine-tuned weights to an adapter, with a report of what it misses."""

from rasa_theory.extraction.adapter_folder import ExtractionFolder, remove_other_extraction
from rasa_theory.extraction.conversion import extract_stack, spectral_facts
from rasa_theory.extraction.error_table import ErrorTable
from rasa_theory.extraction.extract_settings import FORMATS, POOLED, RANKS, STORED, ExtractSettings
from rasa_theory.extraction.forecast import duration, forecast
from rasa_theory.extraction.job import Job, check, job_of
from rasa_theory.extraction.report import (
    difference_table,
    extraction_csv,
    extraction_table,
    is_difference,
    model_card,
    report_notes,
)
from rasa_theory.extraction.run import entered, extract_all, finish

__all__ = [
    "FORMATS",
    "POOLED",
    "RANKS",
    "STORED",
    "ErrorTable",
    "ExtractSettings",
    "ExtractionFolder",
    "Job",
    "check",
    "difference_table",
    "duration",
    "entered",
    "extract_all",
    "extract_stack",
    "extraction_csv",
    "extraction_table",
    "finish",
    "forecast",
    "is_difference",
    "job_of",
    "model_card",
    "remove_other_extraction",
    "report_notes",
    "spectral_facts",
]
