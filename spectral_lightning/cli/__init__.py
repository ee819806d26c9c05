"""The command line: `spectral fit|validate|test|predict|generate|scan`.

Importing this package loads neither torch nor Lightning, so that help answers at once;
`SpectralCLI` lives in `spectral_lightning.cli.main`.
"""
