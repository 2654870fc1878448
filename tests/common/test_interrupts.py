"""An interruption stays one, whatever error the interrupted code raises."""

from __future__ import annotations

import itertools

import pytest

from rasa_theory.common import keeping_interrupts


def chain(*errors: BaseException) -> BaseException:
    """The last of the errors, each the cause of the next."""
    for cause, error in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


@pytest.mark.parametrize("between", [(), (ImportError("initialization failed"),)])
def test_an_error_that_an_interruption_caused_is_one(between: tuple[Exception, ...]) -> None:
    with pytest.raises(KeyboardInterrupt), keeping_interrupts():
        raise chain(KeyboardInterrupt(), *between, RuntimeError("no canvas"))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="wrong"), keeping_interrupts():
        raise chain(ImportError("initialization failed"), ValueError("wrong"))
