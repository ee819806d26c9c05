from torch import nn

from spectral_lightning.optim import parameter_groups
from spectral_lightning.spectra.targets import find_targets


def test_optimizers_tell_its_parameters_apart(build):
    model = build()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["role"]: {names[id(parameter)] for parameter in group["params"]}
        for group in parameter_groups(model)
    }
    assert sum(map(len, groups.values())) == len(names)
    assert groups["head"] == {f"heads.{name}.output.weight" for name in model.head_dims()}
    assert len(groups["embedding"]) == 2
    attention = "encoder.layers.0.attention"
    assert f"{attention}.spectral.q_proj.weight" in groups["matrix"]
    gates = {f"{attention}.fractal", f"{attention}.spectral.gate", "heads.ranking.basis"}
    assert gates <= groups["vector"]


def test_every_weight_matrix_is_found_for_measurement(build):
    model = build()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {target.name for target in find_targets(model).targets} == linears
    assert len(linears) == 2 * (4 + 4 + 3) + 3 + 2 + 5
