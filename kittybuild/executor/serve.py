"""The program of the workers: it imports once what all need, forks a process a connection, and carries orders out.

A worker ends with its connection, and at once when the process that it works for dies.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kittybuild.executor.carry_out import Tools

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


def main(files: Sequence[str], torch: bool, ends: Sequence[int]) -> None:
    """Serve the connections with these file descriptors. `files`: of merge methods; `torch`: some orders need it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of those who share a terminal, one decides what an interrupt means
    _die_with_parent(os.getppid())
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # parallelism is across tensors, and forked threads would be lost
    gc.disable()  # nothing of what is imported becomes garbage
    if torch:
        _import_torch()
    from kittybuild.builders import plugins
    from kittybuild.checkpoint.reading import Files
    from kittybuild.executor.carry_out import Tools
    from kittybuild.store.disk import Disk

    tools = Tools(Files(), plugins.load(files), Disk())
    gc.freeze()  # memory that is not touched stays shared
    server = os.getpid()
    workers = []
    for end in ends:
        pid = os.fork()
        if pid == 0:
            for other in ends:
                if other != end:
                    os.close(other)
            _die_with_parent(server)
            _serve(Connection(end), tools)
            os._exit(0)
        workers.append(pid)
    for end in ends:
        os.close(end)
    for pid in workers:
        os.waitpid(pid, 0)
    os._exit(0)  # some libraries take long to tidy up


def _import_torch() -> None:
    import torch

    torch.set_num_threads(1)  # parallelism is across tensors: the bits must not depend on it


def _serve(orders: Connection, tools: Tools) -> None:
    """Carry out one order after the other; None asks to close the files."""
    from kittybuild.executor.carry_out import carry_out

    gc.enable()
    shared = _peak()
    while True:
        try:
            order = orders.recv()
        except EOFError:
            return
        before = tools.files.bytes_read
        answer: object = None
        try:
            if order is None:
                tools.files.close()
            else:
                answer = carry_out(order, tools)
        except Exception as error:
            answer = error
        try:
            orders.send((answer, tools.files.bytes_read - before, (shared, _peak() - shared)))
        except ConnectionError:  # whom it works for has just died
            return


def _peak() -> int:
    """The most memory that this process had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _die_with_parent(parent: int) -> None:
    """Have the system end this process with its parent, where it can; elsewhere the connection's end does, later."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it died just before
            os._exit(1)
