"""Train, export, play over recordings: the keys are those that training's own network and pixels would press."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import tyro

import export_reflex
import iql_reflex
import play_reflex
from common.runs import load_checkpoint, save_checkpoint
from common.sessions import INTENT_NAMES
from tests.synthetic import write_session

ROOT = Path(iql_reflex.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    for number, outcome in enumerate(["DEATH", "WIN", "INCOMPLETE"]):
        write_session(folder / f"run_{number}", 160, seed=number, outcome=outcome)
    write_session(folder / "heldout_0", 160, seed=9)
    return folder


@pytest.fixture(scope="module")
def run_dir(data, tmp_path_factory) -> Path:
    args = iql_reflex.Args(
        data_dir=str(data), run_root=str(tmp_path_factory.mktemp("runs")), max_updates=60, backbone="cnn",
        image_size=32, batch_size=16, lr=1e-3, bootstrap=20, video_seconds=0.0, workers=1,
    )  # fmt: skip
    return Path(iql_reflex.main(args)["run_dir"])


@pytest.fixture(scope="module")
def model(run_dir, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("model") / "reflex.onnx"
    export_reflex.main(export_reflex.Args(checkpoint=run_dir, output=output))
    return output


def keys_of_torch(run_dir: Path, session: Path) -> np.ndarray:
    """The keys held (N, K) when the script's own `predict` reads the recording as in training, and the rule for playing
    (on the second frame in a row that wants a change; no more than four keys are in play) is written out again."""
    checkpoint = load_checkpoint(run_dir / "best.pt")
    network = iql_reflex.ReflexNet(**checkpoint["network"])
    network.load_state_dict(checkpoint["model"])
    recording = iql_reflex.load_recording(session, checkpoint["keys"], checkpoint["action_horizon"])
    args = iql_reflex.Args(image_size=checkpoint["image_size"], precision="fp32")
    N = len(recording.usable)
    probability = iql_reflex.predict(network, recording, 0, N, args, torch.device("cpu"))[0]  # (N, K)
    wanted, held = probability > np.array(checkpoint["thresholds"]), np.zeros(probability.shape, bool)
    last_change = np.full(held.shape[1], -1)
    for i in range(1, N):
        held[i] = held[i - 1]
        for k in range(held.shape[1]):
            if last_change[k] < i - 1 and wanted[i, k] == wanted[i - 1, k] != held[i, k]:
                held[i, k], last_change[k] = wanted[i, k], i
    return held


def test_the_exported_policy_presses_the_keys_of_the_trained_one(data, run_dir, model):
    frames = changes = equal = 0
    for session in sorted(data.iterdir()):
        play_reflex.main(play_reflex.Eval(model=model, session=session, video=session.name == "heldout_0"))
        table = pq.read_table(model.parent / f"reflex_eval_{session.name}" / "preds.parquet")
        keys = load_checkpoint(run_dir / "best.pt")["keys"]
        played = np.array([[key in row for key in keys] for row in table["active"].to_pylist()])
        expected = keys_of_torch(run_dir, session)
        frames += len(played)
        changes += (played[1:] != played[:-1]).any(1).sum()
        equal += (played == expected).all(1).sum()
    assert frames == 640
    assert changes >= 0.05 * frames
    assert equal >= 0.999 * frames
    metrics = json.loads((model.parent / "reflex_eval_heldout_0/metrics.json").read_text())["metrics"]
    assert metrics["eval/key_f1"] > 0.8 > metrics["eval/key_f1_random"]


def test_the_manifest_says_what_the_checkpoint_holds(run_dir, model):
    assert sorted(path.name for path in model.parent.iterdir() if path.is_file()) == [
        "reflex.onnx",
        "reflex_manifest.json",
    ]
    manifest, checkpoint = json.loads(model.with_name("reflex_manifest.json").read_text()), run_dir / "best.pt"
    entries = load_checkpoint(checkpoint)
    assert manifest["inputs"]["pixels"] == {
        "shape": ["batch", 3, "height", "width", 3],
        "dtype": "uint8",
        "order": "RGB",
        "stack_order": ["t-2", "t-1", "t"],
        "scale": "0..255",
        "height": 360,
        "width": 640,
    }
    assert manifest["outputs"]["keys_logits"] == {"shape": ["batch", 2], "keys": ["KEY_RIGHT", "KEY_SPACE"]}
    assert manifest["outputs"]["mouse_pos"]["shape"] == ["batch", 2]
    assert manifest["outputs"]["value"]["shape"] == ["batch"]
    assert list(manifest["inputs"]) == ["pixels"] and list(manifest["outputs"]) == ["keys_logits", "mouse_pos", "value"]
    assert (manifest["fps"], manifest["horizon"]) == (10.0, {"frames": 2, "ms": 200.0})
    assert manifest["thresholds"] == entries["thresholds"] and manifest["image_size"] == 32
    assert manifest["allowed_keys"] == entries["keys"] == ["KEY_RIGHT", "KEY_SPACE"]
    assert manifest["normalisation"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert manifest["normalisation"]["std"] == pytest.approx([0.229, 0.224, 0.225])
    assert manifest["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert manifest["checkpoint"]["run"] == run_dir.name
    assert manifest["model"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert manifest["script"]["sha256"] == hashlib.sha256((run_dir / "iql_reflex.py").read_bytes()).hexdigest()
    assert 0 < manifest["parity"]["outputs"] < 1e-3 and manifest["parity"]["frame_levels"] <= 1
    assert not any(tensor.external_data for tensor in onnx.load(model).graph.initializer)


def test_a_q_head_is_exported_and_chooses_among_draws(run_dir, tmp_path):
    checkpoint = load_checkpoint(run_dir / "best.pt")
    torch.manual_seed(0)
    sizes = checkpoint["network"] | {"q_head": True}
    network = iql_reflex.ReflexNet(**sizes).eval()
    save_checkpoint(tmp_path / "best.pt", checkpoint | {"network": sizes, "model": network.state_dict()})
    args = export_reflex.Args(
        checkpoint=tmp_path / "best.pt", script=run_dir / "iql_reflex.py", output=tmp_path / "q.onnx"
    )
    manifest = export_reflex.main(args)
    K, S = len(checkpoint["keys"]), checkpoint["image_size"]
    assert manifest["outputs"]["q"]["shape"] == ["batch", 2**K]

    args = play_reflex.ClosedLoop(model=tmp_path / "q.onnx", decode="q")
    player, rng, chosen = play_reflex.PolicyPlayer(args, seed=5), np.random.default_rng(5), set()
    for level in range(0, 250, 10):
        player.policy.reset()
        ((_, keys),) = player.step(np.full((S, S, 3), level, np.uint8), None, 0.0)
        with torch.no_grad():
            features = network.features(torch.full((1, 9, S, S), level, dtype=torch.uint8))
            p = network.heads(features)[0].sigmoid()[0].numpy()
            sets = (rng.random((play_reflex.Q_DRAWS, K)) < p).astype(np.float32)
            q = network.q_head(features.expand(len(sets), -1), torch.from_numpy(sets)).amin(0)
        best = sets[int(q.argmax())] > 0
        assert keys == set(np.array(checkpoint["keys"])[best])
        chosen.add(tuple(best))
    assert len(chosen) > 1


def test_a_policy_with_intents_is_exported_with_its_goal(run_dir, tmp_path):
    checkpoint = load_checkpoint(run_dir / "best.pt")
    torch.manual_seed(0)
    sizes = checkpoint["network"] | {"n_intents": 7}
    network = iql_reflex.ReflexNet(**sizes).eval()
    entries = checkpoint | {"network": sizes, "model": network.state_dict(), "intents": list(INTENT_NAMES)}
    save_checkpoint(tmp_path / "best.pt", entries)
    output = tmp_path / "goals.onnx"
    manifest = export_reflex.main(
        export_reflex.Args(checkpoint=tmp_path / "best.pt", script=run_dir / "iql_reflex.py", output=output)
    )
    assert manifest["inputs"]["goal"]["shape"] == manifest["outputs"]["intent_logits"]["shape"] == ["batch", 7]
    assert manifest["inputs"]["goal"]["intents"] == manifest["outputs"]["intent_logits"]["intents"]
    assert manifest["inputs"]["goal"]["intents"] == list(INTENT_NAMES)

    session, S = ort.InferenceSession(output), checkpoint["image_size"]
    frames = np.random.default_rng(0).integers(0, 256, (3, 3, S, S, 3), np.uint8)
    goal = np.eye(7, dtype=np.float32)[[4, 4, 0]] * [[0], [1], [1]]
    names = [given.name for given in session.get_outputs()]
    assert names == ["keys_logits", "mouse_pos", "value", "intent_logits"]
    outputs = session.run(None, {"pixels": frames, "goal": goal.astype(np.float32)})
    stacks = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).flatten(1, 2)
    with torch.no_grad():
        features = network.features(stacks)
        expected = *network.heads(features, torch.from_numpy(goal).float()), network.intent_head(features)
    for mine, true in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(mine, true.numpy(), atol=1e-4)

    player = play_reflex.PolicyPlayer(play_reflex.ClosedLoop(model=output, goal_intent="LEAP"))
    probability, _ = player.policy(frames[1, 0])
    with torch.no_grad():
        stack = torch.from_numpy(frames[1, 0]).permute(2, 0, 1).repeat(3, 1, 1)[None]
        told = F.one_hot(torch.tensor([4]), 7).float()
        expected = network.heads(network.features(stack), told)[0].sigmoid()[0]
    np.testing.assert_allclose(probability, expected, atol=1e-4)


def test_a_changed_copy_is_exported_with_its_own_network(run_dir, tmp_path):
    """In the copy two frames make a stack."""
    copy = shutil.copytree(run_dir, tmp_path / "run")
    script = (copy / "iql_reflex.py").read_text()
    assert "CONTEXT = 3" in script
    (copy / "iql_reflex.py").write_text(script.replace("CONTEXT = 3", "CONTEXT = 2"))
    model = tmp_path / "two.onnx"
    with pytest.raises(SystemExit, match="best.pt does not fit ReflexNet of .*size mismatch"):
        export_reflex.main(export_reflex.Args(checkpoint=copy, output=model))
    assert not list(tmp_path.glob("two*")) and not list(tmp_path.glob(".*"))

    module = export_reflex.load_script(copy / "iql_reflex.py")
    entries = load_checkpoint(copy / "best.pt")
    entries["model"] = module.ReflexNet(**entries["network"]).state_dict()
    save_checkpoint(copy / "best.pt", entries)
    manifest = export_reflex.main(export_reflex.Args(checkpoint=copy / "best.pt", output=model))
    assert manifest["inputs"]["pixels"]["stack_order"] == ["t-1", "t"]
    outputs = ort.InferenceSession(model).run(None, {"pixels": np.zeros((1, 2, 50, 70, 3), np.uint8)})
    assert [output.shape for output in outputs] == [(1, 2), (1, 2), (1,)]
    assert not (copy / "__pycache__").exists()


def test_a_graph_that_differs_leaves_what_was_there(run_dir, model, tmp_path, monkeypatch):
    output = Path(shutil.copy(model, tmp_path / "reflex.onnx"))
    shutil.copy(model.with_name("reflex_manifest.json"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    resize = export_reflex.resize
    monkeypatch.setattr(export_reflex, "resize", lambda frames, H, W: resize(frames, H, W) // 2)
    with pytest.raises(SystemExit, match="was not written: on .* frames of .* the graph's resize differs by"):
        export_reflex.main(export_reflex.Args(checkpoint=run_dir, output=output, overwrite=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_random_weights_play_over_a_session_without_labels(tmp_path):
    session = write_session(tmp_path / "plain", 12, labels=False)
    text = (ROOT / "iql_reflex.py").read_text()
    text, changed = re.subn(r'(backbone: .*) = "resnet18"', r'\1 = "cnn"', text)
    text, changed_too = re.subn(r"image_size: int = \d+", "image_size: int = 32", text)
    assert changed == changed_too == 1
    script, model = tmp_path / "small.py", tmp_path / "r.onnx"
    script.write_text(text)
    keys = ("KEY_RIGHT", "KEY_X")
    manifest = export_reflex.main(export_reflex.Args(random=True, script=script, keys=keys, output=model, width=64))
    assert manifest["image_size"] == 32 and manifest["checkpoint"] is None
    assert manifest["script"]["file"] == "small.py" and any("random" in note for note in manifest["notes"])

    # as a person would type it
    words = ["play_reflex.py", "eval", "--model", str(model), "--session", str(session)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0 and "ms a decision" in done.stdout, done.stderr
    table = pq.read_table(tmp_path / "r_eval_plain/preds.parquet")
    assert len(table) == 12 and {"probability_KEY_RIGHT", "probability_KEY_X"} <= set(table.column_names)
    with pytest.raises(SystemExit) as stopped:
        tyro.extras.subcommand_cli_from_dict(play_reflex.COMMANDS, args=["eval", "--model", str(model)])
    assert stopped.value.code == 2
