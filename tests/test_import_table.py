"""The table of CONTRIBUTING.md: which package may import which, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spectral_lightning

ROOT = Path(spectral_lightning.__file__).parent
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}

# Packages of ours that each package may import, besides itself.
MAY_IMPORT = {
    "linalg": set(),
    "spectra": {"linalg"},
    "control": set(),
    "actuators": {"linalg", "nn"},
    "nn": {"linalg"},
    "losses": {"nn"},
    "models": {"nn", "losses", "linalg"},
    "optim": {"linalg", "actuators"},
    "data": set(),
    "tasks": {"models", "nn", "losses", "optim"},
    "dashboards": {"spectra"},
    "callbacks": {"spectra", "control", "actuators", "nn", "dashboards"},
    "cli": {"tasks", "data", "callbacks", "dashboards", "spectra", "models"},
}
MAY_IMPORT["testing"] = set(MAY_IMPORT) - {"cli"}

WITHOUT_LIGHTNING = ("linalg", "spectra", "control", "actuators", "nn", "losses", "models", "optim")

# Packages whose files are saved with a model and import each other relatively.
SELF_CONTAINED = ("spectral_lightning.models.spectra",)

DECOMPOSITIONS = {
    *("svd", "svdvals", "eig", "eigh", "eigvals", "eigvalsh", "qr", "pinv", "cond", "matrix_rank"),
    *("svd_lowrank", "pca_lowrank", "lobpcg"),
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, also inside functions."""
    package = ".".join(path.relative_to(ROOT.parent).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = node.level == 1 and package in SELF_CONTAINED
            assert node.level == 0 or relative, f"{path}: imports must be absolute"
            module = f"{package}.{node.module}" if relative else node.module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def decompositions(path: Path) -> set[str]:
    found = {name for name in imports(path) if name.startswith("torch.")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {
        name
        for name in found
        if name.startswith("torch.") and name.rsplit(".", 1)[-1] in DECOMPOSITIONS
    } | {name for name in found if name.endswith((".svd", ".qr"))}


def test_every_package_has_its_row_in_the_table():
    packages = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert packages <= set(MAY_IMPORT)
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_its_row_allows(package):
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if name.startswith("spectral_lightning.")
        and name.split(".")[1] not in allowed | {"__version__"}
    ]
    assert wrong == []


@pytest.mark.parametrize("package", WITHOUT_LIGHTNING)
def test_package_runs_without_lightning(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if name.split(".")[0] in LIGHTNING
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "others"), [("linalg", {"torch", "jaxtyping"}), ("control", set())]
)
def test_package_needs_nothing_but_the_standard_library_and(package, others):
    allowed = sys.stdlib_module_names | others | {"spectral_lightning"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if name.split(".")[0] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("package", [name for name in MAY_IMPORT if name != "linalg"])
def test_decompositions_are_written_only_in_linalg(package):
    wrong = {
        f"{path.relative_to(ROOT)} uses {name}"
        for path in sources(package)
        for name in decompositions(path)
    }
    assert wrong == set()


def test_callbacks_do_not_import_each_other():
    def is_callback(path: Path) -> bool:
        nodes = ast.walk(ast.parse(path.read_text()))
        bases = [base for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases]
        return any(ast.unparse(base).endswith("Callback") for base in bases)

    # `assr_v15` is no callback, and makes one under an old name.
    others = ("__init__.py", "base.py", "optimizer_hooks.py", "assr_v15.py")
    modules = [path for path in sources("callbacks") if path.name not in others]
    callbacks = {
        f"spectral_lightning.callbacks.{path.stem}" for path in filter(is_callback, modules)
    }
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules
        for name in imports(path)
        if name.rpartition(".")[0] in callbacks | {"spectral_lightning.callbacks"}
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["spectral_lightning", "spectral_lightning.cli.entry"])
def test_import_loads_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
