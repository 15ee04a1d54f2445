"""Work on several sessions at a time, each in a process of its own."""

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from tqdm import tqdm


def run(work: Callable[[Path], None], folder: Path):
    """What a process does: when it is ended early, it takes away what is half-written."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a process that is ended leaves there
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        work(folder)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def side_by_side(work: Callable[[Path], None], folders: list[Path], n_workers: int, desc: str) -> dict[Path, int]:
    """`work(folder)` of each of `folders`, `n_workers` at a time. Returns the exit status of their processes, below 0
    for one that was killed. `work` can be pickled; it says nothing, and leaves files."""
    context, todo, running, status = multiprocessing.get_context("spawn"), list(folders), {}, {}
    with tqdm(total=len(folders), desc=desc, unit="session") as bar:
        try:
            while todo or running:
                while todo and len(running) < n_workers:
                    process = context.Process(target=run, args=(work, todo[0]), daemon=True)
                    ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: it reaches the whole group,
                    process.start()
                    signal.signal(signal.SIGINT, ctrl_c)  # and this process decides
                    running[process.sentinel] = process, todo.pop(0)
                for sentinel in wait(list(running)):
                    process, folder = running.pop(sentinel)
                    process.join()
                    status[folder] = process.exitcode
                    bar.update()
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join()
    return status
