from __future__ import annotations

import errno
import logging
import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer

from layercut.checkpoints.hf_calls import MAX_REASON, describe_failure, fetch_each, guard, muted
from layercut.errors import DataError, ModelError, NetworkError, PlanError


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


class Unspeakable(Exception):
    """Its text cannot be made: `describe_failure` stands for our code that a library calls."""

    def __str__(self) -> str:
        return str(1 / 0)


def test_a_mistake_of_ours_that_a_library_calls_is_not_blamed_on_the_file() -> None:
    module = torch.nn.Module()
    module.forward = lambda: describe_failure(Unspeakable())
    with pytest.raises(ZeroDivisionError), guard("x", ModelError, "y"):
        module()
    module.forward = lambda: 1 / 0
    with pytest.raises(ModelError, match="ZeroDivisionError"), guard("x", ModelError, "y"):
        module()


def test_items_are_fetched_under_the_guard_and_used_outside_of_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("a")

    fetched = fetch_each(items(), "x", DataError, "y")
    assert next(fetched) == 1
    with pytest.raises(DataError, match=r"^x: KeyError: 'a'\. y$"):
        next(fetched)
    assert list(fetch_each([1, 2], "x", DataError, "y")) == [1, 2]


def test_only_a_failed_connection_is_a_network_error() -> None:
    def fail_offline(failure: Exception) -> None:
        with guard("x", DataError, "y", offline="Connect."):
            raise failure

    for kind in (ConnectionError, TimeoutError):
        with pytest.raises(NetworkError, match="Connect"):
            fail_offline(kind("a"))
        with pytest.raises(DataError, match=r"y$"), guard("x", DataError, "y"):
            raise kind("a")
    with pytest.raises(DataError, match=r"y$"):
        fail_offline(ValueError("c"))
