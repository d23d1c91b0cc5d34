"""Who carries orders out: processes of their own, so that no worker waits for another's interpreter lock, or threads.

A worker that dies is an error of its order, never of the store.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from typing import Protocol

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.reading import Files
from kittybuild.errors import BuildError
from kittybuild.executor.order import Order, Report, needs_torch
from kittybuild.store.disk import Disk

_SERVE = (
    "import sys, json; task = json.loads(sys.argv[1]); sys.path[:] = task['path'];"
    "sys.setrecursionlimit(task['depth']);"  # a chain that is made in memory is as deep as its plan
    "from kittybuild.executor.serve import main; main(task['files'], task['torch'], task['ends'])"
)
_PATIENCE = 10.0


class Workers(Protocol):
    """Carries orders out; any number of threads may ask. A context manager."""

    @property
    def bytes_read(self) -> int:
        """The bytes of inputs read so far."""

    @property
    def peak_memory(self) -> int:
        """The most bytes of memory that it took beside this process."""

    def start(self, *, torch: bool) -> None:
        """Get ready for orders, which come soon, some of which need torch or none; twice is fine.

        To be called in a thread that outlives them.
        """

    def run(self, order: Order) -> Report:
        """Have an order carried out, and wait for it. Raises what went wrong, as a KittybuildError."""

    def forget_files(self) -> None:
        """Close all files that were read: other files may have their names now."""

    def interrupt(self) -> None:
        """Do not finish what is under way."""

    def __enter__(self) -> Workers: ...

    def __exit__(self, *_: object) -> None: ...


class Threads:
    """Orders are carried out in the thread that asks. (For builders that another process could not find.)"""

    def __init__(self, jobs: int, builders: Builders, disk: Disk) -> None:
        self._files, self._builders, self._disk = Files(), builders, disk
        self.peak_memory = 0

    @property
    def bytes_read(self) -> int:
        """See Workers."""
        return self._files.bytes_read

    def start(self, *, torch: bool) -> None:
        """See Workers."""

    def run(self, order: Order) -> Report:
        """See Workers."""
        from kittybuild.executor.carry_out import Tools, carry_out

        if needs_torch(order.drv):
            _one_thread()
        return carry_out(order, Tools(self._files, self._builders, self._disk))

    def forget_files(self) -> None:
        """See Workers."""
        self._files.close()

    def interrupt(self) -> None:
        """See Workers. A thread cannot be stopped."""

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def _one_thread() -> None:
    """Parallelism is across tensors: the bits must not depend on it."""
    import torch

    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


class Processes:
    """A process for each job, forked from one that has imported once what all need (executor/serve.py).

    `disk` is not used: processes have the real one.
    """

    def __init__(self, jobs: int, builders: Builders, disk: Disk) -> None:
        self._jobs, self._files = jobs, builders.files
        self._server: subprocess.Popen[bytes] | None = None
        self._all: list[Connection] = []
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._lock = threading.Lock()
        self._memory: dict[Connection, tuple[int, int]] = {}
        self.bytes_read = 0

    @property
    def peak_memory(self) -> int:
        """See Workers. What the workers share with the process that they were forked from counts once."""
        shared = max((shared for shared, _ in self._memory.values()), default=0)
        return shared + sum(own for _, own in self._memory.values())

    def run(self, order: Order) -> Report:
        """See Workers."""
        worker = self._idle.get()
        try:
            worker.send(order)
            answer, read, memory = worker.recv()
        except (EOFError, OSError) as error:
            hint = "if memory ran out: fewer --jobs, a smaller --memory"
            raise BuildError("KB507", "a worker process ended before its time", at=order.name, hint=hint) from error
        finally:
            self._idle.put(worker)
        with self._lock:
            self.bytes_read += read
            self._memory[worker] = memory
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Report)
        return answer

    def start(self, *, torch: bool) -> None:
        """See Workers. (The server dies with the thread that starts it, so that none outlives a killed build.)"""
        if self._server is not None:
            return
        pairs = [Pipe() for _ in range(self._jobs)]
        theirs = [end.fileno() for _, end in pairs]
        about = {"path": sys.path, "depth": sys.getrecursionlimit()}
        task = {**about, "files": self._files, "torch": torch, "ends": theirs}
        command = [sys.executable, "-c", _SERVE, json.dumps(task)]
        # What a library prints must not get among the answer of a command, which goes to standard output.
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=theirs)
        for ours, end in pairs:
            end.close()
            self._all.append(ours)
            self._idle.put(ours)

    def forget_files(self) -> None:
        """See Workers. (Called between attempts, when all are idle.)"""
        for worker in self._all:
            with suppress(OSError, EOFError):
                worker.send(None)
                worker.recv()

    def interrupt(self) -> None:
        """See Workers."""
        if self._server is not None:
            self._server.kill()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.close()
        if self._server is not None:
            try:
                self._server.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
