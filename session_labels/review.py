"""Doubtful events: a page that asks a person about them, and overrides, the person's decisions.

An override accepts or rejects one place: a frame, an event, and the sprite's top left corner in recorded pixels.
The page is review.html beside this file, filled with pictures.
"""

import base64
import hashlib
import io
import json
import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.sessions import OVERRIDES, SCHEMA_VERSION, Session, load_session, read_table, write_table
from common.video import VideoReader
from session_labels.files import check_recording, metadata_of, recording_of
from session_labels.sprites import Sighting, Sprites

PAGE = Path(__file__).with_suffix(".html")
NEAR = 6  # pixels by which two places in one frame may differ and still be the same
SPEED = 800.0  # pixels per second: a dying Tux starts with 700
LEVELS = tuple(k / 100 for k in range(1, 11))  # by which thresholds are lowered to see which events would come
CONTEXT_S = 0.5  # before and after the frame
WIDE, NARROW = 640, 320  # pixels, the frame and those around it
MARGIN = 12  # pixels of a sprite as drawn, around the close-up
MEND = "Ask again with --review, or take the file away"


# --- Overrides: written by the page as json, kept beside the recording as overrides.parquet ---


@dataclass
class Override:
    frame: int
    event: str
    sprite: str  # as in detections.parquet
    y: int
    x: int
    accept: bool


def same_place(a: Override | Sighting, b: Override | Sighting) -> bool:
    """Whether two of Override and Sighting, in pixels of the recording, are one place."""
    return (a.frame, a.event) == (b.frame, b.event) and max(abs(a.y - b.y), abs(a.x - b.x)) <= NEAR


def load_overrides(folder: Path, recording: dict) -> list[Override]:
    """Those of a session. Raises ValueError if they were made for another recording than `recording`."""
    path = folder / "overrides.parquet"
    if not path.exists():
        return []
    check_recording(str(path), metadata_of(path, OVERRIDES), recording, MEND)
    overrides = [Override(*(row[name] for name in OVERRIDES.names)) for row in read_table(path, OVERRIDES).to_pylist()]
    for number, override in enumerate(overrides):
        if not 0 <= override.frame < int(recording["recording_frames"]) or min(override.y, override.x) < 0:
            where = f"frame {override.frame} of {recording['recording_frames']}, y {override.y}, x {override.x}"
            raise ValueError(f"{path}, row {number}: {where} is outside the recording. {MEND}")
    return overrides


def used(overrides: list[Override]) -> dict[str, str]:
    """What labels say about the overrides they were made with."""
    rows = json.dumps([list(asdict(o).values()) for o in overrides])
    digest = hashlib.sha256(rows.encode()).hexdigest()[:8] if overrides else "none"
    return {"overrides": str(len(overrides)), "overrides_digest": digest}


def read_overrides(path: Path, folders: list[Path], sprites: dict[str, str]) -> dict[Path, tuple[dict, list[Override]]]:
    """The decisions in a json file of the page: recording and overrides by session folder.

    Raises ValueError naming the file and what is wrong in it.
    """
    try:
        page = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--overrides {path} cannot be read ({error.strerror}). Save it from review.html") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Save it again from review.html") from None
    version = page.get("schema_version") if isinstance(page, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {version!r}, expected {SCHEMA_VERSION}. {MEND}")
    sessions, decisions = page.get("sessions"), page.get("decisions")
    if not isinstance(sessions, dict) or not isinstance(decisions, list):
        raise ValueError(f"{path} lacks its sessions or its decisions. Save it again from review.html")
    named, found = {folder.name: folder for folder in folders}, {}
    for name, made_for in sessions.items():
        if name not in named:
            raise ValueError(f"{path} names the session {name!r}, which is not in {folders[0].parent}. {MEND}")
        frames = min(load_session(named[name]).n_frames, VideoReader(named[name] / "recording.mp4").n_frames)
        recording = recording_of(named[name], frames)
        check_recording(f"{path}, session {name},", made_for if isinstance(made_for, dict) else {}, recording, MEND)
        found[name] = (recording, [])
    for number, row in enumerate(decisions, 1):
        if wrong := wrong_in(row, found, sprites):
            raise ValueError(f"{path}, decision {number}: {wrong}. {MEND}")
        found[row["session"]][1].append(Override(row["frame_idx"], *(row[name] for name in OVERRIDES.names[1:])))
    return {named[name]: both for name, both in found.items()}


def wrong_in(row: object, sessions: dict[str, tuple[dict, list]], sprites: dict[str, str]) -> str | None:
    """What is wrong in a decision, None if nothing is."""
    types = {"session": str, "frame_idx": int, "event": str, "sprite": str, "y": int, "x": int, "accept": bool}
    if not isinstance(row, dict):
        return f"expected an object, found {json.dumps(row)}"
    for name, kind in types.items():
        if type(row.get(name)) is not kind:
            return f"{name} is {json.dumps(row.get(name))}, expected {kind.__name__}"
    if row["session"] not in sessions:
        return f"the session {row['session']!r} is not among the file's sessions"
    frames = sessions[row["session"]][0]["recording_frames"]
    if not 0 <= row["frame_idx"] < frames:
        return f"frame_idx is {row['frame_idx']}, the recording has {frames} frames"
    if min(row["y"], row["x"]) < 0:
        return f"y is {row['y']} and x is {row['x']}, expected 0 or more"
    event = sprites.get(kind_of(row["sprite"]))
    if event is None:
        return f"the sprite {row['sprite']!r} is not among those looked for: {', '.join(sprites)}"
    if event != row["event"]:
        return f"event is {row['event']!r}, expected {event}, which {row['sprite']} tells"
    return None


def kind_of(sprite: str) -> str:
    """A sprite's name without its size."""
    name, _, size = sprite.rpartition(" x")
    return name if name and size.replace(".", "", 1).isdigit() else sprite


def merge(old: list[Override], new: list[Override]) -> list[Override]:
    """All of them; on one place the last."""
    merged: list[Override] = []
    for override in [*old, *new]:
        merged = [o for o in merged if not same_place(o, override)] + [override]
    return sorted(merged, key=lambda o: (o.frame, o.event, o.y, o.x))


def import_overrides(given: Path | None, data_dir: Path, folders: list[Path], sprites: dict[str, str]):
    """Add the decisions in `given`, else in overrides.json in `data_dir` if it is there, to overrides.parquet of their
    sessions; all are checked before the first is written. What was imported from overrides.json is not again: decisions
    given since then are later. `sprites`: the names that there are, without sizes, and the event that each tells.
    """
    path = given or data_dir / "overrides.json"
    if given is None and not path.exists():
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    if given is None and are_imported(path, folders, digest):
        return
    found = read_overrides(path, folders, sprites)
    merged = {}
    for folder, (recording, new) in found.items():
        old, imports = load_overrides(folder, recording), imports_of(folder)
        if new and (given or digest not in imports):
            merged[folder] = (
                merge(old, new),
                recording | {"imports": json.dumps(list(dict.fromkeys([*imports, digest])))},
            )
    for folder, (overrides, metadata) in merged.items():
        rows = {name: [list(asdict(o).values())[i] for o in overrides] for i, name in enumerate(OVERRIDES.names)}
        write_table(folder / "overrides.parquet", rows, OVERRIDES, metadata)
    if merged:
        decisions = sum(len(found[folder][1]) for folder in merged)
        print(f"{path}: {decisions} decisions on {len(merged)} sessions; --overwrite makes their labels again")


def are_imported(path: Path, folders: list[Path], digest: str) -> bool:
    """Whether all sessions that the file decides on have its decisions: they need not be readable then."""
    try:
        names = {row["session"] for row in json.loads(path.read_text())["decisions"]}
        done = {folder.name for folder in folders if folder.name in names and digest in imports_of(folder)}
    except (ValueError, OSError, TypeError, KeyError):
        return False  # reading it says what is wrong
    return bool(names) and done == names


def imports_of(folder: Path) -> list[str]:
    """Digests of the files that a session's overrides came from."""
    path = folder / "overrides.parquet"
    return json.loads(metadata_of(path, OVERRIDES).get("imports", "[]")) if path.exists() else []


# --- ALGO LOGIC: which sightings count, once a person has decided ---


def follow(start: Sighting, sightings: list[Sighting], times: np.ndarray, stride: int) -> list[Sighting]:
    """`start` and what goes on from it, forwards and backwards: in each frame the nearest of `sightings`, no further
    than it can have moved. It may be missing in one frame. Frame `times` (N,) in ms."""
    chain = [start]
    for way in (1, -1):
        last = start
        ahead = sorted((s for s in sightings if (s.frame - start.frame) * way > 0), key=lambda s: s.frame * way)
        for frame, group in groupby(ahead, key=lambda s: s.frame):
            if abs(frame - last.frame) > 2 * stride:
                break
            distance, nearest = min(
                ((np.hypot(s.y - last.y, s.x - last.x), s) for s in group), key=lambda pair: pair[0]
            )
            if distance <= NEAR + SPEED * abs(int(times[frame]) - int(times[last.frame])) / 1000:
                last = nearest
                chain.append(nearest)
    return sorted(chain, key=lambda s: s.frame)


def accept(
    detections: list[Sighting], overrides: list[Override], sprites: Sprites, times: np.ndarray, stride: int
) -> list[Sighting]:
    """`detections` with score 1 at the places that a person has accepted, also where there was none. What is not sure
    without the person is one sprite with score 1 from its first frame to its last."""
    detections, accepted = list(detections), {}
    for override in (o for o in overrides if o.accept):
        kind = kind_of(override.sprite)
        if kind not in sprites.kinds:
            raise ValueError(f"overrides.parquet names the sprite {kind!r}, which is not looked for. {MEND}")
        here = [d for d in detections if same_place(d, override) and sprites.kinds[d.sprite] == kind]
        if not here:
            here = [Sighting(override.frame, override.event, sprites.kinds.index(kind), 0.0, override.y, override.x)]
            detections += here
        start = max(here, key=lambda d: d.score)
        weak = [d for d in detections if d.event == start.event and d.score < sprites.thresholds[d.sprite]]
        is_weak = any(d is start for d in weak)
        accepted |= {id(d): start.sprite for d in (follow(start, weak, times, stride) if is_weak else [start])}
    marked = [replace(d, score=1.0, sprite=accepted[id(d)]) if id(d) in accepted else d for d in detections]
    return sorted(marked, key=lambda d: d.frame)


def whole(_, group: list[Sighting]) -> list[Sighting]:
    return group


def without_rejected(
    groups: list[list[Sighting]], overrides: Sequence[Override], together: Callable = whole
) -> list[list[Sighting]]:
    """`groups` of sightings, each an event, without those whose best place goes with a rejected one.

    `together(sighting, group)` is what goes with a sighting. Of other events that goes alone, and of those in which a
    place was accepted the rejected places do.
    """
    kept = []
    for group in groups:
        rejected = [s for s in group if is_judged(s, overrides, accepted=False)]
        gone = {id(s) for s in rejected}
        if rejected and not any(is_judged(s, overrides, accepted=True) for s in group):
            gone = {id(s) for start in rejected for s in together(start, group)}
            if id(max(group, key=lambda s: s.score)) in gone:
                continue
        kept.append([s for s in group if id(s) not in gone])
    return [group for group in kept if group]


def is_judged(sighting: Sighting, overrides: Sequence[Override], accepted: bool) -> bool:
    return any(o.accept == accepted and same_place(sighting.recorded, o) for o in overrides)


# --- ALGO LOGIC: which events are doubtful ---


@dataclass
class Card:
    """One event that a person is asked about, by its best place."""

    folder: Path
    recording: dict  # by which its overrides will know it
    event: str
    sprite: str  # as in detections.parquet
    scale: float  # size of that sprite, 1 as drawn
    score: float
    threshold: float
    taken: bool  # as an event, by the labeller
    frame: int
    time: int  # ms since the first frame
    y: int
    x: int
    size: tuple[int, int]  # height and width, pixels
    around: dict[int, int]  # frames to show, its own and those before and after: ms from its own
    places: dict[int, tuple[int, int]]  # y and x in all frames that show it


def doubtful(groups_at: Callable[..., list[list]], overrides: list[Override]) -> tuple[list[list], list[list]]:
    """Groups of sightings that are events, and groups that would be events of their own if thresholds were lower by one
    of LEVELS; those that a person has judged are left out. `groups_at(less, overrides)` finds them."""
    known = defaultdict(list)

    def remember(places: list):
        for place in places:
            known[place.frame, place.event].append(place)

    def is_new(group: list) -> bool:
        return not any(same_place(s.recorded, k) for s in group for k in known[s.frame, s.event])

    remember(overrides)
    events = groups_at(0.0, overrides)
    taken, weak = [group for group in events if is_new(group)], []
    remember([s.recorded for group in groups_at(0.0, []) for s in group])
    for less in LEVELS:
        groups = groups_at(less, [])
        weak += [group for group in groups if is_new(group)]
        remember([s.recorded for group in groups for s in group])
    return taken, weak


def make_cards(
    session: Session, metadata: dict, sprites: Sprites, groups_at: Callable, overrides: list[Override], stride: int
) -> list[Card]:
    """A card for each doubtful event of a session."""
    recording = {name: int(metadata[name]) for name in ("recording_frames", "recording_bytes")}
    taken, weak = doubtful(groups_at, overrides)
    cards = [make_card(session, recording, sprites, group, True, stride) for group in taken]
    return cards + [make_card(session, recording, sprites, group, False, stride) for group in weak]


def make_card(
    session: Session, recording: dict, sprites: Sprites, group: list[Sighting], taken: bool, stride: int
) -> Card:
    """The card of a group of sightings."""
    places = [s.recorded for s in group]
    best = max(places, key=lambda d: d.score - sprites.thresholds[d.sprite])
    times = session.timestamps[: recording["recording_frames"]]
    moments = times[best.frame] + np.array([-1, 0, 1]) * CONTEXT_S * 1000
    around = sorted({best.frame, *(int(np.abs(times - moment).argmin()) for moment in moments)})
    return Card(
        session.folder,
        recording,
        best.event,
        sprites.names[best.sprite],
        sprites.scales[best.sprite],
        float(best.score),
        float(sprites.thresholds[best.sprite]),
        taken,
        best.frame,
        int(times[best.frame] - times[0]),
        int(best.y),
        int(best.x),
        tuple(sprites.finder.bank.templates[best.sprite].shape),
        {frame: int(times[frame] - times[best.frame]) for frame in around},
        {d.frame: (int(d.y), int(d.x)) for d in follow(best, places, times, stride)},
    )


def choose(cards: list[Card], n: int) -> list[Card]:
    """The `n` nearest to their thresholds, nearest first: half of them taken, half not, more of one where the other has
    too few."""
    nearest = sorted(cards, key=lambda c: (abs(c.score - c.threshold), c.folder.name, c.frame))
    taken, weak = [c for c in nearest if c.taken], [c for c in nearest if not c.taken]
    half = max(n // 2, n - len(weak))
    chosen = {id(c) for c in taken[:half] + weak[: n - min(half, len(taken))]}
    return [c for c in nearest if id(c) in chosen]


# --- The page ---


def data_uri(image: Image.Image, width: int, kind: str = "jpeg") -> str:
    """A picture, no wider than `width`, as a link that holds it."""
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def draw_sprite(folder: Path, kind: str) -> str:
    """A sprite as drawn, with the margin of the close-up."""
    with Image.open(folder / kind.removesuffix(" mirrored")) as image:
        sprite = image.convert("RGBA")
    sprite = ImageOps.mirror(sprite) if kind.endswith(" mirrored") else sprite
    return data_uri(ImageOps.expand(sprite, MARGIN, (0, 0, 0, 0)), WIDE, "png")


def draw_frame(image: Image.Image, card: Card, frame: int) -> dict:
    """A frame, and the card's place in it in parts of the picture's width and height; `seen` if the sprite is there."""
    y, x = card.places.get(frame, (card.y, card.x))
    box = [x / image.width, y / image.height, card.size[1] / image.width, card.size[0] / image.height]
    return {
        "image": data_uri(image, WIDE if frame == card.frame else NARROW),
        "width": image.width,
        "height": image.height,
        "box": [round(part, 4) for part in box],
        "seen": frame in card.places,
        "ms": card.around[frame],
    }


def draw_card(card: Card, reader: VideoReader) -> dict:
    """What the page shows of a card, with its pictures."""
    images = {f: Image.fromarray(reader.read(f, f + 1)[0].permute(1, 2, 0).numpy()) for f in card.around}
    (h, w), margin = card.size, round(MARGIN * card.scale)
    area = (card.x - margin, card.y - margin, card.x + w + margin, card.y + h + margin)  # black beyond the frame
    names = ("event", "sprite", "score", "threshold", "taken", "y", "x", "time")
    return {name: getattr(card, name) for name in names} | {
        "id": f"{card.folder.name} {card.recording['recording_bytes']} {card.event} {card.frame} {card.y} {card.x}",
        "session": card.folder.name,
        "recording": card.recording,
        "frame_idx": card.frame,
        "kind": kind_of(card.sprite),
        "close_up": data_uri(images[card.frame].crop(area), WIDE),
        "frames": [draw_frame(images[frame], card, frame) for frame in card.around],
    }


def write_page(path: Path, cards: list[Card], sprites: Path, data_dir: Path, flags: list[str]):
    """The page that asks about `cards`, with all pictures inside. `sprites`: folder of their files. `flags` are those
    that the labels are to be made with again."""
    readers, kinds = {}, sorted({kind_of(card.sprite) for card in cards})
    command = ["python", "precompute_labels.py", "--data-dir", str(data_dir), *flags, "--overwrite"]
    page = {"schema_version": SCHEMA_VERSION, "command": shlex.join(command), "cards": []}
    for card in cards:
        if card.folder not in readers:
            readers[card.folder] = VideoReader(card.folder / "recording.mp4")
        page["cards"].append(draw_card(card, readers[card.folder]))
    page["sprites"] = {kind: draw_sprite(sprites, kind) for kind in kinds}
    html = PAGE.read_text().replace("{{page}}", json.dumps(page).replace("<", "\\u003c"))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(html)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
