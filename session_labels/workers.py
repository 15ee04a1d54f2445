"""Work on several sessions at a time, each in a process of its own."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from tqdm import tqdm


def side_by_side(work: Callable[[Path], None], folders: list[Path], n_workers: int, desc: str) -> dict[Path, int]:
    """`work(folder)` of each of `folders`, `n_workers` at a time. Returns the exit status of their processes, below 0
    for one that was killed. `work` can be pickled; it says nothing, and leaves files."""
    context, todo, running, status = multiprocessing.get_context("spawn"), list(folders), {}, {}
    with tqdm(total=len(folders), desc=desc, unit="session") as bar:
        try:
            while todo or running:
                while todo and len(running) < n_workers:
                    process = context.Process(target=work, args=(todo[0],), daemon=True)
                    process.start()
                    running[process.sentinel] = process, todo.pop(0)
                for sentinel in wait(list(running)):
                    process, folder = running.pop(sentinel)
                    process.join()
                    status[folder] = process.exitcode
                    bar.update()
        finally:
            for process, _ in running.values():
                process.terminate()
                process.join()
    return status
