"""Draw together the embeddings of items that people take one after the other, whatever their texts say.

    python tests/bench/align_embeddings.py --embeddings data/output/Office_items_with_embeddings.parquet \\
        --histories Office_histories.parquet --output data/output/Aligned_items_with_embeddings.parquet
    python train_rqvae.py --category Aligned

As the catalogue grows, align again with the same histories, then export with --keep_ids.

Embeddings: parent_asin, embedding. Histories: a column `history`, lists of parent_asin in order of time, one row for
each person. Where they have a column `split`, only the rows of --split are read. Leave out what you will test on: the
IDs would know it. Items without an embedding are counted and left out; those without a history move by f alone:

    y = norm(x - mean + f(x - mean) + e)

x is the embedding, f a small network that starts at zero, and e a free vector for each item that starts at zero, too,
so that rare items keep near their texts. Learned by telling the item of a pair from those of other pairs (InfoNCE: van
den Oord et al., arXiv:1807.03748, equation 4), where popular ones weigh less against a pair (logQ: Yi et al., RecSys
2019, section 4). It overfits within a few hundred steps, so the best of its looks at held-out histories is kept.

Shapes: N items, D dimensions, P pairs, B pairs in a batch, T items in all histories together.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from train_rqvae import UNREADABLE, EmbeddingDataset, atomic_write, fail, fail_on  # noqa: E402

WINDOW = 3  # places in a history between the items of a pair, at most
HELD_OUT = 0.05  # of the histories
STEPS, LOOK_EVERY, BATCH, MAX_LR = 400, 25, 1024, 1e-3
HIDDEN, DROPOUT = 512, 0.2
TEMPERATURE, POPULARITY = 0.07, 0.5
MIN_PAIRS = 100


# ---------------------------------------------------------------- data


def read_histories(path: Path, split: str | None, parent_asin: pl.Series) -> tuple[Tensor, Tensor]:
    """The number of each item (T) and of the history that it stands in (T), in order of time."""
    with fail_on(UNREADABLE, path, "not a readable parquet file", "name a file of histories"):
        table = pl.read_parquet(path, glob=False)
    for column in ["history"] + ["split"] * (split is not None):
        if column not in table.columns:
            fail(path, f"no column {column} among {', '.join(table.columns)}", "--help says what is read")
    if table.schema["history"] != pl.List(pl.String):
        fail(path, f"history is {table.schema['history']}, not a list of text", "cast it to List(String)")
    if "split" in table.columns:
        table = table.filter(pl.col("split").cast(pl.String) == (split or "train"))
    numbers = pl.DataFrame({"history": parent_asin, "item": np.arange(len(parent_asin))})
    every = table.select("history").with_row_index("row").explode("history").drop_nulls()
    known = every.join(numbers, on="history", how="inner", maintain_order="left")
    if known.is_empty():
        fail(path, f"no item of its {len(table):,} histories has an embedding", "name files of one catalogue")
    if unknown := len(every) - len(known):
        print(f"left out {unknown:,} of {len(every):,} items, which have no embedding")
    return known["item"].to_torch().long(), known["row"].cast(pl.Int64).to_torch()


def pairs_within(items: Tensor, rows: Tensor, window: int) -> Tensor:
    """Pairs (P, 2) of different items at most `window` places apart in one history: items (T), rows (T)."""
    pairs = []
    for apart in range(1, window + 1):
        pair = torch.stack([items[:-apart], items[apart:]], dim=1)
        pairs.append(pair[(rows[:-apart] == rows[apart:]) & (pair[:, 0] != pair[:, 1])])
    return torch.cat(pairs)


# ---------------------------------------------------------------- learning


class Aligner(nn.Module):
    """Numbers of items (B) to their new vectors (B, D)."""

    def __init__(self, x: Tensor):  # (N, D)
        super().__init__()
        n, dim = x.shape
        self.register_buffer("x", x - x.mean(0), persistent=False)
        self.f = nn.Sequential(nn.Linear(dim, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, dim))
        self.e = nn.Embedding(n, dim)
        for start in (*self.f[-1].parameters(), self.e.weight):
            nn.init.zeros_(start)

    def forward(self, items: Tensor) -> Tensor:
        x = self.x[items]
        return F.normalize(x + self.f(x) + self.e(items))


def info_nce(first: Tensor, second: Tensor, target: Tensor, log_popularity: Tensor) -> Tensor:
    """How badly the vectors first (B, D) tell their own second (B, D), whose items are target (B), from the others."""
    logits = first @ second.T / TEMPERATURE - POPULARITY * log_popularity[target]  # (B, B)
    twins = (target.unsqueeze(1) == target) & ~torch.eye(len(target), dtype=torch.bool)
    return F.cross_entropy(logits.masked_fill(twins, -torch.inf), torch.arange(len(target)))


def next_item_recall(y: Tensor, pairs: Tensor) -> float:
    """The share of pairs (P, 2) whose second item is among the ten nearest of the first: y (N, D)."""
    hits = 0
    for first, second in (part.unbind(1) for part in pairs.split(1024)):
        cosines = (y[first] @ y.T).scatter(1, first.unsqueeze(1), -torch.inf)  # (B, N)
        hits += (cosines.topk(min(10, len(y))).indices == second.unsqueeze(1)).sum().item()
    return hits / len(pairs)


def align(x: Tensor, pairs: Tensor, held_out: Tensor, seed: int) -> tuple[Tensor, float, float]:
    """The new vectors (N, D), and the recall of held-out pairs before and after: x (N, D), pairs (P, 2) to learn."""
    torch.manual_seed(seed)
    model, every = Aligner(x), torch.arange(len(x))
    log_popularity = pairs[:, 1].bincount(minlength=len(x)).clamp(min=1).log()  # (N)
    optimizer = torch.optim.AdamW(model.parameters(), lr=MAX_LR)
    best = F.normalize(model.x)
    before = best_recall = next_item_recall(best, held_out)
    for step in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = MAX_LR * (1 - (step - 1) / STEPS)
        batch = pairs[torch.randint(len(pairs), (BATCH,))]
        vectors = model.train()(batch.flatten()).unflatten(0, (-1, 2))  # (B, 2, D)
        optimizer.zero_grad()
        info_nce(vectors[:, 0], vectors[:, 1], batch[:, 1], log_popularity).backward()
        optimizer.step()
        if step % LOOK_EVERY == 0:
            with torch.no_grad():
                y = model.eval()(every)
            if (recall := next_item_recall(y, held_out)) > best_recall:
                best, best_recall = y, recall
    return best, before, best_recall


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail("command line", message, "--help lists the flags")
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--histories", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="the embeddings file with another embedding column")
    parser.add_argument("--split", help="the histories to learn from (train, where there is a column split)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    if not flags.output.parent.is_dir():
        fail(flags.output, "no such folder", "make it first")

    dataset = EmbeddingDataset(flags.embeddings)
    items, rows = read_histories(flags.histories, flags.split, dataset.parent_asin)
    with_pairs = torch.unique(rows[:-1][rows[:-1] == rows[1:]])  # only these can be held out
    order = torch.randperm(len(with_pairs), generator=torch.Generator().manual_seed(flags.seed))
    aside = torch.isin(rows, with_pairs[order[: max(1, round(HELD_OUT * len(with_pairs)))]])  # (T)
    pairs = pairs_within(items[~aside], rows[~aside], WINDOW)
    held_out = pairs_within(items[aside], rows[aside], 1)
    if len(pairs) < MIN_PAIRS or not len(held_out):
        fail(flags.histories, f"{len(pairs)} pairs, fewer than {MIN_PAIRS}", "collect more histories first")

    y, before, after = align(dataset.embeddings, pairs, held_out, flags.seed)
    print(f"learned from {len(pairs):,} pairs of {items.unique().numel():,} items, of {len(y):,}")
    print(f"recall@10 of the next item {before:.3f} before, {after:.3f} after: {len(held_out):,} held-out pairs")
    table, content = pl.read_parquet(flags.embeddings, glob=False), io.BytesIO()
    table.with_columns(pl.Series("embedding", y.numpy()).cast(pl.List(pl.Float32))).write_parquet(content)
    atomic_write({flags.output: content.getvalue()})


if __name__ == "__main__":
    main()
