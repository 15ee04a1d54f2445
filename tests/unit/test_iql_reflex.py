"""The functions of iql_reflex.py against naive loops and cases worked by hand."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ttest_rel

import iql_reflex as q
from benchmarks.train import summary
from common.runs import write_json
from common.sessions import INTENT, INTENT_NAMES, key_table, load_session, write_table
from common.video import VideoReader, resize
from session_labels.files import recording_of
from session_labels.intents import label_intents
from tests.reference import naive_event_f1
from tests.synthetic import write_session

KEYS = ["KEY_RIGHT", "KEY_SPACE"]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [
        q.load_recording(write_session(folder / f"run_{n}", 60 + 10 * n, seed=n, outcome=o), KEYS, 2)
        for n, o in enumerate(["DEATH", "WIN", "INCOMPLETE"])
    ]


def test_rows_belong_to_the_moment_of_decision(recordings):
    recording = recordings[0]
    assert not recording.usable[:2].any() and not recording.usable[-2:].any() and recording.usable[2:-2].all()
    np.testing.assert_array_equal(recording.keys_before[4:], recording.keys[1:-3])  # any[i-1] = label of frame i-3
    np.testing.assert_array_equal(recording.keys_now, key_table(load_session(recording.video.parent), KEYS)[0])
    assert recording.finished.all() and not recordings[2].finished.any()
    assert recording.returns[-1] == -1 and recording.returns[-2] == pytest.approx(-0.99)
    assert recording.rewards[-1] == -1 and recording.gamma == 0.99  # the last label is that of the last frame but two
    assert np.flatnonzero(recording.terminal).tolist() == [len(recording.returns) - 3]
    assert not recordings[2].terminal.any()


def test_expectile_loss_by_hand():
    returns, value, mask = torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    assert q.expectile_loss(returns, value, 0.7, mask).item() == pytest.approx((0.7 * 1 + 0.3 * 4) / 2)
    assert q.expectile_loss(returns, value, 0.7, torch.zeros(3)).item() == 0


def test_q_loss_by_hand():
    rewards, next_value, mask = torch.tensor([1.0, 0.0, 9.0]), torch.tensor([0.5, 0.0, 0.0]), torch.tensor([1.0, 1, 0])
    twice = torch.tensor([[1.0, 2.0, 0.0], [1.5, 0.0, 0.0]])
    assert q.q_loss(twice, rewards, next_value, mask).item() == pytest.approx((0.25 / 2 + 4 / 2) / 2)
    assert q.q_loss(twice, rewards, next_value, torch.zeros(3)).item() == 0


def test_twin_q_and_value_equal_dynamic_programming_on_a_small_mdp():
    """Four states in a row, two keys: the first walks right, where the reward is, but may slip (one time in four); both
    at once end the episode for a little. Every key set is played equally often."""
    S, gamma, tau = 4, 0.9, 0.8
    rows = []  # state, keys, reward, next state, terminal: what happens, as often as it happens
    for s in range(S):
        for keys in ((0, 0), (1, 0), (0, 1), (1, 1)):
            for luck in range(4):
                if keys == (1, 1):
                    rows.append((s, keys, 0.3, s, 1))
                elif keys == (1, 0) and luck:
                    rows.append((s, keys, 1.0 * (s == S - 2), min(s + 1, S - 1), s == S - 2))
                else:
                    rows.append((s, keys, -0.05, max(0, s - keys[1]), 0))
    state, keys, reward, following, terminal = (torch.tensor(column) for column in zip(*rows, strict=True))
    keys, terminal = keys.float(), terminal.float()

    # dynamic programming: Q is a mean over what happens, V the expectile of Q over the key sets played
    number = 4 * state + (keys @ torch.tensor([2.0, 1.0])).long()
    counts = torch.zeros(4 * S).index_add(0, number, torch.ones(len(rows)))
    true_q, true_v = torch.zeros(4 * S), torch.zeros(S)
    for _ in range(300):
        target = reward + gamma * true_v[following] * (1 - terminal)
        true_q = torch.zeros(4 * S).index_add(0, number, target) / counts
        for _ in range(50):  # the expectile, where weighted differences cancel
            difference = true_q.view(S, 4) - true_v[:, None]
            weight = torch.where(difference > 0, tau, 1 - tau)
            true_v = (weight * true_q.view(S, 4)).sum(1) / weight.sum(1)

    # the same by the script's losses
    torch.manual_seed(0)
    twin, value = q.TwinQ(S, 2), torch.zeros(S, requires_grad=True)
    target_q = copy.deepcopy(twin)
    optimizer = torch.optim.Adam([*twin.parameters(), value], 3e-3)
    features, everywhere = F.one_hot(state, S).float(), torch.ones(len(rows))
    for update in range(4000):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / 4000)
        next_value = gamma * value[following].detach() * (1 - terminal)
        loss = q.q_loss(twin(features, keys), reward, next_value, everywhere)
        seen = target_q(features, keys).amin(0).detach()
        loss = loss + q.expectile_loss(seen, value[state], tau, everywhere)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        q.update_target(target_q, twin, 0.02)
    learnt = twin(features, keys).detach()
    assert (learnt - true_q[number]).abs().max() < 1e-2
    assert (value.detach() - true_v).abs().max() < 1e-2
    assert true_q.view(S, 4)[1, 2] > true_q.view(S, 4)[1, 3] + 0.1  # to walk on is worth more than to stop


def test_advantage_weights_divide_by_the_running_deviation_and_clip():
    generator = torch.Generator().manual_seed(0)
    running = torch.zeros(3)
    for _ in range(300):
        advantage = 3 + 2 * torch.randn(64, generator=generator)
        running = q.update_running(running, advantage, torch.ones(64))
    weights = q.advantage_weights(torch.tensor([0.0, 2.0, -2.0, 100.0]), running, 1.0, 10.0, "running")
    assert weights.tolist() == pytest.approx([1, np.e, 1 / np.e, 10], rel=0.1)
    cooler = q.advantage_weights(torch.tensor([2.0]), running, 0.5, 10.0, "running")
    assert cooler.item() == pytest.approx(np.e**2, rel=0.1)
    batch_mean = q.advantage_weights(torch.tensor([5.0, 5.0]), running, 1.0, 10.0, "batch-mean")
    assert batch_mean.tolist() == [1, 1]


def test_running_moments_skip_unknown_returns():
    known = torch.tensor([1.0, 1.0, 0.0])
    one = q.update_running(torch.zeros(3), torch.tensor([1.0, 3.0, 99.0]), known)
    other = q.update_running(torch.zeros(3), torch.tensor([1.0, 3.0, -7.0]), known)
    assert torch.equal(one, other)


def test_even_odds_thresholds_undo_the_weights_of_the_loss():
    """A key that is down in 30 % of the frames, weighted by 3 in the loss: the best constant probability is far above
    0.3, and the threshold lies above it as 0.5 lies above 0.3."""
    keys, pos_weight = torch.tensor([[1.0]] * 3 + [[0.0]] * 7), torch.tensor([3.0])
    logits = torch.linspace(-4, 4, 8001)
    losses = [q.keys_loss(x.expand(10, 1), keys, torch.ones(10), pos_weight) for x in logits]
    best = logits[int(torch.stack(losses).argmin())].sigmoid().item()
    (threshold,) = q.even_odds_thresholds(pos_weight.numpy())
    odds = [p / (1 - p) for p in (best, threshold)]
    assert odds[0] / odds[1] == pytest.approx(0.3 / 0.7, rel=0.01) and threshold == 0.75
    assert q.even_odds_thresholds(np.ones(2)).tolist() == [0.5, 0.5]


def test_keys_loss_equals_the_plain_one():
    logits, keys = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
    plain = F.binary_cross_entropy_with_logits(logits, keys)
    assert q.keys_loss(logits, keys, torch.ones(5), torch.ones(3)).item() == pytest.approx(plain.item())
    weights = torch.tensor([0.0, 0, 0, 0, 5])
    last = F.binary_cross_entropy_with_logits(logits[4], keys[4])
    assert q.keys_loss(logits, keys, weights, torch.ones(3)).item() == pytest.approx(last.item())


def test_inverse_dynamics_loss_takes_the_rows_that_are_followed():
    logits, keys = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    followed = torch.tensor([1.0, 0.0, 1.0, 0.0])
    expected = F.binary_cross_entropy_with_logits(logits[[0, 2]], keys[[0, 2]])
    assert q.inverse_dynamics_loss(logits, keys, followed).item() == pytest.approx(expected.item())
    assert q.inverse_dynamics_loss(logits, keys, torch.zeros(4)).item() == 0


def test_inverse_dynamics_is_a_head_of_its_own():
    plain, network = q.ReflexNet(3, "cnn").eval(), q.ReflexNet(3, "cnn", inverse_dynamics=True).eval()
    assert plain.inverse_head is None and network.inverse_head[0].in_features == 1024
    pixels = torch.randint(0, 256, (5, 9, 24, 24), dtype=torch.uint8)
    features = network.features(pixels)
    assert features.shape == (5, 512) and network.inverse_dynamics(features[:-1], features[1:]).shape == (4, 3)
    for one, other in zip(network(pixels), network.heads(features), strict=True):
        assert torch.equal(one, other)
    network.load_state_dict(plain.state_dict(), strict=False)
    for one, other in zip(network(pixels), plain(pixels), strict=True):
        assert torch.equal(one, other)  # playing does not depend on it


def test_random_shift_shifts_by_whole_pixels_and_repeats_the_border():
    stacks = torch.arange(20 * 20, dtype=torch.int32).view(1, 1, 20, 20).repeat(64, 2, 1, 1)
    shifted = q.random_shift(stacks, 3)
    corner = shifted[:, 0, 10, 10]
    dy, dx = corner // 20 - 10, corner % 20 - 10
    assert dy.abs().max() == 3 and dx.abs().max() == 3 and len(set(zip(dy.tolist(), dx.tolist(), strict=True))) > 20
    assert torch.equal(shifted[:, 0], shifted[:, 1])
    padded = F.pad(stacks.float(), (3, 3, 3, 3), mode="replicate")
    for b in range(64):
        y, x = 3 + int(dy[b]), 3 + int(dx[b])
        assert torch.equal(shifted[b].float(), padded[b, :, y : y + 20, x : x + 20])


def test_event_f1_by_hand_and_against_a_naive_matcher():
    true = np.zeros((20, 1), bool)
    true[5:8], true[12:15] = True, True
    part = np.zeros(20)
    assert q.event_f1(true, true, part, +1) == 1
    assert q.event_f1(np.roll(true, 1, 0), true, part, -1) == 1
    assert q.event_f1(np.roll(true, 2, 0), true, part, +1) == 0
    assert q.event_f1(np.zeros_like(true), true, part, +1) == 0
    once = true.copy()
    once[12:15] = False
    assert q.event_f1(once, true, part, +1) == pytest.approx(2 / 3)
    assert q.event_f1(true, true, np.arange(20) > 11, +1) == 1  # the second onset lies on the border of two stretches
    rng = np.random.default_rng(0)
    for _ in range(50):
        predicted, true = rng.random((60, 3)) < 0.3, rng.random((60, 3)) < 0.3
        for change in (+1, -1):
            expected = naive_event_f1(predicted, true, change)
            assert q.event_f1(predicted, true, np.zeros(60), change) == pytest.approx(expected)


def test_chatter_counts_flips_inside_a_stretch():
    keys = np.array([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]], bool).T  # (6, 2)
    assert q.chatter(keys, np.zeros(6)).tolist() == [3 / 5, 0]
    assert q.chatter(keys, np.array([0, 0, 1, 1, 1, 2])).tolist() == [1 / 3, 0]  # flips on the borders do not count
    assert q.chatter(keys[:1], np.zeros(1)).tolist() == [0, 0]


def test_calibration_error_equals_a_loop_over_bins():
    rng = np.random.default_rng(0)
    p = np.r_[rng.random(997), 0.0, 1.0, 1.0].astype(np.float32).reshape(-1, 2)
    true = rng.random(p.shape) < p**2
    expected = 0.0
    for b in range(10):
        inside = (p >= b / 10) & ((p < (b + 1) / 10) | (b == 9))
        if inside.any():
            expected += inside.mean() * abs(p[inside].mean() - true[inside].mean())
    assert q.calibration_error(p, true) == pytest.approx(expected, rel=1e-4) and expected > 0.1
    assert q.calibration_error(np.full(8, 0.25), np.arange(8) < 2) == pytest.approx(0)  # a constant at the base rate
    assert q.calibration_error(np.ones(4), np.zeros(4, bool)) == 1


def test_f1_and_equal_rate_thresholds():
    true = np.array([[1, 0], [1, 0], [0, 0], [0, 0]], bool)
    predicted = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], bool)
    assert q.f1(predicted, true).tolist() == [0.5, 0.0]
    probability = np.random.default_rng(0).random((1000, 2))
    true = np.random.default_rng(1).random((1000, 2)) < [0.8, 0.05]
    rate = (probability > q.equal_rate_thresholds(probability, true)).mean(0)
    assert rate.tolist() == pytest.approx(true.mean(0).tolist(), abs=0.002)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_visits_every_training_frame_once_within_the_buffer(shuffle):
    rng = np.random.default_rng(0)
    training = [rng.random(n) < 0.97 for n in rng.integers(100, 900, 20)]
    decode, samples = q.plan_epoch(training, 1024, shuffle, seed=1, epoch=0)
    visited = sorted((run[0], i) for run, i in samples)
    assert visited == [(r, i) for r, mask in enumerate(training) for i in np.flatnonzero(mask)]
    assert all(run[1] <= i < run[2] <= run[1] + q.RUN for run, i in samples)
    for r in range(20):  # every recording is read forwards
        starts = [start for number, start, _ in decode if number == r]
        assert starts == sorted(starts)
    decoded_at = {run: position for position, run in enumerate(decode)}
    last_use = {run: position for position, (run, _) in enumerate(samples)}
    newest = np.maximum.accumulate([decoded_at[run] for run, _ in samples])
    for position in range(0, len(samples), 100):  # runs decoded, less those given away
        held = newest[position] + 1 - sum(last < position for last in last_use.values())
        assert held <= 1024 // q.RUN + 2 * q.MIX
    assert q.plan_epoch(training, 1024, shuffle, 1, 0) == (decode, samples)
    follows = {sample: after for sample, after in zip(samples, samples[1:], strict=False)}
    for run in decode:  # of every four frames two stay together, for inverse dynamics
        for i in range(run[1], run[2] - 1):
            assert i % 4 or follows[run, i] == (run, i + 1)
    if shuffle:
        later = q.plan_epoch(training, 1024, shuffle, 1, 1)[1]
        pairs = {one for one, other in zip(later, later[1:], strict=False) if other == (one[0], one[1] + 1)}
        assert (
            later != samples and {(run, i) for run in decode for i in range(run[1], run[2] - 1) if i % 4 == 3} <= pairs
        )
        batches = [{run for run, _ in samples[b : b + 32]} for b in range(0, len(samples) - 31, 32)]
        assert np.mean([len(batch) for batch in batches]) > 18  # otherwise neighbours are rarely in one batch
        assert np.mean([len({r for r, _, _ in batch}) for batch in batches]) > 4  # sessions mix


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_hold_the_frames_they_name(recordings, workers):
    args = q.Args(image_size=24, batch_size=16, workers=workers)
    training = [recording.usable for recording in recordings]
    decode, samples = q.plan_epoch(training, 64, True, 1, 0)
    pictures = [resize(VideoReader(r.video).read(0, len(r.usable)), 24, 24) for r in recordings]
    owner = np.concatenate([np.full(len(r.usable), n) for n, r in enumerate(recordings)])
    frame = np.concatenate([np.arange(len(r.usable)) for r in recordings])
    batches = list(q.stream_batches(recordings, decode, samples, args, 0))
    assert len(batches) == sum(mask.sum() for mask in training) // 16
    for stacks, rows in batches:
        for stack, row in zip(stacks, rows.tolist(), strict=True):
            assert torch.equal(stack, pictures[owner[row]][frame[row] - 2 : frame[row] + 1].flatten(0, 1))
    later = list(q.stream_batches(recordings, decode, samples, args, 3))
    assert len(later) == len(batches) - 3
    for (stacks, rows), (later_stacks, later_rows) in zip(batches[3:], later, strict=True):
        assert torch.equal(rows, later_rows) and torch.equal(stacks, later_stacks)


def test_validation_is_blocks_with_a_gap(recordings):
    whole = np.ones(1000, bool)
    long = [replace(recordings[0], usable=whole, training=whole.copy()) for _ in range(3)]
    blocks = q.choose_validation(long, 0.1, seed=0)
    assert len(blocks) == 3 and all(stop - start == 100 for _, start, stop in blocks)  # of 30 blocks of 10 s
    for r, start, stop in blocks:
        assert not long[r].training[max(0, start - 10) : stop + 10].any()
    assert sum(recording.training.sum() for recording in long) >= 3000 - 3 * 120
    assert q.choose_validation(long, 0.0, seed=0) == []


def test_resnet_has_the_known_size_and_takes_imagenet_weights(tmp_path):
    resnet = q.ResNet18(3)
    assert (
        sum(p.numel() for p in resnet.parameters()) == 11_689_512 - 513_000
    )  # torchvision's count, less its classifier
    weights = {name: torch.rand_like(value.float()) for name, value in resnet.state_dict().items()}
    torch.save(weights | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, tmp_path / "r18.pth")
    nine = q.ResNet18(9)
    nine.load_pretrained(str(tmp_path / "r18.pth"))
    assert torch.allclose(nine.conv1.weight[:, 6:], weights["conv1.weight"] / 3)
    assert torch.equal(nine.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])
    for backbone in ("resnet18", "cnn"):
        keys, mouse, value = q.ReflexNet(4, backbone).eval()(torch.zeros((2, 9, 90, 130), dtype=torch.uint8))
        assert keys.shape == (2, 4) and mouse.shape == (2, 2) and value.shape == (2,)


def test_summary_of_seeds_pairs_the_arms(tmp_path):
    rng, values = np.random.default_rng(0), {}
    for arm in summary.ARMS:
        for seed in (1, 2, 3):
            folder = tmp_path / "runs" / f"data__{arm}__{seed}__0"
            folder.mkdir(parents=True)
            values[arm, seed] = rng.random()
            names = [f"{m}{s}" for m, bases in summary.METRICS.items() for s in ("", *(f"_{b}" for b in bases))]
            evaluation = {
                "sessions": ["heldout"],
                "keys": ["KEY_X"],
                "metrics": dict.fromkeys(names, values[arm, seed]),
            }
            write_json(folder / "eval.json", evaluation | {"per_key": {"KEY_X": {"ap": 0.5, "rate": 0.1}}})
            write_json(folder / "args.json", {"exp_name": arm, "seed": seed, "lr": 0.1})
            write_json(folder / "provenance.json", {"dataset_fingerprint": "same"})
    found = summary.summarise(summary.load_runs(tmp_path / "runs"))
    awr, bc = ([values[arm, seed] for seed in (1, 2, 3)] for arm in ("awr", "bc"))
    row = found["metrics"]["eval/key_ap"]
    assert row["arms"]["awr"]["mean"] == pytest.approx(np.mean(awr))
    paired, interval = ttest_rel(awr, bc), row["differences"]["AWR - plain BC"]
    low, high = paired.confidence_interval(0.95)
    assert interval["mean"] - interval["half_width_95"] == pytest.approx(low)
    assert interval["mean"] + interval["half_width_95"] == pytest.approx(high)
    assert f"{interval['mean']:+.3f} ± {interval['half_width_95']:.3f}" in summary.markdown(found)

    write_json(folder / "args.json", {"exp_name": arm, "seed": seed, "lr": 0.2})
    with pytest.raises(SystemExit, match=r"differs from the first in \['lr'\]"):
        summary.load_runs(tmp_path / "runs")
    (folder / "eval.json").unlink()
    with pytest.raises(SystemExit, match=f"missing: .*{arm} with seed 3"):
        summary.load_runs(tmp_path / "runs")


# intents --------------------------------------------------------------------------------------------------------------
def intent_network() -> q.ReflexNet:
    torch.manual_seed(0)
    return q.ReflexNet(n_keys=2, backbone="cnn", n_intents=len(INTENT_NAMES))


def reached(network, output) -> set[str]:
    """The parts of the network that a gradient of `output` reaches."""
    network.zero_grad()
    output.square().sum().backward(retain_graph=True)
    return {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum()}


def test_the_goal_is_fused_into_policy_and_value_only():
    network, pixels = intent_network().eval(), torch.randint(0, 256, (3, 9, 32, 32), dtype=torch.uint8)
    goal = F.one_hot(torch.tensor([0, 4, 6]), len(INTENT_NAMES)).float()
    features = network.features(pixels)
    without, told = network.heads(features), network.heads(features, goal)
    zeros = network.heads(features, torch.zeros_like(goal))
    assert all(torch.equal(a, b) for a, b in zip(without, zeros, strict=True))
    assert [torch.equal(a, b) for a, b in zip(without, told, strict=True)] == [False, True, False]
    assert [x.shape for x in network(pixels)] == [(3, 2), (3, 2), (3,)]

    parts = {"keys": told[0], "mouse": told[1], "value": told[2], "intent": network.intent_head(features)}
    gradients = {name: reached(network, output) for name, output in parts.items()}
    assert gradients["keys"] == {"backbone", "keys_head", "goal_encoder"}
    assert gradients["value"] == {"backbone", "value_head", "goal_encoder"}
    assert gradients["mouse"] == {"backbone", "mouse_head"}
    assert gradients["intent"] == {"backbone", "intent_head"}


def test_a_network_without_intents_is_the_one_it_was():
    names = {name for name, _ in q.ReflexNet(n_keys=2, backbone="cnn").named_parameters()}
    assert not any(name.startswith(("goal", "intent")) for name in names)
    torch.manual_seed(0)
    plain = q.ReflexNet(n_keys=2, backbone="cnn")
    assert plain.keys_head[0].in_features == plain.value_head[0].in_features == 512


def test_goal_dropout_takes_whole_goals_away_in_its_share():
    torch.manual_seed(0)
    goal = F.one_hot(torch.arange(7000) % 7, 7).float()
    assert torch.equal(q.drop_goals(goal, 0.0), goal) and not q.drop_goals(goal, 1.0).any()
    kept = q.drop_goals(goal, 0.3)
    told = kept.any(1)
    assert torch.equal(kept[told], goal[told]) and 0.67 < told.float().mean() < 0.73


def test_intent_loss_is_the_weighted_cross_entropy():
    logits, intents, weights = torch.randn(5, 7), torch.tensor([0, 6, 3, 3, 4]), torch.tensor([1.0, 0, 2, 0.5, 10])
    rows = [-float(w) * float(x.log_softmax(0)[i]) for x, i, w in zip(logits, intents, weights, strict=True)]
    assert q.intent_loss(logits, intents, weights).item() == pytest.approx(sum(rows) / 5, rel=1e-5)


def test_intents_of_another_recording_or_of_another_kind_are_refused(tmp_path):
    folder = write_session(tmp_path / "run_0", 40)
    session = load_session(folder)
    with pytest.raises(FileNotFoundError, match="intent.parquet is missing.*--labeler keys"):
        q.load_recording(folder, ["KEY_SPACE"], 2, intents=True)
    recording = recording_of(folder, 40)
    labels = label_intents(session, "keys", 1.0, recording)
    assert q.load_recording(folder, ["KEY_SPACE"], 2, intents=True).intents.tolist() == labels.tolist()
    assert not q.load_recording(folder, ["KEY_SPACE"], 2).intents.any()
    label_intents(session, "keys", 1.0, recording | {"recording_bytes": 7})
    with pytest.raises(ValueError, match="intent.parquet has 40 rows.*recording_bytes 7 .*--labeler keys"):
        q.load_recording(folder, ["KEY_SPACE"], 2, intents=True)
    rows = {"frame_idx": range(40), "intent": ["FLY"] * 40, "timestamp": session.timestamps}
    write_table(folder / "intent.parquet", rows, INTENT)
    with pytest.raises(ValueError, match="intent.parquet has .*FLY unknown intent"):
        q.load_recording(folder, ["KEY_SPACE"], 2, intents=True)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(goal_dropout=0.1), "--intent-coef 0.25 --goal-dropout 0.1 do nothing without --intents"),
        (dict(intents=True, q_head=True), "--intents with --q-head"),
        (dict(intents=True, goal_dropout=1.5), "--goal-dropout 1.5: expected 0 to 1"),
    ],
)
def test_flags_of_intents_that_do_not_fit(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        q.main(q.Args(data_dir=str(tmp_path), **flags))
