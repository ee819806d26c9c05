"""Run a function in several processes that can talk over gloo, as fast as a unit test.

Processes are forked from one that has imported torch and Lightning already, so that a fit on two
ranks takes tenths of a second instead of ten. Lightning finds the environment of a launcher and
starts no process of its own. Needs an operating system that can fork (not Windows).
"""

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

import torch
import torch.distributed

_Result = TypeVar("_Result")


def run_ranks(
    function: Callable[..., _Result], *args: Any, num_ranks: int = 2, timeout: float = 60.0
) -> list[_Result]:
    """Call a function on every rank of a new group of forked processes.

    Each process has ``MASTER_ADDR``, ``MASTER_PORT``, ``WORLD_SIZE``, ``NODE_RANK`` and
    ``LOCAL_RANK`` set, and computes on one thread. The function makes the process group itself, or
    has a Trainer make it: ``Trainer(accelerator="cpu", devices=2, strategy="ddp")``.

    Args:
        function: Function to call; any callable, also a local one.
        args: Its arguments, the same on every rank.
        num_ranks: Number of processes.
        timeout: Seconds after which all processes are killed.

    Returns:
        What the function returned on each rank, in the order of the ranks; it has to be picklable.

    Raises:
        Exception: What the function raised on the rank that failed first, with the traceback of
            that process as its cause. The other ranks are killed.
        RuntimeError: If a process ended without an answer.
        TimeoutError: If the ranks are not done in time.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    ranks: dict[Connection, int] = {}
    processes: list[ForkProcess] = []
    try:
        for rank in range(num_ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(sender, rank, num_ranks, port, function, args)
            )
            with warnings.catch_warnings():
                # Python >= 3.12 warns of threads that hold locks; ours wait for work.
                warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
                process.start()
            sender.close()
            ranks[receiver] = rank
            processes.append(process)
        return _collect(ranks, processes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for receiver in ranks:
            receiver.close()


def _collect(
    ranks: dict[Connection, int], processes: list[ForkProcess], timeout: float
) -> list[Any]:
    """Wait for the answer of every rank; the first failure ends the waiting."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        waiting = [receiver for receiver, rank in ranks.items() if rank not in results]
        answered = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not answered:
            silent = sorted(ranks[receiver] for receiver in waiting)
            raise TimeoutError(f"Ranks {silent} were not done after {timeout:g} s.")
        for receiver in answered:
            assert isinstance(receiver, Connection)
            rank = ranks[receiver]
            try:
                value, error, text = pickle.loads(receiver.recv_bytes())
            except EOFError:
                processes[rank].join()
                raise RuntimeError(
                    f"Rank {rank} ended without an answer, with exit code"
                    f" {processes[rank].exitcode}."
                ) from None
            if error is not None:
                raise error from RuntimeError(f"raised on rank {rank}\n{text}")
            results[rank] = value
    for process in processes:  # lets them write out what they printed
        process.join(max(0.0, deadline - time.monotonic()))
    return [results[rank] for rank in sorted(results)]


def _run_rank(
    sender: Connection,
    rank: int,
    num_ranks: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Body of a forked process."""
    # The threads of the parent's OpenMP pool do not exist here: to wait for them is for ever.
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    value, error, text = None, None, ""
    try:
        value = function(*args)
    except BaseException as caught:  # also `pytest.skip`; the parent raises it
        error, text = _portable(caught), traceback.format_exc()
    finally:
        if torch.distributed.is_initialized() and error is None:
            torch.distributed.destroy_process_group()
    sender.send_bytes(pickle.dumps((value, error, text)))
    sender.close()
    sys.stdout.flush()


def _portable(error: BaseException) -> BaseException:
    """Return the exception, or one that says the same where it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PicklingError, TypeError, AttributeError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
