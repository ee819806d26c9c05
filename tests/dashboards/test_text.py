from hypothesis import example, given
from hypothesis import strategies as st

from spectral_lightning.dashboards.text import shorten


@given(name=st.text(), length=st.integers(0, 60))
@example(name="model.layers.0.self_attn.q_proj", length=12)
def test_short_name_never_exceeds_its_length_and_is_ascii(name, length):
    short = shorten(name, length)
    assert len(short) <= length
    assert short.isascii()


@given(length=st.integers(20, 60))
def test_short_names_of_neighbouring_layers_differ(length):
    names = [
        f"model.transformer.layers.{i}.{part}.{kind}_proj"
        for i in range(12)
        for part in ("attn", "mlp")
        for kind in ("q", "down")
    ]
    assert len({shorten(name, length) for name in names}) == len(names)


def test_name_that_fits_is_left_alone():
    assert shorten("model.blocks.0.attn.c_q", 23) == "model.blocks.0.attn.c_q"
