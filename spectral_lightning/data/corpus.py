"""English text that is at hand without a network: the documentation that ships with CPython.

`EmbeddedSource` reads `pydoc_data.topics` and the docstrings of the standard library from their
source files; nothing of the library is imported or run. The result differs between Python
versions, so `sys.version` belongs to the fingerprint. Reading other text lives in `sources`,
making pairs of the docstrings in `embedded_pairs`.
"""

import ast
import functools
import hashlib
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

# A complete installation has 1.9 MB; below this the sources are stripped or zipped away.
_MIN_CORPUS_CHARS = 100_000
# Tests, jokes, vendored wheels and the data of pydoc itself: not prose about the library.
_SKIPPED_MODULES = frozenset(
    {"antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "this", "turtledemo"}
)
_SKIPPED_FOLDERS = frozenset({"__pycache__", "_pyrepl", "site-packages", "test", "tests"})

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
"""What can have a docstring."""


class EmbeddedSource:
    """CPython's own documentation, one document per help topic and per docstring.

    About 2 MB of English in 7,000 documents, sorted by topic and then by file, the same on every
    machine with the same Python. Where the library has no sources (stripped or zipped
    installations) a small text that is part of this package takes its place, with a warning.
    """

    description = f"documentation of CPython {sys.version}"

    def fingerprint(self) -> str:
        """Return a digest of the Python version and of every file that is read."""
        digest = hashlib.blake2b(sys.version.encode(), digest_size=16)
        for path in (*_topic_files(), *library_files()):
            digest.update(path.read_bytes())
        digest.update(_fallback_text().encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield the documents in their fixed order.

        Warns:
            UserWarning: If CPython's documentation is missing and the small text is used.
        """
        documents = _parse_documents(_topic_files(), library_files())
        if sum(map(len, documents)) < _MIN_CORPUS_CHARS:
            warnings.warn(
                "This Python carries no documentation of its own (a stripped installation), so"
                " the embedded corpus is a 9 kB sample. Give `source` a text for real training.",
                stacklevel=2,
            )
            documents = tuple(_fallback_text().split("\n\n"))
        yield from documents


def _fallback_text() -> str:
    resource = resources.files("spectral_lightning.data") / "embedded.txt"
    return resource.read_text(encoding="utf-8").replace("\n\n\n", "\n\n")


def _topic_files() -> tuple[Path, ...]:
    spec = importlib.util.find_spec("pydoc_data")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [Path(folder) / "topics.py" for folder in folders or ()]
    return tuple(path for path in files if path.is_file())


def library_files() -> tuple[Path, ...]:
    """Return the source files of the standard library's public modules, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for name in sorted(sys.stdlib_module_names - _SKIPPED_MODULES):
        if name.startswith("_"):
            continue
        files.append(root / f"{name}.py")
        files.extend(sorted((root / name).rglob("*.py")))
    return tuple(
        path
        for path in files
        if path.is_file() and _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    )


@functools.lru_cache(maxsize=1)
def _parse_documents(topics: tuple[Path, ...], library: tuple[Path, ...]) -> tuple[str, ...]:
    """Parse the sources once per process (about 2 s); docstrings survive `-OO` this way."""
    documents: list[str] = []
    for path in topics:
        texts = _assigned_literal(_parse(path), "topics")
        documents.extend(texts[name] for name in sorted(texts))
    for path in library:
        documents.extend(text for _, text in docstrings(path))
    return tuple(documents)


def docstrings(path: Path) -> Iterator[tuple[Documented, str]]:
    """Yield what a source file documents, module first, each with its docstring."""
    for node in ast.walk(_parse(path)):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield node, text


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own string literals
        # Bytes, not text: the parser then honours a file's own coding declaration.
        return ast.parse(path.read_bytes(), filename=str(path))


def _assigned_literal(module: ast.Module, name: str) -> dict[str, str]:
    """Return the value of the module-level statement ``name = {...}``."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            literal: dict[str, str] = ast.literal_eval(node.value)
            return literal
    return {}
