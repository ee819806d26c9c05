import pytest
from transformers import AutoConfig

from spectral_lightning.models.spectra import PRESETS, SpectraConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 65}, "`hidden_size` must be a multiple of num_attention_heads=4, got 65"),
        ({"pooling": "max"}, "`pooling` must be one of .*'mean', 'cls'.*, got 'max'"),
        ({"norm": "none"}, "`norm` must be one of .*, got 'none'"),
        ({"semantic_dims": (64, 64)}, r"`semantic_dims` must be descending .*, got \(64, 64\)"),
        ({"entity_dims": (8, 0)}, r"`entity_dims` must be descending .*, got \(8, 0\)"),
        ({"entity_dims": ()}, "`entity_dims` must not be empty .* use_entity=False"),
        ({"semantic_head": "none", "hidden_size": 32}, "`semantic_dims` must begin with .*=32"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be >= 1, got 0"),
        ({"fractal_depth": -1}, "`fractal_depth` must be >= 0, got -1"),
        ({"hidden_dropout": 1.0}, r"`hidden_dropout` must be in \[0, 1\), got 1.0"),
        ({"max_length": 600}, "`max_length` must be at most max_position_embeddings=512, got 600"),
        ({"hiden_size": 64}, r"`overrides` must be settings .*, got \['hiden_size'\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SpectraConfig.preset("tiny", **settings)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"must be one of M456, M600, .*, tiny, got 'M2B'"):
        SpectraConfig.preset("M2B")


def test_the_default_is_m456():
    settings = SpectraConfig().to_dict()
    assert settings == SpectraConfig.preset("M456").to_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_config_comes_back(name, tmp_path):
    config = SpectraConfig.preset(name, pooling="cls", use_entity=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SpectraConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.semantic_dims == config.semantic_dims
    assert loaded.max_length == config.max_length
