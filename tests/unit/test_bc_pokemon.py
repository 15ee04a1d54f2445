"""Functions of bc_pokemon.py and pokemon_env/episodes.py against hand-worked cases and naive loops."""

import errno
import json
import os
import zipfile

import numpy as np
import pytest
import torch

import bc_pokemon
from bc_pokemon import Args, Demonstrations, ImpalaCNN, Policy
from common.video import resize
from pokemon_env.episodes import read_episode, read_episodes
from tests import pixel_world


def episode_arrays(T: int = 5, H: int = 20, W: int = 30, n_actions: int = 10, seed: int = 0, **changes) -> dict:
    rng = np.random.default_rng(seed)
    infos = [json.dumps({"milestones": {"completed": ["A"] * (1 + t // 2)}}) for t in range(T)]
    return {
        "observations": rng.integers(0, 256, (T, H, W, 3), np.uint8),
        "actions": rng.integers(0, n_actions, T).astype(np.int32),
        "rewards": rng.normal(size=T).astype(np.float32),
        "dones": np.arange(T) == T - 1,
        "infos": np.array(infos),
        "episode_return": 1.0,
        "episode_length": T,
    } | changes


def write_episode(path, compress: bool = False, **changes) -> dict:
    arrays = episode_arrays(**changes)
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    return arrays


# network and preprocessing --------------------------------------------------------------------------------------------
def test_pooling_pads_so_that_84_becomes_42_21_11():
    sizes, x = [], torch.zeros(1, 3, 84, 84)
    network = ImpalaCNN(10, 256, 84, 84)
    for sequence in network.sequences:
        x = sequence(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 42, 42), (32, 21, 21), (32, 11, 11)]
    assert network.fc.in_features == 3872 and sum(p.numel() for p in network.parameters()) == 1_091_658


@pytest.mark.parametrize("height, width", [(84, 84), (80, 120), (41, 67)])
def test_any_size_fits(height, width):
    network = ImpalaCNN(7, 16, height, width, frames=2, state_dim=5)
    pixels = torch.randint(0, 256, (3, 6, height, width), dtype=torch.uint8)
    assert network(pixels, torch.rand(3, 5)).shape == (3, 7)


def test_residual_block_is_conv_relu_conv_add_relu():
    block, x = bc_pokemon.ResidualBlock(4), torch.randn(2, 4, 6, 6)
    expected = torch.relu(x + block.conv1(torch.relu(block.conv0(x))))
    assert torch.equal(block(x), expected) and (block(x) >= 0).all()


def test_preprocess_is_the_one_resize():
    frames = torch.randint(0, 256, (3, 160, 240, 3), dtype=torch.uint8)
    small = bc_pokemon.preprocess(frames, 84, 84)
    assert small.dtype == torch.uint8 and small.shape == (3, 3, 84, 84)
    assert torch.equal(small, resize(frames.permute(0, 3, 1, 2).contiguous(), 84, 84))


# targets and losses ---------------------------------------------------------------------------------------------------
def test_n_step_transitions_by_hand():
    rewards, half = np.array([1.0, 2.0, 4.0]), 0.5
    return_n, next_row, discount = bc_pokemon.n_step_transitions(rewards, True, True, 2, half)
    np.testing.assert_allclose(return_n, [1 + 0.5 * 2, 2 + 0.5 * 4, 4])
    np.testing.assert_array_equal(next_row, [2, 3, 3])
    np.testing.assert_allclose(discount, [0.25, 0, 0])  # the episode ended in a terminal state: nothing after row 3
    # cut off, and the picture after the last action is known: it is bootstrapped from
    return_n, next_row, discount = bc_pokemon.n_step_transitions(rewards, False, True, 2, half)
    np.testing.assert_allclose(return_n, [2, 4, 4])
    np.testing.assert_allclose(discount, [0.25, 0.25, 0.5])
    # cut off and unknown: no target for the steps that would need it
    return_n, _, discount = bc_pokemon.n_step_transitions(rewards, False, False, 2, half)
    np.testing.assert_array_equal(np.isnan(return_n), [False, True, True])
    assert discount[0] == 0.25


def test_td_target_by_hand():
    """The network prefers action 1 of those known (2 is higher, but never seen); the target network says it is 10."""
    next_q = torch.tensor([[0.0, 3.0, 9.0], [0.0, 3.0, 9.0]])
    next_q_target = torch.tensor([[50.0, 10.0, 70.0], [50.0, 10.0, 70.0]])
    known = torch.tensor([True, True, False])
    target = bc_pokemon.td_target(torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.0]), next_q, next_q_target, known)
    torch.testing.assert_close(target, torch.tensor([6.0, 1.0]))


def test_td_loss_is_huber_of_the_played_action_where_the_target_is_known():
    q = torch.tensor([[0.0, 2.0], [5.0, 0.0], [9.0, 9.0]])
    taken, target = torch.tensor([1, 0, 0]), torch.tensor([2.5, 2.0, 0.0])
    loss = bc_pokemon.td_loss(q, taken, target, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.5, 1.0]))
    assert loss.item() == pytest.approx((0.5 * 0.5**2 + 0.5 * (3 - 0.5)) / 2)


def test_bc_loss_weighs_classes_and_samples():
    logits, actions = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    weights, importance = torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.rand(6)
    p = logits.softmax(1)
    naive = [-importance[i] * weights[a] * torch.log(p[i, a]) for i, a in enumerate(actions)]
    torch.testing.assert_close(bc_pokemon.bc_loss(logits, actions, weights, importance), torch.stack(naive).mean())


def test_dropped_older_frames_become_the_newest():
    pixels = torch.randint(0, 256, (200, 9, 2, 2), dtype=torch.uint8)
    dropped = bc_pokemon.drop_older_frames(pixels, 0.5)
    assert torch.equal(dropped[:, -3:], pixels[:, -3:])
    replaced = (dropped[:, :6] == pixels[:, -3:].repeat(1, 2, 1, 1)).flatten(1).all(1)
    kept = (dropped == pixels).flatten(1).all(1)
    assert (replaced ^ kept).all() and 60 < replaced.sum() < 140
    assert torch.equal(bc_pokemon.drop_older_frames(pixels, 0.0), pixels)


# rows and batches -----------------------------------------------------------------------------------------------------
def demonstrations(lengths=(4, 1, 6), seed: int = 0) -> Demonstrations:
    rng, demos = np.random.default_rng(seed), Demonstrations(0.9, 3)
    for T in lengths:
        frames = rng.integers(0, 256, (T + 1, 3, 8, 8), np.uint8)
        actions = rng.integers(0, 4, T)
        rewards, features = rng.normal(size=T), rng.random((T + 1, 2), np.float32)
        demos.add(frames, actions, actions, rewards, True, True, features, np.arange(T + 1) // 2)
    return demos


def test_stacks_stay_inside_their_episode():
    demos = demonstrations()
    every = np.concatenate(demos.frames)
    episode = np.repeat([0, 1, 2], [5, 2, 7])
    rows = np.random.default_rng(1).permutation(demos.n_rows)
    stacks = demos.gather(rows, 3).numpy().reshape(len(rows), 3, 3, 8, 8)
    for row, stack in zip(rows, stacks, strict=True):
        first = np.flatnonzero(episode == episode[row])[0]
        for back, picture in enumerate(stack[::-1]):
            np.testing.assert_array_equal(picture, every[max(first, row - back)])


def test_the_terminal_transition_is_kept():
    demos = Demonstrations(0.9, 3)
    rows = demos.add(
        np.zeros((4, 3, 8, 8), np.uint8), [1, 2, 3], [1, 2, 3], [0.0, 0.0, 5.0], True, True, np.zeros((4, 0)), [0] * 4
    )
    assert rows.tolist() == [0, 1, 2] and demos.n_rows == 4
    assert demos.rows["return_n"][2] == 5 and demos.rows["discount"][2] == 0 and demos.rows["td_known"][:3].all()


def test_batches_are_a_pure_function_of_seed_and_step():
    rows, stage = np.arange(100), np.zeros(100, int)
    first = [bc_pokemon.sample_rows(rows, stage, None, Args(seed=3), step)[0] for step in range(5)]
    again = [bc_pokemon.sample_rows(rows, stage, None, Args(seed=3), step)[0] for step in reversed(range(5))][::-1]
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(np.concatenate(first))) > 80


def test_curriculum_opens_stages_from_easy_to_hard():
    rows, stage = np.arange(90), np.repeat([1, 2, 5], 30)
    args = Args(milestone_curriculum=True, total_training_steps=60)
    seen = [set(stage[bc_pokemon.sample_rows(rows, stage, None, args, step)[0]]) for step in (0, 12, 29, 59)]
    assert seen == [{1}, {1, 2}, {1, 2, 5}, {1, 2, 5}]


def test_prioritized_samples_by_error_and_corrects_for_it():
    rows, priority = np.arange(10, 14), np.zeros(20, np.float32)
    priority[10:14] = [1, 1, 1, 16]
    draws = [bc_pokemon.sample_rows(rows, np.zeros(20), priority, Args(batch_size=200), step) for step in range(20)]
    chosen, weights = (np.concatenate(x) for x in zip(*draws, strict=True))
    p = np.array([1, 1, 1, 16]) ** 0.6 / (3 + 16**0.6)
    np.testing.assert_allclose(np.bincount(chosen, minlength=14)[10:] / len(chosen), p, atol=0.03)
    assert weights[chosen == 13].max() == pytest.approx((p[3] / p[0]) ** -0.4) and weights[chosen == 10].max() == 1


def test_whole_episodes_are_held_out():
    assert len(bc_pokemon.split_episodes(20, 0.1, 1)) == 2 and bc_pokemon.split_episodes(20, 0.0, 1) == []
    assert bc_pokemon.split_episodes(1, 0.1, 1) == [] and len(bc_pokemon.split_episodes(2, 0.1, 1)) == 1


# policies and evaluation ----------------------------------------------------------------------------------------------
class Fixed(torch.nn.Module):
    """Logits as given; remembers what it saw."""

    def __init__(self, logits):
        super().__init__()
        self.row = torch.tensor(logits)

    def forward(self, pixels, state):
        self.seen = pixels
        return self.row.repeat(len(pixels), 1)


def test_sampling_gives_no_chance_to_actions_the_data_never_show():
    sizes = {"height": 8, "width": 8, "frames": 1, "state_inputs": "none"}
    frames, begun = np.zeros((500, 16, 16, 3), np.uint8), np.ones(500, bool)
    network = Fixed([1.0, 9.0, 1.0])
    assert (Policy(network, sizes, [True, True, True], "argmax", "cpu")(frames, [{}] * 500, begun) == 1).all()
    sampled = Policy(network, sizes, [True, False, True], "sample", "cpu")(frames, [{}] * 500, begun)
    assert set(sampled) == {0, 2} and 180 < (sampled == 0).sum() < 320


def test_an_episode_begins_with_its_first_frame_repeated():
    sizes = {"height": 8, "width": 8, "frames": 2, "state_inputs": "none"}
    network = Fixed([0.0, 1.0])
    policy = Policy(network, sizes, [True, True], "argmax", "cpu")
    flat = [np.full((2, 16, 16, 3), level, np.uint8) for level in (10, 20, 30)]
    seen = []
    for frames, begun in zip(flat, ([True, True], [False, False], [False, True]), strict=True):
        policy(frames, [{}] * 2, np.array(begun))
        seen.append(network.seen[:, ::3, 0, 0].tolist())  # per environment: older, newest
    assert seen == [[[10, 10], [10, 10]], [[10, 20], [10, 20]], [[20, 30], [30, 30]]]


@pytest.fixture
def envs():
    envs = pixel_world.vector(3, "good")
    yield envs
    envs.close()


def test_evaluate_beside_its_baselines():
    demos, rows = demonstrations((4, 6)), np.r_[0:4, 5:11]
    actions = demos.rows["action"][rows]
    metrics = bc_pokemon.evaluate(Fixed([0.0, 5.0, 0.0, 0.0]), demos, rows, Args(), "cpu")
    losses = -torch.log_softmax(torch.tensor([0.0, 5.0, 0.0, 0.0]), 0).numpy()[actions]
    assert metrics["eval/loss"] == pytest.approx(losses.mean(), abs=1e-6)  # unseen actions cost as much
    assert metrics["eval/accuracy"] == pytest.approx((actions == 1).mean())
    assert metrics["eval/accuracy_majority"] == pytest.approx(np.bincount(actions).max() / 10)
    pairs = [(a, b) for part in (actions[:4], actions[4:]) for a, b in zip(part, part[1:], strict=False)]
    assert metrics["eval/accuracy_repeat_previous"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    assert metrics["eval/change_accuracy"] == pytest.approx(np.mean([b == 1 for a, b in pairs if a != b]))
    assert metrics["eval/balanced_accuracy"] == pytest.approx(1 / len(set(actions)))


@pytest.mark.parametrize("share, agree, different", [(0.0, 0.0, 4), (1.0, 1.0, 8)])
@pytest.mark.parametrize("steps", [0, 3])
def test_dagger_labels_different_pictures_of_whole_episodes(envs, tmp_path, share, agree, different, steps):
    def left(frames, infos, begun):
        return np.ones(len(frames), int)

    args = Args(obs_height=8, obs_width=16, dagger_patience=6, dagger_steps=steps)
    episodes, error = bc_pokemon.label_by_expert(envs, left, share, list(range(20, 25)), args)
    assert error == "" and all(e["by_student"].all() == (share == 0) for e in episodes)
    said, taken = (np.concatenate([e[name] for e in episodes]) for name in ("action", "taken"))
    assert len(episodes) == 5 and np.mean(said == taken) == agree
    assert all(e["stage"].max() == (2 if share else 1) for e in episodes)  # up to the last step before the end
    bc_pokemon.save_round(tmp_path / "dagger_round_1.npz", episodes)
    demos = Demonstrations(0.9, 3)
    rows = bc_pokemon.add_round(demos, tmp_path / "dagger_round_1.npz")
    labelled = np.concatenate([e["labelled"] for e in episodes])
    assert demos.n_rows == len(said) + 5 and len(rows) == labelled.sum() == (steps or different)
    np.testing.assert_array_equal(demos.rows["action"][rows], said[labelled])
    pixels = demos.gather(rows, 1)
    assert pixels.shape == (len(rows), 3, 8, 16) and len(np.unique(pixels.flatten(1), axis=0)) == len(rows)


def test_labels_up_to_the_experts_failure_are_kept():
    def walks(frames, infos, begun):
        return np.full(len(frames), pixel_world.RIGHT)

    envs = pixel_world.vector(2, "raises")  # before the door
    far = [seed for seed in range(50) if np.random.default_rng(seed).integers(4) == 0]
    episodes, error = bc_pokemon.label_by_expert(envs, walks, 1.0, far[:6], Args())
    envs.close()
    assert "the expert failed: RuntimeError: no idea" in error
    assert 0 < sum(e["labelled"].sum() for e in episodes) and all((e["action"] >= 0).all() for e in episodes)


@pytest.mark.parametrize("frame_stack, state_inputs", [(2, "none"), (1, "milestone")])
def test_inputs_differ_where_the_network_sees_a_difference(envs, frame_stack, state_inputs):
    def to_and_fro(frames, infos, begun):
        return np.array([pixel_world.LEFT if info and info["x"] == 3 else pixel_world.RIGHT for info in infos])

    args = Args(obs_height=8, obs_width=16, dagger_patience=12, frame_stack=frame_stack, state_inputs=state_inputs)
    episodes, _ = bc_pokemon.label_by_expert(envs, to_and_fro, 0.0, [1, 2, 3], args)
    seen = set()
    for e in episodes:
        for t in range(len(e["action"])):
            first = max(0, t + 1 - frame_stack)
            seen.add((e["frames"][first : t + 1].tobytes(), e["features"][t].tobytes()))
    assert sum(e["labelled"].sum() for e in episodes) == len(seen)


def test_action_statistics_count_seen_actions_only():
    actions = np.array([0] * 8 + [2] * 2)
    known, weights = bc_pokemon.action_statistics(actions, 4, "inverse")
    assert known.tolist() == [True, False, True, False]
    assert weights.tolist() == pytest.approx([0.5 / 0.8, 0, 0.5 / 0.2, 0])
    for weighting in ("none", "sqrt", "inverse"):
        assert bc_pokemon.action_statistics(actions, 4, weighting)[1][actions].mean() == pytest.approx(1)


def test_export_agrees_with_torch(tmp_path):
    import onnxruntime as ort

    sizes = {"height": 20, "width": 24, "frames": 2, "state_inputs": "milestone"}
    network = ImpalaCNN(4, 8, 20, 24, frames=2, state_dim=32)
    policy = Policy(network, sizes, [True] * 4, "argmax", "cpu")
    assert bc_pokemon.export_onnx(tmp_path / "policy.onnx", policy, (40, 60, 3), list("ABCD")) <= 0.02
    session = ort.InferenceSession(tmp_path / "policy.onnx")
    frames, state = np.zeros((5, 2, 40, 60, 3), np.uint8), np.zeros((5, 32), np.float32)
    assert session.run(None, {"frames": frames, "state": state})[0].shape == (5, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.onnx"]


# episode files --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compress", [False, True])
def test_cache_holds_the_resized_episode(tmp_path, compress, monkeypatch):
    arrays = write_episode(
        tmp_path / "episode_0001.npz", compress, T=7, final_observation=np.full((20, 30, 3), 9, np.uint8)
    )
    args = Args(expert_data_dir=str(tmp_path), obs_height=10, obs_width=12)
    monkeypatch.setattr(bc_pokemon, "CHUNK_BYTES", 3 * 20 * 30 * 3)  # three frames at a time
    episode = read_episode(tmp_path / "episode_0001.npz")
    cache = bc_pokemon.cache_frames(episode, args)
    frames = bc_pokemon.open_frames(cache)
    expected = bc_pokemon.preprocess(torch.from_numpy(arrays["observations"]), 10, 12).numpy()
    np.testing.assert_array_equal(frames[:7], expected)
    assert (frames[7] == 9).all() and isinstance(frames, np.memmap)
    made = os.stat(next((tmp_path / ".cache").iterdir())).st_mtime_ns
    bc_pokemon.cache_frames(episode, args)
    assert [path.stat().st_mtime_ns for path in (tmp_path / ".cache").iterdir()] == [made]  # used again
    write_episode(tmp_path / "episode_0001.npz", seed=1)
    bc_pokemon.cache_frames(read_episode(tmp_path / "episode_0001.npz"), args)
    assert len(list((tmp_path / ".cache").iterdir())) == 2  # other content, another cache


def test_a_full_disk_leaves_no_half_cache(tmp_path, monkeypatch):
    write_episode(tmp_path / "episode_0001.npz")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(ValueError, match="No space left.*--cache-dir"):
        bc_pokemon.cache_frames(read_episode(tmp_path / "episode_0001.npz"), Args(expert_data_dir=str(tmp_path)))
    assert list((tmp_path / ".cache").iterdir()) == []


class Bomb:
    def __reduce__(self):
        return os.putenv, ("BOMB", "went off")


def damage(path, kind):
    write_episode(path, T=5)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "cut inside":
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "no zip":
        path.write_bytes(b"not a zip at all")
    elif kind == "no archive":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "unknown compression":
        content = bytearray(path.read_bytes())
        content[content.rindex(b"PK\x01\x02") + 10] = 77  # the method of the last member
        path.write_bytes(content)
    elif kind == "flipped byte":
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
    elif kind == "key missing":
        arrays = episode_arrays()
        del arrays["rewards"]
        np.savez(path, **arrays)
    else:
        observations = episode_arrays()["observations"]
        bad = {
            "wrong shape": {"observations": observations[..., 0]},
            "four channels": {"observations": np.zeros((5, 20, 30, 4), np.uint8)},
            "wrong dtype": {"observations": observations.astype(np.float32)},
            "float actions": {"actions": np.zeros(5)},
            "action too high": {"actions": np.array([0, 1, 2, 3, 10])},
            "action negative": {"actions": np.array([0, 1, 2, 3, -1])},
            "lengths disagree": {"actions": np.zeros(4, np.int32)},
            "infos disagree": {"infos": np.array(["{}"] * 3)},
            "no step": {
                key: episode_arrays()[key][:0] for key in ("observations", "actions", "rewards", "dones", "infos")
            },
            "rewards not finite": {"rewards": np.array([0, np.nan, 0, 0, 0], np.float32)},
            "infos no JSON": {"infos": np.array(["{"] * 5)},
            "infos no objects": {"infos": np.array(["null"] * 5)},
            "two episodes": {"dones": np.array([0, 1, 0, 0, 1], bool)},
            "another ROM": {"rom_sha1": "beef"},
            "infos pickled": {"infos": np.array([{"bomb": Bomb()}] * 5, dtype=object)},
            "final of another size": {"final_observation": np.zeros((4, 4, 3), np.uint8)},
            "final info no JSON": {"final_info": '{"x": '},
            "final info no object": {"final_info": "[1]"},
            "length too high": {"episode_length": 6},
            "length no number": {"episode_length": [5, 5]},
        }[kind]
        write_episode(path, **bad)


DAMAGES = {
    "truncated": "cut off or damaged",
    "cut inside": "cut off or damaged",
    "no zip": "cut off or damaged|pickle",
    "no archive": "cut off or damaged",
    "unknown compression": "cut off or damaged",
    "flipped byte": "cut off or damaged",
    "key missing": "lacks rewards",
    "wrong shape": r"observations are uint8 \(5, 20, 30\), expected uint8 \(T, height, width, 3\)",
    "four channels": "expected uint8",
    "wrong dtype": "observations are float32",
    "float actions": r"actions are float64 \(5,\), expected int32",
    "action too high": "actions hold 10, expected 0 to 9",
    "action negative": "actions hold -1, expected 0 to 9",
    "lengths disagree": r"actions are int32 \(4,\), expected int32 \(5,\)",
    "infos disagree": r"infos are \(3,\), expected \(5,\)",
    "no step": r"observations are uint8 \(0, 20, 30, 3\)",
    "rewards not finite": "rewards are not finite at step 1",
    "infos no JSON": "infos are no JSON",
    "infos no objects": "infos are not all JSON objects",
    "two episodes": "done at step 1 of 5",
    "another ROM": "rom_sha1 is 'beef', in episode_0001.npz ''",
    "infos pickled": "pickled Python objects.*--allow-pickle",
    "final of another size": "final_observation is uint8",
    "final info no JSON": "final_info is no JSON",
    "final info no object": "final_info is list, expected a JSON object or null",
    "length too high": "episode_length is 6, expected 5",
    "length no number": "episode_length is .*, expected 5",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_bad_episodes_stop_the_script_with_a_message(tmp_path, kind):
    data = tmp_path / "data"
    data.mkdir()
    write_episode(data / "episode_0001.npz")
    damage(data / "episode_0002.npz", kind)
    before = {path.name: path.read_bytes() for path in data.glob("*.npz")}
    args = Args(expert_data_dir=str(data), run_root=str(tmp_path / "runs"), model_dir=str(tmp_path / "models"))
    args.final_eval_episodes = 0
    with pytest.raises(SystemExit, match=DAMAGES[kind]) as stop:
        bc_pokemon.main(args)
    assert "episode_0002.npz" in str(stop.value) and stop.value.code not in (0, None)
    assert {path.name: path.read_bytes() for path in data.glob("*.npz")} == before
    assert not (tmp_path / "runs").exists() and not (tmp_path / "models").exists()
    assert "BOMB" not in os.environ


def test_other_bad_folders(tmp_path):
    def fails(match, **settings):
        args = Args(
            run_root=str(tmp_path / "runs"), model_dir=str(tmp_path / "models"), final_eval_episodes=0, **settings
        )
        with pytest.raises(SystemExit, match=match):
            bc_pokemon.main(args)
        assert not (tmp_path / "runs").exists()

    (tmp_path / "empty").mkdir()
    fails("holds no episode.*collect_expert_data.py", expert_data_dir=str(tmp_path / "empty"))
    fails("holds no episode", expert_data_dir=str(tmp_path / "nowhere"))
    write_episode(tmp_path / "episode_0001.npz")
    write_episode(tmp_path / "episode_0002.npz", H=24)
    fails(r"frames are \(24, 30, 3\), in episode_0001.npz \(20, 30, 3\)", expert_data_dir=str(tmp_path))
    write_episode(tmp_path / "episode_0002.npz", action_meanings=np.array(list("ABCDEFGHIJ")))
    fails("actions mean", expert_data_dir=str(tmp_path))
    for name, value in {"val_fraction": 0.7, "top_fraction": 0.0, "n_step": 0, "export_onnx": "policy.bin"}.items():
        fails(f"--{name.replace('_', '-')}", expert_data_dir=str(tmp_path), **{name: value})
    fails("--algorithm dagger needs an expert", expert_data_dir=str(tmp_path), algorithm="dagger", expert=None)
    fails("no cuda device|cuda", expert_data_dir=str(tmp_path), device="cuda:77")


def test_trusted_pickles_open_when_asked_for(tmp_path):
    infos = np.array([{"milestones": {"completed": ["A"]}}] * 5, dtype=object)
    write_episode(tmp_path / "episode_0001.npz", infos=infos)
    (episode,), names = read_episodes(tmp_path, allow_pickle=True)
    assert episode["infos"][4]["milestones"]["completed"] == ["A"] and names[:2] == ["A", "B"]


@pytest.mark.parametrize(
    "stored,read",
    [('{"x": 3}', {"x": 3}), ("null", None), (np.array({"x": 3}, dtype=object), {"x": 3}), (None, None)],
)
def test_final_infos_are_read(tmp_path, stored, read):
    write_episode(tmp_path / "episode_0001.npz", **({} if stored is None else {"final_info": stored}))
    episode = read_episode(tmp_path / "episode_0001.npz", allow_pickle=True)
    assert episode.get("final_info") == read
    args = Args(expert_data_dir=str(tmp_path), allow_pickle=True)
    assert bc_pokemon.load_episodes(args)[0][0]["features"].shape[0] == 6


def test_failed_episodes_are_no_data(tmp_path):
    write_episode(tmp_path / "episode_0001.npz")
    write_episode(tmp_path / "episode_0002.failed.npz")
    assert [e["path"].name for e in read_episodes(tmp_path)[0]] == ["episode_0001.npz"]


def test_stored_and_compressed_files_read_the_same(tmp_path):
    for name, compress in (("episode_0001.npz", False), ("episode_0002.npz", True)):
        write_episode(tmp_path / name, compress)
        assert zipfile.ZipFile(tmp_path / name).infolist()[0].compress_type == (8 if compress else 0)
    first, second = read_episodes(tmp_path)[0]
    np.testing.assert_array_equal(first["taken_actions"], second["actions"])
    assert first["shape"] == second["shape"] == (5, 20, 30, 3)
