import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from spectral_lightning.testing.distributed import run_ranks

pytestmark = pytest.mark.distributed


def rank():
    return int(os.environ["LOCAL_RANK"])


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def test_ranks_talk_and_answer_in_order():
    def add(offset):
        dist.init_process_group("gloo", rank=rank(), world_size=2)
        total = torch.tensor([rank() + offset])
        dist.all_reduce(total)
        return rank(), total

    assert run_ranks(add, 10.0) == [(0, torch.tensor([21.0])), (1, torch.tensor([21.0]))]


def test_the_environment_of_the_parent_stays_as_it_was():
    before = dict(os.environ)
    assert run_ranks(lambda: os.environ["WORLD_SIZE"], num_ranks=1) == ["1"]
    assert dict(os.environ) == before


def test_the_first_failure_is_raised_and_the_others_do_not_wait_for_ever():
    def fail():
        dist.init_process_group("gloo", rank=rank(), world_size=2)
        if rank() == 1:
            raise ValueError("no such layer")
        dist.barrier()
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run_ranks(fail)
    assert time.monotonic() - start < 20
    assert "in fail" in str(caught.value.__cause__)


def test_an_exception_that_cannot_be_pickled_keeps_its_text():
    def fail():
        raise Unpicklable("this", "that")

    with pytest.raises(RuntimeError, match="Unpicklable: this and that"):
        run_ranks(fail, num_ranks=1)


def test_a_killed_rank_is_reported():
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="Rank 0 ended without an answer, with exit code -9"):
        run_ranks(die, num_ranks=1)


def test_ranks_that_hang_are_killed():
    with pytest.raises(TimeoutError, match=r"Ranks \[0, 1\] were not done after 0\.3 s"):
        run_ranks(time.sleep, 60, timeout=0.3)
