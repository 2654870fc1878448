"""What every room uses: errors, checks of what enters, files written whole, versions and hardware."""

from rasa_theory.common.checks import at_least, fraction, one_of, positive, real_number, whole_number
from rasa_theory.common.environment import environment
from rasa_theory.common.errors import DamagedFile, FailedElsewhere, InputError, NotFinite, ProcessLost, UnsoundFile
from rasa_theory.common.files import identity, locked, unfinished, writable_folder, write_file
from rasa_theory.common.tables import aligned, csv_text
from rasa_theory.common.version import __version__

__all__ = [
    "DamagedFile",
    "FailedElsewhere",
    "InputError",
    "NotFinite",
    "ProcessLost",
    "UnsoundFile",
    "__version__",
    "aligned",
    "at_least",
    "csv_text",
    "environment",
    "fraction",
    "identity",
    "locked",
    "one_of",
    "positive",
    "real_number",
    "unfinished",
    "whole_number",
    "writable_folder",
    "write_file",
]
