import itertools
import math

import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.retrieval as reference
from torch.nn import functional as F

from spectral_lightning.tasks.embedding_retrieval import CorpusRetrieval, neighbour_overlap

MEASURES = ("ndcg@10", "mrr", "map", "recall@1", "recall@3", "recall@10", "recall@500")
KS = (1, 3, 10, 500)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_task(num_queries=25, dim=16):
    """Queries with one to three relevant texts each; some queries are texts of the corpus too."""
    texts, queries = noise(60, dim), noise(num_queries, dim, seed=1)
    query = torch.arange(60) % num_queries
    queries = queries + sum(texts[query == row].mean(0) for row in range(num_queries)) / 30
    query_ids = torch.where(torch.arange(num_queries) % 4 == 0, torch.arange(num_queries) + 30, -1)
    query_ids = torch.where(query_ids < 0, 1000 + torch.arange(num_queries), query_ids)
    return queries[query], texts, query_ids[query], torch.arange(60)


def retrieve(anchors, positives, anchor_ids, positive_ids, dims=(16,), **settings):
    metric = CorpusRetrieval(dims, **{"ks": KS} | settings)
    metric.update(anchors, positives, anchor_ids, positive_ids)
    return metric.compute()


def judge(cosines, relevant):
    """The measures by torchmetrics, of one query without ties."""
    cosines = cosines + 2  # torchmetrics finds no relevant text with a score below 0
    measures = {
        "ndcg@10": reference.retrieval_normalized_dcg(cosines, relevant, top_k=10),
        "mrr": reference.retrieval_reciprocal_rank(cosines, relevant),
        "map": reference.retrieval_average_precision(cosines, relevant),
    }
    for k in KS:
        measures[f"recall@{k}"] = reference.retrieval_recall(cosines, relevant, top_k=k)
    return {name: value.item() for name, value in measures.items()}


@pytest.mark.parametrize("dim", [16, 5])
@pytest.mark.parametrize("max_elements", [2**24, 130, 1])
def test_every_query_is_judged_as_by_torchmetrics_and_sklearn(dim, max_elements):
    anchors, positives, anchor_ids, positive_ids = make_task()
    result = retrieve(
        anchors, positives, anchor_ids, positive_ids, (16, 5), max_elements=max_elements
    )
    assert (result.num_queries, result.corpus_size) == (25, 60)
    corpus = F.normalize(positives[:, :dim], dim=-1)
    for row, query_id in enumerate(anchor_ids.unique()):
        query = F.normalize(anchors[anchor_ids == query_id][0, :dim], dim=-1)
        candidate = positive_ids != query_id
        relevant = (anchor_ids == query_id)[candidate]
        cosines = (corpus @ query)[candidate]
        found = {name: value[row] for name, value in result.per_query[dim].named().items()}
        assert found == pytest.approx(judge(cosines, relevant), abs=1e-6)
        gain = sklearn.metrics.ndcg_score(relevant[None], cosines[None], k=10)
        assert found["ndcg@10"].item() == pytest.approx(gain, abs=1e-6)
    means = {name: value.mean() for name, value in result.per_query[dim].named().items()}
    assert result.by_dim[dim].named() == means


def test_a_ranking_made_by_hand():
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4])
    texts = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([[1.0, 0.0]]).expand(2, 2)
    others = torch.tensor([[-1.0, 0.0]]).expand(2, 2)
    result = retrieve(
        torch.cat([query, others]),
        texts[[1, 3, 0, 2]],
        torch.tensor([8, 8, 9, 9]),
        torch.tensor([101, 103, 100, 102]),
        dims=(2,),
    )
    first = {name: value[0].item() for name, value in result.per_query[2].named().items()}
    ideal = 1 + 1 / math.log2(3)
    assert first == pytest.approx(  # relevant at ranks 2 and 4 of 4
        {
            "recall@1": 0.0,
            "recall@3": 0.5,
            "recall@10": 1.0,
            "recall@500": 1.0,
            "ndcg@10": (1 / math.log2(3) + 1 / math.log2(5)) / ideal,
            "mrr": 0.5,
            "map": 0.5,
        }
    )


def test_ties_count_as_the_mean_over_their_orders():
    levels = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.5, 0.1])
    relevant = torch.tensor([False, True, True, False, False, True])
    vectors = torch.stack([levels, (1 - levels**2).sqrt()], dim=1)
    query = torch.tensor([[1.0, 0.0]]).expand(6, 2)
    result = retrieve(query, vectors, torch.where(relevant, 8, 9), 100 + torch.arange(6), dims=(2,))
    orders = [
        judge(levels - 1e-3 * torch.tensor([0, *order, 0]), relevant)
        for order in itertools.permutations(range(4))
    ]
    expected = {name: sum(order[name] for order in orders) / len(orders) for name in MEASURES}
    found = {name: value[0].item() for name, value in result.per_query[2].named().items()}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("spread", [0.0, 1e-7])
def test_a_collapsed_model_is_at_chance(spread):
    anchors, positives, *ids = make_task()
    constant = torch.full((60, 16), 0.25)
    result = retrieve(
        constant + spread * anchors.sign(), constant + spread * positives.sign(), *ids
    )
    found, chance = result.by_dim[16].named(), result.chance.named()
    assert {name: found[name].item() for name in MEASURES} == pytest.approx(
        {name: chance[name].item() for name in MEASURES}, abs=1e-6
    )
    assert found["mrr"] < 0.2


def test_chance_is_what_random_rankings_get():
    anchors, positives, *ids = make_task()
    chance = retrieve(anchors, positives, *ids).chance.named()
    runs = []
    for seed in range(60):
        # Vectors per text, so that the vectors of a query stay the same in all its rows.
        vectors = noise(60, 16, seed=seed)
        runs.append(retrieve(noise(25, 16, seed=seed + 99)[ids[0] % 25], vectors, *ids))
    for name in MEASURES:
        found = torch.stack([run.by_dim[16].named()[name] for run in runs])
        error = found.std() / math.sqrt(len(runs))
        assert abs(found.mean() - chance[name]) <= 4 * error, name


def test_chance_of_recall_is_k_over_the_corpus():
    positives, ids = noise(40, 16), torch.arange(40)
    chance = retrieve(positives, positives, ids + 1000, ids).chance
    harmonic = sum(1 / rank for rank in range(1, 41))
    assert {k: value.item() for k, value in chance.recall.items()} == pytest.approx(
        {1: 1 / 40, 3: 3 / 40, 10: 10 / 40, 500: 1.0}
    )
    assert chance.mrr.item() == chance.map.item() == pytest.approx(harmonic / 40)


def test_texts_and_queries_seen_again_count_once():
    task = make_task()
    twice = [torch.cat([column, column[10:30]]) for column in task]
    once, again = retrieve(*task), retrieve(*twice)
    assert (again.num_queries, again.corpus_size) == (once.num_queries, once.corpus_size)
    assert torch.equal(again.per_query[16].ndcg, once.per_query[16].ndcg)


def test_a_query_does_not_find_itself():
    vectors, ids = torch.eye(4), torch.arange(4)
    # Each text is a query for the next one, and is nearest to itself.
    result = retrieve(vectors, vectors.roll(-1, 0), ids, ids.roll(-1), dims=(4,), ks=(1, 3))
    assert result.by_dim[4].recall[3] == 1.0
    assert result.by_dim[4].recall[1].item() == pytest.approx(1 / 3)  # three tied candidates
    alone = CorpusRetrieval((4,))
    alone.update(vectors, vectors, ids, ids)
    with pytest.raises(ValueError, match="got 4 queries that are their only relevant text"):
        alone.compute()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_vectors_are_ranked_in_float32(dtype):
    anchors, positives, *ids = make_task()
    anchors, positives = anchors.to(dtype), positives.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        half = retrieve(anchors, positives, *ids)
    full = retrieve(anchors.float(), positives.float(), *ids)
    assert torch.equal(half.per_query[16].map, full.per_query[16].map)


def test_rows_that_are_not_valid_do_not_count():
    task = make_task()
    valid = torch.arange(60) < 40
    metric = CorpusRetrieval((16,), ks=KS)
    metric.update(*task, valid=valid)
    found = metric.compute()
    assert found.corpus_size == 40
    expected = retrieve(*(column[valid] for column in task))
    assert torch.equal(found.per_query[16].mrr, expected.per_query[16].mrr)


def test_vectors_that_are_not_finite_give_nan_and_a_warning():
    anchors, positives, *ids = make_task()
    positives[3, 2] = math.nan
    with pytest.warns(UserWarning, match="retrieval measures are NaN: some vectors"):
        result = retrieve(anchors, positives, *ids, num_neighbours=3)
    assert all(value.isnan() for value in result.by_dim[16].named().values())
    assert result.per_query[16].ndcg.isnan().all()
    assert result.neighbour_overlap is None
    assert not result.chance.mrr.isnan()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bad_input_is_refused():
    metric = CorpusRetrieval((8,))
    with pytest.raises(ValueError, match="must see at least one row"):
        metric.compute()
    with pytest.raises(ValueError, match=r"`positive_ids` must have shape \(5,\), got \(4,\)"):
        metric.update(torch.ones(5, 8), torch.ones(5, 8), torch.arange(5), torch.arange(4))
    with pytest.raises(ValueError, match=r"`ks` and `max_elements` must be >= 1"):
        CorpusRetrieval((8,), ks=(0,))


@pytest.mark.parametrize("max_elements", [2**24, 150])
def test_overlap_counts_shared_neighbours(max_elements):
    vectors = noise(50, 16)
    overlap = neighbour_overlap(vectors, (16, 4), 7, max_elements)
    nearest = {}
    for dim in (16, 4):
        unit = F.normalize(vectors[:, :dim], dim=-1)
        nearest[dim] = (unit @ unit.T).fill_diagonal_(-2).topk(7).indices.tolist()
    pairs = zip(nearest[16], nearest[4], strict=True)
    shared = sum(len(set(full) & set(prefix)) for full, prefix in pairs) / (50 * 7)
    assert overlap.by_dim == pytest.approx({16: 1.0, 4: shared})
    assert overlap.chance == 7 / 49
    anchors, positives, *ids = make_task()
    of_metric = retrieve(anchors, positives, *ids, num_neighbours=7).neighbour_overlap
    assert of_metric == neighbour_overlap(positives, (16,), 7)


def test_overlap_of_a_collapsed_model_is_at_chance():
    overlap = neighbour_overlap(torch.ones(30, 8), (8, 4), num_neighbours=5)
    assert overlap.by_dim == pytest.approx({8: 5 / 29, 4: 5 / 29})
    assert neighbour_overlap(torch.ones(3, 8), (8,), num_neighbours=5).by_dim == {8: 1.0}
    with pytest.raises(ValueError, match=r"`vectors` must have shape .* got \(1, 8\) and 5"):
        neighbour_overlap(torch.ones(1, 8), (8,), num_neighbours=5)
