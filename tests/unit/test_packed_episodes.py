import numpy as np
import pytest
import torch

from packed_episodes import scores
from packed_episodes.rows import Rows, load_meta, load_rows
from tests import reference
from tests.packed import play, write_packed


# data -----------------------------------------------------------------------------------------------------------------
def test_packed_episodes_are_read_as_they_are(tmp_path):
    folder = write_packed(tmp_path / "packed", episodes=2, length=30)
    meta = load_meta(folder)
    rows = load_rows(folder, ["episode_0001", "episode_0002"], meta)
    part = play(30, 1)
    assert rows.runs.tolist() == [[0, 30], [30, 60]] and (rows.frames[30:] == part["frames"]).all()
    assert (
        rows.movement[30:].tolist() == part["movement"].tolist()
        and rows.reward[30:].tolist() == part["reward"].tolist()
    )
    departing = load_rows(folder, ["episode_0001"], meta | {"action_index": "departure"})
    arriving = load_rows(folder, ["episode_0001"], meta)
    assert departing.movement[1:].tolist() == arriving.movement[:-1].tolist()
    assert not departing.act_valid[0] and departing.reward.tolist() == arriving.reward.tolist()


def test_a_gap_or_an_end_begins_another_run(tmp_path):
    folder = write_packed(tmp_path / "packed", episodes=1, length=30)
    part = play(30, 0)
    part["frame_index"][10:] += 5
    part["cont"][19] = 0
    np.savez_compressed(folder / "episode_0001.npz", **part)
    assert load_rows(folder, ["episode_0001"], load_meta(folder)).runs.tolist() == [[0, 10], [10, 20], [20, 30]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": np.zeros(29, np.float32)}, "lengths .*'reward': 29.*expected one length"),
        ({"reward": np.r_[np.zeros(12), np.nan, np.zeros(17)].astype(np.float32)}, "reward of frame 12 is not finite"),
        (
            {"frame_index": np.r_[np.arange(9), 8, np.arange(10, 30)].astype(np.int32)},
            "row 9 has frame 8 after frame 8",
        ),
        ({"frames": np.zeros((30, 32, 32, 3), np.uint8)}, r"has the shape \(32, 32, 3\) in a row, meta.json says"),
        ({"movement": np.full(30, 9, np.int16)}, "movement 9 to 9, keys .* 5 movements and 1 keys"),
        ({"keys": np.zeros((30, 3), np.uint8)}, "keys .30, 3.*5 movements and 1 keys"),
    ],
)
def test_a_wrong_episode_is_named(tmp_path, change, words):
    folder = write_packed(tmp_path / "packed", episodes=1, length=30)
    np.savez_compressed(folder / "episode_0001.npz", **play(30, 0) | change)
    with pytest.raises(ValueError, match=words) as caught:
        load_rows(folder, ["episode_0001"], load_meta(folder))
    assert "episode_0001.npz" in str(caught.value) and "pack_episodes.py" in str(caught.value)


def test_a_damaged_file_or_folder_is_named(tmp_path):
    folder = write_packed(tmp_path / "packed", episodes=1, length=30)
    path = folder / "episode_0001.npz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="episode_0001.npz is missing, cut off or damaged"):
        load_rows(folder, ["episode_0001"], load_meta(folder))
    part = play(30, 0)
    del part["cont"]
    np.savez_compressed(path, **part)
    with pytest.raises(ValueError, match="Expected frames, frame_index"):
        load_rows(folder, ["episode_0001"], load_meta(folder))
    (folder / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="meta.json cannot be used .*no .*episodes"):
        load_meta(folder)
    with pytest.raises(ValueError, match="nothing/meta.json is missing"):
        load_meta(tmp_path / "nothing")


# scores ---------------------------------------------------------------------------------------------------------------
def some_actions(runs: list[tuple[int, int]], seed: int, n_keys: int = 1) -> Rows:
    rng, R = np.random.default_rng(seed), runs[-1][1]
    known = torch.ones(R, dtype=torch.bool)
    known[[first for first, _ in runs]] = False
    rows = {"frames": None, "z": None, "reward": torch.zeros(R), "cont": torch.ones(R), "act_valid": known}
    movement = torch.tensor(np.repeat(rng.integers(0, 3, R), 2)[:R])
    keys = torch.tensor(rng.integers(0, 2, (R, n_keys))).float()
    return Rows(
        **rows,
        movement=movement,
        keys=keys,
        rew_valid=known.clone(),
        runs=np.array(runs),
        episode=np.zeros(R, int),
        task=torch.zeros(R, dtype=torch.long),
    )


def test_counting_predicts_as_a_plain_loop_does():
    train, held = some_actions([(0, 50), (50, 80)], 0), some_actions([(0, 40)], 1)
    assert scores.count_actions(train, held, 3) == pytest.approx(reference.action_baselines(train, held, 3))


def test_the_most_likely_action_but_one_is_what_a_search_finds():
    torch.manual_seed(0)
    logits, movement, keys = torch.randn(300, 6), torch.randint(0, 3, (300,)), torch.randint(0, 2, (300, 3)).float()
    movement[:150], keys[:150] = logits[:150, :3].argmax(-1), (logits[:150, 3:] > 0).float()  # the likeliest, ruled out
    everything = torch.tensor([(m, a, b, c) for m in range(3) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    log_p = logits[:, :3].log_softmax(-1)[:, everything[:, 0]]
    sign = 2.0 * everything[:, 1:] - 1  # (24, 3)
    log_p = log_p + torch.nn.functional.logsigmoid(logits[:, None, 3:] * sign).sum(-1)
    last = torch.cat([movement[:, None], keys.long()], 1)
    log_p[(everything == last[:, None]).all(-1)] = -torch.inf
    found = scores.most_likely_but(logits, movement, keys)
    assert torch.equal(torch.cat([found[0][:, None], found[1].long()], 1), everything[log_p.argmax(-1)])


def test_a_policy_that_knows_scores_as_expected():
    train, held = some_actions([(0, 50)], 0, 2), some_actions([(0, 30), (30, 60)], 1, 2)
    held.keys[:, 1] = 0
    following = torch.nn.functional.one_hot(held.movement.roll(-1), 3).float()
    logits = 20 * torch.cat([following - 0.5, held.keys.roll(-1, 0) - 0.5], 1)
    metrics, table = scores.score_policy(logits, train, held, ["B", "C"])
    for name in ("action_accuracy", "action_accuracy_sampled", "change_accuracy", "change_accuracy_not_last"):
        assert metrics[f"eval/{name}"] == 1
    assert metrics["eval/policy_nll"] < 1e-3 < metrics["eval/policy_nll_markov"]
    assert table["per_key"]["B"]["f1"] == 1 and table["per_key"]["C"]["recall"] == 0
    last = torch.cat([20 * (torch.nn.functional.one_hot(held.movement, 3) - 0.5), 20 * (held.keys - 0.5)], 1)
    metrics, table = scores.score_policy(last, train, held, ["B", "C"])  # repeats the last action
    assert metrics["eval/action_accuracy"] == pytest.approx(metrics["eval/action_accuracy_repeat_last"])
    assert metrics["eval/change_accuracy"] == 0 and table["change_frames"] > 0


def test_rewards_that_are_known_are_told_apart_and_recalled():
    held = some_actions([(0, 40), (40, 80)], 0)
    held.reward[[10, 50, 60]], held.reward[[20, 70]], held.cont[79] = 1.0, -2.0, 0.0
    predicted = np.stack([np.roll(held.reward.numpy(), -n) for n in range(3)], 1)
    metrics, table = scores.score_reward(predicted, 1 - held.cont.numpy(), held)
    assert [ahead["gain"] for ahead in table["reward_auc_ahead"]] == [1, 1, 1]
    for name in ("reward_auc", "reward_auc_loss", "reward_recall", "reward_recall_loss", "cont_auc"):
        assert metrics[f"eval/{name}"] == 1
    assert metrics["eval/reward_mean"] == pytest.approx(metrics["eval/reward_mean_true"])
    assert table["reward_events"] == {"gain": 3, "loss": 2}
    assert sum(band["rows"] for band in table["reward_by_prediction"]) == held.rew_valid.sum()
    metrics, _ = scores.score_reward(0.4 * predicted, np.zeros(80), held)
    assert metrics["eval/reward_auc"] == 1 and metrics["eval/reward_recall"] == 0 and metrics["eval/cont_auc"] == 0.5
    held.reward[:] = 0
    metrics, _ = scores.score_reward(predicted, np.zeros(80), held)
    assert np.isnan(metrics["eval/reward_auc"]) and metrics["eval/reward_recall"] == 0


def test_a_psnr_of_a_hundredth_is_twenty_decibels():
    real = torch.zeros(2, 3, 4, 4)
    made = torch.full((2, 3, 4, 4), 0.1)
    assert scores.psnr(made, real) == pytest.approx(20, abs=1e-5)
    made[:, :, :2] = 0.7
    lower = torch.tensor([0.0, 0, 1, 1])[:, None].expand(2, 1, 4, 4)
    assert scores.psnr(made, real, lower) == pytest.approx(20, abs=1e-5)
    assert np.isnan(scores.psnr(made, real, torch.zeros(2, 1, 4, 4)))
    both = scores.Decibels()
    both.add(made[:1], real[:1]), both.add(made[1:], real[1:])
    assert both.value() == pytest.approx(scores.psnr(made, real))
