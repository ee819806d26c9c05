import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_ranks.py")


def start(text, cache, world_size):
    """Run the script once per rank and return what each rank prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(text), str(cache), str(world_size)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_learn_and_evaluate_as_one(make_data, tmp_path):
    make_data()  # writes the text
    text = tmp_path / "notes.txt"
    (one,) = start(text, tmp_path / "cache", 1)
    first, second = start(text, tmp_path / "cache", 2)
    assert first == second
    for name in ("valid/loss", "valid/bpb", "weights"):
        assert first[name] == pytest.approx(one[name], rel=1e-5), name
