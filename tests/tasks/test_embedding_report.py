import math

import pytest
import torch

from spectral_lightning.tasks.embedding_metrics import SimilarityCorrelation
from spectral_lightning.tasks.embedding_report import (
    TargetScore,
    log_values,
    report_rows,
    report_table,
    target_table,
)
from spectral_lightning.tasks.embedding_retrieval import CorpusRetrieval

TARGET = TargetScore(measure="spearman_768", value=0.825, source="a guide", split="STS-B test")


@pytest.fixture
def results():
    generator = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, 30, 8, generator=generator)
    pairs, retrieval = SimilarityCorrelation((8, 4)), CorpusRetrieval((8, 4), num_neighbours=3)
    pairs.update(first, first + noise, (first * (first + noise)).sum(-1))
    retrieval.update(first, first + noise, torch.arange(30) + 100, torch.arange(30))
    return pairs.compute(), retrieval.compute()


def test_log_values_name_the_measure_and_the_dimension(results):
    pairs, retrieval = results
    values = log_values(pairs)
    assert values["spearman_4"] == pairs.by_dim[4].spearman.item()
    assert set(values) == {
        *("num_pairs", "spearman_8", "pearson_8", "spearman_4", "pearson_4"),
    }
    values = log_values(retrieval)
    assert values["recall@5_4"] == retrieval.by_dim[4].recall[5].item()
    assert values["chance_recall@5"] == pytest.approx(5 / 30)
    assert (values["corpus_size"], values["num_queries"]) == (30, 30)
    assert values["chance_neighbour_overlap"] == 3 / 29
    assert values["neighbour_overlap_8"] == pytest.approx(1.0)


def test_report_has_a_row_for_each_measure_and_dimension(results):
    pairs, retrieval = results
    rows = report_rows({"semantic": [pairs, retrieval]}, num_resamples=100)
    measures = ["spearman", "recall@1", "recall@5", "recall@10", "ndcg@10", "mrr", "map"]
    assert [(row.measure, row.dim) for row in rows] == [
        (m, dim) for m in measures for dim in (8, 4)
    ]
    for row in rows:
        assert row.interval.low < row.interval.value < row.interval.high
        assert row.num_rows == 30
    full, prefix = (row for row in rows if row.measure == "ndcg@10")
    assert full.retained == 1.0
    assert prefix.retained == pytest.approx(prefix.interval.value / full.interval.value)
    assert full.interval.value == pytest.approx(retrieval.by_dim[8].ndcg.item())
    assert full.chance == pytest.approx(retrieval.chance.ndcg.item())
    assert rows == report_rows({"semantic": [pairs, retrieval]}, num_resamples=100)
    table = report_table(rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert table[2].startswith("| semantic | 8 | spearman | 0.")


def test_targets_show_progress_and_what_nobody_measured():
    assert TARGET.progress({"spearman_768": 0.6892}) == pytest.approx(0.8354, abs=1e-4)
    assert TARGET.progress({"spearman_256": 0.6892}) is None
    assert TARGET.progress({"spearman_768": math.nan}) is None
    (line,) = target_table({"spearman_768": 0.6892}, [TARGET]).splitlines()[2:]
    expected = "| spearman_768 | 0.6892 | 0.8250 | 83.5% | a guide (unverified) | STS-B test |"
    assert line == expected
    (line,) = target_table({}, [TARGET]).splitlines()[2:]
    assert "| not measured | 0.8250 | - |" in line


def test_targets_need_a_value_a_source_and_a_split():
    good = {"measure": "mrr_768", "value": 0.4, "source": "a guide", "split": "test"}
    with pytest.raises(ValueError, match=r"`value` must be above 0 and finite, got 0\.0"):
        TargetScore(**good | {"value": 0.0})
    with pytest.raises(ValueError, match="`source` and `split` must not be empty"):
        TargetScore(**good | {"source": ""})
