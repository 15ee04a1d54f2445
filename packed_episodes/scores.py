"""Scores of what agent_finetune.py learns, each beside what a simple rule gets, on whole held-out episodes.

Frames: decibels, also of the foreground alone. Actions: likelihood and accuracy beside those of counting what follows
an action. Rewards: how well the predicted ones tell events from the rest. Pictures of an open-loop prediction.
"""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from common.video import VideoWriter
from packed_episodes.rows import Rows

# Axes: R rows, T frames, A keys, M movements, L rows ahead.
FOREGROUND = 0.1  # a pixel is foreground where a channel is so far from the mean frame, of 1


# frames ---------------------------------------------------------------------------------------------------------------
def foreground(frames: torch.Tensor, mean_frame: torch.Tensor) -> torch.Tensor:
    """Which pixels (..., 1, H, W) differ from the mean frame; frames (..., 3, H, W) in 0..1."""
    return ((frames - mean_frame).abs().amax(-3, keepdim=True) > FOREGROUND).float()


class Decibels:
    """PSNR of many pictures together, 10 log10(1 / mean squared error), of values in 0..1."""

    def __init__(self):
        self.error, self.count = 0.0, 0.0

    def add(self, made: torch.Tensor, real: torch.Tensor, weight: torch.Tensor | None = None):
        """Pictures of one shape (..., 3, H, W); `weight` (..., 1, H, W) says which pixels count."""
        error = (made - real).square()
        self.error += float(error.sum() if weight is None else (error * weight).sum())
        self.count += error.numel() if weight is None else 3 * float(weight.sum())

    def value(self) -> float:
        """NaN where no pixel counted."""
        return float(-10 * np.log10(self.error / self.count + 1e-12)) if self.count else float("nan")


def psnr(made: torch.Tensor, real: torch.Tensor, weight: torch.Tensor | None = None) -> float:
    """Of one batch of pictures, as `Decibels`."""
    decibels = Decibels()
    decibels.add(made, real, weight)
    return decibels.value()


def draw_open_loop(run_dir: Path, writer: SummaryWriter, table: dict, pictures: dict | None, fps: float):
    """open_loop.png: error over the horizon, and real and predicted frames where there are any, which open_loop.mp4
    shows side by side; both in TensorBoard, too. `table` lists by `horizons` and latent_mse_<way>, `pictures` holds
    (T, 3, H, W) by name."""
    figure = Figure(figsize=(10, 4 if pictures is None else 7), layout="constrained")
    axes = figure.subplots(1 if pictures is None else 2, 1, squeeze=False)[:, 0]
    for way in (name.removeprefix("latent_mse_") for name in table if name.startswith("latent_mse_")):
        axes[0].plot(table["horizons"], table[f"latent_mse_{way}"], "o-", markersize=3, label=way.replace("_", " "))
    axes[0].set(xlabel="frames ahead", ylabel="squared error of the latents", ylim=(0, None))
    axes[0].legend(fontsize="small")
    if pictures is not None:
        at = [h - 1 for h in table["horizons"]]
        strips = {name: frames[at].movedim(1, -1).cpu().numpy() for name, frames in pictures.items()}
        axes[1].imshow(np.concatenate([np.concatenate(list(strip), 1) for strip in strips.values()]), aspect="auto")
        size = next(iter(strips.values())).shape[1]
        axes[1].set_yticks([size * (i + 0.5) for i in range(len(strips))], list(strips))
        axes[1].set_xticks([size * (i + 0.5) for i in range(len(at))], [f"{h} ahead" for h in table["horizons"]])
        side_by_side = torch.cat(list(pictures.values()), -1)  # (T, 3, H, 3 * W)
        scale = max(1, 256 // size)
        film = (side_by_side.movedim(1, -1) * 255).byte().cpu().numpy().repeat(scale, 1).repeat(scale, 2)
        video = VideoWriter(run_dir / "open_loop.mp4", fps, film.shape[2], film.shape[1], crf=20)
        for picture in film:
            video.add(picture)
        video.close()
        add_film(writer, "open_loop/film", film, fps)
    figure.savefig(run_dir / "open_loop.png", dpi=110)
    writer.add_image(
        "open_loop/sheet", np.array(Image.open(run_dir / "open_loop.png").convert("RGB")), dataformats="HWC"
    )


def draw_dreams(run_dir: Path, writer: SummaryWriter, films: dict, n_context: int, fps: float):
    """dreams.mp4, in TensorBoard, too: a row of films (n, T, 3, H, W) in 0..1 per policy, by name. The first
    `n_context` frames are real and have a grey frame."""
    rows = []
    for parts in films.values():
        scale = max(1, 192 // parts.shape[-1])
        large = (parts.movedim(2, -1) * 255).byte().cpu().numpy().repeat(scale, 2).repeat(scale, 3)  # (n, T, H, W, 3)
        large = np.pad(large, ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0)))
        large[:, :n_context, [0, 1, -2, -1]] = large[:, :n_context, :, [0, 1, -2, -1]] = 128
        rows.append(np.concatenate(list(large), 2))
    film = np.concatenate(rows, 1)  # (T, H, W, 3)
    video = VideoWriter(run_dir / "dreams.mp4", fps / 2, film.shape[2], film.shape[1], crf=20)
    for picture in film:
        video.add(picture)
    video.close()
    add_film(writer, "dreams/film", film[:, ::2, ::2], fps / 2)


def add_film(writer: SummaryWriter, tag: str, film: np.ndarray, fps: float):
    """A film (T, H, W, 3) uint8 as an animated picture, which is what TensorBoard shows."""
    first, *others = (Image.fromarray(picture) for picture in film)
    gif = io.BytesIO()
    first.save(gif, "GIF", save_all=True, append_images=others, duration=1000 / fps, loop=0)
    picture = Summary.Image(
        height=film.shape[1], width=film.shape[2], colorspace=3, encoded_image_string=gif.getvalue()
    )
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), 0)


# actions --------------------------------------------------------------------------------------------------------------
def pairs_of_actions(rows: Rows) -> np.ndarray:
    """(P,) rows that have an action and, before it in the same run, another."""
    known = rows.act_valid.numpy().copy()
    known[rows.runs[:, 0]] = False
    return np.flatnonzero(known & np.r_[False, rows.act_valid.numpy()[:-1]])


def action_code(movement: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """One number (R,) for an action, movement (R,) and keys (R, A)."""
    return (movement + 1000 * (keys.long() << torch.arange(keys.shape[1])).sum(-1)).numpy()


def most_likely_but(logits: torch.Tensor, movement: torch.Tensor, keys: torch.Tensor) -> tuple:
    """Movement (R,) and keys (R, A) that logits (R, M + A) hold for the most likely, those given ruled out."""
    n_movement = logits.shape[1] - keys.shape[1]
    moving, pressing = logits[:, :n_movement], logits[:, n_movement:]
    best, pressed = moving.argmax(-1), pressing > 0
    same = (best == movement) & (pressed == (keys > 0.5)).all(-1)
    top = moving.topk(min(2, n_movement), -1)
    cost = torch.cat([top.values[:, :1] - top.values[:, -1:], pressing.abs()], -1)  # of changing one thing, (R, 1 + A)
    cost[:, 0] = cost[:, 0] if n_movement > 1 else torch.inf
    change = F.one_hot(cost.argmin(-1), cost.shape[1]).bool() & same[:, None]
    return torch.where(change[:, 0], top.indices[:, -1], best), pressed ^ change[:, 1:]


def count_actions(train: Rows, held: Rows, n_movement: int) -> dict[str, float]:
    """What counting the training actions, each alone and after the last one, predicts of the held-out ones: negative
    log-likelihoods, and where the action changes the accuracy of the best guess that is not the last one."""
    now, then = pairs_of_actions(held), pairs_of_actions(train)
    columns = [(held.movement.numpy(), train.movement.numpy(), n_movement)]
    columns += [(h.long().numpy(), t.long().numpy(), 2) for h, t in zip(held.keys.T, train.keys.T, strict=True)]
    marginal = markov = 0.0
    for of_held, of_train, n in columns:
        counts = np.ones((n, n))
        np.add.at(counts, (of_train[then - 1], of_train[then]), 1)
        given_last, alone = counts / counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()
        marginal -= np.log(alone[of_held[now]]).mean()
        markov -= np.log(given_last[of_held[now - 1], of_held[now]]).mean()
    of_held, of_train = (action_code(rows.movement, rows.keys) for rows in (held, train))
    before, after = of_train[then - 1], of_train[then]
    guess = {}
    for last in np.unique(of_held[now - 1]):
        follows = after[(before == last) & (after != last)]
        follows = follows if len(follows) else after[after != last]
        values, counts = np.unique(follows, return_counts=True)
        guess[last] = values[counts.argmax()] if len(values) else -1
    last, true = of_held[now - 1], of_held[now]
    changed = last != true
    hit = np.array([guess[code] for code in last]) == true
    return {
        "eval/policy_nll_marginal": float(marginal),
        "eval/policy_nll_markov": float(markov),
        "eval/action_accuracy_repeat_last": float((~changed).mean()),
        "eval/change_accuracy_markov": float(hit[changed].mean()) if changed.any() else float("nan"),
    }


def score_policy(logits: torch.Tensor, train: Rows, held: Rows, key_names: list[str]) -> tuple[dict, dict]:
    """Metrics, and a table per key, of the logits (R, M + A) that row t of the held-out rows has for the action of row
    t + 1; both ways to choose: the most likely action, and a drawn one."""
    M = logits.shape[1] - len(key_names)
    now = pairs_of_actions(held)
    logits, movement, keys = logits[now - 1], held.movement[now], held.keys[now]
    p_keys, generator = logits[:, M:].sigmoid(), torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logits[:, :M].softmax(-1), 1, generator=generator)[:, 0]
    last, true = (action_code(held.movement[i], held.keys[i]) for i in (now - 1, now))
    changed = last != true
    hits = {
        "greedy": (logits[:, :M].argmax(-1), p_keys > 0.5),
        "sampled": (drawn, torch.rand(p_keys.shape, generator=generator) < p_keys),
        "not_last": most_likely_but(logits, held.movement[now - 1], held.keys[now - 1]),
    }
    hits = {way: action_code(*action) == true for way, action in hits.items()}
    nll = F.cross_entropy(logits[:, :M], movement, reduction="none")
    nll = nll + F.binary_cross_entropy_with_logits(logits[:, M:], keys, reduction="none").sum(-1)
    metrics = {
        "eval/policy_nll": float(nll.mean()),
        "eval/action_accuracy": float(hits["greedy"].mean()),
        "eval/action_accuracy_sampled": float(hits["sampled"].mean()),
        "eval/change_accuracy": float(hits["greedy"][changed].mean()),
        "eval/change_accuracy_sampled": float(hits["sampled"][changed].mean()),
        "eval/change_accuracy_not_last": float(hits["not_last"][changed].mean()),
    }
    per_key = {}
    for a, name in enumerate(key_names):
        on, said = keys[:, a] > 0.5, p_keys[:, a] > 0.5
        hit = float((on & said).sum())
        precision, recall = hit / max(1.0, float(said.sum())), hit / max(1.0, float(on.sum()))
        per_key[name] = {
            "rate": float(on.float().mean()),
            "predicted_rate": float(said.float().mean()),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / max(1e-9, precision + recall),
        }
    return metrics | count_actions(train, held, M), {"change_frames": int(changed.sum()), "per_key": per_key}


# rewards --------------------------------------------------------------------------------------------------------------
def auc(event: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve, NaN where all or none are events."""
    return float(roc_auc_score(event, score)) if 0 < event.sum() < len(event) else float("nan")


def score_reward(predicted: np.ndarray, ends: np.ndarray, held: Rows) -> tuple[dict, dict]:
    """Metrics and a table of the rewards (R, L) that row t predicts of the rows t .. t + L - 1, and of the chance (R,)
    that the game ended with it. An event is recalled where at least half of its reward is predicted."""
    R, L = predicted.shape
    run_of = np.searchsorted(held.runs[:, 0], np.arange(R), "right") - 1
    valid, reward, cont = held.rew_valid.numpy(), held.reward.numpy(), held.cont.numpy()
    ahead = []
    for n in range(L):
        t = np.arange(R - n)
        t = t[(run_of[t] == run_of[t + n]) & valid[t + n]]
        gain, loss = reward[t + n] > 0, reward[t + n] < 0
        ahead.append({"gain": auc(gain, predicted[t, n]), "loss": auc(loss, -predicted[t, n])})
    now, true = predicted[valid, 0], reward[valid]
    recalled = {
        name: float((np.abs(now[kind]) >= np.abs(true[kind]) / 2)[np.sign(now[kind]) == np.sign(true[kind])].sum())
        / max(1, int(kind.sum()))
        for name, kind in (("gain", true > 0), ("loss", true < 0))
    }
    metrics = {
        "eval/reward_auc": ahead[0]["gain"],
        "eval/reward_auc_loss": ahead[0]["loss"],
        "eval/reward_recall": recalled["gain"],
        "eval/reward_recall_loss": recalled["loss"],
        "eval/reward_mean": float(now.mean()),
        "eval/reward_mean_true": float(true.mean()),
        "eval/cont_auc": auc(cont == 0, ends),
    }
    order = np.argsort(now)
    bands = np.split(order, [len(order) // 100, len(order) // 10, len(order) * 9 // 10, len(order) * 99 // 100])
    table = {
        "reward_auc_ahead": ahead,
        "reward_events": {"gain": int((true > 0).sum()), "loss": int((true < 0).sum())},
        "reward_by_prediction": [  # lowest 1 %, to 10 %, to 90 %, to 99 %, highest 1 %
            {"rows": len(band), "predicted": float(now[band].mean()), "true": float(true[band].mean())}
            for band in bands
            if len(band)
        ],
    }
    return metrics, table


# for the terminal -----------------------------------------------------------------------------------------------------
def report(metrics: dict, tables: dict):
    if "open_loop" in tables:
        table = tables["open_loop"]
        print(f"\n{'frames ahead':<34}" + "".join(f"{h:>9}" for h in table["horizons"]))
        for name, row in table.items():
            if isinstance(row, list) and name != "horizons":
                print(f"{name:<34}" + "".join(f"{x:>9.4f}" if "mse" in name else f"{x:>9.1f}" for x in row))
    print()
    for name, metric in metrics.items():
        print(f"{name.removeprefix('eval/'):<40}{metric:>9.4f}")
