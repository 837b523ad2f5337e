"""align_embeddings.py, on a catalogue in which behaviour contradicts text. Needs no packages of the benchmarks."""

import random
import sys

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import align_embeddings as align

import train_rqvae

GROUPS, SIZE, DIM = 12, 10, 24  # item g * SIZE + t is taken with its group g; its text is that of topic t
UNSEEN = 20  # items without a history, two of each topic
NAMES = [f"i{n:03}" for n in range(GROUPS * SIZE + UNSEEN)]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    # at 0.07, contradicted texts are first all drawn to one place, which takes many more steps to leave
    monkeypatch.setattr(align, "TEMPERATURE", 0.2)
    for name, value in {"STEPS": 160, "LOOK_EVERY": 20, "BATCH": 128, "HIDDEN": 32, "MAX_LR": 5e-3}.items():
        monkeypatch.setattr(align, name, value)


@pytest.fixture
def embeddings(tmp_path):
    """Texts that say the topic and little else; two pairs are equal. The file's order is not that of the names."""
    draw = np.random.default_rng(0)
    topics = draw.normal(size=(SIZE, DIM))
    x = topics[np.arange(len(NAMES)) % SIZE] + 0.3 * draw.normal(size=(len(NAMES), DIM)) + 1
    x[SIZE], x[-1] = x[0], x[-1 - SIZE]  # of two groups, and both without a history
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    table = pl.DataFrame({"parent_asin": NAMES, "title": NAMES, "embedding": pl.Series(x).cast(pl.List(pl.Float32))})
    path = tmp_path / "C_items_with_embeddings.parquet"
    table.sample(fraction=1, shuffle=True, seed=0).write_parquet(path)
    return path


def make_histories(count: int = 120, seed: int = 0) -> list[list[str]]:
    draw = random.Random(seed)
    groups = [draw.randrange(GROUPS) * SIZE for _ in range(count)]
    return [[NAMES[n] for n in draw.sample(range(group, group + SIZE), 5)] for group in groups]


def run(embeddings, histories, *more: str) -> pl.DataFrame:
    """The output in the order of the names; histories may be a column, or a table with more columns."""
    table = histories if isinstance(histories, pl.DataFrame) else pl.DataFrame({"history": histories})
    source, output = embeddings.with_name("histories.parquet"), embeddings.with_name("out.parquet")
    table.write_parquet(source)
    align.main(["--embeddings", str(embeddings), "--histories", str(source), "--output", str(output), *more])
    return pl.read_parquet(output).sort("parent_asin")


def vectors_of(table: pl.DataFrame) -> np.ndarray:
    return table["embedding"].list.to_array(DIM).to_numpy()


def test_items_taken_together_come_nearer_and_the_others_keep_near_their_texts(embeddings, capsys):
    table = run(embeddings, make_histories())
    said = capsys.readouterr().out.splitlines()
    before, after = float(said[-1].split()[5]), float(said[-1].split()[7])
    assert said[-2].startswith("learned from ")
    assert after > before + 0.2

    old = pl.read_parquet(embeddings)
    assert table.schema == old.schema
    assert table.drop("embedding").equals(old.sort("parent_asin").drop("embedding"))
    x, y = vectors_of(old.sort("parent_asin")), vectors_of(table)
    assert np.allclose(np.linalg.norm(y, axis=1), 1, atol=1e-5)
    x = x - x.mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)

    seen, group = GROUPS * SIZE, np.arange(GROUPS * SIZE) // SIZE
    together = (group[:, None] == group) & ~np.eye(seen, dtype=bool)
    old_cosines, cosines = x[:seen] @ x[:seen].T, y[:seen] @ y[:seen].T
    assert old_cosines[together].mean() < 0.1  # behaviour contradicts text
    assert cosines[together].mean() - cosines[~together].mean() > 0.2
    assert cosines[0, SIZE] < 0.8  # equal texts, but taken with other items

    kept = (x * y).sum(1)
    assert kept[seen:].mean() > kept[:seen].mean() + 0.1
    unseen = y[seen:] @ y[seen:].T
    assert unseen[-1, -1 - SIZE] > 0.9999
    assert (np.where(np.eye(UNSEEN, dtype=bool), -1, unseen).argmax(1) % SIZE == np.arange(UNSEEN) % SIZE).all()


def test_the_ids_follow_behaviour_through_a_kill_and_a_growing_catalogue(embeddings, monkeypatch):
    monkeypatch.chdir(embeddings.parent)
    flags = "--category C --data_dir . --batch_size 64 --max_steps 120 --max_lr 1e-2 --steps_per_checkpoint 40"
    flags += " --codebook_size 16 16 --codebook_embedding_dim 8 --encoder_hidden_dims 32 --device cpu"

    def ids(folder: str, *more: str) -> pl.DataFrame:
        assert train_rqvae.main([*flags.split(), "--checkpoint_dir", folder, *more]) == 0
        return pl.read_parquet("C_semantic_ids.parquet")

    def share(table: pl.DataFrame, group: np.ndarray) -> float:
        """Of the pairs of one group, those with the same first code."""
        codes = table.sort("parent_asin")["semantic_id_0"].to_numpy()[: GROUPS * SIZE]
        same = (group[:, None] == group) & ~np.eye(len(group), dtype=bool)
        return (codes[:, None] == codes)[same].mean()

    item, texts = np.arange(GROUPS * SIZE), pl.read_parquet(embeddings)
    of_texts, aligned = ids("texts"), run(embeddings, make_histories())
    aligned.write_parquet(embeddings)
    undisturbed = ids("undisturbed")
    assert share(of_texts, item % SIZE) > share(of_texts, item // SIZE) + 0.1
    assert share(undisturbed, item // SIZE) > share(undisturbed, item % SIZE) + 0.1

    with monkeypatch.context() as patch:
        patch.setattr(train_rqvae, "reset_codes", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            ids("killed")
    assert ids("killed", "--resume").equals(undisturbed)

    new = texts[:9].with_columns(parent_asin=pl.lit("new ") + pl.col("parent_asin"))
    pl.concat([texts, new]).write_parquet(embeddings)
    run(embeddings, make_histories()).write_parquet(embeddings)
    grown = ids("killed", "--export_only", "--keep_ids", "C_semantic_ids.parquet")
    assert grown["semantic_id"].is_unique().all()
    kept = grown.join(undisturbed, on=["parent_asin", "semantic_id"])
    assert len(kept) > 0.7 * len(NAMES)


def test_unknown_items_are_counted_and_change_nothing(embeddings, capsys):
    histories = make_histories()
    plain = run(embeddings, histories)
    capsys.readouterr()
    with_unknown = [[*history[:2], "gone", None, *history[2:]] for history in histories]
    assert run(embeddings, [["gone"], *with_unknown, [], None]).equals(plain)
    assert "left out 121 of 721 items" in capsys.readouterr().out


def test_only_the_histories_of_the_split_are_read(embeddings):
    train, others = make_histories(), make_histories(seed=1)
    plain = run(embeddings, train)
    splits = ["train"] * len(train) + ["valid"] * 60 + ["test"] * 60
    table = pl.DataFrame({"history": train + others, "split": splits})
    assert run(embeddings, table).equals(plain)
    assert run(embeddings, table, "--split", "train").equals(plain)
    other = run(embeddings, table, "--split", "test")
    assert other.equals(run(embeddings, others[60:]))
    assert not other.equals(plain)


def test_pairs_stay_within_the_window_and_the_history():
    items, rows = torch.tensor([0, 1, 2, 1, 5, 6]), torch.tensor([0, 0, 0, 0, 3, 3])
    expected = {1: [(0, 1), (1, 2), (2, 1), (5, 6)], 2: [(0, 2)], 3: [(0, 1)]}  # never (1, 1), nor from row 0 to 3
    for window in (1, 2, 3, 9):
        found = [tuple(pair) for pair in align.pairs_within(items, rows, window).tolist()]
        assert sorted(found) == sorted(pair for apart in expected if apart <= window for pair in expected[apart])


def test_loss_and_recall_are_those_of_a_loop():
    torch.manual_seed(0)
    first, second, y = (torch.nn.functional.normalize(torch.randn(n, 4).double()) for n in (6, 6, 30))
    target, log_popularity = torch.tensor([3, 1, 3, 0, 2, 1]), torch.rand(5).double()
    losses = []
    for i in range(6):
        rivals = [j for j in range(6) if j == i or target[j] != target[i]]
        logits = [first[i] @ second[j] / 0.2 - 0.5 * log_popularity[target[j]] for j in rivals]
        losses.append(torch.stack(logits).logsumexp(0) - logits[rivals.index(i)])
    found = align.info_nce(first, second, target, log_popularity)
    assert found.item() == pytest.approx(torch.stack(losses).mean().item())

    pairs = torch.randint(30, (50, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    ranks = [sum(y[a] @ y[c] > y[a] @ y[b] for c in range(30) if c not in (a, b)) for a, b in pairs.tolist()]
    assert align.next_item_recall(y, pairs) == pytest.approx(np.mean([rank < 10 for rank in ranks]))


@pytest.mark.parametrize(
    ("table", "more", "told"),
    [
        ({"items": [["i000", "i001"]]}, [], "no column history among items"),
        ({"history": ["i000 i001"]}, [], "history is String, not a list of text"),
        ({"history": [[0, 1]]}, [], "history is List(Int64), not a list of text"),
        ({"history": [["a", "b"]]}, [], "no item of its 1 histories has an embedding"),
        ({"history": [["i000", "i001"]], "split": ["valid"]}, [], "no item of its 0 histories has an embedding"),
        ({"history": [["i000", "i001"]]}, ["--split", "train"], "no column split among history"),
        ({"history": [["i000", "i001", "i002"]] * 20}, [], "57 pairs, fewer than 100"),
        ({"history": [["i000"]]}, [], "0 pairs, fewer than 100"),
        ({"history": [NAMES]}, [], "0 pairs, fewer than 100"),  # the only history is held out
    ],
)
def test_wrong_histories_end_with_one_line(embeddings, refused, tmp_path, table, more, told):
    source = tmp_path / "histories.parquet"
    pl.DataFrame(table).write_parquet(source)
    argv = ["--embeddings", str(embeddings), "--histories", str(source), "--output", str(tmp_path / "out.parquet")]
    assert told in refused(align.main, [*argv, *more], tmp_path)


@pytest.mark.parametrize("wrong", ["--embeddings", "--histories", "--output", "--window"])
def test_wrong_paths_and_flags_end_with_one_line(embeddings, refused, tmp_path, wrong):
    paths = {"--embeddings": embeddings, "--histories": tmp_path / "h.parquet", "--output": tmp_path / "out.parquet"}
    pl.DataFrame({"history": make_histories()}).write_parquet(paths["--histories"])
    paths[wrong] = tmp_path / "absent" / "out.parquet"
    refused(align.main, [str(part) for pair in paths.items() for part in pair], tmp_path)
