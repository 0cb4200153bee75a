"""How the processes of one run meet, and how they end together.

The first rank that fails says why; the others end in silence with its exit code. Whoever waits for
it in a collective is freed by its connection's end, and by a watch where that does not free it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from layercut.errors import LayercutError, ResourceError
from layercut.launcher import Place, find_place
from layercut.models.ranks import ALONE, Ranks

MEETING = timedelta(minutes=5)
"""How long the first process waits for the last one."""
PATIENCE = timedelta(days=2)
"""How long a rank waits for another's sums: the watch, not the clock, notices who is gone."""
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 30.0
"""A rank that has not shown itself for so long is gone."""
GRACE_SECONDS = 8.0
"""Time to end in order, before a process is ended from outside."""

_joined: ContextVar[Ranks] = ContextVar("layercut_ranks")


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """All processes of the run inside the block; alone where no launcher started this one.

    Raises:
        ResourceError: the others cannot be reached, or one has ended without a word.
        SystemExit: another rank has failed, and has said why; with its exit code.
    """
    place = find_place()
    if place is None or _joined.get(None) is not None:
        yield _joined.get(ALONE)
        return
    board = _Board(place, _meet(place))
    watch = _Watch(place, board)
    token = None
    try:
        ranks = _form_group(place, board)
        watch.start()
        token = _joined.set(ranks)
        with warnings.catch_warnings():
            if not ranks.is_first:
                warnings.simplefilter("ignore")
            yield ranks
    except BaseException as error:
        if exit_code_of(error) == 0:  # how a command line ends
            dist.destroy_process_group()
            raise
        lost = ResourceError(watch.lost) if watch.lost else None
        speaks = bool(lost) or board.report_failure(exit_code_of(error))
        _leave()
        watch.finished.set()
        board.wait_for_others()
        if lost:
            raise lost from error
        if not speaks:
            raise SystemExit(board.exit_code()) from error
        raise
    else:
        dist.destroy_process_group()
    finally:
        watch.finished.set()
        if token is not None:
            _joined.reset(token)


def exit_code_of(error: BaseException) -> int:
    """What the command line ends with after ``error``."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return error.exit_code if isinstance(error, LayercutError) else 1


def _meet(place: Place) -> Store:
    """The board on which ranks leave notes, once all of them are there."""
    try:
        meeting = rendezvous("env://", rank=place.rank, world_size=place.world, timeout=MEETING)
        store: Store = next(meeting)[0]
    except (RuntimeError, ValueError, OSError) as error:
        raise ResourceError(
            f"the {place.world} processes of this run do not find each other ({error}). Check "
            "MASTER_ADDR, MASTER_PORT and that all of them were started."
        ) from error
    return store


def _form_group(place: Place, board: _Board) -> Ranks:
    """Tell every rank whether the others have a GPU, and connect them."""
    gpus = board.exchange_gpus(place.local_rank < torch.cuda.device_count())
    if all(gpus):
        torch.cuda.set_device(place.local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if all(gpus) else "gloo",
        store=board.store,
        rank=place.rank,
        world_size=place.world,
        timeout=PATIENCE,
    )
    return Ranks(place.rank, place.world, place.local_rank, gpus)


def _leave() -> None:
    """Close this rank's connections, so that nobody waits for it."""
    with suppress(RuntimeError, ValueError):
        group = dist.group.WORLD
        if group is not None:
            group.abort()


class _Board:
    """Notes that all ranks see: who has a GPU, who is alive, whether one has failed.

    Attributes:
        store: where they are.
    """

    def __init__(self, place: Place, store: Store) -> None:
        self.store = store
        self._place = place
        # A clone: the watch must not wait for what a collective asks the store on the same line.
        own: Any = store
        self._notes = PrefixStore("layercut", own.clone())

    def exchange_gpus(self, has_gpu: bool) -> tuple[bool, ...]:
        """Of every rank, whether it has a GPU; waits for all to have said so."""
        keys = [f"gpu/{rank}" for rank in range(self._place.world)]
        self._notes.set(keys[self._place.rank], str(int(has_gpu)))
        try:
            return tuple(note == b"1" for note in self._notes.multi_get(keys))
        except RuntimeError as error:
            raise ResourceError(
                f"not all of the {self._place.world} processes of this run have started within "
                f"{MEETING.seconds} s. Look at what the others say."
            ) from error

    def report_failure(self, exit_code: int) -> bool:
        """Say that this rank fails; whether it is the first to do so, and gives the reason."""
        try:
            if self._notes.add("failures", 1) > 1:
                return False
            self._notes.set("exit code", str(exit_code))
        except RuntimeError:  # gone with rank 0, who waits for all but a sudden death
            return self._place.rank == 1
        return True

    def has_failure(self) -> bool:
        """Whether a rank has failed, or the board is gone with its keeper."""
        try:
            return bool(self._notes.check(["exit code"]))
        except RuntimeError:
            return True

    def exit_code(self) -> int:
        """That of the rank that failed first."""
        try:
            return int(self._notes.get("exit code")) if self.has_failure() else 1
        except RuntimeError:
            return 1

    def wait_for_others(self) -> None:
        """Rank 0, who may keep the board, lets the others read it before it goes."""
        with suppress(RuntimeError):
            gone = self._notes.add("gone", 1)
            end = time.monotonic() + GRACE_SECONDS
            while self._place.rank == 0 and gone < self._place.world and time.monotonic() < end:
                time.sleep(0.1)
                gone = self._notes.add("gone", 0)

    def beat(self, count: int) -> bytes:
        """Show that this rank is alive, and what the next one shows."""
        rank, world = self._place.rank, self._place.world
        self._notes.set(f"beat/{rank}", str(count))
        key = f"beat/{(rank + 1) % world}"
        return self._notes.get(key) if self._notes.check([key]) else b""


class _Watch(threading.Thread):
    """Ends this process when another rank has failed or fallen silent, and it hangs in a call.

    Attributes:
        finished: set when there is nothing to watch any more.
        lost: what to say of a rank that has fallen silent; empty if none has.
    """

    def __init__(self, place: Place, board: _Board) -> None:
        super().__init__(name="layercut-watch", daemon=True)
        self.finished = threading.Event()
        self.lost = ""
        self._place, self._board = place, board

    def run(self) -> None:
        """Look every few seconds, until this rank is finished or has to be."""
        shown, since, count = b"", time.monotonic(), 0
        while not self.finished.wait(BEAT_SECONDS):
            count += 1
            try:
                beat = self._board.beat(count)
            except RuntimeError:
                beat = shown
            if beat != shown:
                shown, since = beat, time.monotonic()
            if self._board.has_failure():
                break
            if time.monotonic() - since > SILENCE_SECONDS and self._board.report_failure(7):
                lost = (self._place.rank + 1) % self._place.world
                self.lost = (
                    f"rank {lost} has not shown itself for {SILENCE_SECONDS:.0f} s: it was killed, "
                    "or its machine is gone. Nothing was written; start the run again."
                )
                break
        else:
            return
        self._end()

    def _end(self) -> None:
        """Give this process time to end by itself; then ask it to; then end it."""
        if self.finished.wait(GRACE_SECONDS):
            return
        os.kill(os.getpid(), signal.SIGTERM)
        if self.finished.wait(GRACE_SECONDS):
            return
        if self.lost:
            sys.stderr.write(f"error: {self.lost}\n")
        os._exit(self._board.exit_code())
