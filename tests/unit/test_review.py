"""The review of doubtful events: what is asked, what a decision changes, and what is refused."""

import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.sessions import EVENTS, OVERRIDES, read_table, write_table
from precompute_labels import Args, Sighting, group_events, main, sprite_groups
from session_labels.game import load_game
from session_labels.review import Card, Override, accept, choose, doubtful, follow, kind_of, merge, without_rejected
from tests.unit.test_precompute_labels import arguments, dataset, times_at  # noqa: F401

TIMES = times_at(10, 400)
DEATH_SPRITE = "creatures/tux/small/gameover-0.png"
RULES = load_game(Args.game).rules
SPRITES = SimpleNamespace(kinds=["tux", "tux other", "enemy"], thresholds=np.array([0.85, 0.85, 0.85]))


def place(frame, score, y=100, x=100, event="DEATH", sprite=0):
    return Sighting(frame, event, sprite, score, y, x)


def seen(detections, less=0.0):
    """The hand-made detections that score 0.85, or `less`, as sightings."""
    return [replace(d, recorded=d) for d in detections if d.score >= 0.85 - less]


def groups_of(event, sightings, overrides=(), stride=1):
    return sprite_groups(Args(event_stride=stride), RULES[event], sightings, TIMES, overrides)


def deaths(detections, overrides=(), less=0.0, stride=1):
    return group_events(RULES["DEATH"], groups_of("DEATH", seen(detections, less), overrides, stride), TIMES)


def override(frame, accept, y=100, x=100, event="DEATH", sprite="tux"):
    return Override(frame, event, sprite, y, x, accept)


# --- what is asked ---


def asked(detections, overrides=()):
    def groups_at(less, decided):
        those = seen(detections, less)
        deaths, attacks = ([s for s in those if s.event == event] for event in ("DEATH", "ATTACK"))
        return groups_of("DEATH", deaths, decided) + groups_of("ATTACK", attacks, decided)

    taken, weak = doubtful(groups_at, list(overrides))
    return [[[s.frame for s in group] for group in groups] for groups in (taken, weak)]


def test_events_and_what_would_be_events_are_asked_once_each():
    detections = [
        place(10, 0.80),  # leads into a death: no event of its own
        *(place(12 + i, 0.97) for i in range(5)),
        *(place(17 + i, 0.78) for i in range(5)),  # and goes on from it
        *(place(100 + i, score) for i, score in enumerate((0.78, 0.82, 0.80))),
        place(103, 0.76, x=500),  # a cloud, within the time of one death
        place(200, 0.76),
    ]
    taken, weak = asked(detections)
    assert taken == [[12, 13, 14, 15, 16]]
    assert [frame for group in weak for frame in group if frame in (101, 200)] == [101, 200]
    assert len(weak) == 2


def test_squished_enemies_are_asked_by_track():
    def enemy(frames, score, x):
        return [place(i, score, 400, x, "ATTACK", 2) for i in frames]

    detections = sorted(enemy(range(10, 30), 0.95, 300) + enemy(range(15, 25), 0.8, 80), key=lambda d: d.frame)
    taken, weak = asked(detections)
    assert taken == [list(range(10, 30))] and weak == [list(range(15, 25))]


def test_what_was_judged_is_not_asked_again():
    detections = [place(10, 0.97), place(11, 0.97), place(100, 0.8), place(101, 0.79), place(200, 0.9)]
    assert asked(detections) == [[[10, 11], [200]], [[100]]]
    judged = [override(10, True), override(100, False), override(200, False)]
    assert asked(detections, judged) == [[], []]
    assert asked(detections, judged[:1]) == [[[200]], [[100]]]


def card(score, taken, threshold=0.85):
    return Card(SimpleNamespace(name="run"), {}, "DEATH", "", 1, score, threshold, taken, 0, 0, 0, 0, (1, 1), {}, {})


def test_the_nearest_of_both_sides_are_chosen():
    taken, weak = [0.86, 0.99, 0.9, 0.95], [0.84, 0.76, 0.8, 0.78]
    cards = [card(score, True) for score in taken] + [card(score, False) for score in weak]
    assert sorted(c.score for c in choose(cards, 4)) == [0.8, 0.84, 0.86, 0.9]
    assert [c.score for c in choose(cards, 6)][-2:] == [0.78, 0.95], "nearest first"
    assert sorted(c.score for c in choose(cards[:5], 4)) == [0.84, 0.86, 0.9, 0.95]
    assert sorted(c.score for c in choose(cards[3:], 4)) == [0.78, 0.8, 0.84, 0.95]
    assert len(choose(cards, 100)) == 8 and choose(cards, 0) == []
    strict = card(0.92, False, 0.95)  # nearer to its own threshold than the other
    assert choose([card(0.8, False), strict], 1) == [strict]


# --- what a decision changes ---


def accepted(detections, *overrides, stride=1):
    return accept(detections, list(overrides), SPRITES, TIMES, stride)


def test_accepted_place_is_an_event_from_its_first_frame_on():
    weak = [place(100 + i, score, y=100 - 40 * i) for i, score in enumerate((0.77, 0.83, 0.79))]
    cloud = [place(99, 0.8, y=20, x=500), place(103, 0.8, y=20, x=500)]
    detections = sorted(weak + cloud + [place(250, 0.84)], key=lambda d: d.frame)
    assert deaths(detections) == []
    assert deaths(accepted(detections, override(101, True, y=62, x=96))) == [(100, 1.0)]
    assert deaths(accepted(detections, override(101, False, y=62, x=96))) == []


def test_accepted_place_counts_however_seldom_it_is_seen(monkeypatch):
    seldom = [place(100, 0.9)]
    assert deaths(seldom) == [(100, 0.9)]
    monkeypatch.setattr(RULES["DEATH"], "min_sightings", 3)
    monkeypatch.setattr(RULES["DEATH"], "of_frames", 3)
    assert deaths(seldom) == []
    assert deaths(accepted(seldom, override(100, True)), [override(100, True)]) == [(100, 1.0)]


def test_accepting_an_event_makes_it_sure_and_moves_nothing():
    detections = [place(9, 0.8), place(10, 0.9), place(11, 0.95), place(12, 0.8)]
    assert deaths(accepted(detections, override(11, True))) == [(10, 1.0)]


def test_accepted_place_without_a_detection_counts():
    assert deaths(accepted([], override(40, True))) == [(40, 1.0)]
    other = [place(40, 0.8, x=200), place(41, 0.8)]
    assert deaths(accepted(other, override(40, True))) == [(40, 1.0)]
    with pytest.raises(ValueError, match="names the sprite 'bear', which is not looked for"):
        accepted([], override(40, True, sprite="bear"))


def test_accepted_event_is_one_sprite():
    """Else each of the two sprites would be a squished enemy."""
    sprites = SimpleNamespace(kinds=["left", "right"], thresholds=np.array([0.85, 0.85]))
    detections = [place(i, 0.8 - 0.01 * (i % 2), event="ATTACK", sprite=i % 2) for i in range(10, 20)]
    chosen = accept(detections, [override(10, True, event="ATTACK", sprite="left")], sprites, TIMES, 1)
    assert [(s.frame, s.sprite) for s in chosen] == [(i, 0) for i in range(10, 20)]
    assert len(groups_of("ATTACK", seen(chosen))) == 1


def test_rejected_place_takes_its_event_with_it():
    detections = [place(10, 0.9), place(11, 0.95), place(14, 0.9), place(80, 0.97)]
    assert deaths(detections, [override(11, False)]) == [(80, 0.97)]
    assert deaths(detections, [override(11, False, y=106, x=94)]) == [(80, 0.97)]
    assert len(deaths(detections, [override(11, False, y=107)])) == 2, "another place"
    assert len(deaths(detections, [override(11, False, event="ATTACK")])) == 2, "another event"
    assert len(deaths(detections, [override(12, False)])) == 2, "another frame"


def test_rejected_place_takes_no_better_event_with_it_that_is_elsewhere():
    """A cloud that lower thresholds let in, 2 s before a death: one death by its time, two things on the screen."""
    cloud, death = [place(10 + i, 0.79, y=20, x=400 - 30 * i) for i in range(4)], [place(30, 0.97), place(31, 0.97)]
    assert deaths(cloud + death, less=0.07) == [(10, 0.97)]
    assert deaths(cloud + death, [override(11, False, y=20, x=370)], less=0.07) == [(30, 0.97)]
    assert deaths(cloud, [override(11, False, y=20, x=370)], less=0.07) == []


def test_acceptance_beats_a_rejection_in_the_same_event():
    detections = accepted([place(10, 0.9), place(11, 0.95)], override(11, True))
    assert deaths(detections, [override(10, False), override(11, True)]) == [(11, 1.0)]


def test_rejected_enemy_leaves_the_others():
    def both(overrides=()):
        pairs = [[place(i, 0.9, 400, x, "ATTACK", 2) for x in (100, 300)] for i in range(10, 25)]
        return groups_of("ATTACK", seen([d for pair in pairs for d in pair]), overrides)

    assert len(both()) == 2
    left = both([override(17, False, 400, 300, "ATTACK", "enemy")])
    assert [{s.x for s in group} for group in left] == [{100}]
    assert without_rejected(both(), []) == both()


def test_follow_crosses_one_missing_frame_and_no_more():
    line = [place(i, 0.8, x=100 + 20 * i) for i in (0, 1, 3, 4, 7, 8)]
    assert [s.frame for s in follow(line[1], line, TIMES, 1)] == [0, 1, 3, 4]
    assert [s.frame for s in follow(line[1], line, TIMES, 2)] == [0, 1, 3, 4, 7, 8]
    assert [s.frame for s in follow(line[0], [place(1, 0.8, x=187)], TIMES, 1)] == [0], "87 pixels in 0.1 s"
    assert [s.frame for s in follow(line[0], [place(1, 0.8, x=185)], TIMES, 1)] == [0, 1]


def test_later_decision_on_a_place_replaces_the_older():
    old = [override(10, True), override(50, False)]
    new = [override(10, False, y=103), override(10, True, x=300)]
    assert merge(old, new) == [override(10, True, x=300), override(10, False, y=103), override(50, False)]
    assert merge([], [override(1, True), override(1, False)]) == [override(1, False)]


def test_size_is_no_part_of_a_sprites_kind():
    assert kind_of("a/b.png mirrored x1.25") == "a/b.png mirrored" and kind_of("a/b.png") == "a/b.png"
    assert kind_of("a x/b.png") == "a x/b.png"


# --- whole sessions ---


def events(folder):
    return [tuple(row.values()) for row in read_table(folder / "events.parquet", EVENTS).to_pylist()]


def page_of(dataset):  # noqa: F811
    text = (dataset / "review.html").read_text()
    return json.loads(text.split('id="page">')[1].split("</script>")[0])


def decide(dataset, *cards, path=None):  # noqa: F811
    """What the page saves for `cards` (card, accept)."""
    names = ("session", "frame_idx", "event", "sprite", "y", "x")
    rows = [{name: card[name] for name in names} | {"accept": accept} for card, accept in cards]
    sessions = {card["session"]: card["recording"] for card, _ in cards}
    page = {"schema_version": 1, "sessions": sessions, "decisions": rows}
    (path or dataset / "overrides.json").write_text(json.dumps(page))


@pytest.fixture
def asked_dataset(dataset):  # noqa: F811
    """Two deaths in run_a, two squished enemies in run_b, all above the threshold, and a page that asks about them."""
    main(arguments(dataset, sprite_threshold=0.95, review=20))
    return dataset


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_one_offline_file(asked_dataset, capsys):
    page, text = page_of(asked_dataset), (asked_dataset / "review.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and reader.links == []
    assert "http://" not in text and "https://" not in text and "//cdn" not in text and "@import" not in text
    taken = [(card["session"], card["event"]) for card in page["cards"] if card["taken"]]
    assert sorted(taken) == [("run_a", "DEATH")] * 2 + [("run_b", "ATTACK")] * 2
    pictures = [f["image"] for card in page["cards"] for f in card["frames"]]
    pictures += [card["close_up"] for card in page["cards"]]
    assert all(picture.startswith("data:image/jpeg;base64,/9j/") for picture in pictures)
    assert {card["kind"] for card in page["cards"]} == set(page["sprites"])
    assert not list(asked_dataset.glob(".*"))
    (asked_dataset / "run_a").rename(asked_dataset / "run_<!--<script>")
    main(arguments(asked_dataset, sprite_threshold=0.95, review=3))
    cards = page_of(asked_dataset)["cards"]
    assert len(cards) == 3 and "run_<!--<script>" in [card["session"] for card in cards]
    assert "run_<" not in (asked_dataset / "review.html").read_text(), "it would end the page's data, or never"
    assert "review.html asks about 3 events" in capsys.readouterr().out


def test_page_names_the_command_that_keeps_gamma(asked_dataset):
    main(arguments(asked_dataset, half_life_s=2.0, overwrite=True))
    main(arguments(asked_dataset, sprite_threshold=0.95, review=3))
    gamma = pq.read_schema(asked_dataset / "run_a" / "returns.parquet").metadata[b"gamma"].decode()
    assert gamma != "0.99" and page_of(asked_dataset)["command"] == (
        f"python precompute_labels.py --data-dir {asked_dataset} --gamma {gamma} --overwrite"
    )


def test_a_session_that_became_unreadable_does_not_stop_the_others(asked_dataset, capsys):
    """Its decisions are imported: the file that they came from is still there."""
    card = next(c for c in page_of(asked_dataset)["cards"] if c["session"] == "run_a")
    decide(asked_dataset, (card, False))
    main(arguments(asked_dataset, sprite_threshold=0.95))
    (asked_dataset / "run_a" / "frames.parquet").write_bytes(b"")
    with pytest.raises(SystemExit, match="(?s)1 of 2 sessions failed.*run_a"):
        main(arguments(asked_dataset, sprite_threshold=0.95, overwrite=True))
    assert "run_b: " in capsys.readouterr().out


def test_decisions_outside_the_recording_fail_their_session(asked_dataset):
    card = next(c for c in page_of(asked_dataset)["cards"] if c["session"] == "run_a")
    decide(asked_dataset, (card, True))
    main(arguments(asked_dataset, sprite_threshold=0.95))
    path = asked_dataset / "run_a" / "overrides.parquet"
    metadata = {key.decode(): value.decode() for key, value in pq.read_schema(path).metadata.items()}
    write_table(
        path,
        {k: [9999] if k == "frame_idx" else v for k, v in read_table(path, OVERRIDES).to_pydict().items()},
        OVERRIDES,
        metadata,
    )
    with pytest.raises(SystemExit, match="overrides.parquet, row 0: frame 9999 of .* is outside the recording"):
        main(arguments(asked_dataset, sprite_threshold=0.95, overwrite=True))


def test_card_shows_the_place(asked_dataset):
    card = next(c for c in page_of(asked_dataset)["cards"] if c["session"] == "run_a" and c["frame_idx"] < 60)
    assert card["event"] == "DEATH" and card["kind"] == DEATH_SPRITE and card["threshold"] == 0.95
    assert (card["y"], card["x"]) == (20 + card["frame_idx"] - 30, 50)
    before, now, after = card["frames"]
    assert [before["ms"], now["ms"], after["ms"]] == [-500, 0, 500] and now["seen"]
    np.testing.assert_allclose(now["box"], [50 / 128, card["y"] / 96, 40 / 128, 31 / 96], atol=1e-4)


def test_rejected_event_goes_and_stays_away(asked_dataset, capsys):
    card = next(c for c in page_of(asked_dataset)["cards"] if c["session"] == "run_a" and c["frame_idx"] < 60)
    decide(asked_dataset, (card, False))
    before = events(asked_dataset / "run_b")
    main(arguments(asked_dataset, sprite_threshold=0.95))  # keeps the labels, and says so
    out = capsys.readouterr().out
    assert "overrides.json: 1 decisions on 1 sessions" in out
    assert "run_a: has labels (made with overrides 0, not 1; overrides_digest none, not " in out
    assert "run_b: has labels, kept" in out
    assert [e[0] for e in events(asked_dataset / "run_a")] == [30, 80, 114]
    (asked_dataset / "overrides.json").unlink()
    for threshold in (0.95, 0.85, 0.9):
        main(arguments(asked_dataset, sprite_threshold=threshold, overwrite=True))
        assert [e[0] for e in events(asked_dataset / "run_a")] == [80, 114]
    metadata = pq.read_schema(asked_dataset / "run_a" / "events.parquet").metadata
    assert metadata[b"overrides"] == b"1" and len(metadata[b"overrides_digest"]) == 8
    main(arguments(asked_dataset, sprite_threshold=0.95, overwrite=True))
    assert events(asked_dataset / "run_b") == before
    table = read_table(asked_dataset / "run_a" / "overrides.parquet", OVERRIDES)
    assert [*table.to_pylist()[0].values()] == [*(card[n] for n in OVERRIDES.names[:-1]), False]
    assert table.schema.metadata[b"schema_version"] == b"1" and table.schema.metadata[b"recording_frames"] == b"120"


def test_comparison_counts_decisions_and_its_curves_do_not(asked_dataset):
    card = next(c for c in page_of(asked_dataset)["cards"] if c["session"] == "run_a" and c["frame_idx"] < 60)
    decide(asked_dataset, (card, False))
    main(arguments(asked_dataset, sprite_threshold=0.95, overwrite=True, truth="truth.parquet"))
    report, curves = (
        pq.read_table(asked_dataset / "label_report" / f"{name}.parquet").to_pylist() for name in ("report", "curves")
    )
    figures = [(row["metric"], row["value"]) for row in report if (row["event"], row["size"]) == ("DEATH", "all")]
    assert dict(figures)["found"] == 1 and dict(figures)["true"] == 2
    assert [row["found"] for row in curves if (row["event"], row["threshold"]) == ("DEATH", 0.95)] == [2]


@pytest.mark.parametrize(("name", "event"), [("run_a", "DEATH"), ("run_b", "ATTACK")])
def test_accepted_place_below_the_threshold_is_an_event(asked_dataset, name, event):
    (first, _, peak), (_, _, other) = events(asked_dataset / name)[:2]
    threshold = max(peak, other) + 1e-4
    main(arguments(asked_dataset, sprite_threshold=threshold, overwrite=True, review=50))
    assert event not in [e[1] for e in events(asked_dataset / name)]
    cards = [c for c in page_of(asked_dataset)["cards"] if c["session"] == name and c["event"] == event]
    assert len(cards) == 2 and not any(c["taken"] for c in cards)
    decide(asked_dataset, (min(cards, key=lambda c: c["frame_idx"]), True))
    for again in (threshold, 0.9999):
        main(arguments(asked_dataset, sprite_threshold=again, overwrite=True))
        assert [e for e in events(asked_dataset / name) if e[1] == event] == [(first, event, 1.0)]
    main(arguments(asked_dataset, overwrite=True))
    assert [e[1] for e in events(asked_dataset / name)].count(event) == 2
    assert events(asked_dataset / name)[0] == (first, event, 1.0)


def test_second_file_adds_to_the_first(asked_dataset):
    cards = [c for c in page_of(asked_dataset)["cards"] if c["taken"] and c["session"] == "run_a"]
    first, second = sorted(cards, key=lambda c: c["frame_idx"])
    decide(asked_dataset, (first, False))
    main(arguments(asked_dataset, overwrite=True))
    assert [e[0] for e in events(asked_dataset / "run_a")] == [80, 114]
    given = asked_dataset / "later.json"
    decide(asked_dataset, (first, True), (second, False), path=given)
    main(arguments(asked_dataset, overwrite=True, overrides=given))
    assert [e[0] for e in events(asked_dataset / "run_a")] == [30, 114]
    assert events(asked_dataset / "run_a")[0][2] == 1.0
    main(arguments(asked_dataset, overwrite=True))  # overrides.json is older than what was given
    assert [e[0] for e in events(asked_dataset / "run_a")] == [30, 114]
    assert len(read_table(asked_dataset / "run_a" / "overrides.parquet", OVERRIDES)) == 2


def fails(dataset, match, **changes):  # noqa: F811
    with pytest.raises(SystemExit, match=match):
        main(arguments(dataset, overwrite=True, **changes))
    assert not list(dataset.glob("run_*/overrides.parquet"))


def test_broken_decisions_are_refused_before_anything_is_written(asked_dataset):
    path, card = asked_dataset / "overrides.json", page_of(asked_dataset)["cards"][0]
    decide(asked_dataset, (card, True))
    good = json.loads(path.read_text())
    row, name = good["decisions"][0], card["session"]

    def refused(match, **changes):
        path.write_text(json.dumps(good | changes))
        fails(asked_dataset, f"(?s)overrides.json.*{match}.*(--review|review.html)")

    other = {name: {"recording_frames": 120, "recording_bytes": 5}}
    refused("is for a recording with recording_bytes 5, recording.mp4 has", sessions=other)
    refused("is for a recording with recording_frames None", sessions={name: 7})
    refused("names the session 'run_z', which is not in", sessions=good["sessions"] | {"run_z": {}})
    refused("schema version 9, expected 1", schema_version=9)
    refused("lacks its sessions or its decisions", decisions={})
    refused("decision 2: expected an object, found 3", decisions=[row, 3])
    for changes, match in (
        ({"session": "run_y"}, "the session 'run_y' is not among"),
        ({"frame_idx": 120}, "frame_idx is 120, the recording has 120 frames"),
        ({"frame_idx": 1.5}, "frame_idx is 1.5, expected int"),
        ({"x": -1}, "y is [0-9]+ and x is -1, expected 0 or more"),
        ({"accept": "yes"}, 'accept is "yes", expected bool'),
        ({"sprite": "bear.png"}, "the sprite 'bear.png' is not among those looked for: creatures/tux"),
        ({"event": "WIN"}, "event is 'WIN', expected (DEATH|ATTACK)"),
    ):
        refused(f"decision 2: {match}", decisions=[row, row | changes])
    path.write_text(json.dumps(good)[:-40])
    fails(asked_dataset, "overrides.json is no JSON.*Save it again from review.html")
    path.unlink()
    fails(asked_dataset, "--overrides .*none.json cannot be read", overrides=asked_dataset / "none.json")
    fails(asked_dataset, "--review is -1", review=-1)
    fails(asked_dataset, "--no-detect-events looks for no sprites", review=5, detect_events=False)


def test_overrides_of_another_recording_are_an_error(asked_dataset):
    card = next(c for c in page_of(asked_dataset)["cards"] if c["session"] == "run_a")
    decide(asked_dataset, (card, True))
    main(arguments(asked_dataset))
    (asked_dataset / "overrides.json").unlink()
    (asked_dataset / "run_a" / "recording.mp4").write_bytes((asked_dataset / "run_b" / "recording.mp4").read_bytes())
    with pytest.raises(SystemExit, match="(?s)1 of 2.*run_a/overrides.parquet is for a recording.*take the file away"):
        main(arguments(asked_dataset, overwrite=True))
    (asked_dataset / "run_a" / "overrides.parquet").unlink()
    assert main(arguments(asked_dataset, overwrite=True))["sessions"]["run_a"]["ATTACK"] == 2


def test_mirrored_sprite_is_drawn_mirrored(asked_dataset):
    page = page_of(asked_dataset)
    kinds = [kind for kind in page["sprites"] if kind.endswith(" mirrored")]
    assert kinds, "run_b shows one"
    uri = page["sprites"][kinds[0]]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))[12:-12, 12:-12]
    file = np.asarray(Image.open(asked_dataset / "sprites" / kinds[0].removesuffix(" mirrored")))
    np.testing.assert_array_equal(drawn, file[:, ::-1])
