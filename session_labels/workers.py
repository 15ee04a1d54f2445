"""Work on several sessions at a time, each in a process of its own, on this machine or on a Ray cluster."""

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from tqdm import tqdm


def run(work: Callable[[Path], bool], folder: Path):
    """What a process does: when it is ended early, it takes away what is half-written."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a process that is ended leaves there
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        sys.exit(0 if work(folder) else 1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def side_by_side(
    work: Callable[[Path], bool], folders: list[Path], n_workers: int, desc: str
) -> tuple[set[Path], dict[Path, str]]:
    """`work(folder)` of each of `folders`, `n_workers` at a time. Returns those of which it was true, and why those
    fail whose process was killed. `work` can be pickled; it says nothing, and leaves files."""
    context, todo, running, done, lost = multiprocessing.get_context("spawn"), list(folders), {}, set(), {}

    def stop(*_):
        raise KeyboardInterrupt

    on_term = signal.signal(signal.SIGTERM, stop)  # else the processes would go on alone
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
                    if process.exitcode == 0:
                        done.add(folder)
                    elif process.exitcode < 0:
                        ended = f"the process that searched its video was ended by signal {-process.exitcode}"
                        lost[folder] = f"{ended}. Try --num-workers 1"
                    bar.update()
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join()
            signal.signal(signal.SIGTERM, on_term)
    return done, lost


def on_cluster(
    work: Callable[[Path], bool], folders: list[Path], address: str, n_gpus: int, desc: str
) -> tuple[set[Path], dict[Path, str]]:
    """The same as tasks of the Ray cluster at `address`, each on a CPU and `n_gpus`. Its nodes see folders and code
    where this process does. Raises ImportError without ray, ConnectionError where no cluster answers."""
    try:
        import ray
        from ray.job_config import JobConfig
    except ImportError as error:
        raise ImportError(f"ray does not import ({error}). Install it: pip install -e '.[cluster]'") from None
    code = JobConfig(_py_driver_sys_path=[str(Path(__file__).resolve().parents[1])])
    try:
        ray.init(address, job_config=code, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ConnectionError(
            f"--ray-address {address}: no cluster answers ({why}). Start one with `ray start` on each machine, or "
            "use this machine alone: --ray-address local"
        ) from None

    @ray.remote(num_gpus=n_gpus, max_retries=0)
    def task(folder: Path) -> bool:
        if not folder.is_dir():
            node = ray.util.get_node_ip_address()
            raise FileNotFoundError(f"{folder} is not there on {node}; all nodes have to see the data folder")
        return work(folder)

    done, lost, running = set(), {}, {}
    try:
        running = {task.remote(folder.resolve()): folder for folder in folders}
        with tqdm(total=len(folders), desc=desc, unit="session") as bar:
            while running:
                (finished,), _ = ray.wait(list(running))
                folder = running.pop(finished)
                try:
                    done |= {folder} if ray.get(finished) else set()
                except ray.exceptions.RayError as error:
                    lost[folder] = f"the Ray task that searched its video failed: {str(error).strip().splitlines()[-1]}"
                bar.update()
    finally:
        for unfinished in running:
            ray.cancel(unfinished)  # as Ctrl-C would
        ray.wait(list(running), num_returns=len(running), timeout=10) if running else None
        ray.shutdown()
    return done, lost
