"""Sessions of a motion-control recorder: what their columns mean, and reading session_*.npz with every check.

The format is described in docs/controls_transformer.md."""

from pathlib import Path

import numpy as np

# Axes: N frames of a session, C controls
CONTROLS = (
    "move_forward move_backward strafe_left strafe_right sprint sneak jump attack use_item look_yaw look_pitch "
    "drop_item swap_offhand open_inventory hotbar_slot_1 hotbar_slot_2 hotbar_slot_3 hotbar_slot_4 hotbar_slot_5 "
    "hotbar_slot_6 hotbar_slot_7 hotbar_slot_8 hotbar_slot_9 cursor_x cursor_y inv_left_click inv_right_click "
    "inv_shift_held"
).split()
ACTION_COLUMNS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13)
LOOK_COLUMNS = (9, 10)
HOTBAR_COLUMNS = tuple(range(14, 23))
CURSOR_COLUMNS = (23, 24)
INV_COLUMNS = (25, 26, 27)
BINARY_COLUMNS = tuple(c for c in range(28) if c not in LOOK_COLUMNS + CURSOR_COLUMNS)
PULSES = ("jump", "attack", "drop_item", "swap_offhand", "open_inventory", "inv_left_click", "inv_right_click")
HEAD_COLUMNS = {"action": ACTION_COLUMNS, "look": LOOK_COLUMNS, "hotbar": HOTBAR_COLUMNS}
HEAD_COLUMNS |= {"cursor": CURSOR_COLUMNS, "inv": INV_COLUMNS}
HEADS = {name: len(columns) for name, columns in HEAD_COLUMNS.items()}  # outputs of each head
LOOK, SLOTS, CURSOR, CLICKS = slice(9, 11), slice(14, 23), slice(23, 25), slice(25, 28)
FRAME_DIM, STATE_DIM, CONTROL_DIM, POSITIONS = 260, 46, 28, 225  # POSITIONS: columns that are metres
SCREEN_OPEN, CURRENT_SLOT = 38, 44  # columns of the game's state
LOOK_DEADZONE = 0.08
MEND = "Record it again, or leave it out with --skip-bad-sessions"
SIMULATE = "python benchmarks/make_control_sessions.py --output recordings"

V1_CONTROLS = (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # the new column of each of the ten
V1_STATE = {
    **{0: 0, 1: 1, 2: 2, 3: 3, 5: 4, 6: 5, 7: 11, 8: 12, 9: 14, 10: 15, 11: 20, 12: 21, 13: 26, 14: 25, 15: 22},
    **{16: 24, 17: 29, 18: 30, 19: 23, 20: 7, 21: 16, 22: 27, 23: 19},
}  # old column: new one; the old 4, can_block, has none
V1_NO_STATE = (5, 11, 12, 14)  # 1 where a session has no state: empty hand, full health and hunger, on the ground
SHAPES = {
    1: {
        "pose_world": (33, 3),
        "left_hand_3d": (21, 3),
        "right_hand_3d": (21, 3),
        "left_hand_present": (),
        "right_hand_present": (),
        "pose_visibility": (33,),
        "controls": (10,),
        "timestamps": (),
    },
    2: {"frames": (FRAME_DIM,), "controls": (CONTROL_DIM,), "game_state": (STATE_DIM,), "timestamps": ()},
}


def find_sessions(folder: Path | str) -> list[Path]:
    """The session_*.npz in `folder`, by name. Raises FileNotFoundError where there is none."""
    paths = sorted(Path(folder).glob("session_*.npz"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no session_*.npz. Record some, name their folder with --recordings-dir, or make simulated "
            f"ones: {SIMULATE}"
        )
    return paths


def load_session(path: Path | str) -> dict:
    """A session: frames (N, 260), controls (N, 28), game_state (N, 46) float32, timestamps (N,) float64 in seconds, and
    path, fps, version, session_type, person ("" where not known). Version 1 is mapped to the columns of version 2. No
    pickle is opened. Raises ValueError where anything in it cannot be right."""
    path = Path(path)
    try:
        raw, version = _read_arrays(path)
        _check_shapes(raw, version)
        session = _from_v1(raw) if version == 1 else {name: raw[name] for name in SHAPES[2]}
        session = {name: np.asarray(session[name], np.float32) for name in ("frames", "controls", "game_state")}
        session["timestamps"] = np.asarray(raw["timestamps"], np.float64)
        _check_values(session, "as version 2: " if version == 1 else "")
        session |= {"fps": _fps(raw, session["timestamps"]), "version": version}
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}. {MEND}") from None
    return session | {"path": path} | {name: str(raw.get(name, "")) for name in ("session_type", "person")}


def _read_arrays(path: Path) -> tuple[dict, int]:
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            version = int(file["version"]) if "version" in file else 1
            names = [*SHAPES.get(version, ()), "game_state", "fps", "session_type", "person"]
            raw = {name: file[name] for name in names if name in file}
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # the readers of zip and npy raise many kinds for damaged bytes
        raise ValueError(f"it cannot be read ({type(error).__name__}: {error})") from None
    if version not in SHAPES:
        raise ValueError(f"version {version}, expected 1 or 2, as only those hold the pose")
    return raw, version


def _check_shapes(raw: dict, version: int):
    N = raw["timestamps"].size if "timestamps" in raw else 0
    for name, shape in SHAPES[version].items():
        if name not in raw:
            raise ValueError(f"there is no {name}, which version {version} has")
        if raw[name].shape != (N, *shape) or raw[name].dtype.kind not in "fiub":
            found = f"{name} is {raw[name].dtype} {raw[name].shape}"
            raise ValueError(f"{found}, expected numbers of shape {(N, *shape)} for {N} timestamps")
    if version == 1 and "game_state" in raw and raw["game_state"].shape not in ((N, 16), (N, 24)):
        raise ValueError(f"game_state is {raw['game_state'].shape}, expected {(N, 16)} or {(N, 24)} in version 1")
    if N < 2:
        raise ValueError(f"{N} frames, expected at least 2")


def _from_v1(raw: dict) -> dict:
    N = len(raw["timestamps"])
    controls, state = np.zeros((N, CONTROL_DIM), np.float32), np.zeros((N, STATE_DIM), np.float32)
    controls[:, V1_CONTROLS] = raw["controls"]
    if "game_state" in raw:
        for old, new in list(V1_STATE.items())[: 15 if raw["game_state"].shape[1] == 16 else None]:
            state[:, new] = raw["game_state"][:, old] * (0.5 if old == 15 else 1)  # fall distance: / 10, now / 20
    else:
        state[:, V1_NO_STATE] = 1
    parts = [raw[name].reshape(N, -1) for name in list(SHAPES[1])[:6]]
    return {"frames": np.concatenate(parts, 1), "controls": controls, "game_state": state}


def _check_values(session: dict, form: str):
    frames, controls, times = session["frames"], session["controls"], session["timestamps"]
    limits = [("frames", frames[:, :POSITIONS], -10, 10, 0), ("frames", frames[:, POSITIONS:], 0, 1, POSITIONS)]
    signed = np.isin(np.arange(CONTROL_DIM), LOOK_COLUMNS)
    limits += [("controls", controls, np.where(signed, -1, 0), 1, 0), ("game_state", session["game_state"], -1, 1, 0)]
    for name, values, low, high, first in limits:
        wrong = ~((values >= low - 1e-3) & (values <= high + 1e-3))  # also where NaN
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            low = int(np.broadcast_to(low, values.shape[1])[column])
            raise ValueError(
                f"{form}{name} row {row}, column {first + column} is {values[row, column]}, expected {low} to {high}"
            )
    finite = np.isfinite(times)
    backwards = np.flatnonzero(~(np.diff(times) >= 0) | ~finite[1:] | ~finite[:-1])
    if len(backwards):
        row = backwards[0] + 1
        raise ValueError(f"timestamps row {row} is {times[row]} after {times[row - 1]}, expected seconds that rise")


def _fps(raw: dict, times: np.ndarray) -> float:
    if "fps" in raw:
        if raw["fps"].size != 1 or raw["fps"].dtype.kind not in "fiu" or not 0 < float(raw["fps"].item()) < np.inf:
            raise ValueError(f"fps is {raw['fps']}, expected one positive number")
        fps, span = float(raw["fps"].item()), times[-1] - times[0]
        if not 0.5 < fps * span / (len(times) - 1) < 2:
            raise ValueError(
                f"timestamps span {span:g} for {len(times)} frames, expected seconds at the fps of {fps:g}"
            )
        return fps
    return float((len(times) - 1) / (times[-1] - times[0])) if times[-1] > times[0] else 30.0


def repeated_share(session: dict) -> float:
    """Share of the frames with a look in which game state and controls are the previous frame's to the bit: rows that
    a recorder read twice from a slower game clock, a third of them at 30 frames and 20 ticks per second."""
    controls, state = session["controls"], session["game_state"]
    looking = (controls[1:, list(LOOK_COLUMNS)] != 0).any(1)
    same = (controls[1:] == controls[:-1]).all(1) & (state[1:] == state[:-1]).all(1)
    return float((same & looking).sum() / max(1, looking.sum()))
