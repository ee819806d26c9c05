"""A checkpoint for the end of training, the one that no argument of `ModelCheckpoint` gives."""

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class FinalCheckpoint(ModelCheckpoint):
    """Save ``final.ckpt`` when training ends, and at no other time.

    Not saved if training breaks off. The other names are arguments of `ModelCheckpoint`:
    ``best`` is ``filename="best", monitor=..., mode=...``; ``last`` is ``save_last=True``; and
    ``step-500, step-1000, ...``, of which three are kept, is ``filename="step-{step}",
    auto_insert_metric_name=False, every_n_train_steps=500, monitor="step", mode="max",
    save_top_k=3``. Give those of fixed name ``enable_version_counter=False``, to replace files of
    an earlier run.

    Args:
        dirpath: Folder; None for where `ModelCheckpoint` saves.
        save_weights_only: Whether to leave out what only a resume needs.

    Example:
        >>> FinalCheckpoint().CHECKPOINT_NAME_LAST
        'final'
    """

    CHECKPOINT_NAME_LAST = "final"

    def __init__(self, dirpath: str | None = None, save_weights_only: bool = False) -> None:
        super().__init__(
            dirpath=dirpath,
            save_weights_only=save_weights_only,
            save_top_k=0,
            save_last=True,
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        """Key of its state in a checkpoint, which differs from a `ModelCheckpoint`'s."""
        return self._generate_state_key(name=self.CHECKPOINT_NAME_LAST)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing over: a resumed run ends anew."""
