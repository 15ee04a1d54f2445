import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import agent_finetune as a
from benchmarks.speed.agent import dream_without_cache
from tests.packed import write_packed

DYNAMICS = {"z_shape": (3, 4), "bounded": True, "n_movement": 5, "n_keys": 2, "n_tasks": 2, "dim": 16, "layers": 4}
DYNAMICS |= {"heads": 4, "kv_heads": 2, "registers": 2, "time_every": 2, "k_max": 8, "context": 4}


@pytest.fixture
def dynamics() -> a.Dynamics:
    torch.manual_seed(0)
    return a.Dynamics(**DYNAMICS)


def inputs(B: int = 2, T: int = 7, k_max: int = 8) -> dict:
    torch.manual_seed(1)
    actions = {
        "movement": torch.randint(0, 5, (B, T)),
        "keys": torch.randint(0, 2, (B, T, 2)).float(),
        "act_valid": torch.rand(B, T) < 0.8,
        "task": torch.zeros(B, dtype=torch.long),
    }
    signal = torch.randint(0, k_max, (B, T))
    return {"z": torch.randn(B, T, 3, 4), "signal": signal, "step": torch.zeros_like(signal), "actions": actions}


def random_heads(dim: int = 16, ahead: int = 8) -> a.Heads:
    return a.Heads(dim=dim, ahead=ahead, n_movement=5, n_keys=2, reward_limit=5.0, value_limit=9.0)


# two-hot --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("limit", "x", "low", "weights"),
    [
        (5, 0.0, 127, (1, 0)),
        (5, 0.14, 130, (0.676212, 0.323788)),
        (5, 4.0, 167, (0.122370, 0.877630)),
        (5, -10.0, 66, (0.904863, 0.095137)),
        (20, 0.14, 127, (0.179163, 0.820837)),
        (20, 4.0, 137, (0.793375, 0.206625)),
        (20, -10.0, 111, (0.213037, 0.786963)),
        (20, 1000.0, 170, (0.138449, 0.861551)),
    ],
)
def test_twohot_gives_the_weights_of_the_fact_sheet(limit, x, low, weights):
    encoded = a.twohot_encode(torch.tensor(x, dtype=torch.float64), a.symexp_bins(255, limit))
    assert encoded[low : low + 2].tolist() == pytest.approx(weights, abs=1e-6)
    assert encoded.sum() == pytest.approx(1) and (encoded > 0).sum() == sum(w > 0 for w in weights)


def test_bins_are_symmetric_and_what_lies_outside_is_clamped():
    bins = a.symexp_bins(255, 5.0)
    assert bins[127] == 0 and torch.equal(bins, -bins.flip(0)) and float(bins[-1]) == pytest.approx(147.413159)
    assert a.twohot_encode(torch.tensor(1000.0), bins).argmax() == 254
    x = torch.tensor([-147.0, -10, -0.3, 0, 1e-3, 4, 147.4131], dtype=torch.float64)
    assert a.twohot_decode(a.twohot_encode(x, bins).log(), bins).tolist() == pytest.approx(x.tolist(), abs=1e-9)
    for limit, reached in ((5.0, (66, 168, 103)), (20.0, (111, 138, 28))):
        hit = a.twohot_encode(torch.linspace(-10, 4, 5000, dtype=torch.float64), a.symexp_bins(255, limit)).sum(0) > 0
        where = hit.nonzero()[:, 0]
        assert (int(where[0]), int(where[-1]), int(hit.sum())) == reached


def test_a_mean_is_decoded_of_values_not_of_their_logarithms():
    bins = a.symexp_bins(255, 5.0)
    mix = 0.5 * a.twohot_encode(torch.tensor(0.0), bins) + 0.5 * a.twohot_encode(torch.tensor(4.0), bins)
    assert float(a.twohot_decode(mix.log(), bins)) == pytest.approx(2.0)
    for limit in (5.0, 20.0):
        assert float(a.twohot_decode(torch.zeros(255), a.symexp_bins(255, limit).float())) == 0.0


def test_twohot_loss_with_impossible_and_with_far_apart_logits():
    bins = a.symexp_bins(3, 1.0)
    logits = torch.tensor([0.0, -torch.inf, 1.0], requires_grad=True)
    weights = torch.tensor([0.3, 0.0, 0.7])
    dense = weights * F.log_softmax(logits.detach(), -1)
    assert float(-dense.nansum()) == pytest.approx(0.6133, abs=1e-4)
    assert torch.isnan(dense.sum())  # what gathering avoids
    loss = a.twohot_loss(logits, bins[2], bins)  # the bin below is the impossible one
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.3133, abs=1e-4) and torch.isfinite(logits.grad).all()
    far = a.twohot_loss(torch.tensor([0.0, 0.0, 1e4]), bins[0], bins)
    assert float(far) == pytest.approx(1e4)


def test_twohot_loss_is_the_cross_entropy_with_the_twohot():
    torch.manual_seed(0)
    bins, logits, x = a.symexp_bins(255, 5.0).float(), torch.randn(6, 255), torch.randn(6) * 5
    dense = -(a.twohot_encode(x, bins) * logits.log_softmax(-1)).sum(-1).mean()
    assert float(a.twohot_loss(logits, x, bins)) == pytest.approx(float(dense), abs=1e-5)


# which rows learn what ------------------------------------------------------------------------------------------------
def test_pairs_of_predictions_and_targets():
    everything = torch.ones(1, 32, dtype=torch.bool)
    for first, most in ((1, 31), (0, 32)):  # policy, reward
        row, counts = a.mtp_pairs(everything, everything, 8, first)
        assert counts.sum((0, 1)).tolist() == list(range(most, most - 8, -1))
        t, n = counts[0].nonzero().T
        assert torch.equal(row[t, n], t + n + first)
        _, counts = a.mtp_pairs(everything, torch.ones(1, 40, dtype=torch.bool), 8, first)
        assert counts.all()  # label rows beyond the window train every distance everywhere
    _, counts = a.mtp_pairs(everything[:, :4], everything[:, :4], 8, 1)
    assert counts.sum((0, 1)).tolist() == [3, 2, 1, 0, 0, 0, 0, 0]
    predict, target = everything.clone(), everything.clone()
    predict[0, 5], target[0, 9] = False, False  # padding; a row without a label
    _, counts = a.mtp_pairs(predict, target, 8, 1)
    assert not counts[0, 5].any() and not counts[0, 8, 0] and not counts[0, 6, 2] and counts[0, 8, 1]


def test_a_distance_without_a_pair_learns_nothing_and_the_others_are_summed():
    heads, h = random_heads(), torch.randn(1, 4, 16)
    batch = {
        "movement": torch.zeros(1, 4, dtype=torch.long),
        "keys": torch.zeros(1, 4, 2),
        "reward": torch.arange(4.0)[None],
        "cont": torch.ones(1, 4),
        "act_valid": torch.ones(1, 4, dtype=torch.bool),
        "rew_valid": torch.ones(1, 4, dtype=torch.bool),
    }
    rows = torch.ones(1, 4, dtype=torch.bool)
    a.agent_losses(heads, h, batch, rows, rows)["policy"].backward()
    gradient = heads.policy.out.weight.grad.reshape(8, 7, 256)
    assert (gradient[:3].abs().sum((1, 2)) > 0).all() and not gradient[3:].any()
    nll, counts = torch.rand(2, 5, 3), torch.zeros(2, 5, 3, dtype=torch.bool)
    counts[0, 1, 1] = counts[1, 2, 1] = True
    assert a.mtp_means(nll, counts).tolist() == [0, float((nll[0, 1, 1] + nll[1, 2, 1]) / 2), 0]


def test_zero_output_layers_begin_uniform_and_learn():
    torch.manual_seed(0)
    heads, h = random_heads(ahead=1), torch.randn(1, 6, 16, requires_grad=True)
    bins, target = heads.reward_bins, torch.tensor([[0.0, 1, 0, -1, 0, 4]])
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        h.grad = None
        loss = a.twohot_loss(heads.reward(h)[..., 0, :], target, bins)
        loss.backward()
        losses.append(
            (float(loss.detach()), float(h.grad.abs().sum()), float(heads.reward.out.weight.grad.abs().sum()))
        )
        optimizer.step()
    assert losses[0][0] == pytest.approx(math.log(255), abs=1e-4)
    assert losses[0][1] == 0 and losses[0][2] > 0 and losses[1][1] > 0 and losses[1][0] < losses[0][0]
    assert float(a.twohot_decode(torch.zeros(255), bins)) == 0.0


def test_an_action_is_a_movement_and_independent_keys():
    logits = torch.tensor([0.2, -0.1, 0.4, 1.0, -2.0])
    p = torch.tensor([0.2, -0.1, 0.4]).softmax(-1)[2] * torch.tensor(1.0).sigmoid() * (1 - torch.tensor(-2.0).sigmoid())
    assert float(a.action_nll(logits, torch.tensor(2), torch.tensor([1.0, 0.0]))) == pytest.approx(-math.log(p))


# normalisation, groups, precision -------------------------------------------------------------------------------------
def test_running_rms_is_debiased_and_survives_what_is_not_finite():
    rms = a.RunningRMS()
    assert [float(rms(torch.tensor(x))) for x in (2.0, 4.0, 4.0, 1.0)] == pytest.approx(
        [1, 1.263008, 1.152775, 0.329005], abs=2e-6
    )
    before = copy.deepcopy(rms.state_dict())
    rms(torch.tensor(torch.nan))
    assert rms.state_dict() == before
    rms.eval()(torch.tensor(100.0))
    assert rms.state_dict() == before


def test_running_rms_goes_on_where_it_stood_and_cancels_a_constant_factor():
    torch.manual_seed(0)
    losses, one, eight = torch.rand(60), a.RunningRMS(), a.RunningRMS()
    for i, loss in enumerate(losses):
        if i == 50:
            again = a.RunningRMS()
            again.load_state_dict(one.state_dict())
        x = one(loss)
        assert float(eight(8 * loss)) == pytest.approx(float(x), rel=1e-5)
    for loss in losses[50:]:
        y = again(loss)
    assert x == y


@pytest.mark.parametrize(
    ("device", "bf16", "expected"),
    [
        ("cpu", True, (None, False)),
        ("mps", True, (None, False)),
        ("cuda", True, (torch.bfloat16, False)),
        ("cuda:1", True, (torch.bfloat16, False)),
        ("cuda", False, (torch.float16, True)),
    ],
)
def test_amp_config(device, bf16, expected):
    assert a.amp_config(device, bf16) == expected


def test_parameter_groups_hold_every_parameter_once(dynamics):
    heads = random_heads()
    new, modules = [*heads.parameters(), *dynamics.agent_parameters()], [dynamics, heads]
    groups = a.parameter_groups(new, modules, 1e-3, 0.1, 0.01)
    held = [id(p) for group in groups for p in group["params"]]
    wanted = [p for module in modules for p in module.parameters()]
    assert sorted(held) == sorted(map(id, wanted))
    of = {id(p): group for group in groups for p in group["params"]}
    assert of[id(dynamics.z_in.weight)]["lr"] == pytest.approx(1e-4) and of[id(dynamics.agent)]["lr"] == 1e-3
    assert of[id(dynamics.z_in.weight)]["weight_decay"] == 0.01
    for plain in (dynamics.z_in.bias, dynamics.slots, dynamics.movement.weight, dynamics.trunk.norm.weight):
        assert of[id(plain)]["weight_decay"] == 0
    adam, muon = ({id(p) for g in o.param_groups for p in g["params"]} for o in a.make_optimizers(groups))
    assert muon == {id(p) for p in dynamics.trunk.blocks.parameters() if p.dim() == 2} and not adam & muon
    assert adam | muon == set(held)
    dynamics.requires_grad_(False)
    frozen = {id(p) for group in a.parameter_groups(new, modules, 1e-3, 0.1, 0.01) for p in group["params"]}
    assert not frozen & {id(p) for p in dynamics.parameters()}


# the network ----------------------------------------------------------------------------------------------------------
def test_nothing_sees_the_future_and_nobody_sees_the_agent(dynamics):
    x = inputs()
    z, h, _ = dynamics(**x)
    changed = dict(x, z=x["z"].clone())
    changed["z"][:, 5] += 1
    z2, h2, _ = dynamics(**changed)
    assert torch.equal(h[:, :5], h2[:, :5]) and torch.equal(z[:, :5], z2[:, :5])
    assert (h[:, 5:] != h2[:, 5:]).any(-1).all() and (z[:, 6] != z2[:, 6]).any()
    nn.init.normal_(dynamics.agent), nn.init.normal_(dynamics.task.weight)
    z3, h3, _ = dynamics(**x)
    z4, h4, _ = dynamics(**x | {"actions": x["actions"] | {"task": torch.tensor([0, 1])}})
    assert torch.equal(z, z4) and torch.equal(h3[0], h4[0]) and (h3[1] != h4[1]).any(-1).all()
    assert torch.equal(z, z3) and (h != h3).all(-1).any()
    z3.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in dynamics.agent_parameters())


def test_an_action_moves_its_own_frame_and_later_ones(dynamics):
    x = inputs()
    z, h, _ = dynamics(**x)
    x["actions"]["act_valid"][:] = True
    z, h, _ = dynamics(**x)
    x["actions"]["movement"][:, 3] = (x["actions"]["movement"][:, 3] + 1) % 5
    z2, h2, _ = dynamics(**x)
    assert torch.equal(z[:, :3], z2[:, :3]) and torch.equal(h[:, :3], h2[:, :3])
    assert (z[:, 3] != z2[:, 3]).any() and (h[:, 3] != h2[:, 3]).any()
    x["actions"]["act_valid"][:] = False  # an action that is not known does not matter
    unknown = dynamics(**x)[0]
    x["actions"]["keys"] = 1 - x["actions"]["keys"]
    assert torch.equal(unknown, dynamics(**x)[0])


def test_independent_frames_see_themselves_only(dynamics):
    x = inputs(B=3)
    x["z"].requires_grad_(True)
    flagged = torch.tensor([False, True, False])
    z, h, _ = dynamics(**x, independent=flagged)
    plain_z, plain_h, _ = dynamics(**x)
    assert torch.allclose(z[[0, 2]], plain_z[[0, 2]], atol=1e-6) and torch.allclose(
        h[[0, 2]], plain_h[[0, 2]], atol=1e-6
    )
    for out in (z, h):
        (gradient,) = torch.autograd.grad(out[1, 4].sum(), x["z"], retain_graph=True)
        assert gradient[1, 4].any() and not gradient[1, [0, 1, 2, 3, 5, 6]].any()


def test_a_token_is_told_what_it_and_its_neighbours_were_in_the_frame_before():
    dynamics = a.Dynamics((4, 3), True, 9, 1, 1, 16, 2, 2, 1, 1, 2, 8, 4)
    z, signal = torch.randn(1, 3, 4, 3, requires_grad=True), torch.zeros(1, 3, dtype=torch.long)
    told = dynamics.frame_before(z, signal, None, None)
    assert not told[:, 0].any()
    for token, seen in enumerate(([0, 1], [0, 1, 2], [1, 2, 3], [2, 3])):
        (gradient,) = torch.autograd.grad(told[0, 2, token].sum(), z, retain_graph=True)
        assert gradient[0].any(-1).nonzero().tolist() == [[1, other] for other in seen]


@pytest.mark.parametrize("parts", [[1] * 11, [4, 7], [3, 1, 1, 6]])
def test_a_cache_gives_what_the_whole_window_gives(dynamics, parts):
    x = inputs(T=11)  # beyond the context of 4, as deep as two layers see
    z, h, _ = dynamics(**x)
    cache, first, out = {}, 0, []
    for length in parts:
        part = slice(first, first + length)
        actions = {name: x["actions"][name][:, part] for name in a.ACTION} | {"task": x["actions"]["task"]}
        *read, cache = dynamics(x["z"][:, part], x["signal"][:, part], x["step"][:, part], actions, cache=cache)
        out.append(read)
        first += length
    assert torch.allclose(torch.cat([o[0] for o in out], 1), z, atol=1e-5)
    assert torch.allclose(torch.cat([o[1] for o in out], 1), h, atol=1e-5)
    assert all(not seen or seen[0].shape[2] == 4 for seen in cache["past"])


def test_activations_are_really_computed_again(dynamics):
    counted = []
    for block in dynamics.trunk.blocks:
        block.register_forward_pre_hook(lambda *_: counted.append(1))
    x = inputs()
    losses, gradients = [], []
    for again in (False, True):
        dynamics.trunk.recompute = again
        dynamics.zero_grad()
        loss = dynamics(**x)[0].square().mean()
        forwards = len(counted)
        loss.backward()
        losses.append(float(loss.detach())), gradients.append(dynamics.z_in.weight.grad.clone())
    assert forwards == 8 and len(counted) == 12  # 4, then 4 and again 4 in the backward pass
    assert losses[0] == losses[1] and torch.allclose(*gradients, atol=1e-7)


@pytest.mark.parametrize("grid", [True, False])
def test_tokenizer_sees_no_later_frame_and_its_cache_agrees(grid):
    torch.manual_seed(0)
    sizes = {"size": 16, "patch": 4, "dim": 16, "layers": 2, "heads": 2, "n_latents": 4, "latent_dim": 3}
    tokenizer = a.Tokenizer(**sizes, pack=2, time_every=2, clip=2, grid=grid)
    nn.init.normal_(tokenizer.to_pixels.weight)
    frames = torch.rand(1, 5, 3, 16, 16)
    z, _ = tokenizer.encode(frames)
    made, _ = tokenizer.decode(z)
    assert z.shape == (1, 5, 2, 6) and z.abs().max() <= 1 and made.shape == frames.shape
    later = frames.clone()
    later[:, 3] = 0
    z2, _ = tokenizer.encode(later)
    assert torch.equal(z[:, :3], z2[:, :3]) and not torch.equal(z[:, 3], z2[:, 3])
    seen, shown, parts = {}, {}, []
    for t in range(5):
        one, seen = tokenizer.encode(frames[:, t : t + 1], cache=seen)
        picture, shown = tokenizer.decode(one, cache=shown)
        parts.append((one, picture))
    assert torch.allclose(torch.cat([p[0] for p in parts], 1), z, atol=1e-5)
    assert torch.allclose(torch.cat([p[1] for p in parts], 1), made, atol=1e-5)


@pytest.mark.parametrize(("preset", "millions"), [("cpu", 0.8), ("gpu-s", 40), ("gpu-m", 115)])
def test_every_preset_makes_networks_that_fit_together(preset, millions):
    p, rows = a.PRESETS[preset], some_rows([(0, 10)], [1])
    args, meta = a.Args(preset=preset), {"n_movement": 9, "keys": ["B"]}
    with torch.device("meta"):  # shapes alone
        name, sizes = a.network_sizes("tokenizer", args, meta, rows, {}, 1)
        networks = {name: a.build(name, sizes, "meta")}
        frames = torch.zeros(1, 2, 3, p.frame_size, p.frame_size)
        z, _ = networks["tokenizer"].encode(frames)
        assert networks["tokenizer"].decode(z)[0].shape == frames.shape
    rows.z = torch.zeros(10, *z.shape[2:])
    with torch.device("meta"):
        for phase in ("dynamics", "agent"):
            name, sizes = a.network_sizes(phase, args, meta, rows, networks, 1)
            networks[name] = a.build(name, sizes, "meta")
        actions = {"movement": torch.zeros(1, 2).long(), "keys": torch.zeros(1, 2, 1), "task": torch.zeros(1).long()}
        actions["act_valid"] = torch.ones(1, 2).bool()
        made, h, _ = networks["dynamics"](z, actions["movement"], actions["movement"], actions)
        assert made.shape == z.shape and networks["heads"].policy(h).shape == (1, 2, 8, 10)
    count = sum(parameter.numel() for parameter in networks["dynamics"].parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.15)


def test_patches_are_put_back_where_they_were_cut():
    tokenizer = a.Tokenizer(16, 4, 16, 1, 2, 4, 3, 2, 0, 2, grid=True)
    frames = torch.rand(1, 2, 3, 16, 16)
    patches = tokenizer.patches(frames)
    assert torch.equal(patches[0, 1, 5], frames[0, 1, :, 4:8, 4:8].flatten())


# shortcut forcing -----------------------------------------------------------------------------------------------------
def test_levels_lie_on_the_grid_that_sampling_walks_along():
    torch.manual_seed(0)
    signal, step = a.draw_levels(torch.arange(4000) >= 1000, 3, 8)
    assert not step[:1000].any() and set(step[1000:].unique().tolist()) == {1, 2, 3}
    assert (signal % (1 << step) == 0).all() and (signal + (1 << step) <= 8).all()
    assert set(signal[:1000].unique().tolist()) == set(range(8))


@pytest.mark.parametrize("ramp, weights", [(0.9, [0.1, 0.55, 0.8875]), (0.0, [1, 1, 1])])
def test_frames_near_the_noise_count_less(ramp, weights):
    z, step, everything = (
        torch.zeros(1, 1, 2, 4),
        torch.zeros(1, 1, dtype=torch.long),
        torch.ones(1, 1, dtype=torch.bool),
    )
    for signal, weight in zip((0, 4, 7), weights, strict=True):
        signal = torch.full((1, 1), signal)
        losses = a.shortcut_losses(z + 1, z, z, signal, step, everything, 8, ramp)
        assert losses["dynamics"].item() == pytest.approx(weight)


def test_an_oracle_loses_nothing_and_is_sampled_exactly():
    torch.manual_seed(0)
    z, noise = torch.randn(64, 3, 2, 4, dtype=torch.float64), torch.randn(64, 3, 2, 4, dtype=torch.float64)
    for rows in (torch.zeros(64, dtype=torch.bool), torch.ones(64, dtype=torch.bool)):
        signal, step = a.draw_levels(rows, 3, 8)
        z_noisy = a.noisy(z, noise, signal, 8)
        target = a.bootstrap_target(lambda *_: z, z_noisy, signal, step, 8) if rows.any() else z
        everything = torch.ones(64, 3, dtype=torch.bool)
        losses = a.shortcut_losses(z, z, target, signal, step, everything, 8)
        assert float(losses["flow"]) < 1e-12 and float(losses["bootstrap"]) < 1e-12


@pytest.mark.parametrize("n_steps", [1, 2, 4, 8])
def test_sampling_from_an_oracle_returns_the_frame(n_steps):
    z = torch.rand(2, 1, 3, 4) * 2 - 1
    asked = []

    class Oracle:
        k_max, bounded = 8, True

        def __call__(self, noisy, signal, step, actions, cache):
            asked.append((int(signal[0, 0]), int(step[0, 0])))
            return z, None, None

    made = a.predict_frame(Oracle(), {"movement": torch.zeros(2, 1)}, {}, n_steps, z.shape)
    assert torch.allclose(made, z, atol=1e-6)
    assert asked == [(i * 8 // n_steps, (8 // n_steps).bit_length() - 1) for i in range(n_steps)]


def test_bootstrap_target_is_the_division_of_equation_7_without_its_division():
    torch.manual_seed(0)
    f = lambda z, signal, step: torch.tanh(z * (1 + signal[..., None, None]) + step[..., None, None])  # noqa: E731
    z, z_hat = torch.randn(9, 2, 2, 3, dtype=torch.float64), torch.randn(9, 2, 2, 3, dtype=torch.float64)
    signal, step = a.draw_levels(torch.ones(9, dtype=torch.bool), 2, 8)
    tau, d = (signal / 8)[..., None, None].double(), (2.0**step / 8)[..., None, None].double()
    b1 = (f(z, signal, step - 1) - z) / (1 - tau)
    b2 = (f(z + b1 * d / 2, signal + 2 ** (step - 1), step - 1) - (z + b1 * d / 2)) / (1 - tau - d / 2)
    paper = (1 - tau) ** 2 * ((z_hat - z) / (1 - tau) - (b1 + b2) / 2) ** 2
    ours = (z_hat - a.bootstrap_target(f, z, signal, step, 8)) ** 2
    assert torch.allclose(paper, ours, atol=1e-6)


def world_batch(B: int = 8, T: int = 6) -> dict:
    x = inputs(B, T)
    more = {name: torch.cat([x["actions"][name]] * 2, 1) for name in a.ACTION} | {"task": x["actions"]["task"]}
    known = torch.ones(B, 2 * T, dtype=torch.bool)
    reward = torch.randn(B, 2 * T)
    return more | {"z": x["z"], "reward": reward, "cont": torch.ones(B, 2 * T), "rew_valid": known, "inside": known}


def test_the_dynamics_learn_from_uniform_windows_the_policy_from_the_others(dynamics):
    heads, batch = random_heads(), world_batch()
    nn.init.normal_(heads.policy.out.weight)
    uniform = torch.arange(8) < 4
    args = a.Args(independent_frame_ratio=0.0)

    def gradients(name: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        z = batch["z"].clone().requires_grad_(True)
        terms = a.world_terms(dynamics, heads, batch | {"z": z}, uniform, True, args)
        return torch.autograd.grad(terms[name], z)[0].abs().sum((1, 2, 3))

    assert (gradients("dynamics")[:4] > 0).any() and not gradients("dynamics")[4:].any()
    assert not gradients("policy")[:4].any() and (gradients("policy")[4:] > 0).all()
    torch.manual_seed(0)
    terms = a.world_terms(dynamics, heads, batch, uniform, True, args)
    sum(terms[name] for name in a.TERMS["agent"]).backward()
    assert dynamics.z_in.weight.grad.abs().sum() > 0 and dynamics.agent.grad.abs().sum() > 0
    dynamics.zero_grad()
    torch.manual_seed(0)
    a.world_terms(dynamics, None, batch, uniform, True, args)["dynamics"].backward()
    assert all(p.grad is None or not p.grad.any() for p in dynamics.agent_parameters())


def test_independent_windows_are_drawn_one_by_one_and_train_no_head(dynamics, monkeypatch):
    drawn = []

    class Counted(a.Dynamics):
        def forward(self, z, signal, step, actions, independent=None, cache=None):
            drawn.append(independent)
            return z, torch.zeros(*z.shape[:2], 16), None

    torch.manual_seed(0)
    batch = {name: x.repeat(512, *[1] * (x.dim() - 1)) for name, x in world_batch().items()}
    uniform = torch.ones(4096, dtype=torch.bool)
    a.world_terms(Counted(**DYNAMICS), None, batch, uniform, False, a.Args())
    assert float(drawn[0].float().mean()) == pytest.approx(0.3, abs=0.03)
    heads, batch = random_heads(), world_batch()
    for ratio, learns in ((0.0, True), (1.0, False)):
        terms = a.world_terms(dynamics, heads, batch, uniform[:8], True, a.Args(independent_frame_ratio=ratio))
        assert bool(terms["policy"] > 0) == learns and terms["flow"] > 0


# returns and policy loss ----------------------------------------------------------------------------------------------
def test_lambda_returns():
    rewards, values = torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30, 40])
    assert a.lambda_returns(rewards, values, torch.ones(3), 0.5, 0.5).tolist() == [9.8125, 15.25, 23, 40]
    assert a.lambda_returns(rewards, values, torch.tensor([1.0, 0, 1]), 0.5, 0.5).tolist() == [6.5, 2, 23, 40]
    late = torch.tensor([0.0] * 7 + [1.0])
    first = a.lambda_returns(late, torch.zeros(9), torch.ones(8), 0.997, 0.95)[0]
    assert float(first) == pytest.approx((0.997 * 0.95) ** 7, abs=1e-6)
    both = a.lambda_returns(rewards.repeat(2, 1), values.repeat(2, 1), torch.ones(2, 3), 0.5, 0.5)
    assert both.shape == (2, 4)


def test_pmpo_looks_at_signs_only():
    log_p, advantage = torch.tensor([-1.0, -2, -3, -4]), torch.tensor([1.0, -1, 0, -5])
    assert float(a.pmpo_loss(log_p, advantage)) == -0.5
    assert float(a.pmpo_loss(log_p, 1000 * advantage)) == -0.5
    assert float(a.pmpo_loss(log_p, torch.ones(4))) == 0.5 * 2.5  # an empty set adds nothing


def test_weighted_pmpo_looks_at_sizes_and_not_at_the_scale():
    log_p, advantage = torch.tensor([-1.0, -2, -3, -4]), torch.tensor([3.0, -1, 1, -3])
    expected = 0.5 * (1 * -2 + 3 * -4) / 4 - 0.5 * (3 * -1 + 1 * -3) / 4
    assert float(a.pmpo_loss(log_p, advantage, 0.5, weighted=True)) == expected == -1.0
    assert float(a.pmpo_loss(log_p, advantage / 1024, 0.5, weighted=True)) == expected
    assert float(a.pmpo_loss(log_p, torch.ones(4), 0.5, weighted=True)) == 0.5 * 2.5
    assert float(a.pmpo_loss(log_p, torch.zeros(4), 0.5, weighted=True)) == 0


def test_the_distance_of_two_policies_is_summed_over_movement_and_keys():
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    on, off = torch.tensor([0.2]).logit(), torch.tensor([0.1]).logit()
    assert float(a.action_kl(p, q, 3)) == pytest.approx(0.085123, abs=1e-6)
    assert float(a.action_kl(q, p, 3)) == pytest.approx(0.092033, abs=1e-6)
    both = a.action_kl(torch.cat([p, on])[None], torch.cat([q, off])[None], 3)
    assert both.shape == (1,) and float(both) == pytest.approx(0.085123 + 0.044403, abs=1e-6)
    assert float(a.action_kl(torch.cat([p, on]), torch.cat([p, on]), 3)) == 0


# dreams ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("follow", [False, True])
def test_dreams_with_a_cache_are_those_without(dynamics, follow):
    heads, batch = random_heads(), world_batch(T=12)
    nn.init.normal_(heads.policy.out.weight)
    policy, args = None if follow else heads.policy, a.Args()
    made = a.dream(dynamics, heads, policy, batch, 5, 6, args, torch.Generator().manual_seed(3))
    slow = dream_without_cache(dynamics, heads, policy, batch, 5, 6, 4, torch.Generator().manual_seed(3))
    assert made["h"].shape == (8, 7, 16) and made["z"].shape == (8, 6, 3, 4) and made["keys"].shape == (8, 6, 2)
    for name in ("h", "z", "movement", "keys"):
        assert torch.allclose(made[name].float(), slow[name].float(), atol=1e-5), name
    assert made["z"].abs().max() <= 1
    if follow:
        assert torch.equal(made["movement"], batch["movement"][:, 5:11])
    else:
        assert len(made["movement"].unique()) > 1


class Echo(a.Dynamics):
    """The agent reads the movement that led in; latents stay what they are."""

    def forward(self, z, signal, step, actions, independent=None, cache=None):
        return z, F.one_hot(actions["movement"], 16).float(), {}


class Pays(nn.Module):
    """A reward head that pays `wanted` (16,) of what the agent reads."""

    def __init__(self, wanted: torch.Tensor, bins: torch.Tensor):
        super().__init__()
        self.wanted, self.bins = wanted, bins

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return a.twohot_encode(h @ self.wanted, self.bins).log()[..., None, :]


def test_a_dream_is_paid_for_the_action_that_led_in():
    heads, batch = random_heads(), world_batch(T=8)
    heads.reward = Pays(0.05 * torch.arange(16.0), heads.reward_bins)
    made = a.dream(Echo(**DYNAMICS), heads, None, batch, 3, 5, a.Args())
    assert made["reward"] == pytest.approx(0.05 * batch["movement"][:, 3:8].float(), abs=1e-5)


def test_only_the_policy_and_the_value_learn_from_dreams_and_each_from_its_own_loss(dynamics):
    heads, batch = random_heads(), world_batch()
    prior = copy.deepcopy(heads.policy)
    for head in (heads.policy, heads.reward, heads.cont):
        nn.init.normal_(head.out.weight)
    terms = a.imagine_terms(dynamics, heads, prior, batch, a.Args(horizon=4))
    learning = {}
    for name in ("actor", "value"):
        for module in (dynamics, heads, prior):
            module.zero_grad()
        terms[name].backward(retain_graph=True)
        learning[name] = {n for n, p in heads.named_parameters() if p.grad is not None and p.grad.any()}
        assert all(p.grad is None or not p.grad.any() for m in (dynamics, prior) for p in m.parameters())
    assert {name.split(".")[0] for name in learning["actor"]} == {"policy"}
    assert {name.split(".")[0] for name in learning["value"]} == {"value"}
    assert terms["kl"] > 0


def test_dreams_teach_the_action_that_pays(dynamics):
    torch.manual_seed(0)
    heads, batch = random_heads(), world_batch()
    prior = copy.deepcopy(heads.policy)
    echo = Echo(**DYNAMICS)
    heads.reward = Pays(F.one_hot(torch.tensor(3), 16).float(), heads.reward_bins)
    optimizer = torch.optim.Adam([*heads.policy.parameters(), *heads.value.parameters()], lr=3e-3)
    for _ in range(60):
        terms = a.imagine_terms(echo, heads, prior, batch, a.Args(horizon=4))
        optimizer.zero_grad()
        (terms["actor"] + terms["value"]).backward()
        optimizer.step()
    chosen = a.dream(echo, heads, heads.policy, batch, 3, 4, a.Args())["movement"]
    assert (chosen == 3).float().mean() > 0.6 and terms["kl"] > 0.2  # a fifth before


def test_a_dream_that_may_have_ended_counts_less():
    cont = torch.tensor([[0.5, 0.5, 1.0]])
    assert a.alive(cont).tolist() == [[1, 0.5, 0.25]]
    made = {"reward": torch.tensor([[1.0, 2.0, 4.0]]), "cont": cont}
    assert float(a.dream_returns(made, 0.5)) == pytest.approx(1 + 0.5 * 0.5 * 2 + 0.25 * 0.25 * 4)


def test_dreams_begin_where_the_game_goes_on():
    rows = some_rows([(0, 20), (20, 24), (24, 40)], [])
    rows.cont[[19, 23, 39]] = 0
    contexts = a.choose_contexts(rows, 8, task=0)
    assert contexts[:, 0].tolist() == [0, 4, 8, 24, 28]  # not those whose eighth row is 19 or 39; one run is too short
    rows.task[24:] = 1
    begins = {task: a.choose_contexts(rows, 8, task)[:, 0].tolist() for task in range(3)}
    assert begins == {0: [0, 4, 8], 1: [24, 28], 2: [0, 4, 8, 24, 28]}  # nobody played as the third


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"actions_apart": 0.01}, "do not follow the actions.*0.0100 apart, two noise seeds 0.0200.*--no-gates"),
        ({"rate_gain": 0.3, "rate_loss": 0.5}, "fires 0.40 times as often"),
        ({"rate_gain": 2.5, "rate_loss": 2.5}, "fires 2.50 times as often"),
        ({"rate_gain": 1.2, "rate_loss": 0.0}, None),
        ({"events_loss": 4, "events_gain": 5}, "too few rewards.*5 gains and 4 losses"),
        ({"real_rate_gain": 40.0}, "does not tell a gain from other frames"),
        ({"opposite": [(0, 0), (0, 0)]}, "has one action"),
        ({}, None),
    ],
)
def test_gates(changes, words):
    found = {
        "actions_apart": 0.03,
        "seeds_apart": 0.02,
        "events_gain": 20,
        "events_loss": 20,
        "rate_gain": 1.9,
        "rate_loss": 0.6,
    }
    found |= {"opposite": [(3, 0), (4, 0)], "real_rate_gain": 1.0, "real_rate_loss": 1.1}
    if words is None:
        a.check_dreams(found | changes)
    else:
        with pytest.raises(ValueError, match=words):
            a.check_dreams(found | changes)


# windows and sampling -------------------------------------------------------------------------------------------------
def some_rows(runs: list[tuple[int, int]], rewards: list[int]) -> a.Rows:
    R = runs[-1][1]
    known, reward = torch.ones(R, dtype=torch.bool), torch.zeros(R)
    reward[rewards] = 1
    rows = {"frames": None, "z": torch.arange(R).half()[:, None, None], "movement": torch.zeros(R, dtype=torch.long)}
    rows |= {"keys": torch.zeros(R, 1), "reward": reward, "cont": known.float(), "act_valid": known, "rew_valid": known}
    task = torch.zeros(R, dtype=torch.long)
    return a.Rows(**rows, runs=np.array(runs), episode=np.repeat(np.arange(len(runs)), np.diff(runs)[:, 0]), task=task)


def test_windows_lie_inside_runs_cover_them_and_know_their_rewards():
    rows = some_rows([(0, 10), (10, 13), (13, 40), (40, 41)], [12, 30])
    windows, relevant = a.choose_windows(rows, 8)
    assert windows[:3].tolist() == [[0, 10], [2, 10], [10, 13]]
    covered = {t for first, stop in windows for t in range(first, min(first + 8, stop))}
    assert covered == set(range(40))  # a run of one frame has nothing to predict
    for (first, stop), hit in zip(windows, relevant, strict=True):
        assert hit == any(first <= event < min(first + 8, stop) for event in (12, 30))


def test_the_best_task_has_the_highest_mean_return():
    rows = some_rows([(0, 10), (10, 13), (13, 40), (40, 50)], [1, 11, 12, 20])  # returns 1, 2, 1, 0
    rows.task = torch.tensor([0, 2, 1, 2])[rows.episode]
    assert a.best_task(rows) == 0 or a.best_task(rows) == 1  # 1, 1 and (2 + 0) / 2
    rows.reward[45] = 3
    assert a.best_task(rows) == 2


def test_returns_are_of_what_comes_after_a_row_and_known_where_the_game_ends():
    rows = some_rows([(0, 4), (4, 12), (12, 22)], [0, 2, 3, 7])
    rows.cont[3] = 0  # the first game ends, the others break off
    returns = a.recorded_returns(rows, 0.5)
    assert returns[:4].tolist() == [0.75, 1.5, 1, 0]  # the reward of row 0 came before
    assert returns[4:8].tolist() == [0.25, 0.5, 1, 0]  # 0.5 ** 4 is below a tenth, 0.5 ** 3 is not
    assert returns[8:12].isnan().all() and returns[12:18].eq(0).all()
    rows.rew_valid[6] = False
    returns = a.recorded_returns(rows, 0.5)
    assert returns[4:6].isnan().all() and returns[6:8].tolist() == [1, 0]


def test_the_value_begins_with_recorded_returns(dynamics):
    torch.manual_seed(0)
    rows, heads = some_rows([(0, 400)], list(range(0, 400, 10))), random_heads()
    rows.keys = torch.zeros(400, 2)
    rows.z = torch.zeros(400, 3, 4)
    rows.z[:, 0, 0] = torch.arange(400) % 10 / 10 - 0.5  # how far the next reward is
    before = {name: x.clone() for name, x in heads.state_dict().items()}
    args = a.Args(gamma=0.5)
    assert a.fit_value(dynamics, heads, rows, rows, args, "cpu") > 0.4  # read by an untrained network; a constant has 0
    assert {n.split(".")[0] for n, x in heads.state_dict().items() if not torch.equal(x, before[n])} == {"value"}
    rows.rew_valid[:] = False
    assert math.isnan(a.fit_value(dynamics, heads, rows, rows, args, "cpu"))


def test_rows_beyond_a_run_do_not_count():
    rows = some_rows([(0, 10), (10, 13), (13, 40)], [12])
    windows = np.array([[2, 10], [10, 13], [30, 40]])
    batch = a.gather(rows, windows, 8, 3, "cpu")
    assert batch["z"][:, :, 0, 0].tolist() == [
        [2, 3, 4, 5, 6, 7, 8, 9],
        [10, 11, 12, 12, 12, 12, 12, 12],
        [30, 31, 32, 33, 34, 35, 36, 37],
    ]
    assert batch["inside"].sum(1).tolist() == [8, 3, 10] and torch.equal(batch["rew_valid"], batch["inside"])
    longer = a.gather(rows, windows, 12, 0, "cpu")["z"][:, 0, 0, 0]
    assert longer.tolist() == [0, 10, 28]  # moved back as far as the run allows


def test_long_windows_hold_the_short_ones_and_begin_anywhere():
    torch.manual_seed(0)
    rows, windows = some_rows([(0, 40), (40, 80)], []), np.array([[10, 40], [42, 80], [72, 80]])
    begin = []
    for _ in range(200):
        begin.append(a.gather(rows, a.lengthen(windows, 8, 20), 20, 0, "cpu")["z"][:, 0, 0, 0].tolist())
    assert [sorted(set(first)) for first in zip(*begin, strict=True)] == [list(range(11)), [40, 41, 42], [60]]


def test_clips_reach_every_row_of_a_window_and_stay_in_its_run():
    torch.manual_seed(0)
    windows = np.array([[0, 10], [10, 12], [30, 40]])
    clips = np.stack([a.draw_clips(windows, length=8, clip=4) for _ in range(200)])  # (200, 3, 4)
    assert [set(clips[:, w].ravel()) for w in range(3)] == [set(range(8)), {10, 11}, set(range(30, 38))]
    assert (np.diff(clips[:, [0, 2]]) == 1).all() and (clips[:, 1] == [10, 11, 11, 11]).all()


def test_every_window_once_a_pass_and_the_rest_relevant():
    sampler = a.WindowSampler(30, np.array([3, 7]), seed=1)
    uniform = []
    for _ in range(6):
        windows, from_all = sampler.draw(10)
        assert from_all.sum() == 5 and set(windows[~from_all]) <= {3, 7}
        uniform += list(windows[from_all])
    assert sorted(uniform) == list(range(30))
    again = a.WindowSampler(30, np.array([3, 7]), seed=1)
    first = [again.draw(7)[0].tolist() for _ in range(4)]
    saved = dict(again.state)
    rest = [again.draw(7)[0].tolist() for _ in range(9)]
    resumed = a.WindowSampler(30, np.array([3, 7]), seed=1)
    resumed.state = saved
    assert [resumed.draw(7)[0].tolist() for _ in range(9)] == rest and first[0] != rest[0]
    alone, from_all = a.WindowSampler(30, np.zeros(0, int), seed=1).draw(10)
    assert from_all.all() and len(set(alone)) == 10


# evaluation and play --------------------------------------------------------------------------------------------------
class Mover:
    """A dynamics that knows: a frame is the one before plus ten times the movement. Its predictions are off by 1."""

    k_max, bounded = 8, False

    def eval(self):
        pass

    def __call__(self, z, signal, step, actions, cache):
        if signal[0, 0] == 7:  # a frame to remember, with an eighth of noise
            clean = 10 * torch.round(z * 8 / 7 / 10)
        else:
            clean = cache["last"] + 10.0 * actions["movement"][..., None, None] + 1
        return clean, None, {"last": clean[:, -1:]}


def test_a_dynamics_that_knows_the_rule_beats_holding_and_needs_the_actions():
    rows = some_rows([(0, 60), (60, 120)], [])
    rows.movement = torch.tensor(np.random.default_rng(0).integers(0, 5, 120))
    z = 10 * torch.cat([part.cumsum(0) for part in rows.movement.split(60)])
    rows.z = z[:, None, None].half()
    metrics, table, _ = a.evaluate_dynamics(Mover(), None, rows, 1, "cpu")
    assert metrics["eval/latent_mse"] == 1 and table["latent_mse_one_step"] == [1] * 5
    assert metrics["eval/latent_mse_hold_last"] > 100 and metrics["eval/action_shuffle_ratio"] > 100


def small_agent() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    tokenizer = {"size": 64, "patch": 16, "dim": 16, "layers": 2, "heads": 2, "n_latents": 4, "latent_dim": 2}
    sizes = {"tokenizer": tokenizer | {"pack": 2, "time_every": 2, "clip": 2, "grid": True}}
    sizes["dynamics"] = DYNAMICS | {"z_shape": (2, 4), "n_keys": 1}
    sizes["heads"] = {"dim": 16, "ahead": 2, "n_movement": 5, "n_keys": 1, "reward_limit": 5.0, "value_limit": 9.0}
    networks = {name: a.build(name, kwargs, "cpu") for name, kwargs in sizes.items()}
    nn.init.normal_(networks["heads"].policy.out.weight, std=3.0)
    return networks


def play_along(player: a.AgentPlayer, seeds: list[int], screens: np.ndarray, done: np.ndarray) -> np.ndarray:
    """What it chooses (T, E) on screens (T, E, H, W, 3) where `done` (T, E) is what was then done."""
    player.reset(seeds)
    chosen = []
    for screen, action in zip(screens, done, strict=True):
        chosen.append(player.act(screen))
        player.took(action)
    return np.array(chosen)


def test_the_agent_plays_by_what_the_evaluation_reads(tmp_path):
    folder = write_packed(tmp_path / "packed", episodes=1, length=30)
    rows = a.load_rows(folder, ["heldout_0001"], a.load_meta(folder))
    networks = small_agent()
    rows.z = a.encode_rows(networks["tokenizer"], rows, "cpu")
    actions = {name: getattr(rows, name)[None] for name in a.ACTION} | {"task": torch.tensor([0])}
    h, _ = a.look(networks["dynamics"], rows.z[None].float(), actions, {}, [torch.Generator().manual_seed(3)])
    done = (2 * rows.movement + rows.keys[:, 0]).long().numpy()[1:, None]  # after each screen but the last
    player = a.AgentPlayer(networks, networks["heads"].policy, 0, sample=False, device="cpu")
    draw_noise, t = a.draw_noise, iter(range(30))
    noise = draw_noise(rows.z[None].shape, [torch.Generator().manual_seed(3)], "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a, "draw_noise", lambda *_: noise[:, [next(t)]])  # one frame at a time draws in another order
        chosen = play_along(player, [3], rows.frames[:-1, None], done)[:, 0]
    logits = networks["heads"].policy(h)[0, :-1, 0]
    assert chosen.tolist() == (2 * logits[:, :5].argmax(-1) + (logits[:, 5] > 0)).tolist()
    assert len(set(chosen)) > 1


@pytest.mark.parametrize("sample", [False, True])
def test_a_game_does_not_depend_on_those_beside_it(sample):
    rng = np.random.default_rng(0)
    screens, done = rng.integers(0, 256, (12, 3, 48, 80, 3), np.uint8), rng.integers(0, 10, (12, 3))
    networks = small_agent()
    player = a.AgentPlayer(networks, networks["heads"].policy, 0, sample, "cpu")
    together = play_along(player, [5, 6, 7], screens, done)
    alone = play_along(player, [6], screens[:, 1:2], done[:, 1:2])
    assert together[:, 1].tolist() == alone[:, 0].tolist()


def test_sampled_actions_come_as_often_as_their_probabilities():
    networks = small_agent()
    player = a.AgentPlayer(networks, networks["heads"].policy, 0, True, "cpu")
    logits = torch.tensor([0.0, 1.0, 0.5, -1.0, -2.0, 0.8])
    out = networks["heads"].policy.out
    nn.init.zeros_(out.weight), out.bias.data.copy_(logits.repeat(2))
    screens = np.zeros((400, 5, 64, 64, 3), np.uint8)
    chosen = play_along(player, list(range(5)), screens, np.zeros((400, 5), int)).ravel()
    rates = np.bincount(chosen // 2, minlength=5) / len(chosen)
    assert rates == pytest.approx(logits[:5].softmax(0).numpy(), abs=0.04)
    assert (chosen % 2).mean() == pytest.approx(float(logits[5].sigmoid()), abs=0.04)
