"""Mode switching as its user meets it: what it protects, and what it leaves alone."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from spectral_lightning.actuators import first_moments
from spectral_lightning.callbacks import SVDModeSwitch
from spectral_lightning.control import ScheduledPolicy, SeedPolicy
from spectral_lightning.linalg import singular_triplets
from spectral_lightning.optim import MuonAdamW, parameter_groups
from spectral_lightning.spectra import LayerAnalysis, ModeSettings, read_mode_events
from spectral_lightning.testing.tasks import TinyNetwork, TinyTask

SIDES = ["gradients", "two_sided", "left", "right", "block"]


def scheduled(schedule, principal=0.25):
    return ScheduledPolicy(schedule=schedule, principal=principal)


def optimizer_of(name, net):
    makers = {
        "sgd": lambda: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda: torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.5),
        "muon": lambda: MuonAdamW(parameter_groups(net), lr=0.02),
    }
    return makers[name]()


class Task(TinyTask):
    """The tiny task with an optimizer of one's choice."""

    def __init__(self, optimizer="adamw"):
        super().__init__(num_batches=400, optimizer=lambda net: optimizer_of(optimizer, net))


class KeepParts(SVDModeSwitch):
    """Keep the largest change of each protected part that was ever seen after a step."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.worst = {}

    def on_weights(self, trainer, pl_module):
        super().on_weights(trainer, pl_module)
        for name, part in self.parts.items():
            change = part.change(self.spectra.targets[name].matrix()).item()
            self.worst[name] = max(self.worst.get(name, 0.0), change)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_the_protected_part_holds_under_momentum_decay_accumulation_and_clipping(
    fit, side, optimizer, clip
):
    task = Task(optimizer)
    switch = KeepParts("net.[25]", 5, scheduled({0: "lowrank"}), side)
    clipping = {"gradient_clip_val": {"norm": 0.1, "value": 1e-3}[clip]}
    clipping["gradient_clip_algorithm"] = clip
    fit(switch, task=task, accumulate_grad_batches=2, max_steps=60, **clipping)
    assert set(switch.worst) == {"net.2", "net.5"}
    assert max(switch.worst.values()) < 1e-5
    for name, part in switch.parts.items():
        assert part.num_principal == 10, name


def test_a_protected_layer_goes_on_learning(fit):
    task = Task()
    start = task.net[2].weight.detach().clone()
    fit(SVDModeSwitch("net.2", 1, scheduled({0: "lowrank"})), task=task, max_steps=50)
    assert (task.net[2].weight - start).norm() > 0.05 * start.norm()


def test_a_switch_changes_neither_weight_nor_loss(fit, snapshots):
    """At the step of the switch a run is bitwise the run that does not switch."""
    runs = []
    for schedule in ({}, {4: "lowrank", 8: "full"}):
        task = Task()
        switch = SVDModeSwitch("net.2", 4, scheduled(schedule))
        snapshots.weights = {}
        fit(switch, snapshots, task=task, max_steps=12)
        runs.append(dict(snapshots.weights))
    same = [step for step in runs[0] if torch.equal(runs[0][step]["net.2"], runs[1][step]["net.2"])]
    assert same == [0, 1, 2, 3, 4, 5]  # analysed with the gradient of step 4, protected from then


def test_untouched_layers_and_the_optimizer_are_those_of_a_run_without_switches(fit):
    """The last layer has no rate, so that it sees no change of the others'."""

    class Frozen(Task):
        def configure_optimizers(self):
            rest = [p for n, p in self.net.named_parameters() if not n.startswith("2.")]
            groups = [{"params": self.net[2].parameters(), "lr": 1e-2}, {"params": rest, "lr": 0.0}]
            return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)

    steps, ids = [], []

    class Count(SVDModeSwitch):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            ids.append(id(trainer.optimizers[0]))

        def on_weights(self, trainer, pl_module):
            super().on_weights(trainer, pl_module)
            steps.append(trainer.global_step)

    task, twin = Frozen(), Frozen()
    forced = {3: "lowrank", 5: "full", 8: "lowrank"}
    trainer = fit(Count("net.2", 1, scheduled(forced)), task=task, max_steps=10)
    other = fit(task=twin, max_steps=10)
    assert steps == list(range(1, 11))
    assert len(set(ids)) == 1
    for name, weight in task.state_dict().items():
        if not name.startswith("net.2"):
            assert torch.equal(weight, twin.state_dict()[name]), name
    states = [t.optimizers[0].state_dict()["state"] for t in (trainer, other)]
    assert states[0].keys() == states[1].keys()
    assert all(found["step"] == 10 for found in states[0].values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_momentum_never_carries_the_protected_part_over_a_switch(fit, optimizer):
    """Else it would move that part at once on entering, and all at a time on leaving."""
    shares = {}

    class Look(SVDModeSwitch):
        def on_weights(self, trainer, pl_module):
            part = self.parts.get("net.2")
            super().on_weights(trainer, pl_module)
            part = self.parts.get("net.2", part)
            if trainer.global_step in (4, 7, 10):
                (moment,) = first_moments(trainer.optimizers[0], pl_module.net[2].weight)
                rest = moment.clone()
                part.remove_(rest)
                shares[trainer.global_step] = ((moment - rest).norm() / moment.norm()).item()

    switch = Look("net.2", 3, scheduled({3: "lowrank", 6: "full", 9: "lowrank"}), "two_sided")
    fit(switch, task=Task(optimizer), max_steps=11)
    assert max(shares.values()) < 1e-5
    assert len(shares) == 3


def test_the_first_step_after_a_switch_moves_the_weight(fit, snapshots):
    fit(SVDModeSwitch("net.2", 4, scheduled({4: "lowrank"})), snapshots, task=Task(), max_steps=8)
    weights = [snapshots.weights[step]["net.2"] for step in (5, 6, 7)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_the_gradient_measured_in_low_rank_mode_is_that_of_the_dense_weight(fit):
    found = {}

    class Twin(SVDModeSwitch):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 6:
                twin = nn.Sequential(*[type(m)(*_arguments(m)) for m in pl_module.net])
                twin.load_state_dict(pl_module.net.state_dict())
                (x, y) = next(iter(pl_module.train_dataloader()))
                for _ in range(3):
                    (nn.functional.mse_loss(twin(x), y) / 3).backward()
                own = pl_module.net[2].weight.grad
                assert torch.allclose(own, twin[2].weight.grad, atol=1e-6)
                found["norm"] = own.norm().item()
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    switch = Twin("net.2", 2, scheduled({2: "lowrank"}))
    fit(switch, task=Task(), max_steps=8, accumulate_grad_batches=3)
    assert found["norm"] > 0
    assert switch.modes["net.2"].mode == "lowrank"


def _arguments(module):
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.p,) if isinstance(module, nn.Dropout) else ()


def test_the_basis_and_its_size_are_chosen_anew_at_each_analysis(fit):
    task = Task()
    bases = []

    class Keep(SVDModeSwitch):
        def on_weights(self, trainer, pl_module):
            super().on_weights(trainer, pl_module)
            bases.append(self.parts["net.2"].left if self.parts else None)

    policy = SeedPolicy(preset="phase1", warmup_steps=0, rank_min=4)
    switch = Keep("net.2", 2, policy, "block")
    fit(switch, task=task, max_steps=30)
    sizes = [basis.shape[1] for basis in bases if basis is not None]
    assert len(set(sizes)) >= 2


def test_events_and_logs_hold_every_analysis(fit, tmp_path):
    logger = CSVLogger(tmp_path)
    switch = SVDModeSwitch("net.[25]", 2, SeedPolicy(preset="phase1", warmup_steps=0), "two_sided")
    fit(switch, task=Task(), max_steps=9, logger=logger)
    logger.save()
    folder = tmp_path / "lightning_logs/version_0"
    settings, *events = read_mode_events(folder / "svd_mode.jsonl")
    assert isinstance(settings, ModeSettings)
    assert settings.policy == "SeedPolicy"
    assert settings.conditions[0] == ("principal_alignment", "danger", True, 0.3)
    assert [(e.step, e.layer) for e in events] == [
        (step, name) for step in (2, 4, 6, 8) for name in ("net.2", "net.5")
    ]
    wanted = {
        "principal_alignment",
        "minor_alignment",
        "right_alignment",
        "intent_lift",
        "intent_erosion",
        "effect_lift",
        "effect_erosion",
        "largest_erosion",
        "reconstruction_error",
        "concentration",
    }
    for event in events:
        assert isinstance(event, LayerAnalysis)
        assert wanted <= event.measures.keys()
        assert event.loss > 0
    assert {"subspace_angle", "subspace_overlap"} <= events[2].measures.keys()
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert {"svd/mode/net.2", "svd/rank/net.5", "svd/effect_lift/net.2"} <= set(header.split(","))


def test_measures_are_those_of_weight_gradient_and_step(fit):
    kept = {}

    class Keep(SVDModeSwitch):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 3:
                weight = pl_module.net[2].weight
                kept["W"], kept["G"] = weight.detach().clone(), weight.grad.clone()
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

        def on_weights(self, trainer, pl_module):
            if trainer.global_step == 4:
                kept["step"] = pl_module.net[2].weight.detach() - kept["W"]
                kept["numbers"] = self._layers["net.2"].analysis
            super().on_weights(trainer, pl_module)
            if trainer.global_step == 4:
                kept["numbers"] = kept["numbers"].numbers

    fit(Keep("net.2", 3, SeedPolicy(), "left"), task=Task(), max_steps=5)
    W, G, step = (kept[name].double() for name in ("W", "G", "step"))
    numbers = kept["numbers"]
    U, S, V = singular_triplets(W)
    Uk, Sk, Vk = U[:, :10], S[:10], V[:, :10]
    left = (Uk.mT @ G).square().sum() / G.square().sum()
    assert numbers["principal_alignment"] == pytest.approx(left.sqrt().item(), rel=1e-4)
    assert numbers["minor_alignment"] == pytest.approx((1 - left).sqrt().item(), rel=1e-4)
    assert numbers["intent_lift"] == pytest.approx(left.item() / 0.25, rel=1e-4)
    tail = S[10:].norm() / S.norm()
    assert numbers["reconstruction_error"] == pytest.approx(tail.item(), rel=1e-4)
    effect = (Uk.mT @ step).square().sum() / step.square().sum() / 0.25
    assert numbers["effect_lift"] == pytest.approx(effect.item(), rel=1e-3)
    changes = ((step @ Vk) * Uk).sum(0)
    assert numbers["largest_erosion"] == pytest.approx((-changes / Sk).max().item(), rel=1e-3)
    # Cosine of the step and -W_k, both without their component along W.
    principal = Uk * Sk @ Vk.mT
    rest = [x - (x * W).sum() / W.square().sum() * W for x in (step, principal)]
    erosion = -(rest[0] * rest[1]).sum() * 40 / (rest[0].norm() * rest[1].norm())
    assert numbers["effect_erosion"] == pytest.approx(erosion.item(), rel=1e-3)


@pytest.mark.parametrize("protection", ["gradients", "two_sided", "factored"])
def test_compiled_training_never_recompiles_on_a_switch(fit, protection):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = TinyNetwork()

        def forward(self, x):
            return self.body(x)

    task, graphs = TinyTask(Net(), num_batches=12), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    task.net.compile(backend=backend)
    schedule = {step: ("lowrank" if step % 2 else "full") for step in range(1, 12)}
    switch = SVDModeSwitch("net.body.2", 1, scheduled(schedule), protection)
    fit(switch, task=task, max_steps=12)
    assert switch.modes["net.body.2"].num_switches == 11
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_a_checkpoint_in_low_rank_mode_loads_into_the_plain_model(fit, tmp_path):
    task = Task()
    trainer = fit(SVDModeSwitch("net.2", 1, scheduled({0: "lowrank"})), task=task)
    trainer.save_checkpoint(tmp_path / "low.ckpt")
    plain = Task()
    plain.load_state_dict(torch.load(tmp_path / "low.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(plain.net[2].weight, task.net[2].weight)
