"""What labelling leaves beside a recording: detections.parquet, and three tables that are written together.

Their metadata holds what they were made from, so that what belongs to another recording is not used.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa

from common.sessions import DETECTIONS, EPISODES, EVENTS, RETURNS, read_table, write_table
from common.template_matching import FIND_VERSION
from session_labels.sprites import Sighting, Sprites, kept_from


def metadata_of(path: Path, schema: pa.Schema) -> dict[str, str]:
    """What a parquet file says about itself."""
    return {k.decode(): v.decode() for k, v in (read_table(path, schema).schema.metadata or {}).items()}


def recording_of(folder: Path, n_frames: int) -> dict[str, int]:
    """What tells a recording from another one that took its place."""
    return {"recording_frames": n_frames, "recording_bytes": (folder / "recording.mp4").stat().st_size}


def check_recording(where: str, made_for: dict, recording: dict, mend: str):
    """Raise ValueError where something belongs to another recording."""
    for key in ("recording_frames", "recording_bytes"):
        if str(made_for.get(key)) != str(recording[key]):
            found = f"is for a recording with {key} {made_for.get(key)}, recording.mp4 has {recording[key]}"
            raise ValueError(f"{where} {found}. {mend}")


def scan_metadata(sprites: Sprites, metadata: dict[str, str]) -> dict[str, str]:
    """What detections depend on; those made with the same are used again."""
    looked_for = hashlib.sha256()
    for name, event, template in zip(sprites.names, sprites.events, sprites.finder.bank.templates, strict=True):
        looked_for.update(f"{name} {event} {tuple(template.shape)}".encode() + template.numpy().tobytes())
    recording = {name: metadata[name] for name in ("recording_frames", "recording_bytes", "event_stride", "roi")}
    scales = json.dumps(list(dict.fromkeys(sprites.scales)))
    return recording | {"search_version": str(FIND_VERSION), "sprites": looked_for.hexdigest(), "scales": scales}


def scan_of(folder: Path) -> dict[str, str]:
    """The metadata of a session's detections.parquet, empty where there is none that can be read."""
    try:
        return {"search_version": "1", "roi": "None"} | metadata_of(folder / "detections.parquet", DETECTIONS)
    except (ValueError, OSError):
        return {}


def say_why_again(folder: Path, wanted: dict[str, str]):
    """Say what tells a detections.parquet from the search that is wanted."""
    made = scan_of(folder)
    others = [key for key, value in wanted.items() if made.get(key) != value]
    if made and others:
        print(f"{folder.name}: detections.parquet was made with other {', '.join(others)}; searched again")


def load_detections(folder: Path, sprites: Sprites, wanted: dict[str, str]) -> list[Sighting] | None:
    """Those of detections.parquet, None where they were searched otherwise or leave out what is asked for now."""
    made = scan_of(folder)
    if any(made.get(key) != value for key, value in wanted.items()):
        return None
    least = json.loads(made["least"])
    if any(least[name] > threshold + 1e-9 for name, threshold in zip(sprites.names, sprites.thresholds, strict=True)):
        return None
    number = {name: t for t, name in enumerate(sprites.names)}
    return [
        Sighting(row["frame_idx"], row["event"], number[row["sprite"]], row["score"], row["y"], row["x"])
        for row in read_table(folder / "detections.parquet", DETECTIONS).to_pylist()
    ]


def save_detections(folder: Path, detections: list[Sighting], sprites: Sprites, metadata: dict[str, str]):
    least = dict(zip(sprites.names, kept_from(sprites.thresholds).tolist(), strict=True))
    columns = {
        "frame_idx": [d.frame for d in detections],
        "event": [d.event for d in detections],
        "sprite": [sprites.names[d.sprite] for d in detections],
    } | {name: [getattr(d, name) for d in detections] for name in ("score", "y", "x")}
    write_table(folder / "detections.parquet", columns, DETECTIONS, metadata | {"least": json.dumps(least)})


def write_labels(folder: Path, events: dict, episodes: dict, returns: dict, metadata: dict):
    """Write the three tables, all or none: they replace the old ones when the last of them is complete."""
    temporary = folder / ".labels.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write_table(temporary / "events.parquet", events, EVENTS, metadata)
        write_table(temporary / "episodes.parquet", episodes, EPISODES, metadata)
        write_table(temporary / "returns.parquet", returns, RETURNS, metadata)
    except BaseException:  # a full disk, Ctrl-C
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    install_labels(folder)


def has_labels(folder: Path) -> bool:
    """Whether all three tables are there."""
    return all((folder / f"{name}.parquet").exists() for name in ("events", "episodes", "returns"))


def install_labels(folder: Path):
    """Put complete new labels in place, also those of a run that was killed while it did so; remove incomplete ones.

    While it is done there is no returns.parquet, that is, the session has no labels.
    """
    temporary = folder / ".labels.tmp"
    if (temporary / "returns.parquet").exists():
        (folder / "returns.parquet").unlink(missing_ok=True)
        for name in ("events.parquet", "episodes.parquet", "returns.parquet"):
            if (temporary / name).exists():
                os.replace(temporary / name, folder / name)
    shutil.rmtree(temporary, ignore_errors=True)


def made_otherwise(old: dict[str, str], metadata: dict[str, str]) -> str:
    """What labels with the metadata `old` were made with that now is another."""
    changed = [(key, old.get(key, "not known"), value) for key, value in metadata.items() if old.get(key) != value]
    return "; ".join(f"{key} {before}, not {value}" for key, before, value in changed)


def say_what_changes(folder: Path, metadata: dict[str, str], older: dict[str, str]):
    """Of labels that are made again: with which other settings. What a person decided changes them anyhow."""
    try:
        old = older | metadata_of(folder / "returns.parquet", RETURNS)
    except (ValueError, OSError):
        return  # no labels, or none that can be read
    asked = {key: value for key, value in metadata.items() if not key.startswith(("recording_", "overrides"))}
    if changed := made_otherwise(old, asked):
        print(f"{folder.name}: its labels were made with {changed}; they are made again")


def check_labels(folder: Path, metadata: dict[str, str], older: dict[str, str]):
    """Say that labels are kept; raise ValueError where they belong to another recording. `older`: what labels are made
    with that do not say it."""
    old = older | metadata_of(folder / "returns.parquet", RETURNS)
    for key in ("recording_frames", "recording_bytes"):
        if key in old and old[key] != metadata[key]:
            raise ValueError(
                f"{folder}/returns.parquet was made for a recording with {key} {old[key]}, recording.mp4 has "
                f"{metadata[key]}. Label it again with --overwrite"
            )
    changed = made_otherwise(old, metadata)
    note = f" (made with {changed})" if changed else ""
    print(f"{folder.name}: has labels{note}, kept; --overwrite makes them again")
