"""A reflex policy as one ONNX file that takes raw frames, and a manifest that says how to play it.

Takes a checkpoint of `iql_reflex.py`, or of a changed copy: the network comes from the script copy in the run folder,
so this runs that script. Stacking, resize and normalisation go into the graph, and the graph is compared with torch
on golden frames before anything is written. Page: docs/export_reflex.md

    python export_reflex.py --checkpoint runs/<run> --output reflex.onnx

In: best.pt and the script of a run folder. Out: <output>.onnx and <output>_manifest.json.
"""

import hashlib
import importlib.util
import itertools
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from common import runs
from common.sessions import KEY_CODES, MARKER_KEYS
from common.video import resize


@dataclass
class Args:
    checkpoint: Path | None = None
    """best.pt or last.pt of a run, or the run folder, whose best.pt is taken"""
    random: bool = False
    """export a network with random weights instead, to test what plays it"""
    script: Path | None = None
    """file that defines ReflexNet; None takes the copy in the run folder, with --random iql_reflex.py"""
    keys: tuple[str, ...] = ("KEY_LEFT", "KEY_LEFTCTRL", "KEY_RIGHT", "KEY_SPACE")
    """keys of a --random network; a checkpoint has its own"""
    seed: int = 1
    """of the weights of a --random network, and of the golden frames"""
    output: Path = Path("reflex.onnx")
    """the ONNX file; the manifest lies beside it as <stem>_manifest.json"""
    height: int = 360
    """of the example frame in pixels; the graph takes any"""
    width: int = 640
    """of the example frame in pixels; the graph takes any"""
    overwrite: bool = False
    """replace an output that is there already"""


# Axes: B batch, T frames in a stack (oldest first), H W of the raw frame, S image_size, K keys, G intents
OPSET = 18  # the first with an antialiased Resize
TOLERANCE = 1e-3  # outputs of graph and torch on the same resized frames, relative above 1
VALUES_OFF = 0.08  # share of a resized noise frame's values that may differ from common.video.resize, by one level of
# 255: there the weights are integers of 16 bits, in the graph float32. Frames that are enlarged may differ by two
OUTPUTS = ("keys_logits", "mouse_pos", "value")  # and q or intent_logits of a network with such a head
SCENES = ("flat", "noise", "scene")  # kinds of golden frames


# the graph ------------------------------------------------------------------------------------------------------------
class RawReflexNet(nn.Module):
    """Raw frames (B, T, H, W, 3) uint8 -> key logits (B, K), mouse (B, 2), value (B,), of a network with a Q head the
    smaller Q of every set of keys (B, 2^K), of one with intents, which takes a goal (B, G), their logits (B, G), and
    the stacks made of the frames."""

    def __init__(self, network: nn.Module, image_size: int):
        super().__init__()
        self.network, self.image_size = network, image_size

    def forward(self, pixels, goal=None):
        B, T = pixels.shape[:2]
        frames = pixels.permute(0, 1, 4, 2, 3).flatten(0, 1)  # (B * T, 3, H, W)
        # as common.video.resize: the width, then the height, rounded after each; an exact copy where the size is right
        for size in ((frames.shape[2], self.image_size), (self.image_size, self.image_size)):
            frames = F.interpolate(frames.float(), size, mode="bilinear", antialias=True)
            frames = (frames + 0.5).clamp(0, 255).to(torch.uint8)
        stacks = frames.unflatten(0, (B, T)).flatten(1, 2)  # (B, T * 3, S, S)
        return *network_outputs(self.network, stacks, goal), stacks


def output_names(network: nn.Module) -> tuple[str, ...]:
    """The outputs of the graph, in order. Q and intents exclude each other."""
    q, intents = getattr(network, "q_head", None) is not None, n_intents(network) > 0
    return OUTPUTS + ("q",) * q + ("intent_logits",) * intents


def n_intents(network: nn.Module) -> int:
    """How many intents a goal chooses from, 0 of a network that takes no goal."""
    return getattr(network, "n_intents", 0)


def network_outputs(network: nn.Module, stacks: torch.Tensor, goal=None) -> tuple[torch.Tensor, ...]:
    """What the graph gives for stacks (B, T * 3, S, S) and a goal (B, G), in the order of `output_names`. Bit k of a
    set's number is key k."""
    if n_intents(network):
        features = network.features(stacks)  # (B, F)
        return *network.heads(features, goal), network.intent_head(features)
    if getattr(network, "q_head", None) is None:
        return network(stacks)
    features = network.features(stacks)  # (B, F)
    keys_logits, mouse_pos, value = network.heads(features)
    B, K = keys_logits.shape
    sets = torch.tensor(list(itertools.product((0.0, 1.0), repeat=K))).flip(1)  # (2^K, K), the first key changes first
    q = network.q_head(features[:, None].expand(B, 2**K, -1), sets.expand(B, 2**K, K)).amin(0)
    return keys_logits, mouse_pos, value, q


def build_graphs(network: nn.Module, image_size: int, T: int, height: int, width: int) -> tuple[bytes, bytes]:
    """The ONNX graph with its outputs, and the same with the stacks as a further one, for comparison."""
    names = output_names(network)
    example = [torch.zeros((2, T, height, width, 3), dtype=torch.uint8)]  # a batch of 1 would be taken for a constant
    free = {"pixels": {0: "batch", 2: "height", 3: "width"}}
    if G := n_intents(network):
        example.append(torch.zeros(2, G))
        free["goal"] = {0: "batch"}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is missing
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "# The axis name: batch")  # pixels and goal share it, which is meant
        program = torch.onnx.export(
            RawReflexNet(network, image_size).eval(),
            tuple(example),
            input_names=list(free),
            output_names=[*names, "stacks"],
            dynamic_shapes=free,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    with_stacks = model.SerializeToString()
    del model.graph.output[len(names)]
    onnx.checker.check_model(model)
    return model.SerializeToString(), with_stacks


# parity ---------------------------------------------------------------------------------------------------------------
def golden_frames(kind: str, B: int, T: int, H: int, W: int, rng: np.random.Generator) -> np.ndarray:
    """Frames (B, T, H, W, 3) uint8: one colour each, or noise, or sky, ground and blocks that move between frames."""
    if kind == "noise":
        return rng.integers(0, 256, (B, T, H, W, 3), np.uint8)
    frames = np.empty((B, T, H, W, 3), np.uint8)
    frames[:] = rng.integers(0, 256, (B, T, 1, 1, 3), np.uint8)
    if kind == "scene":
        sky = np.linspace(rng.integers(60, 120, 3), rng.integers(160, 255, 3), H)  # (H, 3)
        frames[:] = sky[:, None]
        frames[:, :, H * 4 // 5 :, (np.arange(W) // 16) % 2 == 0] = (96, 64, 32)
        for block in range(8):
            y, x, side = rng.integers(H * 3 // 4 + 1), rng.integers(W), max(2, H // 12)
            for t in range(T):
                frames[:, t, y : y + side, x + 3 * t : x + 3 * t + side] = 30 * block
    return frames


@torch.no_grad()
def check_parity(network: nn.Module, graph: bytes, with_stacks: bytes, sizes: list, S: int, T: int, seed: int) -> dict:
    """Compare the graph in onnxruntime with torch at frame `sizes` [(H, W)] and batches of 1 and 2. Returns the largest
    differences found. Raises ValueError naming the frames and the output that differ too much."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = [ort.InferenceSession(file, options, ["CPUExecutionProvider"]) for file in (graph, with_stacks)]
    rng = np.random.default_rng(seed)
    cases = [(kind, H, W) for H, W in sizes for kind in SCENES]
    largest = {"outputs": 0.0, "key_probability": 0.0, "frame_levels": 0}
    values_off = {f"{W}x{H}": 0.0 for H, W in sizes}
    for number, (kind, H, W) in enumerate(tqdm(cases, desc="parity", leave=False)):
        B = 1 + number % 2
        frames = golden_frames(kind, B, T, H, W, rng)
        where = f"on {kind} frames of {W}x{H}, batch {B}"
        inputs, goal = {"pixels": frames}, None
        if G := n_intents(network):  # one-hot, of a batch of two the first without
            inputs["goal"] = np.eye(G, dtype=np.float32)[rng.integers(G, size=B)] * (np.arange(B) == B - 1)[:, None]
            goal = torch.from_numpy(inputs["goal"])
        outputs, stacks = sessions[0].run(None, inputs), sessions[1].run(["stacks"], inputs)[0]

        # the stacks that training would have made of these frames
        flat = torch.from_numpy(frames).flatten(0, 1).permute(0, 3, 1, 2)  # (B * T, 3, H, W)
        expected = resize(flat, S, S).reshape(B, T * 3, S, S)
        levels = np.abs(stacks.astype(int) - expected.numpy())
        limit, off = 1 if min(H, W) >= S else 2, float((levels > 0).mean())
        if levels.max() > limit or (kind == "noise" and off > VALUES_OFF):
            raise ValueError(
                f"{where} the graph's resize differs by {levels.max()} levels on {off:.1%} of the values, expected "
                f"{limit} at most, on noise {VALUES_OFF:.0%}"
            )
        largest["frame_levels"] = max(largest["frame_levels"], int(levels.max()))
        values_off[f"{W}x{H}"] = max(values_off[f"{W}x{H}"], off)

        # the network on the graph's stacks, then from end to end
        for name, output, true in zip(
            output_names(network), outputs, network_outputs(network, torch.from_numpy(stacks), goal), strict=True
        ):
            scale = true.abs().clamp(min=1).numpy()
            off = float((np.abs(output - true.numpy()) / scale).max())
            if not off <= TOLERANCE:  # also where it is NaN
                raise ValueError(f"{where} {name} of the graph is off by {off:.2g}, expected {TOLERANCE:g} at most")
            largest["outputs"] = max(largest["outputs"], off)
        off = (
            (torch.from_numpy(outputs[0]).sigmoid() - network_outputs(network, expected, goal)[0].sigmoid()).abs().max()
        )
        largest["key_probability"] = max(largest["key_probability"], off.item())
    return largest | {"frame_values_off": values_off, "batches": [1, 2], "kinds": list(SCENES)}


# checkpoint and script ------------------------------------------------------------------------------------------------
def find_files(args: Args) -> tuple[Path | None, Path]:
    """The checkpoint (None with --random) and the script that defines its network."""
    if (args.checkpoint is None) != args.random:
        raise ValueError("name either a run, --checkpoint runs/<run>, or --random")
    if args.random:
        return None, args.script or Path(__file__).with_name("iql_reflex.py")
    checkpoint = args.checkpoint / "best.pt" if args.checkpoint.is_dir() else args.checkpoint
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} is missing. Name a run folder that holds a best.pt: runs/<run>")
    copies = [args.script] if args.script else sorted(checkpoint.parent.glob("*.py"))
    if len(copies) != 1:
        found = ", ".join(copy.name for copy in copies) or "none"
        raise ValueError(
            f"{checkpoint.parent} holds {len(copies)} scripts ({found}), expected the one that trained the checkpoint. "
            "Name it: --script iql_reflex.py"
        )
    return checkpoint, copies[0]


def load_script(path: Path) -> ModuleType:
    """Run a script as a module, by path; `common` comes from this checkout."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Name the script that defines ReflexNet: --script iql_reflex.py")
    sys.dont_write_bytecode = True  # a run folder gets no __pycache__
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a changed script does
        raise ValueError(f"{path} does not run: {type(error).__name__}: {error}") from error
    for name in ("ReflexNet", "CONTEXT"):
        if not hasattr(module, name):
            raise ValueError(f"{path} defines no {name}, so it is no script of a reflex policy, as iql_reflex.py is")
    return module


def load_policy(module: ModuleType, script: Path, path: Path | None, args: Args) -> tuple[nn.Module, dict]:
    """The network in evaluation mode and the checkpoint's entries; of --random ones those a checkpoint would have."""
    if path is None:
        unknown = [key for key in args.keys if key not in KEY_CODES]
        if unknown or not args.keys:
            raise ValueError(f"--keys {' '.join(unknown) or 'is empty'}: expected names such as KEY_RIGHT")
        defaults = module.Args()
        runs.seed_everything(args.seed)
        checkpoint = {
            "network": {"n_keys": len(args.keys), "backbone": defaults.backbone},
            "keys": list(args.keys),
            "thresholds": [0.5] * len(args.keys),
            "image_size": defaults.image_size,
            "action_horizon": defaults.action_horizon,
            "fps": 10.0,
        }
        checkpoint["model"] = module.ReflexNet(**checkpoint["network"]).state_dict()
    else:
        try:
            checkpoint = runs.load_checkpoint(path)
        except ValueError as error:
            reason = str(error).removeprefix(f"{path} is not a checkpoint ").split(". ")[0]
            raise ValueError(f"{path} is damaged or no checkpoint {reason}. Export another run's") from None
    needed = ("network", "model", "keys", "thresholds", "image_size", "action_horizon", "fps")
    missing = [name for name in needed if not isinstance(checkpoint, dict) or name not in checkpoint]
    if missing:
        raise ValueError(f"{path} is no checkpoint of a reflex policy: it lacks {', '.join(missing)}")
    try:
        network = module.ReflexNet(**checkpoint["network"])
        network.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} does not fit ReflexNet of {script}: {reason}. Export with the script that trained it: --script"
        ) from None
    network.eval()
    return network, checkpoint


# manifest -------------------------------------------------------------------------------------------------------------
def build_manifest(network, module, checkpoint: dict, args: Args, path: Path | None, script: Path) -> dict:
    """Everything that a player of the model has to know; docs/export_reflex.md explains the entries."""
    keys, S, T = checkpoint["keys"], checkpoint["image_size"], module.CONTEXT
    fps, h = float(checkpoint["fps"]), checkpoint["action_horizon"]
    q_entry = {"shape": ["batch", 2 ** len(keys)], "description": "Q of each set of keys; bit k of its number is key k"}
    told, heard = {}, {}
    if G := n_intents(network):
        goal = {"shape": ["batch", G], "dtype": "float32", "intents": checkpoint["intents"]}
        told = {"goal": goal | {"description": "one-hot, or zeros for none"}}
        heard = {"intent_logits": {"shape": ["batch", G], "intents": checkpoint["intents"]}}
    mean, std = (getattr(network, name, None) for name in ("mean", "std"))  # (1, T * 3, 1, 1), of 0..255
    return {
        "model": {"file": args.output.name, "opset": OPSET},
        "inputs": {
            "pixels": {
                "shape": ["batch", T, "height", "width", 3],
                "dtype": "uint8",
                "order": "RGB",
                "stack_order": [f"t-{T - 1 - t}" if t < T - 1 else "t" for t in range(T)],
                "scale": "0..255",
                "height": args.height,
                "width": args.width,
            }
        }
        | told,
        "outputs": {
            "keys_logits": {"shape": ["batch", len(keys)], "keys": keys},
            "mouse_pos": {"shape": ["batch", 2], "range": "0..1 of the picture's width (x) and height (y)"},
            "value": {"shape": ["batch"], "description": "expected return from here; not needed to choose keys"},
        }
        | ({} if getattr(network, "q_head", None) is None else {"q": q_entry})
        | heard,
        "fps": fps,
        "horizon": {"frames": h, "ms": 1000 * h / fps},
        "thresholds": checkpoint["thresholds"],
        "allowed_keys": [key for key in keys if key not in MARKER_KEYS],
        "image_size": S,
        "resize": "inside the graph: the whole frame to image_size x image_size, bilinear with antialias, first the "
        "width, then the height, each rounded half up to uint8",
        "normalisation": {
            "where": "inside the graph, (pixels / 255 - mean) / std",
            "mean": None if mean is None else (mean.flatten()[:3] / 255).tolist(),
            "std": None if std is None else (std.flatten()[:3] / 255).tolist(),
        },
        "checkpoint": None
        if path is None
        else {"file": path.name, "run": path.resolve().parent.name, "sha256": sha256(path.read_bytes())}
        | {"update": checkpoint.get("update")},
        "script": {"file": script.name, "sha256": sha256(script.read_bytes())},
        "notes": [
            "pixels are frames as captured, of any size, all frames of a batch alike; the oldest comes first",
            "frames are 1 / fps seconds apart; before the first frame of an episode the first one is repeated",
            "a key is wanted where sigmoid(keys_logits) is above its threshold",
            "only allowed_keys may be sent to a game",
        ]
        + (["random weights: for testing what plays the model"] if path is None else []),
    }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# main -----------------------------------------------------------------------------------------------------------------
def main(args: Args) -> dict:
    """Export, compare, write. Returns the manifest. A graph that differs from torch leaves no file."""
    manifest_path = args.output.with_name(f"{args.output.stem}_manifest.json")
    try:
        if min(args.height, args.width) < 2:
            raise ValueError(f"--height {args.height} --width {args.width}: expected at least 2 pixels")
        if args.output.suffix != ".onnx":
            raise ValueError(f"--output {args.output}: expected a name that ends in .onnx")
        there = [path for path in (args.output, manifest_path) if path.exists()]
        if there and not args.overwrite:
            raise ValueError(f"{there[0]} is there already. Replace it with --overwrite, or choose another --output.")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        path, script = find_files(args)
        module = load_script(script)
        network, checkpoint = load_policy(module, script, path, args)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    S, T = checkpoint["image_size"], module.CONTEXT
    manifest = build_manifest(network, module, checkpoint, args, path, script)

    # export
    print(f"{path or 'random weights'}: ReflexNet of {script}, keys {', '.join(checkpoint['keys'])}, {S} pixels")
    try:
        graph, with_stacks = build_graphs(network, S, T, args.height, args.width)
    except (torch.onnx.OnnxExporterError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:600]
        raise SystemExit(f"ReflexNet of {script} cannot be exported: {type(error).__name__}: {reason}") from error

    # compare
    sizes = [(args.height, args.width), (S, S), (args.height + 1, args.width - 1), (S + 37, S + 12), (S * 5 // 7, S)]
    try:
        parity = check_parity(network, graph, with_stacks, sizes, S, T, args.seed)
    except ValueError as error:
        raise SystemExit(f"{args.output} was not written: {error}") from None
    manifest["parity"] = parity
    manifest["model"]["sha256"] = sha256(graph)

    # write
    temporary = args.output.with_name(f".{args.output.name}.tmp")
    try:
        temporary.write_bytes(graph)
        os.replace(temporary, args.output)
    finally:
        temporary.unlink(missing_ok=True)
    runs.write_json(manifest_path, manifest)
    off = list(parity["frame_values_off"].values())
    print(
        f"parity with torch on {len(sizes) * len(SCENES)} batches: outputs within {parity['outputs']:.1e} on the same "
        f"stacks; from raw frame to key, probabilities within {parity['key_probability']:.1e}, resized frames within "
        f"{parity['frame_levels']} level of 255 ({off[0]:.4%} of the values at {args.width}x{args.height}, "
        f"{max(off):.2%} at most)"
    )
    print(f"files  {args.output} ({len(graph) / 2**20:.1f} MiB), {manifest_path}")
    return manifest


if __name__ == "__main__":
    main(tyro.cli(Args))
