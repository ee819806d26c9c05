"""Spectra: a sentence-embedding model with enriched attention and heads of several widths.

A saved model carries its code, so that it loads where this library is not installed: the files here
import each other relatively, and otherwise only torch and transformers.
"""

from transformers import AutoConfig, AutoModel

from .configuration_spectra import SpectraConfig
from .modeling_spectra import SpectraModel, SpectraOutput
from .parameters import parameters_by_part
from .presets import PRESETS

AutoConfig.register(SpectraConfig.model_type, SpectraConfig, exist_ok=True)
AutoModel.register(SpectraConfig, SpectraModel, exist_ok=True)
SpectraConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
SpectraModel.register_for_auto_class("AutoModel")  # type: ignore[no-untyped-call]

__all__ = ["PRESETS", "SpectraConfig", "SpectraModel", "SpectraOutput", "parameters_by_part"]
