"""The recommender that judges IDs: its beam, its data and its figures. Needs none of the packages of the benchmarks."""

import math
import sys

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import bench_recommender as bench

SHAPES = [(40,), (4, 5, 6), (3, 50)]


def make_catalogue(sizes, n=30, seed=0) -> bench.Catalogue:
    """Items with random IDs, of which a few are shared."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(size, (n,), generator=generator) for size in sizes], dim=1)
    return bench.Catalogue(codes, popularity=torch.randint(9, (n,), generator=generator))


def write_histories(path, rows) -> None:
    schema = {"split": pl.String, "history": pl.List(pl.String), "target": pl.String}
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(path)


@pytest.mark.parametrize("sizes", SHAPES)
def test_beam_is_brute_force_over_all_items(sizes):
    catalogue = make_catalogue(sizes)
    torch.manual_seed(0)
    model = bench.Recommender(catalogue).eval()
    for table in model.tables:
        table.weight.data *= 30  # probabilities that differ
    rows = bench.Rows(torch.tensor([[3, 7, 1], [4, -1, -1], [9, 9, -1]]), torch.tensor([3, 1, 2]), torch.zeros(3))
    expected = torch.zeros(3, len(catalogue.codes))  # the log-probability of every item's codes
    with torch.no_grad():
        for row, items in enumerate(rows.history):
            state = model.read(items[items >= 0].unsqueeze(0))[0, -1].expand(len(catalogue.codes), -1)
            for level, code in enumerate(catalogue.codes.T):
                every = model.logits(level, state).log_softmax(-1)
                expected[row] += every.gather(1, code.unsqueeze(1)).squeeze(1)
                state = model.write(level, state, code)
    ids, scores = bench.beam_search(model, catalogue, rows, width=60)
    for row in range(3):
        found = [i for i in ids[row].tolist() if i >= 0]
        assert sorted(found) == list(range(len(catalogue.items_of_id)))  # every ID that exists, once
        of_id = dict(zip(catalogue.id_of_item.tolist(), expected[row].tolist(), strict=True))
        assert scores[row, : len(found)].tolist() == pytest.approx([of_id[i] for i in found], abs=1e-4)
        assert scores[row].diff().nan_to_num().max() <= 0
    best = bench.beam_search(model, catalogue, rows, width=5)[0]
    if len(sizes) == 1:  # nothing can be lost on the way
        assert torch.equal(best, ids[:, :5])
    assert best.shape == (3, 5)
    assert (best >= 0).all()


def test_no_target_is_learned_from(tmp_path, monkeypatch):
    """Other targets and other valid and test histories leave the weights as they are."""
    items, path = pl.Series("parent_asin", [f"i{n}" for n in range(12)]), tmp_path / "histories.parquet"
    train = [("train", ["i0", "i1", "i2"], None), ("train", ["i3", "i4"], None), ("train", ["i5", "i0", "i2"], None)]
    learned = []
    monkeypatch.setattr(bench.Recommender, "loss", record(learned, bench.Recommender.loss))
    for held_out in (["i9", "i10"], ["i7", "i8"]):
        write_histories(path, [*train, *((split, ["i6", held_out[0]], held_out[1]) for split in ("valid", "test"))])
        splits = bench.read_histories(path, items)
        catalogue = bench.Catalogue(torch.arange(12).unsqueeze(1), torch.ones(12))
        bench.train(catalogue, splits, steps=10, seed=0)
    first, second = learned[:10], learned[10:]
    assert all(map(torch.equal, first, second))
    assert {item for batch in learned for item in batch.flatten().tolist()} == {-1, 0, 1, 2, 3, 4, 5}


def record(seen, loss):
    def recorded(self, history):
        seen.append(history)
        return loss(self, history)

    return recorded


def test_every_position_is_a_target_and_padding_changes_nothing():
    catalogue = make_catalogue((4, 5))
    torch.manual_seed(0)
    model = bench.Recommender(catalogue).eval()
    losses = [model.loss(torch.tensor([history])) for history in ([3], [3, 7], [3, 7, 1], [3, 7, 1, -1, -1])]
    assert losses[0] == 0 < losses[1] < losses[2]
    assert torch.allclose(losses[2], losses[3])
    both = model.loss(torch.tensor([[3, 7, 1], [3, 7, -1]]))
    assert torch.allclose(both, losses[1] + losses[2])
    reads = [model.read(torch.tensor([history]))[0, 1] for history in ([3, 7], [3, 7, 1])]
    assert torch.allclose(*reads, atol=1e-6)  # what comes later is not seen


def test_histories(tmp_path, capsys):
    items, path = pl.Series("parent_asin", ["a", "b", "c"]), tmp_path / "histories.parquet"
    rows = [("train", ["a", "gone", "b"], None), ("train", ["gone", "c"], None), ("valid", ["a"], "b")]
    write_histories(path, [*rows, ("test", ["a", "gone", "b"], "c"), ("test", ["a"], "gone"), ("test", ["gone"], "a")])
    splits = bench.read_histories(path, items)
    assert splits["train"].history.tolist() == [[0, 1]]
    assert splits["train"].lengths.tolist() == [2]
    assert splits["valid"].history.tolist() == [[0]]
    assert splits["valid"].target.tolist() == [1]
    assert splits["test"].history.tolist() == [[0, 1]]
    assert splits["test"].target.tolist() == [2]
    out = capsys.readouterr().out
    assert "1 of 2 train histories" in out
    assert "1 of 3 test histories" in out
    assert "left out 4 of 11 items" in out
    with pytest.raises(SystemExit, match="no train history of items with an embedding"):
        bench.read_histories(path, pl.Series("parent_asin", ["x"]))


def test_histories_keep_their_last_items(tmp_path):
    names, path = [str(n) for n in range(80)], tmp_path / "histories.parquet"
    write_histories(path, [("train", names, None), ("valid", names[:2], "3"), ("test", names[:-1], names[-1])])
    splits = bench.read_histories(path, pl.Series("parent_asin", names))
    assert splits["train"].history.tolist() == [list(range(80 - bench.MAX_ITEMS - 1, 80))]  # one more: a target
    assert splits["test"].history.tolist() == [list(range(79 - bench.MAX_ITEMS, 79))]


def test_shared_ids_are_ranked_in_turn():
    codes = torch.tensor([[0, 0], [0, 0], [1, 0], [0, 0], [1, 1]])
    catalogue = bench.Catalogue(codes, popularity=torch.tensor([1, 5, 9, 1, 0]))
    assert catalogue.id_of_item.tolist() == [0, 0, 1, 0, 2]
    ids = torch.tensor([[1, 0, 2]]).repeat(5, 1)  # item 2, then items 1, 0, 3 by popularity and order, then item 4
    assert catalogue.ranks(ids, torch.arange(5)).tolist() == [2, 1, 0, 3, 4]
    assert catalogue.ranks(torch.tensor([[1, -1, -1]]), torch.tensor([3])).tolist() == [math.inf]
    assert catalogue.ranks(torch.tensor([[0, -1, -1]]), torch.tensor([3])).tolist() == [2]


def test_figures_of_ranks():
    found = bench.figures_of(torch.tensor([0.0, 3.0, 9.0, 10.0, 19.0, 20.0, math.inf, math.inf]))
    assert [found[f"recall@{k}"] for k in (1, 5, 10, 20)] == [1 / 8, 2 / 8, 3 / 8, 5 / 8]
    assert found["ndcg@10"] == pytest.approx((1 + 1 / math.log2(5) + 1 / math.log2(11)) / 8)


def test_text_neighbours():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [1.0, 0.4]])
    history = torch.tensor([[2, 0], [0, -1], [2, -1]])
    rows = bench.Rows(history, torch.tensor([2, 1, 1]), torch.tensor([1, 2, 0]))  # ranks 0, 2, 2
    found = bench.text_neighbours(x, rows)
    assert found["recall@1"] == pytest.approx(1 / 3)
    assert found["ndcg@10"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    equal = bench.text_neighbours(torch.ones(40, 2), rows)  # in order, without the last item: ranks 0, 1, 0
    assert equal["recall@1"] == pytest.approx(2 / 3)
    assert equal["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3) + 1) / 3)


def test_it_learns_what_follows(tmp_path, capsys, monkeypatch):
    """The whole command, for twelve items in a ring: after each comes the next one."""
    n = 12
    names = [f"i{i}" for i in range(n)]
    embeddings = tmp_path / "C_items_with_embeddings.parquet"
    vectors = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    pl.DataFrame({"parent_asin": names, "embedding": vectors}).write_parquet(embeddings)
    ring = lambda start, length: [names[(start + step) % n] for step in range(length)]  # noqa: E731
    rows = [("train", ring(start, length), None) for start in range(n) for length in (2, 4, 6)]
    rows += [(split, ring(start, 3), names[(start + 3) % n]) for split in ("valid", "test") for start in range(n)]
    write_histories(tmp_path / "histories.parquet", rows)
    ids = {
        "parent_asin": names,
        "semantic_id_0": [i % 3 for i in range(n)],
        "semantic_id_1": [i // 3 for i in range(n)],
    }
    pl.DataFrame(ids).write_parquet(tmp_path / "ids.parquet")
    command = f"--embeddings {embeddings} --histories {tmp_path}/histories.parquet --steps 60 --seeds 0 1"
    command += f" --ids ready={tmp_path}/ids.parquet --results {tmp_path}/runs.jsonl"
    argv = [*command.split(), "--systems", "one token", "text neighbours"]
    monkeypatch.setattr(bench, "WARMUP", 10)
    bench.main(argv)
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("  ")[0]: line for line in lines[lines.index("") + 3 :]}
    assert list(table) == ["one token", "text neighbours", "ready"]
    for system in ("one token", "ready"):
        assert "1.0000 ± 0.0000" in table[system], system
    monkeypatch.setattr(bench, "judge", None)  # nothing is done again
    bench.main(argv)
    assert capsys.readouterr().out.splitlines() == lines
    others = {
        "ids.parquet": pl.DataFrame(ids | {"semantic_id_0": [0] * n}),
        embeddings.name: pl.DataFrame({"parent_asin": names, "embedding": -vectors}),
        "histories.parquet": pl.read_parquet(tmp_path / "histories.parquet").reverse(),
    }
    for name, table in others.items():
        before = (tmp_path / name).read_bytes()
        table.write_parquet(tmp_path / name)
        with pytest.raises(TypeError, match="NoneType"):  # other contents of the same file are another run
            bench.main(argv)
        (tmp_path / name).write_bytes(before)


def test_ids_of_an_item_that_occurs_twice_are_refused(tmp_path):
    table = pl.DataFrame({"parent_asin": ["a", "b", "a"], "semantic_id_0": [0, 1, 2]})
    table.write_parquet(tmp_path / "ids.parquet")
    with pytest.raises(SystemExit, match="once"):
        bench.read_ids(tmp_path / "ids.parquet", pl.Series("parent_asin", ["a", "b"]))
