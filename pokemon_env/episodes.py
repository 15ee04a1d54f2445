"""Episode files: `episode_0001.npz`, as `collect_expert_data.py` writes and `bc_pokemon.py` reads them.

Per step t of T: `observations` (T, H, W, 3) uint8, `actions` (T,) int, what the expert says to do there, `rewards` (T,)
float, `dones` (T,) bool, `infos` (T,) JSON strings. More keys are welcome; docs/collect_expert_data.md lists ours.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

PER_STEP = {"actions": ("iu", "int32"), "rewards": ("f", "float32"), "dones": ("b", "bool")}  # kinds of dtype, expected
MEND = "Move it out of the folder, or collect it again: python collect_expert_data.py"


class open_observations:
    """`with open_observations(path) as (shape, dtype, stream)`: the frames of an episode as a stream of bytes, so that
    a long episode needs no more memory than a short one, stored or compressed. Raises what `zipfile` raises."""

    def __init__(self, path: Path):
        self.archive = zipfile.ZipFile(path)

    def __enter__(self):
        self.stream = self.archive.open("observations.npy")
        version = np.lib.format.read_magic(self.stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(self.stream)
        if fortran_order:
            raise ValueError("observations are in Fortran order, expected C order")
        return shape, dtype, self.stream

    def __exit__(self, *_):
        self.archive.close()


def read_episode(path: Path, allow_pickle: bool = False) -> dict:
    """Everything of an episode but its frames, checked: the arrays of the file, `infos` as dicts, `final_info` as a
    dict, None where it is not known, `shape` of the observations, `path`, and `taken_actions`, equal to `actions` where
    the file has none. Raises ValueError that names the file, what was found, what was expected and the mend."""
    try:
        with np.load(path, allow_pickle=allow_pickle) as file:
            missing = [key for key in ("observations", *PER_STEP, "infos") if key not in file.files]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}, it has {', '.join(file.files) or 'nothing'}")
            try:
                episode = {key: file[key] for key in file.files if key != "observations"}
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise
                raise ValueError(
                    "it holds pickled Python objects, which can run any code when they are opened, expected JSON "
                    "strings. If you trust its author: --allow-pickle"
                ) from None
        with open_observations(path) as (shape, dtype, _):
            pass
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing. Collect it: python collect_expert_data.py") from None
    except PermissionError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}. {MEND}") from None
    except Exception as error:  # zip and NumPy raise a dozen kinds for damaged bytes
        raise ValueError(f"{path} is cut off or damaged ({error}). {MEND}") from None
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or 0 in shape:
        raise ValueError(f"{path}: observations are {dtype} {shape}, expected uint8 (T, height, width, 3). {MEND}")
    T = shape[0]
    episode["taken_actions"] = episode.get("taken_actions", episode["actions"])
    checks = PER_STEP | {"taken_actions": PER_STEP["actions"]}
    for key, (kinds, expected) in checks.items():
        found = episode[key]
        if found.dtype.kind not in kinds or found.shape != (T,):
            raise ValueError(f"{path}: {key} are {found.dtype} {found.shape}, expected {expected} {(T,)}. {MEND}")
    if not np.isfinite(episode["rewards"]).all():
        raise ValueError(f"{path}: rewards are not finite at step {np.isfinite(episode['rewards']).argmin()}. {MEND}")
    if episode["infos"].shape != (T,):
        raise ValueError(f"{path}: infos are {episode['infos'].shape}, expected {(T,)}. {MEND}")
    try:
        episode["infos"] = [i if isinstance(i, dict) else json.loads(str(i)) for i in episode["infos"]]
    except ValueError as error:
        raise ValueError(f"{path}: infos are no JSON ({error}). {MEND}") from None
    if not all(isinstance(info, dict) for info in episode["infos"]):
        raise ValueError(f"{path}: infos are not all JSON objects. {MEND}")
    length, final_info = episode.get("episode_length"), episode.get("final_info")
    if length is not None and length.ravel().tolist() != [T]:
        raise ValueError(f"{path}: episode_length is {length}, expected {T}, the number of observations. {MEND}")
    try:
        if final_info is not None:
            final_info = final_info.item() if final_info.dtype == object else json.loads(str(final_info))
    except ValueError as error:
        raise ValueError(f"{path}: final_info is no JSON ({error}). {MEND}") from None
    if not isinstance(final_info, dict | None):
        raise ValueError(f"{path}: final_info is {type(final_info).__name__}, expected a JSON object or null. {MEND}")
    episode["final_info"] = final_info
    if episode["dones"][:-1].any():
        raise ValueError(
            f"{path}: done at step {episode['dones'].argmax()} of {T}, expected one episode a file. {MEND}"
        )
    final = episode.get("final_observation")
    if final is not None and (final.shape != shape[1:] or final.dtype != np.uint8):
        raise ValueError(
            f"{path}: final_observation is {final.dtype} {final.shape}, expected uint8 {shape[1:]}. {MEND}"
        )
    return episode | {"path": path, "shape": shape}


def read_episodes(folder: Path, allow_pickle: bool = False, digest=None) -> tuple[list[dict], list[str]]:
    """All `episode_*.npz` of a folder, in the order of their names, and the names of the actions. `digest(episode)` may
    change each as it is read: infos of many episodes are too large to keep. Raises ValueError where frames or actions
    differ between them."""
    paths = episode_paths(folder)
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no episode_*.npz. Collect some: python collect_expert_data.py --episodes 20"
        )
    episodes = []
    for path in tqdm(paths, desc="episodes", leave=False):
        episodes.append(read_episode(path, allow_pickle))
        if digest:
            digest(episodes[-1])
    names = _action_names(episodes[0])
    for path, episode in zip(paths, episodes, strict=True):
        if found := other_game(episode, episodes[0], paths[0].name):
            raise ValueError(f"{path}: {found}. Keep games apart. {MEND}")
        for key in ("actions", "taken_actions"):
            wrong = episode[key][(episode[key] < 0) | (episode[key] >= len(names))]
            if len(wrong):
                raise ValueError(f"{path}: {key} hold {wrong[0]}, expected 0 to {len(names) - 1}. {MEND}")
            episode[key] = episode[key].astype(np.int64)
    return episodes, names


def episode_paths(folder: Path) -> list[Path]:
    """The episodes of a folder, in the order of their names."""
    return sorted(path for path in folder.glob("episode_*.npz") if path.stem.count(".") == 0)  # no .failed.npz


def read_game(path: Path) -> dict:
    """What `other_game` compares of an episode, without reading the rest. Raises ValueError naming the file."""
    try:
        with np.load(path) as file:
            game = {key: file[key] for key in ("env_id", "rom_sha1", "action_meanings") if key in file.files}
        with open_observations(path) as (shape, _, _):
            return game | {"shape": shape}
    except PermissionError:
        raise
    except Exception as error:  # as above
        raise ValueError(f"{path} is cut off or damaged ({error}). {MEND}") from None


def other_game(episode: dict, first: dict, name: str) -> str:
    """What tells the game of `episode` from that of `first`, which is called `name`; "" for the same."""
    for key in ("env_id", "rom_sha1"):
        theirs, ours = str(episode.get(key, "")), str(first.get(key, ""))
        if theirs != ours:
            return f"{key} is {theirs!r}, in {name} {ours!r}"
    theirs, ours = tuple(episode["shape"][1:]), tuple(first["shape"][1:])
    if theirs != ours:
        return f"frames are {theirs}, in {name} {ours}"
    theirs, ours = _action_names(episode), _action_names(first)
    return "" if theirs == ours else f"actions mean {theirs}, in {name} {ours}"


def _action_names(episode: dict) -> list[str]:
    """Those of PokemonEnv where the file does not say."""
    buttons = ["A", "B", "START", "SELECT", "UP", "DOWN", "LEFT", "RIGHT", "L", "R"]
    return [str(name) for name in episode.get("action_meanings", buttons)]
