"""What semantic IDs are worth to a generative recommender: the same model, trained on the IDs of each system.

    pip install -r requirements.txt -r tests/bench/requirements.txt
    python tests/bench/bench_recommender.py --embeddings OUT/Office_items_with_embeddings.parquet \\
        --histories OUT/Office_histories.parquet --results OUT/office.jsonl
    python tests/bench/bench_recommender.py ... --systems "one token" ours --codebook_sizes 1024 256 --seeds 0
    python tests/bench/bench_recommender.py ... --systems ours --flags "--input_mixing 0" --ids mine=OUT/mine.parquet

Embeddings: parent_asin, embedding. Histories: split (train, valid, test), history (parent_asin in order of time) and
target, what came next in valid and test. Learned from: every position of the train histories, nothing else.

one token         a code for every item: SASRec with a full softmax. Where it falls short of what is known for a
                  catalogue, the recommender has not learned, and its other figures mean nothing
text neighbours   no model: the embeddings nearest to that of the last item
ours              the IDs that train_rqvae.py writes with --recipe and --flags; + suffix: with --collisions suffix, too
faiss, residual k-means, ResidualVQ, usual recipe
                  of bench_quality.py, fitted to all items, with TIGER's suffix: one more code counts equal items
random            distinct IDs that mean nothing
--ids NAME=FILE   parent_asin, semantic_id_0, semantic_id_1, ...; items may share an ID

Hits are counted on items: those of one ID are ranked in turn, by their interactions in train. Printed: each run, then
means over the seeds and standard deviations. With OMP_NUM_THREADS=1 a run takes one to two minutes of a core.

SASRec: Kang and McAuley, arXiv:1808.09781. TIGER: Rajput et al., arXiv:2305.05065, section 3.2.
Shapes: N items, L codes in an ID, K codes a level, B histories, T items in a history, D width, W beams.
"""

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "train_rqvae.py"
sys.path.insert(0, str(ROOT))
import train_rqvae  # noqa: E402

WIDTH, LAYERS, HEADS, DROPOUT, INIT = 64, 2, 2, 0.3, 0.02
MAX_ITEMS = 50  # of a history: its last ones
BATCH, MAX_LR, WARMUP, SMOOTHING, LOOKS = 128, 2e-3, 100, 0.1, 10
WEIGHT_DECAY = 0.3  # at AdamW's 0.01, one token an item overfits after a fifth of the steps; at 1, IDs learn slowly
BEAM = 20
SHAPELESS = ["one token", "text neighbours"]  # the others are run at every --codebook_sizes
PEERS = ["faiss", "residual k-means", "ResidualVQ", "usual recipe"]
PEER_FLAGS = argparse.Namespace(batch_size=1024, max_steps=1500, peer_lr=1e-3, peer_rotation=False)
SYSTEMS = [*SHAPELESS, "ours", "ours + suffix", *PEERS, "random"]
FIGURES = ["recall@1", "recall@5", "recall@10", "recall@20", "ndcg@10"]


# ---------------------------------------------------------------- histories


class Rows(NamedTuple):
    """Histories of one split."""

    history: Tensor  # (R, T) numbers of items, then -1
    lengths: Tensor  # (R)
    target: Tensor  # (R); -1 in train


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


def read_histories(path: Path, parent_asin: pl.Series) -> dict[str, Rows]:
    """The rows of each split, without the items that have no embedding."""
    number = {item: i for i, item in enumerate(parent_asin)}
    table, splits, read, kept = pl.read_parquet(path, columns=["split", "history", "target"]), {}, 0, 0
    for split in ("train", "valid", "test"):
        learn, rows, given = split == "train", [], table.filter(pl.col("split") == split)
        for _, history, target in given.iter_rows():
            known = [number[item] for item in history or [] if item in number]
            read, kept = read + len(history or []), kept + len(known)
            if len(known) > learn and (learn or target in number):
                rows.append((torch.tensor(known[-MAX_ITEMS - learn :]), -1 if learn else number[target]))
        print(f"{len(rows):,} of {len(given):,} {split} histories have an item to read and one to predict")
        if not rows:
            raise SystemExit(f"error: {path}: no {split} history of items with an embedding; --help names its columns")
        history = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True, padding_value=-1)
        splits[split] = Rows(history, (history >= 0).sum(1), torch.tensor([row[1] for row in rows]))
    print(f"left out {read - kept:,} of {read:,} items in them, which have no embedding")
    return splits


def batches(lengths: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers, batch after batch: like lengths, so little padding, and other companions in every epoch."""
    while True:
        noisy = lengths + 2 * torch.rand(len(lengths), generator=generator)
        parts = noisy.argsort().split(BATCH)
        yield from (parts[i] for i in torch.randperm(len(parts), generator=generator))


# ---------------------------------------------------------------- IDs and figures


class Catalogue:
    """The IDs that exist, as a tree, and how the items of one ID are ranked."""

    def __init__(self, codes: Tensor, popularity: Tensor):
        self.codes, self.sizes = codes, (codes.amax(0) + 1).tolist()  # (N, L), (L)
        self.children, node = [], torch.zeros(len(codes), dtype=torch.long)
        for column, size in zip(codes.T, self.sizes, strict=True):
            below, child = torch.unique(node * size + column, return_inverse=True)
            children = torch.full((int(node.max() + 1), size), -1)
            children.view(-1)[below] = torch.arange(len(below))
            self.children.append(children)  # (nodes, K): the node below by each code, or -1
            node = child
        self.id_of_item, self.items_of_id = node, node.bincount()  # (N) leaves; (IDs) how many items
        order = torch.from_numpy(np.lexsort((-popularity.numpy(), node.numpy())))  # by ID, popular items first
        self.place_in_id = torch.empty_like(node)  # (N), from 0
        first = self.items_of_id.cumsum(0) - self.items_of_id
        self.place_in_id[order] = torch.arange(len(codes)) - first[node[order]]

    def ranks(self, ids: Tensor, target: Tensor) -> Tensor:
        """Ranks from 0 of target items (B) in lists of IDs (B, W), best first, -1 for none; infinite if not there."""
        hit = ids == self.id_of_item[target].unsqueeze(1)
        items = self.items_of_id[ids]
        before = ((items.cumsum(1) - items) * hit).sum(1) + self.place_in_id[target]
        return torch.where(hit.any(1), before.float(), math.inf)


def figures_of(ranks: Tensor) -> dict[str, float]:
    """Recall@k and NDCG@10 of ranks from 0. One item is right, so the ideal gain is 1."""
    found = {f"recall@{k}": (ranks < k).float().mean().item() for k in (1, 5, 10, 20)}
    return found | {"ndcg@10": torch.where(ranks < 10, 1 / torch.log2(ranks + 2), 0).mean().item()}


# ---------------------------------------------------------------- the recommender


class Dropout(nn.Module):
    """Masks cut from one pool at random places: on a CPU, drawing each anew would be a third of a step."""

    def __init__(self):
        super().__init__()
        self.pool = (torch.rand(2**22) >= DROPOUT) / (1 - DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        start = int(torch.randint(len(self.pool) - x.numel(), ()))
        return x * self.pool[start : start + x.numel()].view_as(x)


class Block(nn.Module):
    """A layer of a causal transformer, with the norms before its parts."""

    def __init__(self, dropout: Dropout):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.to_heads, self.from_heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        heads = self.to_heads(self.norms[0](x)).unflatten(2, (3 * HEADS, -1)).transpose(1, 2)
        read = F.scaled_dot_product_attention(*heads.chunk(3, dim=1), is_causal=True)  # (B, heads, T, D / heads)
        x = x + self.dropout(self.from_heads(read.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norms[1](x)))


class Recommender(nn.Module):
    """Reads an item as the sum of its codes' embeddings and writes the next one code by code.

    What was read is the state. Its products with the embeddings of a level are the logits of the next code, and
    that code moves the state. With one code an item this is SASRec.
    """

    def __init__(self, catalogue: Catalogue):
        super().__init__()
        self.codes, self.dropout = catalogue.codes, Dropout()  # (N, L)
        self.tables = nn.ModuleList(nn.Embedding(size, WIDTH) for size in catalogue.sizes)
        self.positions = nn.Embedding(MAX_ITEMS, WIDTH)
        for table in (*self.tables, self.positions):
            nn.init.normal_(table.weight, std=INIT)
        self.blocks = nn.ModuleList(Block(self.dropout) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.moves = nn.ModuleList(  # from a level to the next
            nn.Sequential(nn.Linear(2 * WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), self.dropout)
            for _ in catalogue.sizes[1:]
        )

    def embed(self, level: int, code: Tensor) -> Tensor:  # (...) -> (..., D)
        return self.tables[level](code) * WIDTH**0.5  # as SASRec does; without it, it learned at half the speed

    def read(self, history: Tensor) -> Tensor:
        """(B, T) -> (B, T, D). Padding comes last, where no item sees it."""
        columns = self.codes[history.clamp(min=0)].unbind(-1)  # (B, T), L times
        x = sum(self.embed(level, column) for level, column in enumerate(columns))
        x = self.dropout(x + self.positions.weight[: history.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, level: int, state: Tensor) -> Tensor:  # (..., D) -> (..., K)
        return state @ self.tables[level].weight.T

    def write(self, level: int, state: Tensor, code: Tensor) -> Tensor:
        """The state (..., D) after this code (...) of a level."""
        if level == len(self.moves):
            return state
        return state + self.moves[level](torch.cat([state, self.embed(level, code)], dim=-1))

    def loss(self, history: Tensor) -> Tensor:
        """The cross-entropies of all codes after the first items of histories (B, T), summed."""
        following = history[:, 1:]
        state, codes = self.read(history[:, :-1])[following >= 0], self.codes[following[following >= 0]]
        losses = []
        for level, code in enumerate(codes.T):
            logits = self.logits(level, state)
            losses.append(F.cross_entropy(logits, code, label_smoothing=SMOOTHING, reduction="sum"))
            state = self.write(level, state, code)
        return sum(losses)


@torch.inference_mode()
def beam_search(model: Recommender, catalogue: Catalogue, rows: Rows, width: int) -> tuple[Tensor, Tensor]:
    """The likeliest IDs after histories and their log-probabilities (B, W); -1 and -inf where there are no more."""
    every = torch.arange(len(rows.history))
    state = model.read(rows.history)[every, rows.lengths - 1].unsqueeze(1)  # (B, 1, D)
    score, node = torch.zeros(len(every), 1), torch.zeros(len(every), 1, dtype=torch.long)
    for level, children in enumerate(catalogue.children):
        below = children[node].flatten(1)  # (B, W * K)
        score = (score.unsqueeze(2) + model.logits(level, state).log_softmax(2)).flatten(1)
        score, best = score.masked_fill(below < 0, -math.inf).topk(min(width, score.shape[1]))
        node, beam, code = below.gather(1, best), best // children.shape[1], best % children.shape[1]
        state = model.write(level, state[every.unsqueeze(1), beam], code)
    return node.masked_fill(score == -math.inf, -1), score


def evaluate(model: Recommender, catalogue: Catalogue, rows: Rows) -> dict[str, float]:
    model.eval()
    ranks = torch.empty(len(rows.target))
    for part in rows.lengths.argsort().split(256):
        some = Rows(rows.history[part, : int(rows.lengths[part].max())], rows.lengths[part], rows.target[part])
        ranks[part] = catalogue.ranks(beam_search(model, catalogue, some, BEAM)[0], some.target)
    return figures_of(ranks)


def train(catalogue: Catalogue, splits: dict[str, Rows], steps: int, seed: int) -> Recommender:
    """The best of ten looks, by NDCG@10 of the valid histories."""
    torch.manual_seed(seed)
    model, rows = Recommender(catalogue), splits["train"]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)
    targets = BATCH * (rows.lengths - 1).float().mean()  # of a mean batch: each of them weighs the same
    best, best_state = -1.0, {}
    order = batches(rows.lengths, torch.Generator().manual_seed(seed))
    for step, some in enumerate(itertools.islice(order, steps), start=1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = MAX_LR * min(step / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        (model.loss(rows.history[some, : int(rows.lengths[some].max())]) / targets).backward()
        optimizer.step()
        if step % math.ceil(steps / LOOKS) == 0 or step == steps:
            found = evaluate(model, catalogue, splits["valid"])["ndcg@10"]
            if found > best:
                best, best_state = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return model


# ---------------------------------------------------------------- systems


def read_ids(path: Path, parent_asin: pl.Series) -> Tensor:
    """The codes (N, L) of these items."""
    table = pl.read_parquet(path)
    levels = [name for i in range(table.width) if (name := f"semantic_id_{i}") in table.columns]
    ids = parent_asin.to_frame().join(table, on="parent_asin", how="left", maintain_order="left").select(levels)
    if not levels or len(ids) > len(parent_asin) or any(column.null_count() for column in ids):
        raise SystemExit(f"error: {path}: needs semantic_id_0, ... of every item with an embedding, once")
    return ids.cast(pl.Int64).to_torch()


def train_ours(sizes: list[int], collisions: str, seed: int, flags: argparse.Namespace) -> Path:
    """The IDs, in a folder of --cache; where their model is there already, train_rqvae.py only writes them."""
    options = f"--codebook_quantization_levels {len(sizes)} --codebook_size {' '.join(map(str, sizes))} "
    options += f"--seed {seed} {flags.recipe} {flags.flags}"
    key = f"{digest(flags.embeddings, TRAIN)} {options}"
    folder = flags.cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "C_items_with_embeddings.parquet"
    source.unlink(missing_ok=True)
    source.symlink_to(flags.embeddings.resolve())
    command = [sys.executable, TRAIN, *shlex.split(f"{options} {collisions}")]
    command += ["--category", "C", "--data_dir", folder, "--checkpoint_dir", folder]
    done = subprocess.run(command, env=os.environ | {"WANDB_MODE": "disabled"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return folder / "C_semantic_ids.parquet"


def ids_of(name: str, sizes: list[int], seed: int, dataset: train_rqvae.EmbeddingDataset, flags) -> Tensor:
    """The IDs (N, L) that a system gives to the items."""
    x, parent_asin = dataset.embeddings, dataset.parent_asin
    if name in flags.ids:
        return read_ids(flags.ids[name], parent_asin)
    if name == "one token":
        return torch.arange(len(x)).unsqueeze(1)
    if name == "random":
        numbers = np.random.default_rng(seed).choice(math.prod(sizes), len(x), replace=False)
        return torch.from_numpy(np.stack(np.unravel_index(numbers, sizes), axis=1))
    if name not in PEERS:
        collisions = "--collisions suffix" if name == "ours + suffix" else ""
        return read_ids(train_ours(sizes, collisions, seed, flags), parent_asin)

    import bench_quality  # here, as the tests do without its packages

    torch.manual_seed(seed)
    system = bench_quality.SYSTEMS[name](bench_quality.Task(flags.cache, x, seed, PEER_FLAGS, sizes))
    with torch.no_grad():
        codes = system.encode(x).numpy()
    return torch.from_numpy(train_rqvae.add_suffix(codes, np.empty((0, len(sizes) + 1), dtype=np.int64)))


def text_neighbours(x: Tensor, rows: Rows) -> dict[str, float]:
    """Figures of ranking all items by the cosines of x (N, D) to the last item, which itself is left out.

    Of equal cosines, the first item comes first.
    """
    x, every = F.normalize(x), torch.arange(len(rows.target))
    last = rows.history[every, rows.lengths - 1]
    cosines = x[last] @ x.T
    cosines[every, last] = -math.inf
    own, earlier = cosines[every, rows.target].unsqueeze(1), torch.arange(len(x)) < rows.target.unsqueeze(1)
    return figures_of(((cosines > own) | (cosines == own) & earlier).sum(1).float())


def judge(name: str, sizes: list[int], seed: int, dataset: train_rqvae.EmbeddingDataset, splits, flags) -> dict:
    """Figures of a system on the test histories."""
    if name == "text neighbours":
        return text_neighbours(dataset.embeddings, splits["test"])
    start, history = time.perf_counter(), splits["train"].history
    codes = ids_of(name, sizes, seed, dataset, flags)
    catalogue = Catalogue(codes, popularity=history[history >= 0].bincount(minlength=len(codes)))
    fitted = time.perf_counter()
    found = evaluate(train(catalogue, splits, flags.steps, seed), catalogue, splits["test"])
    found |= {"tokens": codes.shape[1], "distinct": len(catalogue.items_of_id) / len(codes)}
    return found | {"s to fit": fitted - start, "s to judge": time.perf_counter() - fitted}


# ---------------------------------------------------------------- main


def print_table(rows: list[dict]) -> None:
    columns = dict.fromkeys(FIGURES, 4) | {"tokens": 0, "distinct": 3, "s to fit": 0, "s to judge": 0}
    print(f"{'':<36}" + "".join(f"{name:>17}" for name in columns))
    for system in dict.fromkeys(row["system"] for row in rows):
        cells = []
        for name, digits in columns.items():
            values = [row[name] for row in rows if row["system"] == system and name in row]
            spread = f" ± {np.std(values, ddof=1):.4f}" if name in FIGURES and len(values) > 1 else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}" if values else "-")
        print(f"{system:<36}" + "".join(f"{cell:>17}" for cell in cells))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--embeddings", type=Path, required=True)
    add("--histories", type=Path, required=True)
    add("--systems", nargs="*", choices=SYSTEMS, default=SYSTEMS)
    add("--ids", nargs="+", default=[], metavar="NAME=FILE", help="ready IDs, beside --systems")
    add("--codebook_sizes", type=int, nargs="+", action="append", help="of all levels; give it again for more shapes")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    # half as many suit one token an item, and are too few for IDs of several tokens on Office14
    add("--steps", type=int, default=3000, help="of the recommender (%(default)s)")
    add("--recipe", default="--batch_size 1024 --max_steps 1500 --max_lr 1e-2", help="of train_rqvae.py (%(default)s)")
    add("--flags", default="", help="more flags of train_rqvae.py")
    add("--cache", type=Path, help="folder to keep our models in")
    add("--results", type=Path, help="file of json lines: runs are added, and those that it has are not done again")
    flags = parser.parse_args(argv)
    flags.ids = {name: Path(path) for name, path in (pair.split("=", 1) for pair in flags.ids)}
    if flags.ids.keys() & set(SYSTEMS):
        parser.error(f"--ids {' '.join(flags.ids)}: choose a name that no system has")
    temporary = tempfile.TemporaryDirectory()
    flags.cache = flags.cache or Path(temporary.name)

    dataset = train_rqvae.EmbeddingDataset(flags.embeddings)
    splits = read_histories(flags.histories, dataset.parent_asin)
    shapes, done, rows = flags.codebook_sizes or [[256, 256, 256], [1024, 1024]], {}, []
    if flags.results and flags.results.exists():
        done = {row["run"]: row for row in map(json.loads, flags.results.read_text().splitlines())}
    made_by = {"ours": [TRAIN], "ours + suffix": [TRAIN]} | {name: [path] for name, path in flags.ids.items()}
    # seed after seed, so that a study that was stopped has every system
    for seed, sizes, name in itertools.product(flags.seeds, [[], *shapes], [*flags.systems, *flags.ids]):
        if (sizes == []) != (name in SHAPELESS or name in flags.ids):
            continue
        system = " ".join([name, " x ".join(map(str, sizes)), flags.flags if name.startswith("ours") else ""]).strip()
        files = digest(flags.embeddings, flags.histories, *made_by.get(name, []))
        run = f"{flags.histories.stem} {files}: {system}, {flags.recipe}, seed {seed}, {flags.steps} steps"
        if run not in done:
            done[run] = {"run": run, "system": system} | judge(name, sizes, seed, dataset, splits, flags)
            if flags.results:
                with flags.results.open("a") as file:
                    print(json.dumps(done[run]), file=file)
        rows.append(done[run])
        shown = ", ".join(f"{figure} {done[run][figure]:.4f}" for figure in FIGURES)
        print(f"seed {seed}, {system}: {shown}", flush=True)
    print(f"\n{flags.histories.name}, seeds {flags.seeds}, {flags.steps} steps: means and standard deviations")
    print_table(rows)


if __name__ == "__main__":
    main()
