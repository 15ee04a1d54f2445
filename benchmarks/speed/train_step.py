"""One update of `iql_reflex.py` as the script does it, beside the plain way: eager, fp32, float stacks, NCHW.

    python -m benchmarks.speed.train_step

Both ways draw the same batches and do the same work: shift, forward, three losses, backward, AdamW. The script keeps
uint8 stacks, channels_last and, on processors with AMX, bf16. Writes results/train_step.json.
"""

from dataclasses import dataclass

import torch
import tyro

import iql_reflex
from benchmarks.speed.paired import report, run_in_turn

KEYS = 4


@dataclass
class Args:
    steps: int = 2
    """updates of each way in a round"""
    rounds: int = 9
    """how often the ways take turns"""


def make_batch(batch_size: int, image_size: int) -> dict[str, torch.Tensor]:
    """Random pixels and labels, as `stream_batches` and the tables of labels hand them out."""
    batch = {name: torch.rand(batch_size) for name in ("returns", "finished", "mouse_known")}
    batch = {name: (values > 0.5).float() for name, values in batch.items()}
    batch["keys"], batch["mouse"] = (torch.rand(batch_size, KEYS) > 0.5).float(), torch.rand(batch_size, 2)
    batch["stacks"] = torch.randint(0, 256, (batch_size, 9, image_size, image_size), dtype=torch.uint8)
    return batch


def losses(outputs, batch: dict, running) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses of iql_reflex.py with its default arguments, and the running moments."""
    args = iql_reflex.Args()
    logits, mouse, value = (output.float() for output in outputs)
    advantage = (batch["returns"] - value).detach()
    running = iql_reflex.update_running(running, advantage, batch["finished"])
    weights = iql_reflex.advantage_weights(
        advantage, running, args.iql_adv_temperature, args.iql_adv_clip, args.iql_adv_normalizer
    )
    weights = torch.where(batch["finished"] > 0, weights, 1.0)
    loss = iql_reflex.keys_loss(logits, batch["keys"], weights, torch.ones(KEYS))
    loss = loss + args.value_coef * iql_reflex.expectile_loss(
        batch["returns"], value, args.iql_expectile, batch["finished"]
    )
    return loss + args.mouse_coef * iql_reflex.mouse_loss(mouse, batch["mouse"], batch["mouse_known"]), running


def script_step(backbone: str, batch: dict, steps: int):
    """Updates as in iql_reflex.main."""
    network = iql_reflex.ReflexNet(KEYS, backbone).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    bf16, state = iql_reflex.use_bf16("auto", torch.device("cpu")), {"running": torch.zeros(3)}

    def way(_):
        for _ in range(steps):
            stacks = iql_reflex.random_shift(batch["stacks"], 2)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = network(stacks)
            loss, state["running"] = losses(outputs, batch, state["running"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return way


def plain_step(backbone: str, batch: dict, steps: int):
    """The same with float stacks in NCHW and fp32."""
    network = iql_reflex.ReflexNet(KEYS, backbone)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-4)
    state = {"running": torch.zeros(3)}

    def way(_):
        for _ in range(steps):
            stacks = torch.stack([stack.float() / 255 for stack in batch["stacks"]])  # a data set's samples are floats
            stacks = iql_reflex.random_shift(stacks, 2).contiguous()
            features = network.backbone((stacks - network.mean / 255) / (network.std / 255))
            outputs = network.keys_head(features), network.mouse_head(features), network.value_head(features).squeeze(1)
            loss, state["running"] = losses(outputs, batch, state["running"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return way


def main(args: Args):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    least = 2.8 if torch.cpu._is_amx_tile_supported() else 1.1
    for backbone, image_size, batch_size in (("resnet18", 224, 8), ("cnn", 112, 32)):
        name = f"train_step_{backbone}"
        batch = make_batch(batch_size, image_size)
        ways = {
            "eager fp32": plain_step(backbone, batch, args.steps),
            "iql_reflex.py": script_step(backbone, batch, args.steps),
        }
        seconds = run_in_turn(ways, args.rounds)
        more = {"backbone": backbone, "image_size": image_size, "batch_size": batch_size}
        more["bf16"] = iql_reflex.use_bf16("auto", torch.device("cpu"))
        report(name, seconds, args.steps * batch_size, "samples", [("iql_reflex.py", "eager fp32", least)], more)


if __name__ == "__main__":
    main(tyro.cli(Args))
