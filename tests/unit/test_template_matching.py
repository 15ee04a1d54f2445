"""The matcher against the float64 reference, at borders, in flat areas, and on useless input."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from common import template_matching
from common.template_matching import (
    find,
    load_sprites,
    make_bank,
    make_finder,
    score_maps,
    share_masks,
)
from tests.reference import masked_zncc

H, W = 40, 56


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def best_place(scores: torch.Tensor) -> tuple[float, int, int]:
    """The highest score of a map (1, h, w), its row and column."""
    return scores.max().item(), *divmod(int(scores.argmax()), scores.shape[2])


def random_template(rng, h, w):
    """An irregular mask: the corners may be empty, holes are likely."""
    mask = rng.random((h, w)) < rng.uniform(0.4, 0.95)
    mask[h // 2, :2] = True
    return rng.uniform(0, 255, (h, w)), mask


def difficult_frames(rng, H=H, W=W):
    """Noise; noise of 1.2 grey levels on white and on black, beside full contrast; a quiet corner; a gradient; half
    constant."""
    quiet = rng.normal(0, 1.2, (H, W))
    contrast = rng.integers(0, 2, (H, W)) * 255.0
    left = np.arange(W) < W // 2
    return {
        "noise": rng.uniform(0, 255, (H, W)),
        "quiet_bright": np.clip(250 + quiet, 0, 255),
        "quiet_beside_contrast": np.where(left, np.clip(252 + quiet, 0, 255), contrast),
        "quiet_beside_white": np.where(left, np.clip(3 + quiet, 0, 255), 255.0),
        "quiet_corner": np.where(np.add.outer(np.arange(H), np.arange(W)) < W // 8, 3 + quiet, 255.0),
        "gradient": np.tile(np.linspace(0, 255, W), (H, 1)),
        "half_constant": np.where(left, 128.0, rng.uniform(0, 255, (H, W))),
    }


@pytest.mark.parametrize("kind", list(difficult_frames(np.random.default_rng(0))))
@pytest.mark.parametrize("size", [(11, 15), (7, 4), (3, 4), (H, 9), (H, W)])
def test_equals_float64_reference_at_every_position(kind, size, device):
    rng = np.random.default_rng(sum(size))
    frame = difficult_frames(rng)[kind].astype(np.float32)
    grey, mask = random_template(rng, *size)
    (scores,) = score_maps(torch.from_numpy(frame)[None].to(device), make_bank(["t"], [grey], [mask]))
    scores, (expected, deviation) = scores.cpu(), masked_zncc(frame, grey, mask)
    assert scores.shape == (1, H - size[0] + 1, W - size[1] + 1)
    assert torch.isfinite(scores).all() and scores.abs().max() <= 1
    error = np.abs(scores[0].numpy() - expected)
    assert error[deviation > 1].max(initial=0) < 1e-4
    assert (scores[0].numpy()[deviation < 1] == 0).all()  # flat by definition


@pytest.mark.parametrize("kind", list(difficult_frames(np.random.default_rng(0))))
def test_float32_stays_within_half_its_bounds(kind, device):
    """`find` rules positions out by these bounds, so they have to hold on frames made to be difficult."""
    rng = np.random.default_rng(23)
    frame = difficult_frames(rng, 480, 640)[kind].astype(np.float32)
    templates = [random_template(rng, *size) for size in ((3, 4), (12, 12), (48, 40))]
    bank = make_bank(list("abc"), *zip(*templates, strict=True))
    image = template_matching.centre(torch.from_numpy(frame)[None].to(device))
    single, double = (template_matching._correlations(image, bank, dtype) for dtype in (torch.float32, torch.float64))
    for template, (_, mask), (correlation, variance, _), (_, exact, _) in zip(
        bank.templates, templates, single, double, strict=True
    ):
        assert (variance - exact).abs().max() < template_matching.VARIANCE_ERROR / 2
        h, w = mask.shape
        for y, x in rng.integers(0, (480 - h, 640 - w), (100, 2)):
            expected = (frame[y : y + h, x : x + w].astype(np.float64) * template.numpy()).sum() / np.sqrt(mask.sum())
            assert abs(correlation[0, y, x] - expected) < template_matching.SCORE_ERROR / 2


def test_flat_frames_score_zero_and_stay_finite(device):
    grey, mask = random_template(np.random.default_rng(1), 9, 9)
    bank = make_bank(["t"], [grey], [mask])
    for level in (0.0, 128.0, 255.0):
        frames = torch.full((2, H, W), level, device=device)
        assert (next(score_maps(frames, bank)) == 0).all()
        assert find(frames, make_finder(bank, [0.1])) == [[], []]


def test_large_frame_keeps_the_accuracy():
    """Rounding grows with the frame: 640x480, quiet beside full contrast, checked at 200 positions."""
    rng = np.random.default_rng(2)
    frame = rng.integers(0, 2, (480, 640)) * 255.0
    frame[:, :320] = np.clip(rng.normal(250, 1.3, (480, 320)), 0, 255)
    frame = frame.astype(np.float32)
    grey, mask = random_template(rng, 12, 12)
    (scores,) = score_maps(torch.from_numpy(frame)[None], make_bank(["t"], [grey], [mask]))
    for y, x in rng.integers(0, (469, 300), (200, 2)):
        expected, deviation = masked_zncc(frame[y : y + 12, x : x + 12], grey, mask)
        if deviation[0, 0] > 1:
            assert abs(scores[0, y, x] - expected[0, 0]) < 1e-4


@pytest.mark.parametrize("y", [0, 13, H - 9])
@pytest.mark.parametrize("x", [0, 20, W - 12])
def test_pasted_sprite_is_found_where_it_is(y, x):
    """All four corners, all four edges and the middle; the frame is noise, also inside the sprite's holes."""
    rng = np.random.default_rng(3)
    grey, mask = random_template(rng, 9, 12)
    frame = rng.uniform(0, 255, (H, W))
    frame[y : y + 9, x : x + 12][mask] = 40 + 0.5 * grey[mask]  # brightness and contrast do not matter
    (scores,) = score_maps(torch.from_numpy(frame).float()[None], make_bank(["t"], [grey], [mask]))
    score, *place = best_place(scores)
    assert score > 0.999 and place == [y, x]


def test_templates_with_equal_masks_share_them_and_give_the_same_as_alone():
    rng = np.random.default_rng(4)
    frames = torch.from_numpy(rng.uniform(0, 255, (5, H, W))).float()
    templates = [random_template(rng, h, w) for h, w in ((9, 12), (5, 5), (9, 12))]
    templates.append((rng.uniform(0, 255, (9, 12)), templates[0][1].copy()))  # the first one's mask again
    bank = make_bank(list("abcd"), *zip(*templates, strict=True))
    assert bank.mask_of == [0, 1, 2, 0]
    for scores, (grey, mask) in zip(score_maps(frames, bank), templates, strict=True):
        for n in range(5):
            (alone,) = score_maps(frames[n : n + 1], make_bank(["t"], [grey], [mask]))
            torch.testing.assert_close(scores[n : n + 1], alone, atol=1e-6, rtol=0)


def test_maps_of_many_frames_are_those_of_each():
    """Also of odd sizes, whose transforms are padded: 37x53 is searched as 40x54."""
    rng = np.random.default_rng(24)
    frames = torch.from_numpy(rng.uniform(0, 255, (4, 37, 53))).float()
    templates = [random_template(rng, h, w) for h, w in ((9, 12), (5, 7))]
    bank = make_bank(list("ab"), *zip(*templates, strict=True))
    for scores, (grey, mask) in zip(score_maps(frames, bank), templates, strict=True):
        for frame, found in zip(frames.numpy(), scores.numpy(), strict=True):
            np.testing.assert_allclose(found, masked_zncc(frame, grey, mask)[0], atol=1e-5)


def test_spectra_are_kept_per_frame_size():
    rng = np.random.default_rng(5)
    grey, mask = random_template(rng, 6, 6)
    bank = make_bank(["t"], [grey], [mask])
    for size in ((20, 30), (30, 20), (20, 30)):
        frame = rng.uniform(0, 255, size)
        frame[4:10, 7:13][mask] = grey[mask]
        score, *place = best_place(next(score_maps(torch.from_numpy(frame).float()[None], bank)))
        assert place == [4, 7] and score > 0.999
    assert len(bank.spectra) == 2
    kept = dict(bank.spectra)
    next(score_maps(torch.zeros(1, 20, 30), bank))
    assert all(bank.spectra[key] is kept[key] for key in kept)


def test_perfect_matches_never_exceed_one():
    """Rounding would put a few of these above 1 by 1e-7."""
    for seed in range(20):
        grey, mask = random_template(np.random.default_rng(seed), 9, 12)
        for sign in (1, -1):
            frame = np.full((H, W), 128.0)
            frame[10:19, 20:32][mask] = 128 + sign * 0.4 * (grey[mask] - 128)
            (scores,) = score_maps(torch.from_numpy(frame).float()[None], make_bank(["t"], [grey], [mask]))
            assert scores.max() <= 1 and scores.min() >= -1
            assert abs(scores[0, 10, 20] - sign) < 1e-5


def save_sprite(path, rng, height=10, width=13):
    """A smooth picture with an elliptical alpha, as sprites have."""
    yy, xx = np.mgrid[0:height, 0:width]
    alpha = ((yy / (height - 1) - 0.5) ** 2 + (xx / (width - 1) - 0.5) ** 2 < 0.2) * 255
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    rgb = np.asarray(small.resize((width, height), Image.BICUBIC))
    Image.fromarray(np.dstack([rgb, alpha.astype(np.uint8)]), "RGBA").save(path)
    return rgb, alpha > 127


def test_load_sprites_uses_alpha_and_bt601(tmp_path):
    rgb, mask = save_sprite(tmp_path / "a.png", np.random.default_rng(6))
    bank = load_sprites(tmp_path, scale=1)
    grey = 0.299 * rgb[..., 0] + 0.587 * rgb[..., 1] + 0.114 * rgb[..., 2]
    expected = make_bank(["a"], [grey], [mask])
    torch.testing.assert_close(bank.templates[0], expected.templates[0])
    assert torch.equal(bank.masks[0], torch.from_numpy(mask).float())


def test_alpha_says_which_pixels_count(tmp_path):
    rgb, alpha = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8), np.full((9, 8), 200, np.uint8)
    alpha[:, :3] = 100
    Image.fromarray(np.dstack([rgb, alpha]), "RGBA").save(tmp_path / "a.png")
    count = [load_sprites(tmp_path, 1.0, alpha=least).masks[0].sum().item() for least in (0.0, 0.3, 0.5, 0.75)]
    assert count == [72, 72, 45, 45]


@pytest.mark.parametrize("scale", [0.927, 1.01, 1.17, 1.236, 1.26])
def test_a_sprite_is_scaled_exactly(tmp_path, scale):
    """Its size in whole pixels says less: 33 pixels of 1.26 are 42, which would be 1.27 times as many."""
    wave = np.tile(np.sin(2 * np.pi * (np.arange(33) + 0.5) / 6), (13, 1))
    Image.fromarray((127 + 100 * wave).astype(np.uint8)).convert("RGBA").save(tmp_path / "a.png")
    bank = load_sprites(tmp_path, scale)
    found = bank.templates[0].numpy()[bank.masks[0].numpy() > 0]
    x = np.nonzero(bank.masks[0].numpy())[1]
    assert np.corrcoef(found, np.sin(2 * np.pi * (x + 0.5) / scale / 6))[0, 1] > 0.99


def test_mirror_adds_the_flipped_sprite(tmp_path):
    save_sprite(tmp_path / "a.png", np.random.default_rng(7))
    bank = load_sprites([tmp_path / "a.png"], scale=1, mirror=True)
    assert len(bank.names) == 2 and "mirrored" in bank.names[1]
    torch.testing.assert_close(bank.templates[1], bank.templates[0].flip(1))


def test_half_scale_of_an_odd_size_is_exactly_half(tmp_path):
    """A 21x13 sprite pasted at an even place of the full frame and halved with it, is found at half that place."""
    rng = np.random.default_rng(8)
    rgb, mask = save_sprite(tmp_path / "a.png", rng, 13, 21)
    bank = load_sprites(tmp_path, scale=0.5)
    assert bank.templates[0].shape == (7, 11)
    frame = rng.uniform(0, 255, (80, 112))
    frame[30:43, 50:71][mask] = (rgb @ np.array([0.299, 0.587, 0.114]))[mask]
    half = torch.nn.functional.interpolate(
        torch.from_numpy(frame).float()[None, None], (40, 56), mode="bilinear", antialias=True
    )[0]
    score, *place = best_place(next(score_maps(half, bank)))
    assert place == [15, 25] and score > 0.93


def test_useless_input_is_refused_by_name(tmp_path):
    mask = np.ones((5, 5), bool)
    with pytest.raises(ValueError, match="flat.png.*standard deviation"):
        make_bank(["flat.png"], [np.full((5, 5), 7.0)], [mask])
    with pytest.raises(ValueError, match="empty.png.*alpha"):
        make_bank(["empty.png"], [np.zeros((5, 5))], [~mask])
    with pytest.raises(FileNotFoundError, match="no png file"):
        load_sprites(tmp_path)
    bank = make_bank(["big.png"], [np.random.default_rng(9).uniform(0, 255, (5, 50))], [np.ones((5, 50), bool)])
    with pytest.raises(ValueError, match="big.png is 50x5 pixels, larger than the 40x30 frame"):
        find(torch.zeros(1, 30, 40), make_finder(bank, [0.9]))


def sprite(rng, h, w):
    """A smooth picture in an ellipse, which stays recognisable when it is made smaller."""
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 1, 4, 5)))
    grey = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic", align_corners=True)[0, 0].numpy()
    yy, xx = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
    return grey, yy**2 + xx**2 <= 1


def paste(frame, y, x, grey, mask, contrast=0.8):
    frame[y : y + len(mask), x : x + mask.shape[1]][mask] = 25 + contrast * grey[mask]


@pytest.mark.parametrize(("h", "w", "factor"), [(43, 57, 4), (13, 33, 2), (9, 12, 1), (15, 90, 4), (11, 40, 2)])
def test_find_sees_a_sprite_wherever_it_is(h, w, factor, device):
    """Every place between the cells of the smaller frame, the four corners, a frame whose size no factor divides."""
    rng = np.random.default_rng(h)
    grey, mask = sprite(rng, h, w)
    bank = make_bank(["t"], [grey], [mask])
    finder = make_finder(bank, [0.85])
    assert [look.factor for look in finder.looks] == [factor]
    places = [(20 + i // 4, 31 + i % 4) for i in range(16)] + [(0, 0), (0, 130 - w), (101 - h, 0), (101 - h, 130 - w)]
    ground = np.kron(rng.uniform(0, 255, (26, 33)), np.ones((4, 4)))[:101, :130] + rng.normal(0, 3, (101, 130))
    frames = np.stack([ground] * len(places))
    for frame, (y, x) in zip(frames, places, strict=True):
        paste(frame, y, x, grey, mask)
    frames = torch.from_numpy(frames).float()
    for frame, hits, (y, x) in zip(frames.numpy(), find(frames.to(device), finder), places, strict=True):
        right = masked_zncc(frame[y : y + h, x : x + w], grey, mask)[0].item()
        assert right > 0.99 and hits[0] == (pytest.approx(right, abs=1e-6), 0, y, x)
        assert all(score >= 0.85 for score, *_ in hits)


@pytest.mark.parametrize("factors", [(4, 2), (2,), ()])
@pytest.mark.parametrize("kind", list(difficult_frames(np.random.default_rng(0))))
def test_find_reports_what_the_float64_maps_have(kind, factors, device):
    """Each hit has the score that the map has there; with the look at full size alone, no local maximum is missed."""
    rng = np.random.default_rng(30)
    frame = difficult_frames(rng, 61, 83)[kind]
    templates = [sprite(rng, 24, 30), sprite(rng, 13, 33), random_template(rng, 11, 15)]
    for (grey, mask), (y, x) in zip(templates, [(3, 5), (41, 2), (30, 60)], strict=True):
        paste(frame, y, x, grey, mask)
    bank = make_bank(list("abc"), *zip(*templates, strict=True))
    frames = torch.from_numpy(frame).float()[None]
    (hits,) = find(frames.to(device), make_finder(bank, [0.7] * 3, factors))
    maps = [scores[0] for scores in score_maps(frames, bank)]
    assert {hit[1] for hit in hits} == {0, 1, 2}
    for score, t, y, x in hits:
        assert score == pytest.approx(maps[t][y, x].item(), abs=1e-4) and score >= 0.7
    for t, scores in enumerate(maps):
        h, w = bank.templates[t].shape
        for y, x in (scores >= 0.701).nonzero().tolist() if not factors else []:
            near = [hit for hit in hits if hit[1] == t and abs(hit[2] - y) < h / 2 and abs(hit[3] - x) < w / 2]
            assert near and max(near)[0] >= scores[y, x] - 1e-4


def test_find_misses_no_perfect_match_of_templates_that_share_a_mask(device):
    """At full size, where a tenth of the pixels of either is beside the shared mask and varies more than the rest."""
    rng = np.random.default_rng(35)
    mask = sprite(rng, 24, 30)[1]
    left, right = mask & (np.arange(30) > 5), mask & (np.arange(30) < 24)
    greys = [np.where(left & right, rng.uniform(90, 150, mask.shape), rng.uniform(0, 255, mask.shape)) for _ in "ab"]
    bank = make_bank(list("ab"), greys, [left, right])
    finder = make_finder(bank, [0.999] * 2, ())
    assert len(finder.looks[0].bank.masks) == 1 and all(40 < len(beside) < 70 for beside in finder.looks[0].beside)
    for ground in difficult_frames(rng, 61, 83).values():
        paste(ground, 5, 4, greys[0], left, 1)
        paste(ground, 30, 50, greys[1], right, 1)
        (hits,) = find(torch.from_numpy(ground).float()[None].to(device), finder)
        assert sorted(hit[1:] for hit in hits) == [(0, 5, 4), (1, 30, 50)]


def test_a_shared_mask_leaves_the_places_of_the_templates_own():
    """The first look at full size gives the positions that score, and hardly another, though a part of each mask and
    what it shows differ from the shared one."""
    rng = np.random.default_rng(36)
    mask = sprite(rng, 24, 30)[1]
    left, right = mask & (np.arange(30) > 4), mask & (np.arange(30) < 25)
    greys = [np.where(np.arange(30) % 25 < 5, 230, rng.uniform(0, 120, mask.shape)) for _ in "ab"]
    bank = make_bank(list("ab"), greys, [left, right])
    frames = np.kron(rng.uniform(0, 200, (2, 8, 11)), np.ones((8, 8)))[:, :61, :83] + rng.uniform(0, 50, (2, 61, 83))
    for y, x, grey, own in ((5, 4, greys[0], left), (30, 50, greys[1], right)):
        paste(frames[1], y, x, grey, own)
    frames = torch.from_numpy(frames).float()
    (look,) = make_finder(bank, [0.1] * 2, ()).looks  # low, so that there are hundreds
    assert len(look.bank.masks) == 1 and min(len(beside) for beside in look.beside) > 20
    places = template_matching.first_look(frames, look)
    for t, scores in enumerate(score_maps(frames, bank)):
        found = torch.zeros_like(scores, dtype=torch.bool)
        n, _, y, x = places[places[:, 1] == t].T
        found[n, y, x] = True
        assert (scores >= 0.1).sum() > 100 and found[scores >= 0.1].all() and scores[found].min() > 0.098


@pytest.mark.parametrize("size", [6, 7, 8, 9])
def test_small_sprites_that_overlap_by_half_are_two_wherever_they_are(size):
    rng = np.random.default_rng(size)
    grey, mask, apart = rng.uniform(0, 255, (size, size)), np.ones((size, size), bool), math.ceil(size / 2)
    grey[apart:] = grey[: size - apart]  # so that both can be perfect
    finder = make_finder(make_bank(["t"], [grey], [mask]), [0.95])
    for y in range(10):
        frame = rng.uniform(0, 255, (40, 40))
        paste(frame, y, 12, grey, mask, 1)
        paste(frame, y + apart, 12, grey, mask, 1)
        (hits,) = find(torch.from_numpy(frame).float()[None], finder)
        assert sorted(hit[2:] for hit in hits) == [(y, 12), (y + apart, 12)]


@pytest.mark.parametrize("size", [(61, 83), (2, 3), (1, 2), (37, 1)])
def test_find_takes_templates_of_any_size(size, device):
    """From the whole frame to two pixels, in frames of which a part is flat."""
    rng = np.random.default_rng(34)
    grey = rng.uniform(0, 255, size)
    bank = make_bank(["t"], [grey], [np.ones(size, bool)])
    frame = np.full((61, 83), 128.0)
    y, x = 61 - size[0], (83 - size[1]) // 2
    frame[y : y + size[0], x : x + size[1]] = grey
    (hits,) = find(torch.from_numpy(frame).float()[None].to(device), make_finder(bank, [0.99]))
    assert (pytest.approx(1, abs=1e-6), 0, y, x) in hits
    assert hits[0][2:] == (y, x) or size == (1, 2), "two pixels also match where the ground begins"


def test_find_gives_the_same_for_many_frames_as_for_one(monkeypatch, device):
    monkeypatch.setattr(template_matching, "CACHED_PIXELS", 5 * 45 * 60)  # five frames of half size at once
    rng = np.random.default_rng(31)
    templates = [sprite(rng, 43, 57), sprite(rng, 43, 57), sprite(rng, 13, 33)]
    bank = make_bank(list("abc"), *zip(*templates, strict=True))
    finder = make_finder(bank, [0.8] * 3)
    assert [(look.factor, look.wanted, len(look.bank.masks)) for look in finder.looks] == [(4, [0, 1], 1), (2, [2], 1)]
    frames = rng.uniform(0, 255, (70, 90, 120))
    for n, frame in enumerate(frames):
        for number in range(n % 3):
            paste(frame, 2 + n % 7, 1 + 60 * number, *templates[(n + number) % 3])
    frames = torch.from_numpy(frames).float().to(device)
    together = find(frames, finder)
    assert together == [find(frame[None], finder)[0] for frame in frames]
    assert sum(map(len, together)) >= 60 and find(frames[:0], finder) == []


def test_masks_that_are_nearly_the_same_are_shared():
    rng = np.random.default_rng(32)
    grey, mask = sprite(rng, 20, 24)
    other, small = mask.copy(), mask.copy()
    other[10, 12], small[:9] = False, False
    bank = make_bank(list("abcd"), [grey] * 4, [mask, small, other, mask])
    assert share_masks([bank.masks[m] for m in bank.mask_of]) == [[0, 2, 3], [1]]


def test_a_template_larger_than_the_frame_is_named():
    rng = np.random.default_rng(33)
    finder = make_finder(make_bank(["big.png"], *zip(sprite(rng, 43, 57), strict=True)), [0.8])
    with pytest.raises(ValueError, match="big.png is 57x43 pixels, larger than the 50x60 frame"):
        find(torch.zeros(1, 60, 50), finder)
