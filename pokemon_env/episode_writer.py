"""Writes the episode files that `collect_expert_data.py` makes. They can be read by NumPy and pokemon_env/episodes.py.

An episode grows in a folder, `episode_0007.part`: `episode.npz` has the head of a stored zip and then picture after
picture, `chunk_0000.json` the rest of some steps, `facts.json` what holds for all. `join` fills in the head, appends
the small arrays and renames: pictures are written once, memory stays flat, and what a kill left is joined too.
"""

import errno
import io
import json
import math
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FORMAT_VERSION = 1
COPY_BYTES = 1 << 22  # read or written at once while joining
CUT = {"truncated": True, "interrupted": True, "success": False, "error": "", "final_info": None}  # ending after a kill


class Damaged(OSError):
    """What is in an episode's folder cannot be read; the message names the file."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One process at a time takes a number or clears up in `folder`."""
    with open(folder / ".lock", "ab") as file:
        lock(file, block=True)
        yield


def lock(file, block: bool = False) -> bool:
    """Whether this process now holds `file` alone; always where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False


def next_number(folder: Path) -> int:
    """One more than the highest number of an episode in `folder`, finished, failed or under way."""
    names = [path.name for place in (folder, folder / "failed") if place.is_dir() for path in place.iterdir()]
    return 1 + max((int(m[1]) for name in names if (m := re.fullmatch(r"episode_(\d+)\.(npz|part)", name))), default=0)


def picture_head(T: int, shape: tuple[int, ...], data_crc: int) -> tuple[bytes, zipfile.ZipInfo]:
    """The head of a stored zip whose first member is `observations.npy` with T pictures of `shape`, whose bytes have
    the CRC-32 `data_crc`. Its length does not depend on T."""
    header = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (T, *shape)}
    np.lib.format.write_array_header_1_0(header, description)
    header, size = header.getvalue(), T * math.prod(shape)
    member = zipfile.ZipInfo("observations.npy")
    member.CRC = crc_of_both(zlib.crc32(header), data_crc, size)
    member.file_size = member.compress_size = len(header) + size
    member.header_offset = 0
    return member.FileHeader(zip64=True) + header, member


def crc_of_both(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of two pieces after each other from the CRC-32 of each: first * x^(8 * second_bytes) + second, modulo
    the polynomial; bit 31 is x^0."""

    def times(a: int, b: int) -> int:
        product = 0
        for bit in range(31, -1, -1):
            if b >> bit & 1:
                product ^= a
            a = a >> 1 ^ (0xEDB88320 if a & 1 else 0)
        return product

    power, shift, n = 1 << 23, 1 << 31, second_bytes  # x^8, x^0
    while n:
        shift = times(shift, power) if n & 1 else shift
        power, n = times(power, power), n >> 1
    return times(first, shift) ^ second


@dataclass
class Writer:
    """An episode under way. `observe` a picture, then `step` with what was done there, and at last `close`."""

    folder: Path
    number: int
    facts: dict
    chunk_steps: int
    rows: list = field(default_factory=list)  # steps not yet in a chunk
    chunks: int = 0
    pictures: int = 0
    steps: int = 0
    crcs: tuple[int, int] = (0, 0)  # of all pictures but the last, of all

    @classmethod
    def begin(cls, folder: Path, seed: int, fixed_seed: int | None, facts: dict, chunk_steps: int) -> "Writer":
        """Takes the next number; the episode's seed is `seed` + number, or `fixed_seed`."""
        with folder_lock(folder):
            number = next_number(folder)
            facts = facts | {"seed": seed + number if fixed_seed is None else fixed_seed}
            writer = cls(folder, number, facts, chunk_steps)
            writer.part.mkdir()
            writer.file = open(writer.part / "episode.npz", "x+b", buffering=0)
            lock(writer.file)
        try:
            write_json(writer.part / "facts.json", writer.facts)
            writer.file.seek(len(picture_head(0, tuple(facts["shape"]), 0)[0]))
        except OSError:
            writer.file.close()
            shutil.rmtree(writer.part)
            raise
        return writer

    @property
    def part(self) -> Path:
        return self.folder / f"episode_{self.number:04d}.part"

    def observe(self, picture: np.ndarray):
        written = self.file.write(picture)
        if written != picture.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.part))
        self.crcs = self.crcs[1], zlib.crc32(picture, self.crcs[1])
        self.pictures += 1

    def step(self, label: int, taken: int, reward: float, done: bool, info: str):
        """What the expert said and what was played on the last picture, what came of it, and the info it had."""
        self.rows.append((label, taken, reward, done, info))
        self.steps += 1
        if len(self.rows) == self.chunk_steps:
            self.write_chunk({})

    def write_chunk(self, ending: dict):
        write_json(self.part / f"chunk_{self.chunks:04d}.json", {"steps": self.rows} | ending)
        self.rows, self.chunks = [], self.chunks + 1

    def close(self, ending: dict, compress: bool) -> Path:
        """Join the episode; the path it is at. `ending`: truncated, interrupted, success, error, final_info."""
        try:
            self.write_chunk({"ending": ending})
            return join(self.part, self.file, self.crcs[0] if self.pictures == self.steps + 1 else None, compress)
        finally:
            self.file.close()


def write_json(path: Path, value):
    """Write through a temporary name, so that there is never half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def chunk_paths(part: Path) -> list[Path]:
    """In their order in time, which is not that of their names after 10,000."""
    paths = {int(m[1]): path for path in part.iterdir() if (m := re.fullmatch(r"chunk_(\d+)\.json", path.name))}
    return [paths[number] for number in sorted(paths)]


def read_chunk(path: Path) -> dict:
    """`steps`, and in the last one `ending`. Raises Damaged."""
    try:
        chunk = json.loads(path.read_bytes())
        for label, taken, reward, done, info in chunk["steps"]:
            types = [type(value) for value in (label, taken, done, info)]
            if types != [int, int, bool, str] or not isinstance(reward, int | float):
                raise ValueError("a step is not two actions, a reward, done and an info")
        if missing := CUT.keys() - chunk.get("ending", CUT).keys():
            raise ValueError(f"its ending lacks {', '.join(sorted(missing))}")
        return chunk
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is empty or damaged ({error})") from None


def read_facts(path: Path) -> dict:
    """What `Writer.begin` wrote. Raises Damaged."""
    try:
        facts = json.loads(path.read_bytes())
        if len(facts["shape"]) != 3 or not all(isinstance(n, int) and n > 0 for n in facts["shape"]):
            raise ValueError(f"shape is {facts['shape']}, expected height, width, 3")
        return facts
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is empty or damaged ({error})") from None


def join(part: Path, file, crc: int | None, compress: bool, say: Callable[[str], None] = print) -> Path | None:
    """Make the episode of the folder `part`, whose pictures are in `file`, and remove the folder. None: there was no
    complete step. `crc`: CRC-32 of the pictures, None to compute it. May be repeated after an error. Ends before a
    chunk that cannot be read, and says so; raises Damaged where nothing is left then."""
    facts = read_facts(part / "facts.json")
    shape = tuple(facts["shape"])
    size, start = math.prod(shape), len(picture_head(0, shape, 0)[0])
    paths, ending, damage = chunk_paths(part), CUT, None
    columns, n_pictures, longest = ([], [], [], []), (os.fstat(file.fileno()).st_size - start) // size, 1
    for number in range(len(paths)):  # one at a time: an episode's infos may be large
        try:
            chunk = read_chunk(part / f"chunk_{number:04d}.json")
        except Damaged as error:
            damage, paths = error, paths[:number]
            break
        ending = chunk.get("ending", ending)
        for row in chunk["steps"]:
            for column, value in zip(columns, row[:4], strict=True):
                column.append(value)
            longest = max(longest, len(row[4]))
    T = len(columns[0])
    final, kept = None, {int(path.stem.split("_")[1]): path for path in part.glob("final_*.npy")}
    if kept:  # it was already being joined: its last picture is no longer in `file`
        T = min(T, *kept)
    if T in kept:
        try:
            final = np.load(kept[T])
        except (ValueError, EOFError):
            T -= 1
    if n_pictures < T + (final is None):  # killed while pictures were still on their way: a step lacks where it led
        T = n_pictures - 1
    if T < len(columns[0]):
        ending = CUT | {"error": ending["error"]}
    if T < 0 and columns[0]:
        damage = Damaged(f"{part / 'episode.npz'} is empty or damaged (no pictures to {len(columns[0])} steps)")
    if damage and T <= 0:
        raise damage
    if T < 0 or (T == 0 and not ending["error"]):
        with folder_lock(part.parent):
            file.close()
            shutil.rmtree(part)
        return None
    if final is None:
        file.seek(start + T * size)
        final = np.frombuffer(file.read(size), np.uint8).reshape(shape)
        np.save(part / "final.tmp.npy", final)
        os.replace(part / "final.tmp.npy", part / f"final_{T}.npy")
    if crc is None or damage:
        crc = crc_of_file(file, start, T * size)
    if damage:
        say(f"{damage}. The {T} steps before it are kept")

    labels, taken, rewards, dones = (column[:T] for column in columns)
    rewards = np.array(rewards, np.float32)
    head, member = picture_head(T, shape, crc)
    small = {
        "actions": np.array(labels, np.int32),
        "taken_actions": np.array(taken, np.int32),
        "rewards": rewards,
        "dones": np.array(dones, np.bool_),
        "episode_return": np.float64(rewards.sum(dtype=np.float64)),
        "episode_length": np.int64(T),
        "final_observation": final,
        "final_info": np.array(ending["final_info"] or "null"),
        "format_version": np.int64(FORMAT_VERSION),
    }
    small |= {name: np.array(ending[name]) for name in ("truncated", "interrupted", "success")}
    small |= {name: np.array(value) for name, value in facts.items() if name != "shape"}
    if ending["error"]:
        small["error"] = np.array(ending["error"])

    file.truncate(start + T * size)
    file.seek(0)
    file.write(head)
    file.seek(start + T * size)
    with zipfile.ZipFile(file, "w") as archive:
        archive.infolist().append(member)
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as target:
                np.lib.format.write_array(target, np.asanyarray(array), allow_pickle=False)
        with archive.open("infos.npy", "w", force_zip64=True) as target:
            np.lib.format.write_array_header_1_0(
                target, {"descr": f"<U{longest}", "fortran_order": False, "shape": (T,)}
            )
            left = T
            for path in paths:
                infos = [row[4] for row in json.loads(path.read_text())["steps"]][:left]
                left -= len(infos)
                target.write(np.array(infos, f"<U{longest}").tobytes())
    source = part / "episode.npz"
    if compress:
        source = part / "compressed.npz"
        deflate(part / "episode.npz", source)
    final_path = part.parent / ("failed" if ending["error"] else "") / f"{part.stem}.npz"
    with folder_lock(part.parent):
        final_path.parent.mkdir(exist_ok=True)
        os.rename(source, final_path)
        file.close()
        shutil.rmtree(part)
    return final_path


def crc_of_file(file, start: int, n_bytes: int) -> int:
    file.seek(start)
    crc = 0
    while n_bytes > 0:
        piece = file.read(min(COPY_BYTES, n_bytes))
        crc, n_bytes = zlib.crc32(piece, crc), n_bytes - len(piece)
    return crc


def deflate(source: Path, target: Path):
    """The same archive, compressed."""
    with zipfile.ZipFile(source) as stored, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in stored.infolist():
            with stored.open(member) as here, packed.open(member.filename, "w", force_zip64=True) as there:
                shutil.copyfileobj(here, there, COPY_BYTES)


def recover(folder: Path, compress: bool, say: Callable[[str], None] = print) -> list[Path]:
    """Join what a killed run left in `folder`; its paths. Folders that a running collector fills and folders that
    cannot be read are let alone. `say` gets a line for each episode joined or damaged."""
    joined = []
    for part in sorted(folder.glob("episode_*.part")):
        left_alone = f": its episode cannot be joined. Move {part} out of the folder"
        with folder_lock(folder):
            try:
                file = open(part / "episode.npz", "r+b", buffering=0)
            except FileNotFoundError:  # finished meanwhile, killed right after that, or before the first picture
                finished = any((place / f"{part.stem}.npz").exists() for place in (folder, folder / "failed"))
                if part.is_dir() and (finished or not chunk_paths(part)):
                    shutil.rmtree(part)
                elif part.is_dir():
                    say(f"{part / 'episode.npz'} is missing{left_alone}")
                continue
            if not lock(file):
                file.close()
                continue
        try:
            if not chunk_paths(part):  # nothing that could be joined was played yet
                shutil.rmtree(part)
            elif path := join(part, file, None, compress, say):
                joined.append(path)
                say(f"{path}: joined from what a killed run left, up to its last whole chunk")
        except Damaged as error:
            say(f"{error}{left_alone}")
        finally:
            file.close()
    return joined
