"""Backup of checkpoints to another place, such as a bucket or a network drive."""

import shutil
from typing import Any

import fsspec  # type: ignore[import-untyped]
import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override


class CheckpointBackup(pl.Callback):
    """Copy every n-th checkpoint of a run to another place.

    Every file that `Trainer.save_checkpoint` writes counts, whichever callback asked for it, and is
    copied once it is complete, with its number in front: ``000006-last.ckpt`` is the sixth. A copy
    is written under a temporary name and then renamed, so that one that was broken off is never
    taken for a checkpoint. Sharded checkpoints are copied as the folders they are. Process 0 alone
    copies, and the others wait for it at the next step. The count is part of the checkpoint itself,
    so that a resumed run goes on counting.

    A copy that fails ends no run: a warning says why, and the next one is tried.

    Args:
        destination: Folder, made if it does not exist; any path or URL that fsspec knows, such as
            ``s3://bucket/run``.
        every_n_saves: Checkpoints from one copy to the next, at least 1.
        keep_last: Copies of this run that are kept; None for all.

    Raises:
        ValueError: If `every_n_saves` or `keep_last` is below 1.

    Example:
        >>> backup = CheckpointBackup("memory://backup", every_n_saves=6, keep_last=3)
        >>> trainer = pl.Trainer(callbacks=[backup], logger=False, barebones=False)
    """

    def __init__(
        self, destination: str, every_n_saves: int = 6, keep_last: int | None = None
    ) -> None:
        super().__init__()
        if every_n_saves < 1:
            raise ValueError(f"`every_n_saves` must be >= 1, got {every_n_saves}.")
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"`keep_last` must be >= 1 or None, got {keep_last}.")
        self.destination = destination
        self.every_n_saves = every_n_saves
        self.keep_last = keep_last
        self._num_saves = 0
        self._copies: list[str] = []
        self._run: object | None = None

    @property
    @override
    def state_key(self) -> str:
        """Key of this instance's state in a checkpoint: where it copies to."""
        return self._generate_state_key(destination=self.destination)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._num_saves, self._copies = 0, []
        save, run = trainer.save_checkpoint, object()
        self._run = run

        def save_and_copy(filepath: Any, *args: Any, **kwargs: Any) -> None:
            name = fsspec.core.url_to_fs(str(filepath))[1].rpartition("/")[2]
            # Files of the tuner are hidden; a fit that broke off has no teardown.
            if self._run is not run or name.startswith("."):
                save(filepath, *args, **kwargs)
                return
            # Before the file is written, which holds this state: it counts itself.
            self._num_saves += 1
            is_due = self._num_saves % self.every_n_saves == 0
            if is_due:
                name = f"{self._num_saves:06d}-{name}"
                self._copies = [*(copy for copy in self._copies if copy != name), name]
            save(filepath, *args, **kwargs)
            if is_due and trainer.is_global_zero:
                self._copy(str(filepath), name)

        # No hook is called once a checkpoint is complete.
        trainer.save_checkpoint = save_and_copy  # type: ignore[method-assign]

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._run = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"num_saves": self._num_saves, "copies": list(self._copies)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_saves = state_dict["num_saves"]
        self._copies = list(state_dict["copies"])

    def _copy(self, path: str, name: str) -> None:
        """Copy a checkpoint, and drop the copies that are too many."""
        try:
            copy_atomically(path, self.destination, name)
            if self.keep_last is not None:
                self._copies = _drop_oldest(self.destination, self._copies, self.keep_last)
        except Exception as error:  # filesystems have errors of their own, and none may end a run
            rank_zero_warn(
                f"CheckpointBackup could not copy {path} to {self.destination}:"
                f" {type(error).__name__}: {error}. Training goes on; the next copy is due after"
                f" {self.every_n_saves} more checkpoints."
            )


def _drop_oldest(destination: str, copies: list[str], num_kept: int) -> list[str]:
    """Remove all but the last of some copies, and return those that are left."""
    folder, root = fsspec.core.url_to_fs(destination)
    found = [copy for copy in copies if folder.exists(f"{root}/{copy}")]
    for copy in found[:-num_kept]:
        folder.rm(f"{root}/{copy}", recursive=True)
    return found[-num_kept:]


def copy_atomically(path: str, destination: str, name: str) -> None:
    """Copy a file or folder between any two filesystems, under its final name only when complete.

    Args:
        path: File or folder, a path or URL.
        destination: Folder to copy into, made if it does not exist.
        name: Name of the copy; one that exists is replaced.
    """
    source, start = fsspec.core.url_to_fs(path)
    folder, root = fsspec.core.url_to_fs(destination)
    folder.makedirs(root, exist_ok=True)
    temporary, final = f"{root}/.{name}.partial", f"{root}/{name}"
    if folder.exists(temporary):  # of a copy that was broken off
        folder.rm(temporary, recursive=True)
    for file in source.find(start):
        target = temporary + file.removeprefix(start)
        folder.makedirs(target.rpartition("/")[0], exist_ok=True)
        with source.open(file, "rb") as reader, folder.open(target, "wb") as writer:
            shutil.copyfileobj(reader, writer, length=2**24)
    if folder.isdir(final):  # which a rename would move into
        folder.rm(final, recursive=True)
    folder.mv(temporary, final, recursive=True)
