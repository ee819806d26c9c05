"""Orthogonal optimizers: by themselves, and in Lightning, where a step is given a closure."""

import copy
import json

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from spectral_lightning.models import GPT
from spectral_lightning.optim import (
    MuonAdamW,
    Orthogonal,
    OrthogonalAdamW,
    OrthogonalOptimizer,
    OrthogonalSGD,
    orthogonal,
    orthogonal_groups,
    parameter_groups,
)
from spectral_lightning.tasks import LanguageModeling
from spectral_lightning.testing.tasks import TinyTask, quiet_trainer

LR = 1.0  # steps so large that their rounding does not count


def cosine(one, other):
    one, other = one.detach().double(), other.detach().double()
    return ((one * other).sum() / one.norm() / other.norm()).item()


class Task(TinyTask):
    """Counts forward passes, and keeps the cosine of each update to the weight of ``net.2``."""

    def __init__(self, optimizer):
        super().__init__(optimizer=optimizer)
        self.num_forward, self.cosines = 0, []

    def training_step(self, batch, batch_idx):
        self.num_forward += 1
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args):
        weight = self.net[2].weight
        before = weight.detach().clone()
        super().optimizer_step(*args)
        self.cosines.append(cosine(weight - before, before))


def fit(folder, make, *, ckpt_path=None, save=None, **settings):
    task = Task(make)
    trainer = quiet_trainer(folder, **{"max_steps": 6} | settings)
    trainer.fit(task, ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return task


def sgd(net, **options):
    return OrthogonalSGD(net.parameters(), LR, **options)


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("algorithm", "clip"), [("norm", None), ("norm", 0.5), ("value", 0.01)])
def test_steps_of_sgd_are_orthogonal_and_need_one_forward_pass(
    tmp_path, precision, algorithm, clip
):
    settings = {"gradient_clip_algorithm": algorithm, "gradient_clip_val": clip}
    task = fit(tmp_path, sgd, precision=precision, **settings)
    plain = lambda net: torch.optim.SGD(net.parameters(), LR)  # noqa: E731
    assert max(map(abs, task.cosines)) < 1e-6
    assert max(map(abs, fit(tmp_path, plain, precision=precision, **settings).cosines)) > 1e-4
    assert task.num_forward == 6


def test_accumulated_batches_are_projected_as_one(tmp_path):
    """All batches are equal, so that four of them have the gradient of one."""
    whole = fit(tmp_path, sgd, max_steps=3)
    parts = fit(tmp_path, sgd, max_steps=1, accumulate_grad_batches=4)
    assert parts.num_forward == 4
    one = fit(tmp_path, sgd, max_steps=1)
    torch.testing.assert_close(parts.net.state_dict(), one.net.state_dict())
    assert not same(one.net, whole.net)


@pytest.mark.parametrize(("project", "is_orthogonal"), [("grad", False), ("update", True)])
def test_steps_of_adam_are_orthogonal_if_updates_are_projected(tmp_path, project, is_orthogonal):
    make = lambda net: OrthogonalAdamW(  # noqa: E731
        net.parameters(), 0.01, weight_decay=0.0, project=project
    )
    task = fit(tmp_path, make)
    assert (max(map(abs, task.cosines)) < 1e-6) == is_orthogonal


@pytest.mark.parametrize("project", ["grad", "update", "both"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, project):
    make = lambda net: OrthogonalAdamW(  # noqa: E731
        net.parameters(), 0.01, weight_decay=0.0, project=project
    )
    whole = fit(tmp_path, make)
    fit(tmp_path, make, max_steps=3, save=tmp_path / "run.ckpt")
    assert same(fit(tmp_path, make, ckpt_path=tmp_path / "run.ckpt"), whole)


def weights():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (4,))]


def give_gradients(parameters):
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) + parameter.detach()


def test_the_rest_is_the_optimizer_itself():
    parameters = weights()
    optimizer = orthogonal(torch.optim.AdamW)(parameters, 0.5, (0.8, 0.9), weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert isinstance(optimizer, OrthogonalOptimizer)
    assert type(optimizer) is OrthogonalAdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (0.5, (0.8, 0.9))
    plain = torch.optim.AdamW(parameters)
    assert optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    assert orthogonal(OrthogonalAdamW) is OrthogonalAdamW
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = parameters[0].detach().clone()
    optimizer.step()  # without a gradient
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert torch.equal(parameters[0], before)
    give_gradients(parameters)
    copied = copy.deepcopy(optimizer)
    others = copied.param_groups[0]["params"]
    give_gradients(others)
    copied.step()
    optimizer.step()
    assert torch.equal(others[0], parameters[0])
    assert not torch.equal(parameters[0], before)


def test_a_schedule_changes_the_size_of_steps():
    for factor in (1.0, 0.5):
        parameters = weights()
        optimizer = OrthogonalSGD(parameters, 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, f=factor: f)
        give_gradients(parameters)
        norm, before = parameters[0].grad.norm(), parameters[0].detach().clone()
        optimizer.step()
        schedule.step()
        moved = (parameters[0] - before).norm() / norm
        assert moved.item() == pytest.approx(0.1 * factor, rel=1e-4)


def test_hooks_run_once_and_around_the_whole_step():
    torch.optim.SGD(weights())  # has its own steps hooked
    parameters, calls = weights(), []
    optimizer = OrthogonalSGD(parameters, 0.1, project="update")
    before = parameters[0].detach().clone()

    def after(*args):
        calls.append(cosine(parameters[0] - before, before))

    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    optimizer.register_step_post_hook(after)
    give_gradients(parameters)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3
    assert calls == ["before", pytest.approx(0, abs=1e-6)]


def test_an_optimizer_from_a_configuration_has_hooks_too():
    class Fresh(torch.optim.SGD):
        """No optimizer of this class has been made before."""

    parameters, calls = weights(), []
    optimizer = Orthogonal(parameters, lambda params: Fresh(params, 0.1))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))
    give_gradients(parameters)
    optimizer.step()
    assert calls == ["after"]


def test_checkpoints_of_either_kind_load_into_the_other():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    groups = orthogonal_groups(model)
    plain = torch.optim.AdamW([{"params": g["params"]} for g in groups], lr=0.5)
    optimizer = OrthogonalAdamW(orthogonal_groups(model))
    optimizer.load_state_dict(plain.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 3
    assert [group["orthogonal"] for group in optimizer.param_groups] == ["row", "tensor", "off"]
    assert optimizer.param_groups[0]["role"] == "embedding"
    plain.load_state_dict(optimizer.state_dict())


def test_of_an_embedding_only_rows_that_were_looked_up_change():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    for groups in (orthogonal_groups(model), parameter_groups(model)):
        table = model[0].weight
        before = table.detach().clone()
        optimizer = OrthogonalSGD(groups, 0.1)
        optimizer.zero_grad()
        model(torch.tensor([2, 5])).square().sum().backward()
        optimizer.step()
        change = table.detach() - before
        assert change.abs().sum(1).nonzero().flatten().tolist() == [2, 5]
        assert max(abs(cosine(change[row], before[row])) for row in (2, 5)) < 1e-5


def test_a_weight_before_a_normalisation_is_stepped_as_ever():
    """Its scale has no effect, so that its gradient is orthogonal by itself (Euler)."""
    torch.manual_seed(0)
    steps = []
    for make in (torch.optim.SGD, OrthogonalSGD):
        model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.LayerNorm(5, eps=0.0))
        with torch.no_grad():
            model[0].weight.copy_(torch.arange(30.0).sin().view(5, 6))
        optimizer = make(model.parameters(), 0.1)
        x = torch.arange(48.0).cos().view(8, 6)
        (model(x) - x[:, :5]).square().mean().backward()
        optimizer.step()
        steps.append(model[0].weight.detach().clone())
    torch.testing.assert_close(*steps, rtol=1e-6, atol=1e-7)


def test_parameters_with_names_are_chosen_by_them():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = OrthogonalSGD(model.named_parameters(), 0.1, exclude=["0.*"])
    give_gradients(model.parameters())
    before = [layer.weight.grad.clone() for layer in model]
    optimizer.step()
    assert [torch.equal(m.weight.grad, old) for m, old in zip(model, before, strict=True)] == [
        True,
        False,
    ]


def test_the_paper_projects_everything():
    parameters = weights()
    optimizer = OrthogonalSGD(parameters, 0.1, everything=True)
    give_gradients(parameters)
    optimizer.step()
    assert max(abs(cosine(p.grad, p + 0.1 * p.grad)) for p in parameters) < 1e-6


SIZES = {"depth": 1, "vocab_size": 8, "sequence_len": 4}
FORMS = [
    (
        {
            "class_path": "spectral_lightning.optim.OrthogonalAdamW",
            "init_args": {"lr": 0.01, "betas": [0.8, 0.9], "project": "update", "weight_decay": 0},
        },
        torch.optim.AdamW,
    ),
    (
        {
            "class_path": "spectral_lightning.optim.Orthogonal",
            "init_args": {
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
                "project": "update",
            },
        },
        torch.optim.SGD,
    ),
    (
        {
            "class_path": "spectral_lightning.optim.Orthogonal",
            "init_args": {
                "optimizer": {
                    "class_path": "spectral_lightning.optim.MuonAdamW",
                    "init_args": {"lr": 0.01},
                },
                "project": "update",
            },
        },
        MuonAdamW,
    ),
]


@pytest.mark.parametrize(("form", "base"), FORMS)
def test_a_configuration_makes_the_optimizer(form, base):
    entry = form
    for _ in range(2):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LanguageModeling, "task")
        model = {"class_path": "GPT", "init_args": SIZES}
        arguments = {"model": model, "optimizer": entry}
        text = json.dumps({"task": {"class_path": "LanguageModeling", "init_args": arguments}})
        config = parser.parse_string(text)
        entry = config.task.init_args.optimizer.as_dict()
        task = parser.instantiate_classes(config).task
        optimizer = task.optimizer(parameter_groups(GPT(**SIZES)))
        assert isinstance(optimizer, base)
        assert isinstance(optimizer, OrthogonalOptimizer)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (0.01, 0)
        parameter = group["params"][0]
        give_gradients([parameter])
        before = parameter.detach().clone()
        optimizer.step()
        assert abs(cosine(parameter - before, before)) < 1e-5


def test_an_optimizer_whose_steps_need_a_closure_is_refused():
    with pytest.raises(TypeError, match="`optimizer_class` must step without a closure, got LBFGS"):
        orthogonal(torch.optim.LBFGS)


def test_weight_decay_that_undoes_the_projection_is_warned_of():
    with pytest.warns(UserWarning, match="The weight decay of OrthogonalSGD is added to gradients"):
        OrthogonalSGD(weights(), 0.1, weight_decay=0.1)
    with pytest.warns(UserWarning, match="The weight decay of OrthogonalSGD has no effect where"):
        Orthogonal(weights(), lambda p: torch.optim.SGD(p, weight_decay=0.1), project="update")


@pytest.mark.parametrize("attribute", ["ds_id", "_fsdp_flattened"])
def test_flattened_parameters_are_refused(attribute):
    parameters = weights()
    setattr(parameters[0], attribute, True)
    with pytest.raises(ValueError, match="`params` must keep the shapes of the model, got paramet"):
        OrthogonalSGD(parameters, 0.1)
    optimizer = OrthogonalSGD(weights(), 0.1)
    with pytest.raises(ValueError, match="got parameters that FSDP1 or DeepSpeed has flattened"):
        optimizer.add_param_group({"params": parameters})


def test_parameters_that_are_flattened_later_are_refused():
    optimizer = OrthogonalSGD(weights(), 0.1)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(16))]
    with pytest.raises(RuntimeError, match="OrthogonalSGD must step parameters in the model's sh"):
        optimizer.step()


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`project` must be one of grad, update, both, got 'all'"):
        OrthogonalSGD(weights(), 0.1, project="all")
    with pytest.raises(ValueError, match="`exclude` must be empty unless parameters have names"):
        OrthogonalSGD(weights(), 0.1, exclude=["0.*"])
    with pytest.raises(
        ValueError, match="A group's `orthogonal` must be one of off, tensor, row, "
    ):
        OrthogonalSGD([{"params": weights(), "orthogonal": "column"}], 0.1)
