"""export_reflex.py: the graph's resize against that of training, what parity catches, and which inputs are refused."""

import textwrap

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import export_reflex as e
from common.runs import save_checkpoint
from common.video import resize

S, T = 24, 3
SIZES = [(48, 64), (61, 47), (S, S), (25, 24), (90, 33)]


class Tiny(nn.Module):
    """Heads that look at every pixel of the stack."""

    def __init__(self, n_keys: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * T * S * S, n_keys + 3)

    def forward(self, pixels):
        x = self.layer(pixels.flatten(1).float() / 255)
        return x[:, 3:], x[:, :2].sigmoid(), x[:, 2]


@pytest.fixture(scope="module")
def graphs() -> tuple[bytes, bytes]:
    return e.build_graphs(Tiny().eval(), S, T, 48, 64)


def test_the_graph_is_one_file_with_names_and_dynamic_sizes(graphs):
    model = onnx.load_from_string(graphs[0])
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    (pixels,) = model.graph.input
    shape = [dim.dim_param or dim.dim_value for dim in pixels.type.tensor_type.shape.dim]
    assert (pixels.name, pixels.type.tensor_type.elem_type) == ("pixels", onnx.TensorProto.UINT8)
    assert shape == ["batch", T, "height", "width", 3]
    assert [output.name for output in model.graph.output] == ["keys_logits", "mouse_pos", "value"]
    outputs = ort.InferenceSession(graphs[0]).run(None, {"pixels": np.zeros((5, T, 31, 29, 3), np.uint8)})
    assert [output.shape for output in outputs] == [(5, 2), (5, 2), (5,)]


@pytest.mark.parametrize("H, W", [*SIZES, (480, 640), (360, 641), (240, 160), (121, 77)])
@pytest.mark.parametrize("kind", e.SCENES)
def test_the_graph_resizes_as_training_does(graphs, H, W, kind):
    frames = e.golden_frames(kind, 2, T, H, W, np.random.default_rng(H + W))
    stacks = ort.InferenceSession(graphs[1]).run(["stacks"], {"pixels": frames})[0].astype(int)  # (B, T * 3, S, S)
    flat = torch.from_numpy(frames).flatten(0, 1).permute(0, 3, 1, 2)  # (B * T, 3, H, W)
    levels = np.abs(stacks.reshape(2 * T, 3, S, S) - resize(flat, S, S).numpy())
    assert levels.max() <= 1
    if kind != "scene":  # whose rows of one colour meet ties, which 16-bit weights and float32 break differently
        assert (levels > 0).mean() < 0.02
    if (H, W) == (S, S):
        assert (stacks.reshape(2, T, 3, S, S) == frames.transpose(0, 1, 4, 2, 3)).all()


def test_golden_frames_differ_as_their_names_say():
    frames = {kind: e.golden_frames(kind, 2, T, 40, 60, np.random.default_rng(0)) for kind in e.SCENES}
    assert all(x.shape == (2, T, 40, 60, 3) and x.dtype == np.uint8 for x in frames.values())
    assert frames["flat"].std((2, 3)).max() == 0 and frames["flat"].std() > 0
    assert frames["noise"].std((2, 3)).min() > 60
    assert frames["scene"].std((2, 3)).min() > 10 and (frames["scene"][:, 0] != frames["scene"][:, 2]).any()


def test_parity_finds_another_network_and_another_resize(graphs, monkeypatch):
    found = e.check_parity(Tiny().eval(), *graphs, SIZES, S, T, 0)
    assert found["outputs"] < 1e-4 and found["key_probability"] < 1e-2 and found["frame_levels"] <= 1
    assert list(found["frame_values_off"]) == ["64x48", "47x61", "24x24", "24x25", "33x90"]

    other = Tiny().eval()
    other.layer.weight.data[1, 7] += 1  # one weight, of the pointer's y
    with pytest.raises(ValueError, match="mouse_pos of the graph is off by"):
        e.check_parity(other, *graphs, SIZES, S, T, 0)
    other.layer.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="is off by nan"):
        e.check_parity(other, *graphs, SIZES, S, T, 0)

    def brighter(frames, H, W):
        return resize(frames, H, W).clamp(max=253) + 2

    monkeypatch.setattr(e, "resize", brighter)
    with pytest.raises(ValueError, match="resize differs by 2 levels"):
        e.check_parity(Tiny().eval(), *graphs, SIZES, S, T, 0)

    def rounded_once(frames, H, W):
        return F.interpolate(frames.float(), (H, W), mode="bilinear", antialias=True).round().to(torch.uint8)

    monkeypatch.setattr(e, "resize", rounded_once)
    with pytest.raises(ValueError, match="resize differs by 1 levels on 1.*% of the values"):
        e.check_parity(Tiny().eval(), *graphs, SIZES, S, T, 0)


# what is refused ------------------------------------------------------------------------------------------------------
SCRIPT = textwrap.dedent("""
    import torch.nn as nn

    CONTEXT = 3

    class ReflexNet(nn.Module):
        def __init__(self, n_keys):
            super().__init__()
            self.layer = nn.Linear(2, n_keys)
""")


def refused(words: str, **settings):
    with pytest.raises(SystemExit, match=words):
        e.main(e.Args(**settings))


def test_checkpoints_that_do_not_fit_are_named_and_nothing_is_written(tmp_path):
    run, output = tmp_path / "run", tmp_path / "out" / "reflex.onnx"
    run.mkdir()
    good = {"network": {"n_keys": 2}, "model": {"layer.weight": torch.zeros(2, 2), "layer.bias": torch.zeros(2)}}
    good |= {"keys": ["KEY_X", "KEY_Z"], "thresholds": [0.5, 0.5], "image_size": 8, "action_horizon": 2, "fps": 10.0}

    refused("best.pt is missing", checkpoint=run, output=output)
    refused("x.pt is missing", checkpoint=run / "x.pt", output=output)
    refused("name either a run", output=output)
    refused("name either a run", checkpoint=run, random=True, output=output)

    save_checkpoint(run / "best.pt", good)
    refused(r"holds 0 scripts \(none\)", checkpoint=run, output=output)
    (run / "script.py").write_text(SCRIPT)
    (run / "other.py").write_text("")
    refused(r"holds 2 scripts \(other.py, script.py\)", checkpoint=run, output=output)
    (run / "other.py").unlink()
    refused("nowhere.py is missing", checkpoint=run, script=run / "nowhere.py", output=output)

    (run / "script.py").write_text("x = 1 / 0")
    refused("script.py does not run: ZeroDivisionError", checkpoint=run, output=output)
    (run / "script.py").write_text("CONTEXT = 3")
    refused("script.py defines no ReflexNet", checkpoint=run, output=output)
    (run / "script.py").write_text(SCRIPT)

    save_checkpoint(run / "best.pt", good | {"model": {"layer.weight": torch.zeros(3, 2)}})
    refused("best.pt does not fit ReflexNet of .*script.py: .*layer.bias", checkpoint=run, output=output)
    save_checkpoint(run / "best.pt", good | {"network": {"depth": 3}})
    refused("best.pt does not fit ReflexNet", checkpoint=run, output=output)
    save_checkpoint(run / "best.pt", {name: good[name] for name in ("network", "model", "keys")})
    refused("it lacks thresholds, image_size, action_horizon, fps", checkpoint=run, output=output)
    save_checkpoint(run / "best.pt", good)
    (run / "best.pt").write_bytes((run / "best.pt").read_bytes()[:500])
    refused("best.pt is damaged or no checkpoint", checkpoint=run, output=output)

    save_checkpoint(run / "best.pt", good)
    refused("ReflexNet of .*script.py cannot be exported", checkpoint=run, output=output)  # it has no forward
    assert list(output.parent.iterdir()) == []
    assert sorted(path.name for path in run.iterdir()) == ["best.pt", "script.py"]


def test_flags_that_make_no_sense(tmp_path):
    refused("--height 1 --width 640", random=True, height=1, output=tmp_path / "a.onnx")
    refused("expected a name that ends in .onnx", random=True, output=tmp_path / "a.pt")
    refused("--keys RIGHT: expected names such as KEY_RIGHT", random=True, keys=("RIGHT",), output=tmp_path / "a.onnx")


@pytest.mark.parametrize("name", ["reflex.onnx", "reflex_manifest.json"])
def test_an_existing_output_stays(tmp_path, name):
    (tmp_path / name).write_text("mine")
    refused(f"{name} is there already. Replace it with --overwrite", random=True, output=tmp_path / "reflex.onnx")
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"
