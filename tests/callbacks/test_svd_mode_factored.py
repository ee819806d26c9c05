"""Mode switching by two factors: exact switches, carried momentum, and what the original lacks."""

import pytest
import torch
from torch import nn

from spectral_lightning.actuators import carry_moments, share_moments
from spectral_lightning.callbacks import SVDModeSwitch
from spectral_lightning.control import ScheduledPolicy, SeedPolicy
from spectral_lightning.linalg import singular_triplets
from spectral_lightning.nn import FactoredLinear
from spectral_lightning.optim import MuonAdamW, parameter_groups
from spectral_lightning.testing.tasks import TinyTask

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "muon": lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1),
}


def scheduled(schedule, principal=0.25):
    return ScheduledPolicy(schedule=schedule, principal=principal)


class Task(TinyTask):
    def __init__(self, optimizer="adamw"):
        super().__init__(num_batches=400)
        self.name = optimizer

    def configure_optimizers(self):
        if self.name == "muon":
            return MuonAdamW(parameter_groups(self.net), weight_decay=0.1)
        return OPTIMIZERS[self.name](self.net.parameters())


class Look(SVDModeSwitch):
    """Largest change of the protected block, and the weight before and after each decision."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.worst, self.jumps, self.first = 0.0, [], None

    def _finish(self, trainer, pending):
        before = self.spectra.targets["net.2"].matrix().clone()
        super()._finish(trainer, pending)
        after = self.spectra.targets["net.2"].matrix()
        self.jumps.append(((after - before).norm() / before.norm()).item())

    def on_weights(self, trainer, pl_module):
        super().on_weights(trainer, pl_module)
        for part in self.parts.values():
            weight = self.spectra.targets["net.2"].matrix()
            block = part.left.mT @ weight @ part.right
            if self.first is None or self.first.shape != block.shape:  # a new split
                self.first = block.clone()
            change = ((block - self.first).norm() / self.first.norm()).item()
            self.worst = max(self.worst, change)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, "value"])
def test_projected_factors_protect_and_those_of_the_original_do_not(fit, optimizer, clip):
    clipping = {"gradient_clip_val": 1e-2, "gradient_clip_algorithm": clip} if clip else {}
    worst = {}
    for protection in ("factored", "legacy"):
        look = Look("net.2", 3, scheduled({3: "lowrank"}), protection, refresh=False)
        fit(look, task=Task(optimizer), max_steps=150, **clipping)
        assert look.modes["net.2"].mode == "lowrank"
        worst[protection] = look.worst
    assert worst["factored"] < 1e-5
    assert worst["legacy"] > 1e-2


@pytest.mark.parametrize("policy", ["seed", "scheduled"])
def test_switches_and_new_ranks_leave_the_weight_as_it_is(fit, policy):
    policies = {
        "seed": SeedPolicy(preset="phase1", warmup_steps=0, rank_min=4),
        "scheduled": scheduled({2: "lowrank", 10: "full", 14: "lowrank"}),
    }
    look = Look("net.2", 2, policies[policy], "factored")
    fit(look, task=Task(), max_steps=24)
    assert len(look.jumps) == 11
    assert max(look.jumps) < 1e-6


def test_the_rank_of_the_factors_follows_the_policy(fit):
    ranks = set()

    class Ranks(SVDModeSwitch):
        def on_weights(self, trainer, pl_module):
            super().on_weights(trainer, pl_module)
            columns = pl_module.net[2].left_factor.norm(dim=0)
            ranks.add(int((columns > 0).sum()))
            rank = self.modes["net.2"].rank
            if self.parts:
                assert (columns > 0).sum() <= rank

    policy = SeedPolicy(preset="phase1", warmup_steps=0, rank_min=4)
    fit(Ranks("net.2", 2, policy, "factored"), task=Task(), max_steps=30)
    assert len(ranks) >= 3


def test_a_layer_in_low_rank_mode_trains_its_factors_only(fit):
    task = Task()
    base = []

    class Base(SVDModeSwitch):
        def on_weights(self, trainer, pl_module):
            super().on_weights(trainer, pl_module)
            base.append(pl_module.net[2].weight.detach().clone())

    fit(Base("net.2", 3, scheduled({3: "lowrank"}), "factored"), task=task, max_steps=6)
    # Split after step 4; the next analysis, after the last step, makes a new split.
    assert torch.equal(base[3], base[4])
    assert not torch.equal(base[2], base[3])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_carried_moments_are_those_of_an_optimizer_that_stepped(name):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(8, 8, generator=generator) for _ in range(5)]
    layers = [FactoredLinear(8, 8, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    makers = [OPTIMIZERS[name](list(layer.parameters())) for layer in layers]
    for i, gradient in enumerate(gradients):
        for layer, optimizer, stays in zip(layers, makers, (False, True), strict=True):
            layer.weight.grad = gradient.clone()
            layer.left_factor.grad = torch.zeros_like(layer.left_factor)
            layer.right_factor.grad = torch.zeros_like(layer.right_factor)
            if stays and i > 1:
                layer.weight.grad = None
                carry_moments(optimizer, layer, gradient)
            optimizer.step()
    states = [o.state[layer.weight] for layer, o in zip(layers, makers, strict=True)]
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        if name == "sgd" or key != "momentum_buffer" or name == "muon":
            assert torch.allclose(torch.as_tensor(states[0][key]), torch.as_tensor(states[1][key]))


def test_factors_get_the_moments_of_the_chain_rule():
    layer = FactoredLinear(8, 8, bias=False)
    optimizer = OPTIMIZERS["adamw"](list(layer.parameters()))
    layer(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    U, S, V = singular_triplets(layer.spectral_weight())
    layer.split_(U[:, 2:], S[2:], V[:, 2:])
    share_moments(optimizer, layer)
    B, A = layer.left_factor, layer.right_factor
    base = optimizer.state[layer.weight]
    assert torch.allclose(optimizer.state[B]["exp_avg"], base["exp_avg"] @ A.mT)
    assert torch.allclose(optimizer.state[A]["exp_avg"], B.mT @ base["exp_avg"])
    assert torch.allclose(optimizer.state[B]["exp_avg_sq"], base["exp_avg_sq"] @ A.square().mT)
    layer.merge_()
    share_moments(optimizer, layer)
    assert not any(optimizer.state[f][n].any() for f in (B, A) for n in ("exp_avg", "exp_avg_sq"))


def test_no_optimizer_is_rebuilt_and_no_step_skipped(fit):
    seen = []

    class Count(SVDModeSwitch):
        def on_weights(self, trainer, pl_module):
            super().on_weights(trainer, pl_module)
            seen.append((trainer.global_step, id(trainer.optimizers[0])))

    policy = scheduled({3: "lowrank", 5: "full", 8: "lowrank"})
    fit(Count("net.2", 1, policy, "factored"), task=Task(), max_steps=10)
    assert [step for step, _ in seen] == list(range(1, 11))
    assert len({identity for _, identity in seen}) == 1


def test_layers_that_have_no_factors_are_named(fit, caplog):
    net = nn.Sequential(nn.Linear(12, 8), nn.Bilinear(8, 8, 6))
    net.forward = lambda x: net[1](net[0](x), net[0](x))
    fit(SVDModeSwitch("*", 1, scheduled({}), "factored"), task=TinyTask(net))
    assert isinstance(net[0], FactoredLinear)
