import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import agent_finetune as a
from tests.packed import play, write_packed

ROOT = Path(__file__).resolve().parents[2]
TINY = a.Preset(
    **{"patch": 16, "tokenizer_dim": 32, "n_latents": 4, "latent_dim": 8, "dim": 32, "layers": 2, "heads": 2},
    **{
        "pack": 2,
        "lr": 1e-3,
        "kv_heads": 1,
        "registers": 1,
        "k_max": 4,
        "context": 6,
        "lengths": (4, 10),
        "batch_sizes": (4, 4, 4, 8),
    },
    steps=(30, 30, 30, 20),
)
QUICK = {"warmup_steps": 3, "log_every": 1, "save_every": 7, "device": "cpu", "horizon": 4, "gates": False}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(a.PRESETS, "cpu", TINY)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return write_packed(tmp_path_factory.mktemp("data") / "packed", episodes=2, length=60)


@pytest.fixture(scope="module")
def run(packed, tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(a.PRESETS, "cpu", TINY)
        return a.main(a.Args(data_dir=str(packed), run_root=str(tmp_path_factory.mktemp("runs")), **QUICK))


def curve(run_dir: str | Path, name: str) -> list[float]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in sorted(events.Scalars(name), key=lambda event: event.step)]


def test_four_phases_leave_an_agent(run, packed):
    run_dir = Path(run["run_dir"])
    for name in ("recon", "flow", "policy", "reward"):
        losses = curve(run_dir, f"train/{name}_loss")
        assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5]), name
    evaluation = json.loads((run_dir / "eval.json").read_text())
    assert evaluation["heldout"] == ["heldout_0001"] and len(evaluation["open_loop"]["psnr_ceiling"]) == len(a.HORIZONS)
    files = "open_loop.png", "open_loop.mp4", "dreams.mp4", "agent_finetune.py", "args.json", "provenance.json"
    for name in (*files, "split.json"):
        assert (run_dir / name).stat().st_size > 0
    agent, tuned = (torch.load(run_dir / f"{name}.pt", weights_only=True)["models"] for name in ("agent", "imagine"))
    moved = {name for name in agent["heads"] if not torch.equal(agent["heads"][name], tuned["heads"][name])}
    assert {name.split(".")[0] for name in moved} == {"policy", "value"}
    assert all(torch.equal(agent["heads"][f"policy.{name}"], x) for name, x in tuned["prior"].items())
    assert all(torch.equal(agent["dynamics"][name], x) for name, x in tuned["dynamics"].items())
    weights = load_file(run_dir / "model.safetensors")
    sizes = json.loads((run_dir / "config.json").read_text())["sizes"]
    dynamics = a.Dynamics(**sizes["dynamics"])
    dynamics.load_state_dict({k.removeprefix("dynamics."): v for k, v in weights.items() if k.startswith("dynamics.")})


def test_an_agent_is_evaluated_again_alike(run, packed, tmp_path):
    tuned = f"{run['run_dir']}/imagine.pt"
    again = a.main(
        a.Args(data_dir=str(packed), run_root=str(tmp_path), phase="eval", imagine_checkpoint=tuned, **QUICK)
    )
    for name, metric in run.items():
        if name.startswith("eval/"):
            assert again[name] == pytest.approx(metric, nan_ok=True), name
    assert not (Path(again["run_dir"]) / "last.pt").exists()


def test_a_phase_from_checkpoints_equals_the_same_phase_after_the_others(run, packed, tmp_path):
    for name in ("tokenizer", "dynamics"):
        shutil.copy(f"{run['run_dir']}/{name}.pt", tmp_path)
    settings = {"tokenizer_checkpoint": str(tmp_path / "tokenizer.pt"), "phase": "agent"}
    settings |= {"dynamics_checkpoint": str(tmp_path / "dynamics.pt"), "run_root": str(tmp_path / "runs")}
    alone = a.main(a.Args(data_dir=str(packed), **settings, **QUICK))
    assert curve(alone["run_dir"], "train/policy_loss") == curve(run["run_dir"], "train/policy_loss")
    for name in ("tokenizer", "dynamics"):
        (tmp_path / f"{name}.pt").unlink()
    again = a.main(a.Args(resume=alone["run_dir"]))  # all that it needs is in its own folder
    assert again == pytest.approx(alone, nan_ok=True)


def test_updates_that_are_not_finite_are_left_out_and_end_the_run(packed, tmp_path, monkeypatch):
    terms, updates = a.tokenizer_terms, []

    def broken_from_the_third_on(*args):
        updates.append(1)
        return {"recon": terms(*args)["recon"] * (math.nan if len(updates) > 2 else 1.0)}

    monkeypatch.setattr(a, "tokenizer_terms", broken_from_the_third_on)
    with pytest.raises(SystemExit, match="20 updates in a row, to number 22 of the tokenizer.*Lower --lr.*--resume"):
        a.main(a.Args(data_dir=str(packed), run_root=str(tmp_path), **QUICK))
    (run_dir,) = tmp_path.iterdir()
    state = torch.load(run_dir / "last.pt", weights_only=True)
    assert state["step"] == 21 and all(torch.isfinite(x).all() for x in state["models"]["tokenizer"].values())


@pytest.mark.parametrize("trunk", ["freeze", "finetune"])
def test_a_frozen_trunk_stays_and_the_heads_learn(run, packed, tmp_path, trunk):
    start = torch.load(f"{run['run_dir']}/dynamics.pt", weights_only=True)["models"]["dynamics"]
    settings = {"dynamics_checkpoint": f"{run['run_dir']}/dynamics.pt", "phase": "agent", "agent_steps": 20}
    done = a.main(a.Args(data_dir=str(packed), run_root=str(tmp_path), trunk=trunk, **settings, **QUICK))
    end = torch.load(f"{done['run_dir']}/agent.pt", weights_only=True)["models"]
    same = [torch.equal(start[name], end["dynamics"][name]) for name in start if name not in ("agent", "task.weight")]
    assert all(same) if trunk == "freeze" else not any(same[1:])
    assert not torch.equal(start["agent"], end["dynamics"]["agent"]) and end["heads"]["policy.out.weight"].any()


CHILD = """
import os, signal, sys
sys.path.insert(0, {root!r})
import agent_finetune as a
from tests.smoke.test_agent_finetune import QUICK, TINY
a.PRESETS["cpu"] = TINY
drawn, draw = [], a.WindowSampler.draw
def count(self, n):
    drawn.append(1)
    if len(drawn) == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(self, n)
a.WindowSampler.draw = count
a.main(a.Args(data_dir={data!r}, run_root={runs!r}, resume={resume!r}, **QUICK))
"""


@pytest.mark.parametrize("kill_at", [12, 41, 85, 103])  # in the tokenizer, the dynamics, the agent, the imagination
def test_kill_9_and_resume_give_the_curve_of_a_run_that_was_not_killed(run, packed, tmp_path, kill_at):
    def child(kill_at: int, resume: str | None) -> int:
        code = CHILD.format(root=str(ROOT), data=str(packed), runs=str(tmp_path), kill_at=kill_at, resume=resume)
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TQDM_DISABLE": "1"}
        return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=False).returncode

    assert child(kill_at, None) == -9
    (run_dir,) = tmp_path.iterdir()
    assert child(-1, str(run_dir)) == 0
    for name in ("recon", "flow", "bootstrap", "policy", "reward", "actor", "value"):
        assert curve(run_dir, f"train/{name}_loss") == curve(run["run_dir"], f"train/{name}_loss")
    metrics = json.loads((run_dir / "eval.json").read_text())["metrics"]
    assert metrics == pytest.approx({name: metric for name, metric in run.items() if "/" in name}, nan_ok=True)


def test_dreams_that_do_not_follow_the_actions_stop_before_the_imagination(run, packed, tmp_path):
    settings = QUICK | {"phase": "imagine", "gates": True, "agent_checkpoint": f"{run['run_dir']}/agent.pt"}
    with pytest.raises(SystemExit, match="dreams do not .*--no-gates. The agent is in .*agent.pt"):
        a.main(a.Args(data_dir=str(packed), run_root=str(tmp_path), **settings))
    (run_dir,) = tmp_path.iterdir()
    assert not (run_dir / "last.pt").exists() and not (run_dir / "imagine.pt").exists()


def test_errors_name_the_file_and_the_mend(run, packed, tmp_path):
    def fails(words: str, **changes):
        settings = {"data_dir": str(packed), "run_root": str(tmp_path / "runs"), **QUICK} | changes
        with pytest.raises(SystemExit, match=words):
            a.main(a.Args(**settings))
        assert not (tmp_path / "runs").exists()

    fails("nothing/meta.json is missing.*pack_episodes.py", data_dir=str(tmp_path / "nothing"))
    fails("all its episodes .3. are held out by --heldout", heldout="*")
    fails("--mask-ratio 2.0: expected 0 to 1", mask_ratio=2.0)
    fails("--phase eval trains nothing.*--agent-checkpoint", phase="eval")
    fails("--sampling-steps 3: expected .* a power of two", sampling_steps=3)
    fails("--save-every 0: expected 1 or more", save_every=0)
    fails("--agent-checkpoint .* is for --phase imagine", phase="agent", agent_checkpoint=f"{run['run_dir']}/agent.pt")
    fails("--imagine-checkpoint .* is for --phase eval", imagine_checkpoint=f"{run['run_dir']}/imagine.pt")
    fails("no two windows of 204 frames in the held-out episodes.*--horizon", horizon=200)
    fails("--gamma 1.5: expected 0 to 1", gamma=1.5)
    fails("nobody plays after --phase dynamics", phase="dynamics", env_id="retro:Airstriker-Genesis-v0")
    odd = write_packed(tmp_path / "odd", episodes=1, length=40, action_index="sideways")
    fails("action_index sideways, expected arrival or departure", data_dir=str(odd))
    fails("dynamics.pt is no file.*--dynamics-checkpoint runs", dynamics_checkpoint=str(tmp_path / "dynamics.pt"))
    last, tuned = f"{run['run_dir']}/last.pt", f"{run['run_dir']}/imagine.pt"
    fails("stopped at update 20. Finish it: --resume", phase="eval", imagine_checkpoint=last)
    fails("imagine.pt has dreamed already.*--imagine-checkpoint", phase="imagine", agent_checkpoint=tuned)
    fails("--max-grad-norm -1: expected 0 or more", max_grad_norm=-1.0)
    fails("--reward-range 0 .*expected above 0", reward_range=0.0)
    fails("--play-task nobody: expected one of unknown", play_task="nobody")
    players = write_packed(tmp_path / "players", episodes=1, length=40)
    meta = json.loads((players / "meta.json").read_text())
    for facts in meta["episodes"].values():
        facts["player"] = "me"
    (players / "meta.json").write_text(json.dumps(meta))
    agent = {"phase": "eval", "agent_checkpoint": f"{run['run_dir']}/agent.pt"}
    fails(
        "has episodes of me, the checkpoint knows unknown. Name data of those players", data_dir=str(players), **agent
    )
    fails("has episodes of all, the checkpoint knows unknown. Leave out --tasks none", tasks="none", **agent)
    (players / "meta.json").write_text(json.dumps(meta | {"reward": {"score_scale": 0.1}}))
    fails("was trained on the rewards None, .*players has .*0.1", data_dir=str(players), **agent)
    state = torch.load(f"{run['run_dir']}/agent.pt", weights_only=True)
    torch.save(state | {"args": state["args"] | {"preset": "gpu-s"}}, tmp_path / "agent.pt")
    fails("is of the preset gpu-s. Add --preset gpu-s", **agent | {"agent_checkpoint": str(tmp_path / "agent.pt")})
    del state["sizes"]["dynamics"]["k_max"]
    torch.save(state, tmp_path / "agent.pt")
    fails("agent.pt is of another version", **agent | {"agent_checkpoint": str(tmp_path / "agent.pt")})
    fails("tokenizer.pt holds no dynamics", dynamics_checkpoint=f"{run['run_dir']}/tokenizer.pt")
    other = write_packed(tmp_path / "other", episodes=1, length=40, keys=["A"])
    dynamics = f"{run['run_dir']}/dynamics.pt"
    fails("was trained on the actions.*'B'.*has.*'A'", data_dir=str(other), dynamics_checkpoint=dynamics)
    other = write_packed(tmp_path / "small", episodes=1, length=40, frame_shape=[32, 32, 3])
    for path in other.glob("*.npz"):
        np.savez_compressed(path, **play(40, 0, size=32))
    fails(r"frames of \[32, 32, 3\], the tokenizer .* takes 64 x 64.*--frame-size 64", data_dir=str(other))
    state = torch.load(f"{run['run_dir']}/tokenizer.pt", weights_only=True)
    state["tokenizer_id"] = "another"
    torch.save(state, tmp_path / "tokenizer.pt")
    fails("another tokenizer", tokenizer_checkpoint=str(tmp_path / "tokenizer.pt"), dynamics_checkpoint=dynamics)


def test_latents_of_another_tokenizer_train_an_agent(tmp_path):
    folder = write_packed(tmp_path / "packed", episodes=2, length=40)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["frame_shape"]
    (folder / "meta.json").write_text(json.dumps(meta | {"z_shape": [6, 5]}))
    for path in folder.glob("*.npz"):
        part = dict(np.load(path))
        part["z"] = np.random.default_rng(0).standard_normal((len(part.pop("frames")), 6, 5)).astype(np.float16)
        np.savez_compressed(path, **part)
    done = a.main(
        a.Args(data_dir=str(folder), run_root=str(tmp_path / "runs"), dynamics_steps=4, agent_steps=4, **QUICK)
    )
    assert "eval/latent_mse" in done and "eval/psnr" not in done
    assert not (Path(done["run_dir"]) / "tokenizer.pt").exists()
