"""`agent_finetune.py`: an update of its agent phase, one frame of the agent at play, and dreams.

    python -m benchmarks.speed.agent
    python -m benchmarks.speed.agent --preset gpu-s --device cuda

Training: the rival is the same update with attention written out (scores, softmax, values) and an optimiser that goes
from tensor to tensor. Play: the rival gives the same numbers without a cache, from all frames that the network sees,
the context once for each of its layers over time. Dreams: the rival makes each frame from all before it. The share of
the peak is the update's floating-point operations by its time, against a large matrix product's in the same run.
Latents and actions are noise. On a GPU the clock is the wall's, with one synchronisation a round. Writes
results/agent_training.json, agent_play.json and agent_dreams.json, with the preset's name where it is not cpu.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch.utils.flop_counter import FlopCounterMode

import agent_finetune as a
from benchmarks.speed import paired

N_MOVEMENT, N_KEYS = 9, 1


@dataclass
class Args:
    preset: Literal["cpu", "gpu-s", "gpu-m"] = "cpu"
    """sizes of the networks and of the batch"""
    device: str = "cpu"
    """cpu or cuda"""
    updates: int = 3
    """updates of each way in a round"""
    frames: int = 64
    """frames of play in a round"""
    dreams: int = 16
    """dreams side by side in a round"""
    horizon: int = 15
    """frames of a dream; the script's default is 4, where the cache has less to save"""
    rounds: int = 9
    """how often the ways take turns"""


def make_networks(preset: a.Preset, device) -> tuple[a.Dynamics, a.Heads]:
    z_shape = [preset.n_latents // preset.pack, preset.latent_dim * preset.pack]
    actions = {"n_movement": N_MOVEMENT, "n_keys": N_KEYS}
    sizes = {"dim": preset.dim, "layers": preset.layers, "heads": preset.heads, "kv_heads": preset.kv_heads}
    sizes |= {"registers": preset.registers, "time_every": preset.time_every, "k_max": preset.k_max}
    dynamics = a.Dynamics(z_shape, True, **actions, n_tasks=1, **sizes, context=preset.context).to(device)
    return dynamics, a.Heads(preset.dim, 8, **actions, reward_limit=5.0, value_limit=9.0).to(device)


def make_batch(preset: a.Preset, B: int, T: int, device) -> dict[str, torch.Tensor]:
    known = torch.ones(B, T + 8, dtype=torch.bool)
    z = torch.rand(B, T, preset.n_latents // preset.pack, preset.latent_dim * preset.pack) * 2 - 1
    batch = {"z": z, "movement": torch.randint(0, N_MOVEMENT, known.shape), "reward": torch.randn(known.shape)}
    batch |= {"keys": torch.randint(0, 2, (*known.shape, N_KEYS)).float(), "cont": known.float(), "inside": known}
    batch |= {"act_valid": known, "rew_valid": known, "task": torch.zeros(B, dtype=torch.long)}
    return {name: x.to(device) for name, x in batch.items()}


def written_out(q, k, v, attn_mask=None, enable_gqa=False):
    """Attention without a fused kernel."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ v


def compare_training(args: Args, preset: a.Preset, device, clock, name: str):
    B, T = preset.batch_sizes[2], preset.lengths[0]
    batch, uniform = make_batch(preset, B, T, device), torch.arange(B, device=device) < B // 2
    dtype, _ = a.amp_config(device, device.type == "cuda" and torch.cuda.is_bf16_supported())
    settings, kernel = a.Args(), F.scaled_dot_product_attention

    def make(attention, fused: bool):
        torch.manual_seed(1)
        dynamics, heads = make_networks(preset, device)
        parameters = [*dynamics.parameters(), *heads.parameters()]
        groups = a.parameter_groups(parameters, [dynamics, heads], 1e-4, 1.0, 0.01)
        optimizers = a.make_optimizers(groups, fused)

        def update(_=0, n=args.updates):
            F.scaled_dot_product_attention = attention
            for _ in range(n):
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    terms = a.world_terms(dynamics, heads, batch, uniform, True, settings)
                loss = sum(terms[term] for term in a.TERMS["agent"])
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimizer in optimizers:
                    optimizer.step()
            F.scaled_dot_product_attention = kernel

        return update

    rival, ours = make(written_out, fused=False), make(kernel, fused=True)
    with FlopCounterMode(display=False) as counter:
        make(written_out, fused=False)(n=1)  # as matrix products, all of which are counted
    ways = {"attention written out, plain AdamW": rival, "agent_finetune.py": ours}
    seconds = paired.run_in_turn(ways, args.rounds, clock=clock)
    best, flops = min(seconds["agent_finetune.py"]) / args.updates, counter.get_total_flops()
    peak = measure_peak(device, dtype or torch.float32, clock)
    more = {"preset": args.preset, "device": name_of(device), "batch": [B, T], "gflop_per_update": flops / 1e9}
    more |= {"gflop_per_second": flops / best / 1e9, "peak_gflop_per_second": peak / 1e9}
    more |= {
        "share_of_peak": flops / best / peak,
        "parameters": sum(p.numel() for p in make_networks(preset, "cpu")[0].parameters()),
    }
    paired.report(f"agent_training{name}", seconds, args.updates * B * T, "frames", [], more)


def measure_peak(device, dtype, clock) -> float:
    """Operations a second of a large matrix product, the best of several."""
    n, rates = 2048 if device.type == "cpu" else 8192, []
    x = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(6):
        begin = clock()
        x @ x
        rates.append(2 * n**3 / (clock() - begin))
    return max(rates)


@torch.no_grad()
def compare_play(args: Args, preset: a.Preset, device, clock, name: str):
    torch.manual_seed(1)
    dynamics = make_networks(preset, device)[0].eval()
    seen = preset.layers // preset.time_every * (preset.context - 1) + 2  # each sees the frame before
    batch = make_batch(preset, 1, seen + args.frames, device)

    def part(first: int, stop: int) -> tuple[torch.Tensor, dict]:
        return batch["z"][:, first:stop], {key: batch[key][:, first:stop] for key in a.ACTION} | {"task": batch["task"]}

    def cached(_):
        _, known = a.look(dynamics, *part(0, seen), {})
        for t in range(seen, seen + args.frames):
            _, known = a.look(dynamics, *part(t, t + 1), known)

    def whole(_):
        for t in range(seen, seen + args.frames):
            a.look(dynamics, *part(t + 1 - seen, t + 1), {})

    seconds = paired.run_in_turn({"without a cache": whole, "agent_finetune.py": cached}, args.rounds, clock=clock)
    more = {"preset": args.preset, "device": name_of(device), "frames_seen": seen}
    target = ("agent_finetune.py", "without a cache", 5.0)
    paired.report(f"agent_play{name}", seconds, args.frames, "frames", [target], more)


@torch.no_grad()
def dream_without_cache(dynamics, heads, policy, batch, n_context: int, horizon: int, n_steps: int, generator) -> dict:
    """`agent_finetune.dream`, each frame from all frames before it: h, z, movement, keys."""
    B, k_max = len(batch["z"]), dynamics.k_max
    one = (B, 1, *batch["z"].shape[2:])

    def with_noise(z: torch.Tensor) -> torch.Tensor:
        level = torch.full(z.shape[:2], k_max - 1, device=z.device)
        return a.noisy(z, a.draw_noise(z.shape, generator, z.device), level, k_max)

    def run(z: torch.Tensor, level: int = k_max - 1, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean z and h of the last frame, which has `level` and `step`."""
        levels = torch.full(z.shape[:2], k_max - 1, device=z.device)
        steps = torch.zeros_like(levels)
        levels[:, -1], steps[:, -1] = level, step
        clean, h, _ = dynamics(z, levels, steps, actions)
        return clean[:, -1:], h[:, -1:]

    actions = {name: batch[name][:, :n_context] for name in a.ACTION} | {"task": batch["task"]}
    seen = with_noise(batch["z"][:, :n_context])
    made = {"h": [run(seen)[1]], "z": [], "movement": [], "keys": []}
    for i in range(n_context, n_context + horizon):
        row = {name: batch[name][:, i : i + 1] for name in a.ACTION}
        if policy is not None:
            logits = policy(made["h"][-1])[:, 0, 0]
            chance = torch.rand(logits.shape, generator=generator).to(logits.device)
            movement, keys = a.choose_actions(logits, heads.n_movement, chance)
            row = {"movement": movement[:, None], "keys": keys[:, None], "act_valid": torch.ones_like(movement) > 0}
            row["act_valid"] = row["act_valid"][:, None]
        actions = {name: torch.cat([actions[name], row[name]], 1) for name in a.ACTION} | {"task": batch["task"]}
        z = a.draw_noise(one, generator, seen.device)
        for k in range(n_steps):
            size = (k_max // n_steps).bit_length() - 1
            clean, _ = run(torch.cat([seen, z], 1), k * k_max // n_steps, size)
            z = z + (clean - z) / (n_steps - k)
        z = z.clamp(-1, 1) if dynamics.bounded else z
        seen = torch.cat([seen, with_noise(z)], 1)
        for name, new in (("h", run(seen)[1]), ("z", z), ("movement", row["movement"]), ("keys", row["keys"])):
            made[name].append(new)
    return {name: torch.cat(parts, 1) for name, parts in made.items()}


def compare_dreams(args: Args, preset: a.Preset, device, clock, name: str):
    torch.manual_seed(1)
    dynamics, heads = make_networks(preset, device)
    n_context, settings = preset.lengths[0], a.Args()
    batch = make_batch(preset, args.dreams, n_context, device)
    n_steps = min(4, preset.k_max)

    def cached(_):
        a.dream(dynamics, heads, heads.policy, batch, n_context, args.horizon, settings)

    def whole(_):
        dream_without_cache(dynamics, heads, heads.policy, batch, n_context, args.horizon, n_steps, None)

    seconds = paired.run_in_turn({"without a cache": whole, "agent_finetune.py": cached}, args.rounds, clock=clock)
    more = {"preset": args.preset, "device": name_of(device), "batch": [args.dreams, n_context, args.horizon]}
    paired.report(
        f"agent_dreams{name}",
        seconds,
        args.dreams * args.horizon,
        "frames",
        [("agent_finetune.py", "without a cache", 8.0)],
        more,
    )


def name_of(device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main(args: Args):
    device, preset = torch.device(args.device), a.PRESETS[args.preset]
    torch.set_num_threads(1)
    name = "" if args.preset == "cpu" else f"_{args.preset.replace('-', '_')}"

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    clock = wall if device.type == "cuda" else paired.cpu_seconds
    compare_training(args, preset, device, clock, name)
    compare_play(args, preset, device, clock, name)
    compare_dreams(args, preset, device, clock, name)


if __name__ == "__main__":
    main(tyro.cli(Args))
