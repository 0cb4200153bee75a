from __future__ import annotations

import errno
import logging
import os
import warnings

import pytest
import torch
from tokenizers import Tokenizer

from layercut.checkpoints.hf_calls import MAX_REASON, guard, muted
from layercut.errors import DataError, ModelError, PlanError


def fail(failure: BaseException) -> None:
    with guard("x.json cannot be read", ModelError, "Restore it."):
        raise failure


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ValueError("no such\n  thing."), "no such thing"),
        (KeyError("model"), "KeyError: 'model'"),
        (AttributeError("no attribute"), "AttributeError: no attribute"),
        (RecursionError("maximum depth"), "RecursionError: maximum depth"),
        (AssertionError(), "AssertionError"),
        (BaseException("panic"), "BaseException: panic"),
    ],
)
def test_any_failure_of_a_library_is_one_line_of_ours(failure: BaseException, reason: str) -> None:
    with pytest.raises(ModelError) as raised:
        fail(failure)
    assert str(raised.value) == f"x.json cannot be read: {reason}. Restore it."
    assert raised.value.__cause__ is failure


def test_long_reasons_are_cut() -> None:
    with pytest.raises(ModelError) as raised:
        fail(ValueError("a" * 10_000))
    assert len(str(raised.value)) < MAX_REASON + 50


def test_a_panic_of_a_library_in_rust_is_a_failure_too() -> None:
    with pytest.raises(DataError, match="rows: "), guard("rows", DataError, "Change them."):
        Tokenizer.from_str("{}")


@pytest.mark.parametrize(
    "failure",
    [
        PlanError("ours"),
        KeyboardInterrupt(),
        SystemExit(143),
        MemoryError(),
        OSError(errno.ENOSPC, "No space left on device"),
        torch.OutOfMemoryError("out of memory"),
    ],
)
def test_what_is_no_fault_of_the_file_passes(failure: BaseException) -> None:
    with pytest.raises(type(failure)) as raised:
        fail(failure)
    assert raised.value is failure


def test_what_rust_prints_by_itself_stays_out_of_the_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with muted():
        os.write(1, b"Ignored unknown kwarg option x")
        os.write(2, b"thread panicked")
    print("ours")  # noqa: T201
    assert capfd.readouterr() == ("ours\n", "")


def test_advice_of_libraries_stays_out_of_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with guard("x", ModelError, "y"):
        warnings.warn("advice", stacklevel=1)
        logging.getLogger("transformers").error("advice")
    assert capfd.readouterr() == ("", "")
