"""The program of the workers: it imports torch once, forks a process for each connection, and carries orders out.

A worker ends with its connection, and at once when the process that it works for dies.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


def main() -> None:
    """Serve the connections whose file descriptors stand in the arguments (after the search path)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of those who share a terminal, one decides what an interrupt means
    _die_with_parent(os.getppid())
    gc.disable()  # nothing of what is imported becomes garbage
    import torch

    from kittybuild.executor import carry_out  # noqa: F401  # for the workers to have

    torch.set_num_threads(1)  # parallelism is across tensors: the bits must not depend on it
    gc.freeze()  # memory that is not touched stays shared
    ends = [int(word) for word in sys.argv[2:]]
    server = os.getpid()
    workers = []
    for end in ends:
        pid = os.fork()
        if pid == 0:
            for other in ends:
                if other != end:
                    os.close(other)
            _die_with_parent(server)
            _serve(Connection(end))
            os._exit(0)
        workers.append(pid)
    for end in ends:
        os.close(end)
    for pid in workers:
        os.waitpid(pid, 0)
    os._exit(0)  # torch takes long to tidy up


def _serve(orders: Connection) -> None:
    """Carry out one order after the other; None asks to close the files."""
    from kittybuild.builders.registry import BUILTIN
    from kittybuild.checkpoint.reading import Files
    from kittybuild.executor.carry_out import Tools, carry_out
    from kittybuild.store.disk import Disk

    gc.enable()
    shared, files = _peak(), Files()
    tools = Tools(files, BUILTIN, Disk())
    while True:
        try:
            order = orders.recv()
        except EOFError:
            return
        before = files.bytes_read
        answer: object = None
        try:
            if order is None:
                files.close()
            else:
                answer = carry_out(order, tools)
        except Exception as error:
            answer = error
        orders.send((answer, files.bytes_read - before, (shared, _peak() - shared)))


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
