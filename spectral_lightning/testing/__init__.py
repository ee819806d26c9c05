"""What the tests, notebooks and scripts of this library are trusted by.

`contracts`, `tasks` and `distributed` load Lightning, so they are imported from their modules.
"""

from spectral_lightning.testing.host_sync import RefuseHostSync
from spectral_lightning.testing.matrices import MATRIX_CASES, MatrixCase, matrix_with_spectrum

__all__ = ["MATRIX_CASES", "MatrixCase", "RefuseHostSync", "matrix_with_spectrum"]
