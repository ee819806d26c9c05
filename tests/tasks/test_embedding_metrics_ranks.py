import os

import pytest
import torch
import torch.distributed as dist

from spectral_lightning.tasks.embedding_metrics import AnomalyDetection, SimilarityCorrelation
from spectral_lightning.tasks.embedding_retrieval import CorpusRetrieval
from spectral_lightning.testing.distributed import run_ranks

pytestmark = pytest.mark.distributed

FIRST, SECOND = torch.randn(2, 21, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(21)
CASES = {
    "similarity": (lambda: SimilarityCorrelation((8, 4)), (FIRST, SECOND, FIRST[:, 0])),
    "anomaly": (AnomalyDetection, (FIRST[:, 0], SECOND[:, 0] > 0)),
    "retrieval": (lambda: CorpusRetrieval((8, 4)), (FIRST, SECOND, IDS + 100, IDS)),
}


def numbers(result):
    """All numbers of a result, depth first."""
    if isinstance(result, torch.Tensor):
        return result.flatten().tolist()
    if isinstance(result, dict):
        result = result.values()
    if isinstance(result, bool | int | float) or result is None:
        return [result]
    return [number for part in result for number in numbers(part)]


# A rank without rows has not called `update`, which torchmetrics warns of.
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_first", [21, 13, 0])
def test_ranks_with_unequal_rows_find_what_one_process_finds(case, num_first):
    make_metric, columns = CASES[case]

    def on_rank():
        rank = int(os.environ["LOCAL_RANK"])
        dist.init_process_group("gloo", rank=rank, world_size=2)
        metric = make_metric()
        start, stop = ((0, num_first), (num_first, 21))[rank]
        for row in range(start, stop, 5):
            metric.update(*(column[row : min(row + 5, stop)] for column in columns))
        return numbers(metric.compute())

    one = make_metric()
    one.update(*columns)
    first, second = run_ranks(on_rank)
    assert first == second == pytest.approx(numbers(one.compute()), abs=1e-6)
