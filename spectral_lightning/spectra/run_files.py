"""Files of a run that a later run must not overwrite."""

from pathlib import Path


def set_aside(path: Path) -> None:
    """Rename another run's file to the first free numbered name, as ``<name>.1.<suffix>``."""
    number = 1
    while (free := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(free)
