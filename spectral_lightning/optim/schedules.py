"""Learning-rate schedules, as torch schedulers that are stepped after every optimizer step."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupConstantWarmdown(LambdaLR):
    """Raise the learning rates linearly, hold them, and lower them linearly at the end.

    The step with index ``i`` (from 0) uses the group's rate times ``(i + 1) / warmup_steps``
    during warm-up, 1 in the middle, and from ``num_steps * (1 - warmdown_fraction)`` on a
    straight line to `final_fraction`, which holds for all steps after `num_steps`. Step it once
    per optimizer step (``interval: step`` in Lightning).

    A restored scheduler keeps its step and uses the settings it was built with, so a finished
    run can be prolonged by a larger `num_steps`.

    Args:
        optimizer: Its groups' learning rates at this moment are the rates of the middle part.
        num_steps: Length of the whole run in optimizer steps, at least 1; the trainer's
            `max_steps`.
        warmup_steps: Optimizer steps of the rise, in ``[0, num_steps]``. Default from nanochat,
            November 2025.
        warmdown_fraction: Share of `num_steps` spent on the fall, in ``[0, 1]``, rounded to whole
            steps; 0 never falls. Default from nanochat, November 2025.
        final_fraction: Rate after the fall as a share of the rate of the middle part, in
            ``[0, 1]``. Default from nanochat, November 2025.
        last_epoch: Index of the last step made; -1 starts afresh.

    Raises:
        ValueError: If an argument is outside its range, or warm-up and warm-down overlap.

    References:
        Karpathy (2025), nanochat, ``get_lr_multiplier`` in scripts/base_train.py.
        https://github.com/karpathy/nanochat
        Haegele et al. (2024), "Scaling laws and compute-optimal training beyond fixed training
        durations", sec. 3. https://arxiv.org/abs/2405.18392

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> scheduler = WarmupConstantWarmdown(optimizer, 5, warmup_steps=2, warmdown_fraction=0.4)
        >>> rates = []
        >>> for _ in range(6):
        ...     rates.append(scheduler.get_last_lr()[0])
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_steps: int,
        warmup_steps: int = 0,
        warmdown_fraction: float = 0.2,
        final_fraction: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"`num_steps` must be >= 1, got {num_steps}.")
        if not 0 <= warmup_steps <= num_steps:
            raise ValueError(
                f"`warmup_steps` must be in [0, num_steps={num_steps}], got {warmup_steps}."
            )
        for name, value in (
            ("warmdown_fraction", warmdown_fraction),
            ("final_fraction", final_fraction),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {value}.")
        warmdown_steps = round(warmdown_fraction * num_steps)
        if warmup_steps + warmdown_steps > num_steps:
            raise ValueError(
                f"`warmup_steps` must leave room for the warm-down of {warmdown_steps} out of "
                f"num_steps={num_steps} steps, got {warmup_steps}; lower one of the two."
            )

        # A function, so that LambdaLR leaves it out of the checkpoint: settings are not state.
        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            remaining_steps = max(num_steps - step, 0)
            if remaining_steps >= warmdown_steps:
                return 1.0
            return final_fraction + (1 - final_fraction) * remaining_steps / warmdown_steps

        super().__init__(optimizer, factor, last_epoch)
