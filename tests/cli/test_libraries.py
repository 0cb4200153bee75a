"""How threads wait is said before torch is imported, and by the user first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from layercut.cli.libraries import WAITING, let_threads_sleep


@pytest.mark.parametrize(
    ("own", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")]
)
def test_openmp_of_a_command_waits_as_chosen(own: dict[str, str], policy: str):
    if sys.platform != "linux":
        pytest.skip("needs GNU OpenMP, which tells its settings")
    inherited = {k: v for k, v in os.environ.items() if k not in WAITING}
    done = subprocess.run(
        [sys.executable, "-m", "layercut", "eval", "nowhere/at/all", "--offline", "-q"],
        capture_output=True,
        text=True,
        env={**inherited, **own, "OMP_DISPLAY_ENV": "true"},
    )
    assert done.returncode == 3
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


@pytest.mark.parametrize("own", [None, *WAITING])
def test_a_policy_is_set_only_where_the_user_has_none(
    own: str | None, monkeypatch: pytest.MonkeyPatch
):
    for name in WAITING:
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    if own is not None:
        monkeypatch.setenv(own, "100")
    threads = os.environ.get("OMP_NUM_THREADS")
    let_threads_sleep()
    found = {name: os.environ[name] for name in WAITING if name in os.environ}
    assert found == ({"OMP_WAIT_POLICY": "passive"} if own is None else {own: "100"})
    assert os.environ.get("OMP_NUM_THREADS") == threads
