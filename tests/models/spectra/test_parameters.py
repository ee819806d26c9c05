import pytest
import torch

from spectral_lightning.models.spectra import SpectraConfig, SpectraModel, parameters_by_part


def on_meta(config):
    with torch.device("meta"):
        return SpectraModel(config)


def count(config):
    """Parameters of the model that the config builds, without memory for it."""
    return sum(parameter.numel() for parameter in on_meta(config).parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("M456", 466_406_896),
        ("M600", 719_202_800),
        ("M700", 1_036_249_328),
        ("M1B", 2_388_144_384),
    ],
)
def test_presets_have_the_sizes_of_the_original(name, expected):
    config = SpectraConfig.preset(name)
    assert count(config) == sum(parameters_by_part(config).values()) == expected


@pytest.mark.parametrize(
    ("name", "millions"), [("M456", 458), ("M600", 600), ("M700", 700), ("M1B", 1000)]
)
def test_advertised_presets_have_the_advertised_sizes(name, millions):
    assert count(SpectraConfig.preset(f"{name}-advertised")) == pytest.approx(
        1e6 * millions, rel=0.01
    )


def test_any_size_is_counted():
    sizes = {"hidden_size": 1152, "num_hidden_layers": 20, "num_attention_heads": 18}
    config = SpectraConfig(**sizes, spectral_dim=192)
    assert count(config) == sum(parameters_by_part(config).values()) == 493_759_848


def test_parts_are_those_of_m456():
    assert parameters_by_part(SpectraConfig.preset("M456")) == {
        "embeddings": 31_778_816,
        "attention": 24 * 4_198_400,
        "spectral branch": 24 * 788_033,
        "fractal weights": 24,
        "feed-forward": 24 * (12_594_176 - 2048),
        "layer norms": 24 * 4096 + 2048,
        "semantic head": 768 * 1027,
        "entity head": 384 * 1027,
        "retrieval head": 1024 * 1025 + 128 * 1025,
        "anchor head": 65_728,
        "ranking head": 10_212_608,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"use_spectral": False},
        {"use_anchor": False},
        {"use_entity": False},
        {"use_ranking": False},
        {"use_retrieval": False},
        {"semantic_dims": ()},
        {"fractal_depth": 0},
        {"fractal_depth": 3},
        {"learnable_fractal": False, "learnable_fusion": False},
        {"norm": "post", "final_norm": False, "embedding_norm": True, "type_vocab_size": 2},
        {"feedforward": "gelu", "intermediate_size": 100},
    ],
)
def test_the_closed_form_counts_every_option(settings):
    config = SpectraConfig.preset("tiny", **settings)
    assert count(config) == sum(parameters_by_part(config).values())


@pytest.mark.parametrize(
    ("setting", "name", "drop"),
    [
        ("use_spectral", ".attention.spectral", 24 * (4 * 1024 * 192 + 3 * 192 + 1024 + 1)),
        ("use_anchor", "heads.anchor", 64 * 1024 + 192),
        ("use_entity", "heads.entity", 384 * 1024 + 3 * 384),
        ("use_ranking", "heads.ranking", 10_212_608),
        ("use_retrieval", "heads.retrieval", 1024 * 1025 + 128 * 1025),
    ],
)
def test_what_is_off_is_not_built(setting, name, drop):
    model = on_meta(SpectraConfig(**{setting: False}))
    assert sum(parameter.numel() for parameter in model.parameters()) == 466_406_896 - drop
    assert not [module for module, _ in model.named_modules() if name in module]
