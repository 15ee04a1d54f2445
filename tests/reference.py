"""Naive references: the formulas as plain loops in float64, slow and easy to check by eye. Tests compare with them."""

import math

import numpy as np


def masked_zncc(frame: np.ndarray, grey: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masked zero-mean NCC of a template (h, w) with a frame (H, W), both in grey levels.

    Returns the score and the local standard deviation under the mask in grey levels, both (H-h+1, W-w+1) float64. The
    score is 0 where the deviation is 0.
    """
    (H, W), (h, w) = frame.shape, grey.shape
    template = grey[mask].astype(np.float64)
    template = template - template.mean()
    score, deviation = np.zeros((H - h + 1, W - w + 1)), np.zeros((H - h + 1, W - w + 1))
    for y in range(H - h + 1):
        for x in range(W - w + 1):
            local = frame[y : y + h, x : x + w][mask].astype(np.float64)
            local = local - local.mean()
            deviation[y, x] = math.sqrt((local**2).mean())
            if deviation[y, x] > 0:
                score[y, x] = (local * template).sum() / math.sqrt((local**2).sum() * (template**2).sum())
    return score, deviation


def discounted_returns(rewards: list[float], gamma: float) -> list[float]:
    """G_t = sum over k >= t of gamma^(k - t) r_k, term by term."""
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def specified_returns(length: int, reward: float, gamma: float, attacks=(), attack_reward=0.0, survival_bonus=0.0):
    """The specification's closed form for an episode of `length` frames: terminal reward at the last frame, an attack
    counts for the frames strictly before it, survival for every frame that is followed by another."""
    last, returns = length - 1, []
    for t in range(length):
        value = gamma ** (last - t) * reward
        value += sum(gamma ** (k - t) * attack_reward for k in attacks if k > t)
        value += sum(gamma**j * survival_bonus for j in range(last - t))
        returns.append(value)
    return returns


def naive_key_table(session, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """`state` and `any` (N, K) by replaying every event for every frame: O(N x events)."""
    events = [
        (row["timestamp"], row["key_name"], row["state"] != "up")
        for row in session.inputs.to_pylist()
        if row["event_type"] == "key"
    ]
    N = session.n_frames
    state, any_down = np.zeros((N, len(keys)), bool), np.zeros((N, len(keys)), bool)
    for i in range(N):
        end = session.timestamps[i + 1] if i + 1 < N else session.timestamps[i] + 1000 / session.fps
        for k, key in enumerate(keys):
            for time_ms, name, down in events:
                if name == key and time_ms <= session.timestamps[i]:
                    state[i, k] = down
            inside = [down for t, name, down in events if name == key and session.timestamps[i] < t < end]
            any_down[i, k] = state[i, k] or any(inside)
    return state, any_down


def naive_intents(shown: np.ndarray, signs: list[str], rules: list, horizon: int, cuts: list[int]) -> list[str]:
    """The first of `rules` (intent, signs) of which a sign shows (N, S) in the frames from i to i + horizon, before the
    next of `cuts`."""
    intents = []
    for i in range(len(shown)):
        end = min([cut for cut in cuts if cut > i] + [len(shown), i + horizon + 1])
        seen = {sign for s, sign in enumerate(signs) if any(shown[j, s] for j in range(i, end))}
        intents.append(next((intent for intent, those in rules if seen & set(those.split())), "WAIT"))
    return intents


def naive_event_f1(predicted: np.ndarray, true: np.ndarray, change: int, tolerance: int = 1) -> float:
    """F1 of onsets or releases by the largest one-to-one matching, per key."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    hits = total = 0
    for k in range(true.shape[1]):
        mine, theirs = (np.flatnonzero(np.diff(keys[:, k].astype(int)) == change) for keys in (predicted, true))
        near = np.abs(mine[:, None] - theirs[None, :]) <= tolerance
        hits += int((maximum_bipartite_matching(csr_array(near), perm_type="column") >= 0).sum()) if near.any() else 0
        total += len(mine) + len(theirs)
    return 2 * hits / max(total, 1)


def action_baselines(train, held, n_movement: int) -> dict[str, float]:
    """Pair by pair, what agent_finetune.py counts."""

    def pairs(rows):
        for first, stop in rows.runs:
            for t in range(first + 1, stop):
                if rows.act_valid[t - 1] and rows.act_valid[t]:
                    one = [(int(rows.movement[i]), *(int(k) for k in rows.keys[i])) for i in (t - 1, t)]
                    yield one[0], one[1]

    seen, asked = list(pairs(train)), list(pairs(held))
    marginal = markov = 0.0
    for column, n in [(0, n_movement)] + [(1 + i, 2) for i in range(train.keys.shape[1])]:
        counts = np.ones((n, n))
        for last, now in seen:
            counts[last[column], now[column]] += 1
        for last, now in asked:
            marginal -= np.log(counts[:, now[column]].sum() / counts.sum()) / len(asked)
            markov -= np.log(counts[last[column], now[column]] / counts[last[column]].sum()) / len(asked)
    hits, changes = 0, 0
    for last, now in asked:
        if last == now:
            continue
        follows = [b for one, b in seen if one == last and b != last] or [b for _, b in seen if b != last]
        ranked = sorted(set(follows), key=lambda action: (-follows.count(action), action[1:], action[0]))
        hits, changes = hits + (ranked[0] == now), changes + 1
    return {
        "eval/policy_nll_marginal": marginal,
        "eval/policy_nll_markov": markov,
        "eval/action_accuracy_repeat_last": 1 - changes / len(asked),
        "eval/change_accuracy_markov": hits / changes,
    }


def death_events(present: list[bool], k: int = 3, m: int = 20) -> tuple[list[int], list[int]]:
    """Frame by frame: alive -> dead where k frames with the bar are followed by m without, dead -> alive after k frames
    with it. Second: frames where the bar went and the m frames are not over."""
    deaths, unknown, alive = [], [], True
    for t in range(len(present)):
        before, after = present[max(0, t - k) : t], present[t : t + m]
        if not alive and t >= k and all(before):
            alive = True
        if alive and t >= k and all(before) and not any(after):
            if len(after) == m:
                deaths.append(t)
                alive = False
            else:
                unknown.append(t)
    return deaths, unknown
