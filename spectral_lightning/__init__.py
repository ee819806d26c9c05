"""Measure and steer the spectra of weight matrices while a model trains, in PyTorch Lightning.

Importing this package is cheap on purpose (no torch): the console command answers `--help`
before the heavy imports. Import from the packages below it, for example
``from spectral_lightning.callbacks import SpectralMonitor``.
"""

__version__ = "0.1.0"
