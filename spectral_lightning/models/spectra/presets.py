"""Named shapes of Spectra models."""

from typing import Any

_M456 = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "spectral_dim": 192,
    "max_length": 160,
}
_M600 = {
    "hidden_size": 1280,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "spectral_dim": 256,
    "max_length": 320,
}
_M700 = {
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "spectral_dim": 384,
    "max_length": 384,
}
_M1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "spectral_dim": 512,
    "max_length": 512,
}

# The original's four shapes have 466, 719, 1036 and 2388 million parameters. The advertised
# variants change one or two numbers so that the count is what the name of the original says.
PRESETS: dict[str, dict[str, Any]] = {
    "M456": _M456,
    "M600": _M600,
    "M700": _M700,
    "M1B": _M1B,
    "M456-advertised": _M456 | {"spectral_dim": 112},
    "M600-advertised": _M600 | {"intermediate_size": 3840},
    "M700-advertised": _M700 | {"intermediate_size": 3072},
    "M1B-advertised": _M1B | {"num_hidden_layers": 16, "intermediate_size": 5632},
    "mini": {  # the shape of MiniLM-L6: 30 million parameters, trains on a CPU
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "spectral_dim": 96,
        "max_length": 128,
        "semantic_dims": (384, 256, 128),
        "entity_dims": (192, 96, 48),
        "ranking_dim": 768,
    },
    "tiny": {  # for tests: 0.3 million parameters with a vocabulary of 1000
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "spectral_dim": 16,
        "max_length": 64,
        "semantic_dims": (64, 48, 32),
        "entity_dims": (48, 32, 16),
        "retrieval_dim": 32,
        "anchor_dim": 16,
        "ranking_dim": 96,
        "anomaly_dim": 128,
    },
}
"""Settings of `SpectraConfig` by the name of the preset."""
