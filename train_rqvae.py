"""Trains an RQ-VAE on item embeddings and gives every item its semantic ID. CUDA, MPS or CPU.

Reads   data/output/{category}_items_with_embeddings.parquet   (parent_asin, embedding)
Writes  checkpoints/rqvae/{checkpoint_step_N,best_model,final_model}.pth
        data/output/{category}_semantic_ids.parquet            (one distinct ID an item)
        data/output/{category}_quality.json                    (what these IDs are worth)

    python train_rqvae.py --category Video_Games                                    # the full run, on a GPU
    python train_rqvae.py --category Video_Games --batch_size 1024 --max_steps 1500 --max_lr 1e-2  # on a CPU
    python train_rqvae.py --category Video_Games --resume                           # go on after a stop
    python train_rqvae.py --category Video_Games --export_only                      # IDs from best_model.pth
    python train_rqvae.py --category Video_Games --export_only \\
        --keep_ids data/output/Video_Games_semantic_ids.parquet     # the same for the catalogue as it is now
    torchrun --nproc_per_node=8 train_rqvae.py --category Video_Games               # the same run on eight GPUs

Before: embed_items.py. Paper: Rajput et al., Recommender Systems with Generative Retrieval (TIGER),
arXiv:2305.05065, section 3.1; the residual quantizer is Lee et al., arXiv:2203.01941.
Shapes: N items, B batch, D embedding dimensions, E latent (codebook) dimensions, L levels, K codes a level.
"""

import base64
import ctypes
import errno
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

# what torchrun tells this process, of which only a run of this script makes use; rank 0 speaks and writes for all
RANK, RANKS, LOCAL_RANK = (
    int(os.environ.get(name, default)) if __name__ == "__main__" else default
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
)
PATIENCE = 5  # seconds in which torchrun ends the ranks that are left when one has failed
LONGEST_WAIT = timedelta(days=1)  # of ranks for one another: k-means and the last codes are found by rank 0 alone

LIST_FLAGS = "--help lists the flags"
LARGEST, MOST_LEVELS = 10**12, 64  # of any number on the command line
DIGEST_ROWS = 1024  # of embeddings digested at once; part of the format
READERS = 4  # pieces of a parquet file read at once
LEAST_ROWS_READ = 1024  # in such a piece; each costs some milliseconds
TRAINED_PER_PASS = {"cpu": 2**11}  # rows of a batch at once: what they become stays in its caches; elsewhere all
DECODED_PER_PASS = {"cpu": 2**12, "mps": 2**15, "cuda": 2**16}  # reconstructions at once outside training
SEARCH_WIDTH = 32  # IDs of each item that are decoded to find the best
TRAINING_SEARCH_WIDTH = 4  # the same in training and validation, which pay for it again and again
SEARCH_FROM = 0.5  # of all steps: before, the nearest codes are good enough to learn from
KMEANS_ROWS = 200_000  # of a larger catalogue k-means takes a sample, to bound its time
RECONSTRUCTION_WEIGHT = 5.0  # against the quantization losses; the codes spread more evenly than at 1
ERROR_SCALE = 0.5  # share of the variance; above it, an item's error counts less and less, so that similar items differ
ROUNDING = 1e-10  # a variance below this share of the mean square is rounding
ADAM_BETAS = (0.9, 0.95)  # a short memory of squares suits a few thousand steps at a high learning rate
EQUAL_LOSSES = 0.03  # validation losses this close differ by the luck of the held-out rows: the later model fits better
MOST_AUTOENCODER_STEPS = 1000
LAST_RESET = 0.8  # of all steps: a code revived later would not settle
KEPT_ERROR = 1.05  # times the error of another ID: with more, an item does not keep its own
NO_ERROR = 1e-3  # share of the variance; smaller errors are not told apart when IDs are kept
OUTDATED_LOSS, FEWEST_JUDGED = 1.25, 30  # times that of held-out items, over so many new ones: the model is outdated
QUALITY_ROWS = 100_000  # of a larger catalogue, figures that need vectors are of a sample
RECALL_QUERIES, NEIGHBOURS, COHERENCE_PAIRS = 1000, 10, 50_000
EXAMPLE_PREFIXES, EXAMPLE_BRANCHES, EXAMPLE_ITEMS, LABEL_LENGTH = 5, 2, 3, 90
BARS, BAR_COLUMNS = " ▁▂▃▄▅▆▇█", 16
CHECKPOINT_KEYS = {"model_state_dict", "config", "step", "epoch", "val_loss"}
RESUME_KEYS = CHECKPOINT_KEYS | {
    "optimizer_states", "scheduler_states", "random_states", "usage", "lowest_val_loss", "wandb_run_id",
    "metrics", "data", "autoencoder_steps",
}  # fmt: skip
MODEL_FIELDS = (
    "item_embedding_dim",
    "encoder_hidden_dims",
    "codebook_embedding_dim",
    "codebook_quantization_levels",
    "codebook_size",
)
FREE_FIELDS = {  # may differ between a run and the run that resumes it
    "data_dir", "checkpoint_dir", "device", "num_epochs", "max_steps", "steps_per_train_log", "steps_per_val_log",
    "steps_per_checkpoint", "keep_checkpoints", "wandb_project", "resume", "overwrite", "export_only", "keep_ids",
    "recycle_ids", "collisions",
}  # fmt: skip

# ---------------------------------------------------------------- configuration


@dataclass
class RQVAEConfig:
    """The command line of this script: every field is a flag, and every checkpoint carries them."""

    category: str = HfArg(default="Video_Games", help="Catalogue name: the first part of every file name.")
    data_dir: str = HfArg(default="data/output", help="Folder of the embeddings and of the IDs.")
    checkpoint_dir: str = HfArg(default="checkpoints/rqvae", help="Folder of the checkpoints.")
    num_rows: int | None = HfArg(default=None, help="Only the first rows of the catalogue, for a trial.")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="Where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(
        default="auto",
        help="Number type of the MLPs in training; auto is bfloat16 on CUDA and on CPUs with AVX512-BF16.",
    )
    seed: int = HfArg(default=42, help="Seed of the weights, the split, the batches and k-means.")

    item_embedding_dim: int | None = HfArg(
        default=None, help="Dimension D of the embeddings; by default the file's own."
    )
    encoder_hidden_dims: list[int] = HfArg(
        default_factory=lambda: [512, 256, 128],
        help="Hidden layers of the encoder; the decoder mirrors them.",
    )
    codebook_embedding_dim: int = HfArg(default=32, help="Dimension E of the latents and the codes.")
    codebook_quantization_levels: int = HfArg(default=3, help="Levels L: codes in an ID.")
    codebook_size: int = HfArg(default=256, help="Codes K a level.")
    commitment_weight: float = HfArg(default=0.25, help="Weight beta of the commitment loss.")
    use_rotation_trick: bool = HfArg(
        default=False, help="Pass gradients by the rotation trick instead of straight through."
    )
    use_ema_vq: bool = HfArg(default=False, help="Move the codes by moving averages instead of gradients.")
    ema_decay: float = HfArg(default=0.99, help="Decay of those averages, an optimizer step.")

    batch_size: int = HfArg(default=32768, help="Rows in a batch (at most all there are).")
    gradient_accumulation_steps: int = HfArg(default=1, help="Batches in an optimizer step.")
    num_epochs: int = HfArg(default=20000, help="Passes over the training rows, each less its last, short batch.")
    max_steps: int = HfArg(default=-1, help="Optimizer steps in all, warm-up included; -1 for no limit.")
    max_lr: float = HfArg(default=3e-4, help="Peak learning rate.")
    min_lr: float = HfArg(default=1e-6, help="Learning rate at the end of the cosine.")
    scheduler_type: Literal["cosine", "cosine_with_warmup"] = HfArg(
        default="cosine_with_warmup", help="Learning rate: a cosine, with a linear rise before it or without."
    )
    warmup_steps: int = HfArg(default=100, help="Steps of that rise.")
    gradient_clip_norm: float = HfArg(default=1.0, help="Largest gradient norm; 0 for no clipping.")
    input_noise: float = HfArg(
        default=0.5,
        help="Noise on the training inputs at the start, in their standard deviations; it fades out to the end.",
    )
    input_mixing: float = HfArg(
        default=0.1, help="Mix training inputs in pairs, weights from Beta(a, a) with this a; 0 for none."
    )

    use_kmeans_init: bool = HfArg(
        default=True, help="Start the codes from k-means of the latents of a short autoencoder training."
    )
    autoencoder_steps: int | None = HfArg(
        default=None, help="Steps of that training; by default a fifth of all, at most 1000."
    )
    reset_unused_codes: bool = HfArg(default=True, help="Move codes that no item uses to where items are.")
    steps_per_codebook_reset: int = HfArg(default=50, help="Steps over which a code must be used.")

    val_split: float = HfArg(default=0.02, help="Share of the rows held out to choose the best model by.")
    steps_per_train_log: int = HfArg(default=50, help="Steps between two logged training losses.")
    steps_per_val_log: int = HfArg(default=250, help="Steps between two validations over the whole catalogue.")
    steps_per_checkpoint: int = HfArg(default=2500, help="Steps between two numbered checkpoints.")
    keep_checkpoints: int = HfArg(default=3, help="Numbered checkpoints that stay, beside best and final.")
    wandb_project: str = HfArg(default="semantic-ids", help="Weights & Biases project.")

    resume: bool = HfArg(default=False, help="Go on from the newest sound checkpoint in checkpoint_dir.")
    overwrite: bool = HfArg(default=False, help="Train again where this run is complete already.")
    export_only: bool = HfArg(default=False, help="Write the IDs from best_model.pth without training.")
    keep_ids: str | None = HfArg(
        default=None,
        help="With --export_only: an earlier export of the same model, whose items keep their IDs while these fit.",
    )
    recycle_ids: bool = HfArg(
        default=False, help="With --keep_ids: give the IDs of vanished and moved items out again."
    )
    collisions: Literal["assign", "suffix", "keep"] = HfArg(
        default="assign",
        help="Items with equal codes: assign each another last code, add one more code, or keep them equal.",
    )

    def __post_init__(self):
        at_least = {
            "num_rows": 1, "item_embedding_dim": 1, "codebook_embedding_dim": 1, "codebook_quantization_levels": 1,
            "codebook_size": 2, "commitment_weight": 0, "batch_size": 1, "gradient_accumulation_steps": 1,
            "num_epochs": 1, "max_lr": 1e-12, "min_lr": 0, "warmup_steps": 0, "gradient_clip_norm": 0,
            "input_noise": 0, "input_mixing": 0, "autoencoder_steps": 0, "steps_per_codebook_reset": 1,
            "val_split": 0, "steps_per_train_log": 1, "steps_per_val_log": 1, "steps_per_checkpoint": 1,
            "keep_checkpoints": 1, "seed": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= LARGEST:
                raise ValueError(f"--{name} {value}: must be at least {least} and at most {LARGEST:,}")
        for name in ("val_split", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 0 and below 1")
        if self.codebook_quantization_levels > MOST_LEVELS:
            levels = self.codebook_quantization_levels
            raise ValueError(f"--codebook_quantization_levels {levels}: must be at most {MOST_LEVELS}")
        if 0 < self.input_mixing < 1e-3:
            raise ValueError(f"--input_mixing {self.input_mixing}: must be 0 or at least 0.001")
        if self.seed + self.codebook_quantization_levels > 2**32:
            raise ValueError(f"--seed {self.seed}: must be below 2**32 less the levels")
        if self.max_steps != -1 and not 1 <= self.max_steps <= LARGEST:
            raise ValueError(f"--max_steps {self.max_steps}: must be at least 1 and at most {LARGEST:,}, or -1")
        if not all(1 <= width <= LARGEST for width in self.encoder_hidden_dims):
            raise ValueError(f"--encoder_hidden_dims {self.encoder_hidden_dims}: must each be 1 to {LARGEST:,}")
        if self.keep_ids is not None and not self.export_only:
            raise ValueError(
                "--keep_ids: give --export_only too, as the codes of a newly trained model mean other things"
            )
        if self.keep_ids is not None and self.num_rows:
            raise ValueError("--keep_ids: leave --num_rows out, or the IDs of all other items would count as vanished")
        if self.keep_ids is not None and self.collisions == "keep":
            raise ValueError("--keep_ids: there is nothing to keep apart with --collisions keep")
        if self.recycle_ids and self.keep_ids is None:
            raise ValueError("--recycle_ids: give --keep_ids too")
        if self.min_lr > self.max_lr:
            raise ValueError(f"--min_lr {self.min_lr}: must not be above --max_lr {self.max_lr}")

    @property
    def source(self) -> Path:
        return Path(self.data_dir, f"{self.category}_items_with_embeddings.parquet")

    @property
    def ids_path(self) -> Path:
        return Path(self.data_dir, f"{self.category}_semantic_ids.parquet")

    @property
    def quality_path(self) -> Path:
        return Path(self.data_dir, f"{self.category}_quality.json")

    @property
    def best_path(self) -> Path:
        return Path(self.checkpoint_dir, "best_model.pth")


def await_end() -> None:
    """Gives torchrun the time to end this rank silently, where another one tells, or is, the cause of its trouble."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PATIENCE)


def fail(what: str | Path, trouble: str, way_out: str) -> NoReturn:
    """Ends the run over wrong use or wrong input: one line on standard error, exit status 2."""
    if RANK:  # what is wrong for all is told by rank 0
        await_end()
    line = " ".join(f"error: {what}: {trouble}; {way_out}".split())
    tqdm.write(line, file=sys.stderr)  # on a line of its own, also where there is a progress bar
    raise SystemExit(2)


def diverged(trouble: str) -> NoReturn:
    """Ends a run whose numbers are none any more: one line on standard error, exit status 1."""
    if RANK:
        await_end()
    raise SystemExit(f"error: {trouble}; train again with a lower --max_lr")


def warn(message: str) -> None:
    if RANK == 0:
        print("warning:", message, file=sys.stderr)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse_config(argv: list[str] | None) -> RQVAEConfig:
    for argument in sys.argv[1:] if argv is None else argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            fail("command line", f"{argument!a} is not UTF-8", LIST_FLAGS)
    parser = HfArgumentParser(RQVAEConfig, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: fail("command line", message, LIST_FLAGS)
    try:
        config, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        fail("command line", str(error), LIST_FLAGS)
    if unknown:
        fail("command line", f"unknown argument {unknown[0]!r}", LIST_FLAGS)
    return config


def check_source(path: Path) -> None:
    """Ends the run where the file of the embeddings is missing, or cannot be looked at."""
    if not os.path.isfile(path):
        fail(path, "not found", "run embed_items.py first")


def check_files(config: RQVAEConfig) -> None:
    """The same for all files to read."""
    check_source(config.source)
    if config.export_only and not os.path.isfile(config.best_path):
        fail(config.best_path, "not found", "train first, or name another --checkpoint_dir")
    if config.keep_ids is not None and not os.path.isfile(config.keep_ids):
        fail(
            f"--keep_ids {config.keep_ids}",
            "not found",
            "name an earlier export, or leave --keep_ids out to give all items new IDs",
        )


if __name__ == "__main__":  # what is wrong here is told before the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open to the end
    check_files(parse_config(None))

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
import wandb
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import Dataset

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None

UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)  # what a damaged parquet file raises


# ---------------------------------------------------------------- several processes
# Every rank calls these at the same place, and one process may call them too: it is the sum of its parts. What is
# small goes by way of the CPUs, so that no GPU has to be waited for.


def gathered(value: Any) -> list:
    """The value of each rank."""
    values = [value] * RANKS
    if RANKS > 1:
        dist.all_gather_object(values, value)
    return values


def on_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, which alone does it."""
    result = [work() if RANK == 0 else None]
    if RANKS > 1:
        dist.broadcast_object_list(result)
    return result[0]


def summed(values: Tensor) -> Tensor:
    """In place: the sum over the ranks."""
    if RANKS > 1:
        dist.all_reduce(values)
    return values


def as_on_rank_0(module: nn.Module) -> None:
    """Gives every rank the weights and buffers of rank 0."""
    for values in module.state_dict().values() if RANKS > 1 else ():
        dist.broadcast(values, 0)


def shard_bounds(n: int) -> list[int]:
    """Where the rows of each rank begin, and n: whole pieces of the digest, so that each rank digests its own."""
    pieces = math.ceil(n / DIGEST_ROWS)
    return [min(n, pieces * rank // RANKS * DIGEST_ROWS) for rank in range(RANKS + 1)]


class Shards:
    """Embeddings (N, D) of which each rank holds the rows from its bound to the next, to be asked for by row."""

    def __init__(self, mine: Tensor, bounds: list[int]):
        self.mine, self.bounds = mine, bounds
        self.shape, self.device = (bounds[-1], mine.shape[1]), mine.device

    def to(self, device: torch.device) -> "Shards":
        return Shards(self.mine.to(device), self.bounds)

    def places(self, rows: Tensor) -> Tensor:
        """Where those of the rows that this rank holds lie in `mine`."""
        rows = rows.cpu()
        return rows[(rows >= self.bounds[RANK]) & (rows < self.bounds[RANK + 1])] - self.bounds[RANK]

    def exchange(self, wanted: list[Tensor]) -> Tensor:
        """What this rank wants, where all know the rows that each of the first ranks wants: (b, D)."""
        wanted = wanted + [torch.empty(0, dtype=torch.int64)] * (RANKS - len(wanted))
        given = [self.places(rows) for rows in wanted]
        holders = torch.bucketize(wanted[RANK].cpu(), torch.tensor(self.bounds[1:]), right=True)  # (b)
        received = self.mine.new_empty(len(holders), self.shape[1])  # in the order of the ranks
        dist.all_to_all_single(
            received,
            self.mine[torch.cat(given).to(self.device)],
            torch.bincount(holders, minlength=RANKS).tolist(),
            [len(places) for places in given],
        )
        return received[holders.argsort(stable=True).argsort().to(self.device)]

    def __getitem__(self, rows) -> Tensor:
        """Any rows, for rank 0 while the others `serve`."""
        rows = on_rank_0(lambda: torch.as_tensor(rows).cpu())
        return self.exchange([rows])

    def serve(self) -> None:
        """Gives rank 0 the rows that it asks for, until it says None."""
        while (rows := on_rank_0(lambda: None)) is not None:
            self.exchange([rows])


def fetch(embeddings: Tensor | Shards, wanted: list[Tensor]) -> Tensor:
    """Embeddings of the rows that this rank wants; `wanted` tells those of each of the first ranks."""
    return embeddings.exchange(wanted) if isinstance(embeddings, Shards) else embeddings.index_select(0, wanted[0])


def to_rank_0(part: Tensor, sizes: list[int]) -> Tensor:
    """On rank 0, the parts of the first ranks one after the other, of so many rows; elsewhere none."""
    if RANKS == 1:
        return part
    sizes = sizes + [0] * (RANKS - len(sizes)) if RANK == 0 else [0] * RANKS
    parts = part.new_empty(sum(sizes), *part.shape[1:])
    dist.all_to_all_single(parts, part.contiguous(), sizes, [len(part)] + [0] * (RANKS - 1))
    return parts


def held_here(embeddings: Tensor | Shards, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings that this rank holds, and where those of `rows` that it has lie there."""
    return (embeddings.mine, embeddings.places(rows)) if isinstance(embeddings, Shards) else (embeddings, rows)


def turns(embeddings: Tensor | Shards, order: Tensor | None, size: int) -> Iterator[list[Tensor]]:
    """The rows for each rank to work on next, at most `size`: in `order`, or where that is None, each rank's own."""
    if order is None and isinstance(embeddings, Shards):
        queues = [torch.arange(*ends).split(size) for ends in itertools.pairwise(embeddings.bounds)]
        return map(list, itertools.zip_longest(*queues, fillvalue=torch.empty(0, dtype=torch.int64)))
    order = torch.arange(len(embeddings), device=embeddings.device) if order is None else order
    parts = order.split(size)
    return (list(parts[i : i + RANKS]) for i in range(0, len(parts), RANKS))


# ---------------------------------------------------------------- data


def data_digest(embeddings: np.ndarray, n: int | None = None) -> str:
    """SHA-256 of the shape of embeddings (N, D) and of the digests of their pieces: the same in embed_items.py.

    With n, embeddings are the rows that this rank holds of n, and the digest is that of all n.
    """
    pieces = []
    for start in range(0, len(embeddings), DIGEST_ROWS):
        piece = np.ascontiguousarray(embeddings[start : start + DIGEST_ROWS], "<f4")
        pieces.append(hashlib.sha256(piece).digest())
    if n is not None:
        pieces = itertools.chain(*gathered(pieces))
    shape = (len(embeddings) if n is None else n, embeddings.shape[1])
    return hashlib.sha256(str(shape).encode() + b"".join(pieces)).hexdigest()


def names_digest(names: pl.Series) -> str:
    """SHA-256 of the names of items, in their order: the same in embed_items.py."""
    digest = hashlib.sha256()
    for some in names.to_frame().iter_slices(DIGEST_ROWS):
        texts = some.to_series()
        digest.update(texts.str.len_bytes().to_numpy().tobytes())  # so that values cannot run together
        digest.update(texts.str.join().item().encode())
    return digest.hexdigest()


class EmbeddingDataset(Dataset):
    """The embeddings of a catalogue as one tensor, with what names its items.

    embeddings (N, D) float32; parent_asin and labels (N) text: labels are titles, else the start of the text.
    Of several processes, each reads its shard of the embeddings, and rank 0 alone the names and the labels.
    Reading a file that breaks the contract ends the run with a line that says how.
    """

    def __init__(self, path: str | Path, num_rows: int | None = None):
        path, again = Path(path), "run embed_items.py again"
        check_source(path)
        try:
            file = pl.scan_parquet(path, n_rows=num_rows, glob=False)
            columns = file.collect_schema()
            for name in ("parent_asin", "embedding"):
                if name not in columns:
                    fail(path, f"no column {name} among {', '.join(columns)}", again)
            named = [name for name in ("title", "item_context", "parent_asin") if columns.get(name) == pl.String]
            texts = pl.col(named).str.strip_chars().replace("", None).str.slice(0, LABEL_LENGTH)
            label = pl.coalesce(texts) if named else pl.lit("")
            n = file.select(pl.len()).collect().item()
            if n == 0:
                fail(path, "no rows", again)
            metadata = pl.read_parquet_metadata(path)
            if num_rows is not None and num_rows < pl.scan_parquet(path, glob=False).select(pl.len()).collect().item():
                metadata = {"rows_per_group": metadata.get("rows_per_group", "")}  # the digests are of all rows
            self.digest = metadata.get("vectors")  # data_digest, as embed_items.py saw it
            if RANK == 0:
                table = file.select("parent_asin", label.alias("label")).collect()
                self.parent_asin = table["parent_asin"]
                self.labels = table["label"].fill_null("")
                self._check_names(path)
                if metadata.get("names") not in (None, names_digest(self.parent_asin)):
                    fail(path, "damaged: its parent_asin are not those that were written", again)
            kind = columns["embedding"]
            if kind.base_type() not in (pl.List, pl.Array) or kind.inner not in (pl.Float32, pl.Float64):
                fail(path, f"embedding is {kind}, not a list of Float32", again)
            rows = metadata.get("rows_per_group", "")
            rows = min(max(LEAST_ROWS_READ, int(rows)), n) if rows.isdecimal() else n
            bounds = shard_bounds(n)
            vectors = self._read_vectors(file, bounds[RANK], bounds[RANK + 1], rows, path)
            self.embeddings = Shards(vectors, bounds) if RANKS > 1 else vectors  # (N, D)
        except UNREADABLE as error:
            fail(path, f"not a readable parquet file ({first_line(error)})", again)

    def _check_names(self, path: Path) -> None:
        if self.parent_asin.dtype != pl.String or self.parent_asin.null_count():
            fail(path, "parent_asin is not text in every row", "run tokenize_items.py and embed_items.py again")
        repeated = (~self.parent_asin.is_first_distinct()).to_numpy()
        if repeated.any():
            first = self.parent_asin[int(repeated.argmax())]
            trouble = f"{repeated.sum()} duplicate parent_asin, the first is {first!r} in row {repeated.argmax()}"
            fail(path, trouble, "keep one row of each and run the three scripts again")

    def _read_vectors(self, file: pl.LazyFrame, first: int, end: int, rows: int, path: Path) -> Tensor:
        """Fills the tensor piece by piece, several at once, as polars reads a column of lists on one core."""
        again, n = "run embed_items.py again", end - first
        lists = file.select(pl.col("embedding").cast(pl.List(pl.Float32)))
        dim = lists.head(1).collect().to_series().list.len().item()
        if not dim:
            empty = lists.select((pl.col("embedding").list.len().fill_null(0) == 0).sum()).collect().item()
            fail(path, f"{empty} embeddings are null or empty, the first in row 0", again)
        vectors, odd = np.empty((n, dim), dtype=np.float32), np.zeros(n, dtype=bool)

        def read(start: int) -> None:
            piece = slice(start, start + rows)
            column = lists.slice(first + start, min(rows, n - start)).collect().to_series()
            odd[piece] = column.list.len().fill_null(0).to_numpy() != dim
            if not odd[piece].any():
                vectors[piece] = column.list.to_array(dim).to_numpy()

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, range(0, n, rows)))
        if count := sum(gathered(int(odd.sum()))):
            row = min(gathered(first + int(odd.argmax()) if odd.any() else math.inf))
            fail(path, f"{count} embeddings are not of one dimension, the first in row {row}", again)
        with np.errstate(over="ignore", invalid="ignore"):
            broken = ~np.isfinite(vectors.sum(axis=1))  # of these, some may only have too large a sum
        broken[broken] = ~np.isfinite(vectors[broken]).all(axis=1)
        if count := sum(gathered(int(broken.sum()))):
            row = min(gathered(first + int(broken.argmax()) if broken.any() else math.inf))
            name = file.select("parent_asin").slice(row, 1).collect().item()
            fail(path, f"{count} NaN or infinite embeddings, the first is item {name!r}", again)
        return torch.from_numpy(vectors)

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows) -> Tensor:
        return self.embeddings[rows]


# ---------------------------------------------------------------- quantization


def code_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """Squared Euclidean distances, less the |x|^2 that all codes share: x (B, E), codebook (K, E) -> (B, K)."""
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2)


def nearest_codes(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest in Euclidean distance: x (B, E), codebook (K, E) -> (B)."""
    return code_distances(x, codebook).min(1).indices  # on a CPU in less than half the time of argmin


def straight_through(x: Tensor, code: Tensor) -> Tensor:
    """Exactly `code` forwards; backwards the gradient goes to x unchanged (arXiv:1711.00937, section 3.2)."""
    return code.detach() + (x - x.detach())


def rotate_to(x: Tensor, code: Tensor) -> Tensor:
    """Exactly `code` forwards; backwards the rotation trick (arXiv:2410.06424, equation 4): x, code (B, E).

    The gradient is that of lambda R x, where the constant R rotates x onto the direction of the code and
    lambda = |code| / |x| matches their lengths; R = I - 2 r r^T + 2 q e^T for unit e = x/|x|, q = code/|code|
    and r = (e + q)/|e + q|.
    """
    with torch.no_grad():
        e, q = F.normalize(x, dim=-1), F.normalize(code, dim=-1)
        r = F.normalize(e + q, dim=-1)
        scale = code.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    rotated = scale * (x - 2 * (x * r).sum(-1, keepdim=True) * r + 2 * (x * e).sum(-1, keepdim=True) * q)
    return code.detach() + (rotated - rotated.detach())


def rows_per_pass(device: torch.device, width: int = TRAINING_SEARCH_WIDTH) -> int:
    """Rows to encode at once, each with `width` reconstructions."""
    return max(1, DECODED_PER_PASS.get(device.type, DECODED_PER_PASS["cpu"]) // width)


class QuantizerOutput(NamedTuple):
    """One level's answer."""

    codes: Tensor  # (B) int64
    vectors: Tensor  # (B, E) theirs, without gradient
    codebook_loss: Tensor  # () mean square of sg[x] - code over B and E
    commitment_loss: Tensor  # () mean square of x - sg[code], without its weight beta


class VectorQuantizer(nn.Module):
    """A learnable codebook (arXiv:1711.00937): K codes of dimension E, moved by the codebook loss."""

    def __init__(self, codebook_size: int, codebook_embedding_dim: int):
        super().__init__()
        codebook = torch.randn(codebook_size, codebook_embedding_dim)  # (K, E)
        self.register_codebook(codebook / math.sqrt(codebook_embedding_dim))

    def register_codebook(self, codebook: Tensor) -> None:
        self.codebook = nn.Parameter(codebook)

    def forward(self, x: Tensor, codes: Tensor | None = None) -> QuantizerOutput:
        """Quantizes x (B, E) in float32, by the nearest codes or by those given (B)."""
        x = x.float()
        codes = nearest_codes(x.detach(), self.codebook.detach()) if codes is None else codes
        vectors = F.embedding(codes, self.codebook)  # (B, E); indexing sums its gradient in no fixed order
        return QuantizerOutput(
            codes=codes,
            vectors=vectors.detach(),
            codebook_loss=F.mse_loss(vectors, x.detach()),
            commitment_loss=F.mse_loss(x, vectors.detach()),
        )

    @torch.no_grad()
    def set_codes(self, which: Tensor, vectors: Tensor, items: Tensor) -> None:
        """Puts codes at vectors: which (M) indices, vectors (M, E), items (M) a step that each stands for."""
        self.codebook[which] = vectors

    def set_aside(self) -> None:
        """Called in the middle of an optimizer step, for the sums of its second half to begin at zero again."""

    def end_step(self) -> None:
        """Called after each optimizer step."""


class EMAVectorQuantizer(VectorQuantizer):
    """A codebook moved by exponential moving averages (arXiv:1711.00937, appendix A.1) instead of gradients.

    Sums over the batches of an optimizer step are folded in once, at its end, so that accumulating gradients
    over small batches equals one large batch.
    """

    def __init__(self, codebook_size: int, codebook_embedding_dim: int, ema_decay: float = 0.99):
        super().__init__(codebook_size, codebook_embedding_dim)
        self.ema_decay = ema_decay

    def register_codebook(self, codebook: Tensor) -> None:
        self.register_buffer("codebook", codebook)
        self.register_buffer("ema_counts", torch.ones(len(codebook)))  # (K) items a code stands for
        self.register_buffer("ema_sums", codebook.clone())  # (K, E)
        no_items = torch.zeros(len(codebook), 1 + codebook.shape[1])
        self.register_buffer("step_sums", no_items, persistent=False)  # (K, 1 + E) a code's items, and their sum
        self.register_buffer("sums_aside", no_items.clone(), persistent=False)  # those of the step's first half

    def forward(self, x: Tensor, codes: Tensor | None = None) -> QuantizerOutput:
        """Quantizes x (B, E) in float32; in training, also counts it for the averages."""
        output = super().forward(x, codes)
        if self.training and torch.is_grad_enabled():  # a step, and not a look at the catalogue
            counted = F.pad(x.detach().float(), (1, 0), value=1.0)  # (B, 1 + E)
            self.step_sums += torch.zeros_like(self.step_sums).index_add_(0, output.codes, counted)
        return output

    @torch.no_grad()
    def set_codes(self, which: Tensor, vectors: Tensor, items: Tensor) -> None:
        super().set_codes(which, vectors, items)
        self.ema_counts[which] = items
        self.ema_sums[which] = vectors * items.unsqueeze(1)

    def set_aside(self) -> None:
        self.sums_aside += self.step_sums
        self.step_sums.zero_()

    @torch.no_grad()
    def end_step(self) -> None:
        """Equations of appendix A.1: N = decay N + (1 - decay) n, m = decay m + (1 - decay) sum, code = m / N."""
        sums = summed(self.sums_aside + self.step_sums)
        self.ema_counts.lerp_(sums[:, 0], 1 - self.ema_decay)
        self.ema_sums.lerp_(sums[:, 1:], 1 - self.ema_decay)
        # a code without items keeps its place: both averages fade together, until there is nothing left to divide
        counts = self.ema_counts.unsqueeze(1)  # (K, 1)
        self.codebook.copy_(torch.where(counts > 1e-6, self.ema_sums / counts, self.codebook))
        self.step_sums.zero_()
        self.sums_aside.zero_()


# ---------------------------------------------------------------- model


class Quantized(NamedTuple):
    """What the residual walk found on its way down the levels."""

    vectors: Tensor  # (B, E) exactly the sum of the codes, with the gradient to the latents
    codes: Tensor  # (B, L) int64
    codebook_losses: Tensor  # (L)
    commitment_losses: Tensor  # (L)
    residuals: Tensor  # (B, E) what no level explained


class Losses(NamedTuple):
    """The terms of total = reconstruction + sum over levels (codebook + beta commitment), each a mean over B.

    Of an item's mean square error e over D, standardised, the reconstruction is RECONSTRUCTION_WEIGHT c log(1 + e / c)
    with c = ERROR_SCALE, the Cauchy loss (alpha = 0 in Barron, arXiv:1701.03077).
    """

    total: Tensor  # ()
    reconstruction: Tensor  # ()
    vq: Tensor  # ()
    quantized: Quantized


def reconstruction_loss(errors: Tensor) -> Tensor:
    """That of items with these mean square errors (B): ()."""
    return RECONSTRUCTION_WEIGHT * ERROR_SCALE * (errors / ERROR_SCALE).log1p().mean()


def mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers with a SiLU between each two."""
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class RQVAE(nn.Module):
    """Residual-quantized autoencoder of embeddings (TIGER, arXiv:2305.05065, section 3.1).

    Takes and returns embeddings as stored, but for `forward` and `search`; inside it sees them standardised by one
    mean vector and one scale, which it keeps, so that the reconstruction and the quantization losses are of one
    magnitude.
    """

    def __init__(self, config: RQVAEConfig):
        super().__init__()
        self.config = config
        dim, latent_dim = config.item_embedding_dim or 1024, config.codebook_embedding_dim
        sizes = [dim, *config.encoder_hidden_dims, latent_dim]
        self.register_buffer("input_mean", torch.zeros(dim))
        self.register_buffer("input_scale", torch.ones(()))
        self.mlp_dtype = torch.float32  # of the MLPs' matrix products
        self.encoder = mlp(sizes)
        self.decoder = mlp(sizes[::-1])
        self.estimator = rotate_to if config.use_rotation_trick else straight_through
        self.quantizers = nn.ModuleList(
            EMAVectorQuantizer(config.codebook_size, latent_dim, config.ema_decay)
            if config.use_ema_vq
            else VectorQuantizer(config.codebook_size, latent_dim)
            for _ in range(config.codebook_quantization_levels)
        )

    def run(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        """Layers of an MLP in mlp_dtype.

        Those at the latents stay in float32, as the quantizer does: rounded, items that differ little become equal.
        """
        with torch.autocast(x.device.type, self.mlp_dtype, enabled=self.mlp_dtype != torch.float32):
            return layers(x)

    def encoded(self, x: Tensor) -> Tensor:
        """Latents of standardised x (B, D): (B, E) float32."""
        return self.encoder[-1](self.run(self.encoder[:-1], x).float())

    def decoded(self, latents: Tensor) -> Tensor:
        """Standardised reconstructions of latents (..., E): (..., D) in mlp_dtype."""
        return self.run(self.decoder[1:], self.decoder[0](latents))

    def standardise(self, x: Tensor) -> Tensor:
        return (x - self.input_mean) / self.input_scale

    def encode(self, x: Tensor) -> Tensor:
        """Latents: x (B, D) as stored -> (B, E)."""
        return self.encoded(self.standardise(x))

    def decode(self, latents: Tensor) -> Tensor:
        """Embeddings as stored: (B, E) -> (B, D)."""
        return self.decoded(latents).float() * self.input_scale + self.input_mean

    def quantize(
        self,
        latents: Tensor,
        codes: Tensor | None = None,
        before_level: Callable[[int, Tensor], None] | None = None,
    ) -> Quantized:
        """The residual walk: each level quantizes what those above left of latents (B, E).

        By the nearest codes, or by those given (B, L). `before_level(level, residuals)` may change the level's
        codebook before it is used. The gradient passes the sum of the codes once: level by level, the encoder would
        get it L times.
        """
        latents = latents.float()
        residuals, outputs = latents, []
        for level, quantizer in enumerate(self.quantizers):
            if before_level:
                before_level(level, residuals.detach())
            outputs.append(quantizer(residuals, None if codes is None else codes[:, level]))
            residuals = residuals - outputs[-1].vectors
        return Quantized(
            vectors=self.estimator(latents, sum(output.vectors for output in outputs)),
            codes=torch.stack([output.codes for output in outputs], dim=1),
            codebook_losses=torch.stack([output.codebook_loss for output in outputs]),
            commitment_losses=torch.stack([output.commitment_loss for output in outputs]),
            residuals=residuals,
        )

    @torch.no_grad()
    def search(self, latents: Tensor, target: Tensor, width: int) -> Tensor:
        """Codes of the ID that decodes nearest to target, of `width` likely ones: latents (B, E) -> (B, L).

        A beam search, as in Babenko and Lempitsky's additive quantization (CVPR 2014): level by level, the `width`
        prefixes (W) with the smallest residuals stay. Which of these IDs is best only the decoder knows, as distances
        between latents are not those between embeddings. It follows W walks at once to choose codes; what becomes of
        the chosen is for `quantize`. target (B, D) is standardised.
        """
        residuals = latents.float().unsqueeze(1)  # (B, W, E), W is 1 at first
        codes = torch.empty(*residuals.shape[:2], 0, dtype=torch.int64, device=latents.device)  # (B, W, l)
        for quantizer in self.quantizers:
            book = quantizer.codebook
            distance = code_distances(residuals.flatten(0, 1), book).add_(residuals.square().sum(2).reshape(-1, 1))
            distance = distance.reshape(len(residuals), residuals.shape[1] * len(book))  # (B, W K)
            best = distance.topk(min(width, distance.shape[1]), largest=False).indices  # (B, W of the next level)
            prefix, code = (best // len(book)).unsqueeze(2), best % len(book)
            codes = torch.cat([codes.gather(1, prefix.expand(-1, -1, codes.shape[2])), code.unsqueeze(2)], dim=2)
            residuals = residuals.gather(1, prefix.expand(-1, -1, book.shape[1])) - book[code]
        decoded = self.decoded(latents.unsqueeze(1) - residuals)  # (B, W, D), the largest tensor here
        off = decoded.sub_(target.to(decoded.dtype).unsqueeze(1))
        nearest = torch.linalg.vector_norm(off, dim=2, dtype=torch.float32).argmin(1)  # (B)
        return codes[torch.arange(len(codes), device=codes.device), nearest]

    def decode_levels(self, ids: Tensor) -> Tensor:
        """Sum of the codes of an ID or of its first levels, if any: ids (B, l) with l <= L -> (B, E)."""
        nothing = self.quantizers[0].codebook.new_zeros(len(ids), self.config.codebook_embedding_dim)
        return sum((self.quantizers[level].codebook[ids[:, level]] for level in range(ids.shape[1])), start=nothing)

    def forward(self, x: Tensor, target: Tensor | None = None, width: int = TRAINING_SEARCH_WIDTH) -> Losses:
        """Losses of x (B, D) against target (B, D), x itself by default, both standardised.

        The codes are the best of `width` IDs: the nearest ones at 1, and none, as in a plain autoencoder, at 0.
        """
        latents, target = self.encoded(x), x if target is None else target
        if width:
            codes = self.search(latents, target, width) if width > 1 else None
            quantized = self.quantize(latents, codes)
            vq = (quantized.codebook_losses + self.config.commitment_weight * quantized.commitment_losses).sum()
        else:
            quantized, vq = None, latents.new_zeros(())
        decoded = self.decoded(quantized.vectors if width else latents).float()
        errors = F.mse_loss(decoded, target, reduction="none").mean(1)  # (B)
        reconstruction = reconstruction_loss(errors)
        return Losses(reconstruction + vq, reconstruction, vq, quantized)

    @torch.no_grad()
    def encode_to_semantic_ids(self, x: Tensor, width: int = SEARCH_WIDTH) -> Tensor:
        """Codes of embeddings as stored: x (B, D) -> (B, L) int64; equal for items that collide.

        Of `width` likely IDs it is the one that decodes nearest to the item; 1 takes the nearest codes.
        """
        parts = x.split(rows_per_pass(x.device, width))
        return torch.cat([self.search(self.encode(part), self.standardise(part), width) for part in parts])

    @torch.no_grad()
    def decode_from_semantic_ids(self, ids: Tensor) -> Tensor:
        """Embeddings as stored: ids (B, L), or their first levels (B, l) -> (B, D)."""
        return self.decode(self.decode_levels(ids))


# ---------------------------------------------------------------- initialisation and reset


def fit_standardisation(model: RQVAE, embeddings: Tensor, rows: Tensor | None = None) -> None:
    """Sets the model's mean vector and scale that give embeddings (N, D) variance 1, on average over D.

    Of all rows, or of these; in float64, so that it does not matter how several processes share them.
    """
    rows = torch.arange(len(embeddings), device=embeddings.device) if rows is None else rows
    sums = torch.zeros(2, embeddings.shape[1], dtype=torch.float64)
    for some in rows.split(rows_per_pass(embeddings.device)):
        x = embeddings[some].cpu().double()
        sums += torch.stack([x.sum(0), x.square().sum(0)])
    mean, square = summed(sums) / sum(gathered(len(rows)))
    variance = (square - mean.square()).mean()
    alike = variance <= ROUNDING * square.mean()  # nothing but rounding tells the items apart
    model.input_mean.copy_(mean)
    model.input_scale.copy_(torch.ones(()) if alike else variance.sqrt())


@torch.no_grad()
def rescale_latents(model: RQVAE, latents: Tensor) -> Tensor:
    """Centres latents (N, E) and gives them unit variance, leaving the autoencoder's function as it was.

    The encoder's last layer takes the change, and the decoder's first layer its inverse.
    """
    mean = latents.mean(0)
    scale = (latents - mean).std()
    alike = scale.square() <= ROUNDING * latents.square().mean()  # nothing but rounding tells them apart
    scale = torch.ones_like(scale) if alike else scale
    last, first = model.encoder[-1], model.decoder[0]
    last.bias.sub_(mean).div_(scale)
    last.weight.div_(scale)
    first.bias.add_(first.weight @ mean)
    first.weight.mul_(scale)
    return (latents - mean) / scale


@torch.no_grad()
def init_codebooks(model: RQVAE, latents: Tensor, rows_per_step: int, seed: int) -> None:
    """k-means of each level's residuals, one level after the other: latents (M, E)."""

    def fit(level: int, residuals: Tensor) -> None:
        quantizer = model.quantizers[level]
        size = len(quantizer.codebook)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct vectors than codes: some stay unused
            warnings.simplefilter("ignore", RuntimeWarning)  # latents too large: the next step's loss tells it
            kmeans = KMeans(size, n_init=1, random_state=seed + level).fit(residuals.cpu().numpy())
        centres = torch.from_numpy(kmeans.cluster_centers_).to(residuals)  # (K, E)
        share = torch.from_numpy(np.bincount(kmeans.labels_, minlength=size) / len(residuals)).to(centres)  # (K)
        quantizer.set_codes(torch.arange(size, device=residuals.device), centres, share * rows_per_step)

    model.quantize(latents, before_level=fit)


def start_quantizing(model: RQVAE, x: Tensor, optimizers: list[Optimizer], rows_per_step: int, seed: int) -> None:
    """Ends the plain autoencoder training: codebooks from k-means of the latents of x (M, D), which rank 0 does."""
    if RANK == 0:
        with torch.no_grad():
            latents = torch.cat([model.encode(part) for part in x.split(rows_per_pass(x.device))])
        if not latents.isfinite().all():
            diverged("latents became NaN or infinite before k-means")
        init_codebooks(model, rescale_latents(model, latents), rows_per_step, seed)
    as_on_rank_0(model)
    for optimizer in optimizers:
        optimizer.state.clear()  # moments of another loss, and of the weights before the rescaling


@torch.no_grad()
def reset_codes(model: RQVAE, x: Tensor, usage: Tensor, adam: Optimizer) -> int:
    """Moves codes without usage (L, K) onto residuals of the batch x (B, D), state and all; says how many."""
    unused = (usage == 0).cpu()  # (L, K)

    def revive(level: int, residuals: Tensor) -> None:
        which = unused[level].nonzero().squeeze(1).to(residuals.device)  # (M)
        if len(which) == 0:
            return
        rows = torch.randperm(len(residuals), device=residuals.device).repeat(1 + len(which) // len(residuals))
        codebook = model.quantizers[level].codebook
        model.quantizers[level].set_codes(which, residuals[rows[: len(which)]], torch.ones_like(codebook[which, 0]))
        for moments in adam.state.get(codebook, {}).values():
            if moments.shape == codebook.shape:  # Adam's two; its step count is one number for all codes
                moments[which] = 0

    if unused.any():
        model.quantize(model.encode(x), before_level=revive)
        as_on_rank_0(model)  # each has done the same, but perhaps on another kind of processor
    return int(unused.sum())


# ---------------------------------------------------------------- evaluation


class CodeStatistics(NamedTuple):
    """What a table of codes (N, L) says about the IDs of a whole catalogue."""

    counts: np.ndarray  # (L, K) items that have each code
    usage: list[float]  # (L) share of the codes that any item has
    perplexity: list[float]  # (L) exp of the entropy of the codes
    distinct: float  # distinct IDs / items
    singleton: float  # items alone with their ID / items
    largest: int  # items that share the most common ID


def code_statistics(codes: Tensor, codebook_size: int) -> CodeStatistics:
    counts = torch.stack([torch.bincount(level, minlength=codebook_size) for level in codes.T]).cpu()  # (L, K)
    share = counts.double() / len(codes)
    levels = codes.shape[1]
    if codebook_size**levels < 2**63:  # one number an ID: several times faster to sort than rows
        weights = torch.tensor([codebook_size**level for level in range(levels)], device=codes.device)
        _, sizes = torch.unique((codes * weights).sum(1), return_counts=True)
    else:
        _, sizes = torch.unique(codes, dim=0, return_counts=True)
    return CodeStatistics(
        counts=counts.numpy(),
        usage=(counts > 0).double().mean(1).tolist(),
        perplexity=torch.special.entr(share).sum(1).exp().tolist(),
        distinct=len(sizes) / len(codes),
        singleton=(sizes == 1).sum().item() / len(codes),
        largest=int(sizes.max()),
    )


@torch.inference_mode()
def encode_catalogue(
    model: RQVAE, embeddings: Tensor | Shards, width: int = SEARCH_WIDTH, order: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Latents (N, E) and codes (N, L) of embeddings (N, D), in `order` (N), and the mean norm of the last residual.

    The codes are those of RQVAE.encode_to_semantic_ids with that width. Several processes take turns, and rank 0 gets
    it all: in `order`, from the very batches of one process; without, in any order.
    """
    parts, device = [], model.input_mean.device
    for wanted in turns(embeddings, order, rows_per_pass(device, width)):
        x = fetch(embeddings, wanted).to(device)
        latents = model.encode(x)
        codes = model.search(latents, model.standardise(x), width)
        found = (latents, codes, (latents - model.decode_levels(codes)).norm(dim=1))
        parts.append([to_rank_0(part, [len(rows) for rows in wanted]) for part in found])
    latents, codes, norms = (torch.cat(part) for part in zip(*parts, strict=True))
    return latents, codes, norms.mean().item()


def loss_terms(losses: Losses, config: RQVAEConfig) -> Tensor:
    """Total, reconstruction, vq, then each level's codebook and commitment loss, as one tensor (3 + 2L)."""
    if losses.quantized is None:
        levels = losses.total.new_zeros(2 * config.codebook_quantization_levels)
    else:
        levels = torch.cat([losses.quantized.codebook_losses, losses.quantized.commitment_losses])
    return torch.cat([torch.stack([losses.total, losses.reconstruction, losses.vq]), levels])


def loss_metrics(prefix: str, terms: Tensor, config: RQVAEConfig) -> dict[str, float]:
    """Those terms (3 + 2L) by name."""
    levels = range(config.codebook_quantization_levels)
    names = ["total_loss", "reconstruction_loss", "vq_loss"]
    names += [f"codebook_loss_{level}" for level in levels] + [f"commitment_loss_{level}" for level in levels]
    return {f"{prefix}/{name}": value for name, value in zip(names, terms.tolist(), strict=True)}


@torch.inference_mode()
def validate(model: RQVAE, embeddings: Tensor | Shards, val_rows: Tensor) -> dict[str, float]:
    """Losses over the held-out rows, and the codes of the whole catalogue: embeddings (N, D), val_rows (V).

    With the narrower search of training, so that the codes of `export` differ a little and fit better; in float32, as
    the model will be used.
    """
    config, mlp_dtype = model.config, model.mlp_dtype
    model.mlp_dtype = torch.float32
    model.eval()
    terms = torch.zeros(3 + 2 * config.codebook_quantization_levels, device=embeddings.device)
    here, places = held_here(embeddings, val_rows)
    for rows in places.split(rows_per_pass(here.device)) if len(places) else ():
        losses = model(model.standardise(here[rows]))
        terms = terms + loss_terms(losses, config) * (len(rows) / len(val_rows))
    terms = summed(terms)
    _, codes, residual_norm = encode_catalogue(model, embeddings, TRAINING_SEARCH_WIDTH)
    model.train()
    model.mlp_dtype = mlp_dtype

    def metrics() -> dict[str, float]:
        statistics = code_statistics(codes, config.codebook_size)
        found = loss_metrics("val", terms, config) | {
            "catalogue/distinct": statistics.distinct,
            "catalogue/singleton": statistics.singleton,
            "catalogue/residual_norm": residual_norm,
        }
        for level, (usage, perplexity) in enumerate(zip(statistics.usage, statistics.perplexity, strict=True)):
            found |= {f"catalogue/usage_{level}": usage, f"catalogue/perplexity_{level}": perplexity}
        return found

    return on_rank_0(metrics)


def progress_line(step: int, metrics: dict[str, float], speed: float, config: RQVAEConfig) -> str:
    """Everything that is tracked, in one line of a log."""

    def each_level(name: str, form: str) -> str:
        return "/".join(format(metrics[f"{name}_{i}"], form) for i in range(config.codebook_quantization_levels))

    line = f"step {step}:"
    for part in ("train", "val"):
        if f"{part}/total_loss" in metrics:
            total, reconstruction, vq = (metrics[f"{part}/{name}_loss"] for name in ("total", "reconstruction", "vq"))
            line += f" {part} loss {total:.4g} = {reconstruction:.4g} + {vq:.4g}"
            line += f" (codebook {each_level(f'{part}/codebook_loss', '.3g')},"
            line += f" commitment {each_level(f'{part}/commitment_loss', '.3g')});"
    if "train/gradient_norm" in metrics:
        line += f" gradient norm {metrics['train/gradient_norm']:.3g}"
        line += f" clipped to {metrics['train/clipped_gradient_norm']:.3g};"
        line += f" lr {metrics['train/learning_rate']:.2e}; {speed:,.0f} items/s;"
    line += f" usage {each_level('catalogue/usage', '.0%')}, perplexity {each_level('catalogue/perplexity', '.0f')},"
    line += f" distinct {metrics['catalogue/distinct']:.1%}, singleton {metrics['catalogue/singleton']:.1%},"
    return line + f" residual norm {metrics['catalogue/residual_norm']:.3g}"


# ---------------------------------------------------------------- checkpoints


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Ends the run where another one is writing `path`, or where nothing can be written; keeps others out meanwhile."""
    if RANK:  # rank 0 writes
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("a folder has that name")
        file = open(lock, "w")  # noqa: SIM115  closed below
    except OSError as error:
        fail(path, f"cannot be written ({first_line(error)})", "set the rights there, or choose another folder")
    with file:
        held = True
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))  # else that run has just ended
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError as error:  # a file system without locks
            warn(f"{path} cannot be locked ({first_line(error)}): start no second run there")
        if not held:
            fail(path, "another run is writing it", "wait for that one, or choose another folder")
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and moves it there, flushed, once the block has filled it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if path.is_dir():  # told now, not after the work
            raise IsADirectoryError("a folder has that name")
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, pl.exceptions.ComputeError) as error:  # polars' own for a full disk
        trouble = f"cannot be written ({first_line(error)})"
        fail(path, trouble, "make room or set the rights there, or choose another folder")
    finally:
        with suppress(OSError):
            temporary.unlink()


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """Those in the folder by their step, the last one first."""
    found = [(re.fullmatch(r"checkpoint_step_(\d+)\.pth", path.name), path) for path in folder.glob("*.pth")]
    return dict(sorted(((int(name[1]), path) for name, path in found if name and path.is_file()), reverse=True))


def load_whole(path: Path, device: torch.device | str, keys: set[str]) -> tuple[dict, RQVAE]:
    """The dict of a .pth that this script wrote, with these keys, and its model; ValueError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load takes tensors with flipped bits for good
                raise ValueError("its checksums do not match")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if missing := keys - checkpoint.keys():
            raise ValueError(f"no {', '.join(sorted(missing))} in it")
        model = RQVAE(RQVAEConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model_state_dict"])
        if not all(weight.isfinite().all() for weight in model.state_dict().values()):
            raise ValueError("some of its weights are NaN or infinite")
        if not isinstance(checkpoint["step"], int) or checkpoint["step"] < 0:
            raise ValueError("its step is no number of steps")
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise ValueError(first_line(error)) from error
    return checkpoint, model.to(device).eval()


def read_checkpoint(path: Path, device: torch.device | str) -> tuple[dict, RQVAE]:
    """The dict of a .pth that this script wrote, and its model; ends the run where it is missing or damaged."""
    if not os.path.isfile(path):  # false, too, where it cannot be looked at
        fail(path, "not found", "train first, or name another --checkpoint_dir")
    try:
        return load_whole(path, device, CHECKPOINT_KEYS)
    except ValueError as error:
        fail(path, f"damaged, or not a checkpoint ({error})", "delete it and use another, or train again")


def load_model(path: str | Path, device: torch.device | str = "cpu") -> RQVAE:
    """The RQVAE of any checkpoint, in evaluation mode on `device`; ends the run where the file is no good."""
    return read_checkpoint(Path(path), device)[1]


def save_checkpoint(path: Path, model: RQVAE, step: int, epoch: int, val_loss: float, **training) -> None:
    """Writes a dict of tensors and plain Python types; `training` is what an exact resume needs."""
    checkpoint = {
        "model_state_dict": model.state_dict(),
        "config": asdict(model.config),
        "step": step,
        "epoch": epoch,
        "val_loss": val_loss,
    }
    with replacing(path) as temporary:
        try:
            torch.save(checkpoint | training, temporary)
        except RuntimeError as error:  # its own for a full disk
            raise OSError(first_line(error)) from error


# ---------------------------------------------------------------- distinct IDs


def group_rows(keys: np.ndarray) -> list[np.ndarray]:
    """Rows (N) that share a key, one array a group, rows in order."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1) if len(keys) else []


def prefix_keys(codes: np.ndarray, level: int) -> np.ndarray:
    """One number an item for the first `level` codes of codes (N, L), equal where they are: (N)."""
    keys = np.zeros(len(codes), dtype=np.int64)
    for column in codes.T[:level]:
        _, keys = np.unique(keys * (codes.max() + 1) + column, return_inverse=True)
    return keys


def distances(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Squared, less what all codes share, |x|^2: x (n, E), codebook (K, E) -> (n, K)."""
    return (codebook**2).sum(1) - 2 * x @ codebook.T


def spill(codes: np.ndarray, residuals: np.ndarray, codebook: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Moves items off codes that more share than have `room` (K) to the nearest with room, those that lose least first.

    codes (n), residuals (n, E), codebook (K, E) -> codes (n).
    """
    codes = codes.copy()
    counts = np.bincount(codes, minlength=len(codebook))  # (K)
    while (counts > room).any():
        full = (counts - room).argmax()
        members = np.flatnonzero(codes == full)  # (m)
        cost = distances(residuals[members], codebook)  # (m, K)
        loss = cost[:, counts < room].min(1) - cost[:, full]
        for i in np.argsort(loss, kind="stable")[: counts[full] - room[full]]:
            target = np.where(counts < room, cost[i], np.inf).argmin()  # of those with room by now
            codes[members[i]] = target
            counts[[full, target]] += [-1, 1]
    return codes


def room_below(parent: int, others: np.ndarray, size: int, capacity: int) -> np.ndarray:
    """IDs left below each code of a parent: (K), of `capacity` each. others (T) parent * size + code of those taken."""
    return capacity - np.diff(np.searchsorted(others, parent * size + np.arange(size + 1)))


def assign_distinct(
    latents: np.ndarray,
    codes: np.ndarray,
    codebooks: np.ndarray,
    last_costs: Callable[[list[np.ndarray], np.ndarray], Iterable[np.ndarray]],
    taken: np.ndarray,
) -> np.ndarray:
    """Distinct IDs of the same length: latents (N, E), codes (N, L), codebooks (L, K, E) -> codes (N, L).

    They are none of taken (T, L), distinct IDs of others. From the first level down, a prefix that more items share
    than there are IDs left below it gives some to the next nearest, with the nearest codes below it. At the last
    level, the items of a prefix get different codes at the least total cost (scipy.optimize.linear_sum_assignment):
    last_costs(groups, prefixes) yields those of n items with each last code, (n, K), for groups of rows with their
    prefixes (groups, L - 1). Only prefixes with collisions change. Needs N + T <= K^L.
    """
    n, (levels, size, _) = len(codes), codebooks.shape
    assert n + len(taken) <= size**levels, "more items than IDs"
    codes = np.concatenate([codes, taken])  # the taken ones only count
    parents = np.zeros(len(codes), dtype=np.int64)  # (N + T) one number for the codes above the level
    for level in range(levels):
        # IDs below each code of this level, as far as so many items can tell
        capacity = min(len(codes), size ** (levels - 1 - level))
        prefixes = parents * size + codes[:, level]
        _, keys, counts = np.unique(prefixes, return_inverse=True, return_counts=True)
        affected = np.flatnonzero(np.isin(parents[:n], parents[counts[keys] > capacity]))
        groups, others = [affected[group] for group in group_rows(parents[affected])], np.sort(prefixes[n:])
        if level == levels - 1:
            costs = last_costs(groups, codes[[group[0] for group in groups], :-1])
            for rows, cost in zip(groups, costs, strict=True):
                free = np.flatnonzero(room_below(parents[rows[0]], others, size, capacity))
                codes[rows, level] = free[linear_sum_assignment(cost[:, free])[1]]
            break
        for rows in groups:
            left = latents[rows] - sum(codebooks[above][codes[rows, above]] for above in range(level))  # (n, E)
            room = room_below(parents[rows[0]], others, size, capacity)
            target = spill(codes[rows, level], left, codebooks[level], room)
            moved = target != codes[rows, level]
            rows, left = rows[moved], left[moved]
            codes[rows, level] = target[moved]
            for below in range(level + 1, levels):
                left = left - codebooks[below - 1][codes[rows, below - 1]]
                codes[rows, below] = distances(left, codebooks[below]).argmin(1)
        _, parents = np.unique(parents * size + codes[:, level], return_inverse=True)
    return codes[:n]


def count_within(codes: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """TIGER's suffix (section 3.1): codes (N, L) and a number that counts the items of equal codes, (N, L + 1).

    It goes on from the largest in taken (T, L + 1), IDs of others.
    """
    levels = codes.shape[1]
    keys = prefix_keys(np.concatenate([codes, taken[:, :levels]]), levels)
    first = np.zeros(keys.max(initial=0) + 1, dtype=np.int64)  # (keys) the first number that is free
    np.maximum.at(first, keys[len(codes) :], taken[:, levels] + 1)
    keys = keys[: len(codes)]
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))  # places in order where a group begins
    suffix = np.empty_like(keys)
    suffix[order] = np.arange(len(keys)) - np.repeat(starts, np.diff(starts, append=len(keys)))
    return np.column_stack([codes, first[keys] + suffix])


# ---------------------------------------------------------------- training


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device and, in words, why."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if RANKS > 1:  # which have no way to talk on MPS
        there["mps"] = False
    best, why = name, "asked for"
    if name == "auto":
        best, why = next(kind for kind, is_there in there.items() if is_there), "the best one here"
    if not there[best]:
        fail(f"--device {name}", "there is none here", "use --device auto")
    if RANKS == 1:
        return torch.device(best), why
    if best == "cuda":
        gpus = torch.cuda.device_count()
        if gpus <= LOCAL_RANK:
            trouble = f"more processes than the {gpus} GPUs of this machine"
            fail("torchrun", trouble, "lower --nproc_per_node, or use --device cpu")
        torch.cuda.set_device(LOCAL_RANK)
    return torch.device(best, LOCAL_RANK) if best == "cuda" else torch.device(best), f"{why}; {RANKS} processes"


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next tensor: what it returns to the kernel comes back in pages to be cleared.

    On a CPU that clearing takes up to a fifth of all time. Other C libraries go on as they are.
    """
    with suppress(AttributeError, OSError, TypeError):  # each system's way not to have it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its most: only what is larger gets pages of its own
        mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: unused bytes at the end of the heap before they are returned


def choose_dtype(device: torch.device, name: str) -> str:
    """The number type that --dtype asks for, or that suits the device."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # torch 2.11 cannot tell
        fast = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return "bfloat16" if fast else "float32"


def split_rows(n: int, config: RQVAEConfig) -> tuple[Tensor, Tensor]:
    """Training and validation rows of n, the same for a seed; without a validation split, all rows are both."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
    held_out = min(round(n * config.val_split), n - 1)
    if held_out == 0:
        return order, order
    return order[held_out:], order[:held_out]


def make_optimizers(model: RQVAE, max_lr: float) -> list[Optimizer]:
    """Adam, and Muon for the matrices between hidden layers, where it learns more in as many steps.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes a step orthogonal; scaled as in
    arXiv:2502.16982, section 2.2, one learning rate suits both.
    """
    inner = [layer.weight for stack in (model.encoder, model.decoder) for layer in stack[2:-1:2]]  # the rest are SiLUs
    others = [parameter for parameter in model.parameters() if all(parameter is not weight for weight in inner)]
    optimizers: list[Optimizer] = [torch.optim.Adam(others, lr=max_lr, betas=ADAM_BETAS, fused=True)]
    if inner:
        optimizers.append(torch.optim.Muon(inner, lr=max_lr, weight_decay=0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(step: int, total_steps: int, config: RQVAEConfig) -> float:
    """Of optimizer step `step`, from 0: a linear rise over warmup_steps, then a cosine from max_lr to min_lr."""
    warmup = config.warmup_steps if config.scheduler_type == "cosine_with_warmup" else 0
    if step < warmup:
        return config.max_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.min_lr + (config.max_lr - config.min_lr) * (1 + math.cos(math.pi * min(1, progress))) / 2


def shuffled(rows: Tensor, epoch: int, seed: int) -> Tensor:
    """The training rows in the order of this epoch, the same for a seed and a kind of device whenever it is asked."""
    generator = torch.Generator(rows.device).manual_seed(seed + 1_000_003 * (epoch + 1))
    return rows[torch.randperm(len(rows), generator=generator, device=rows.device)]


def shares(size: int) -> list[Tensor]:
    """Places in a batch of `size` that each rank works on, after the place before them, which is only mixed with."""
    return [torch.arange(size * rank // RANKS - 1, size * (rank + 1) // RANKS) % size for rank in range(RANKS)]


@contextmanager
def drawing_from(seed: int | None) -> Iterator[None]:
    """Draws random numbers on the CPU from another seed for a while, and then goes on as if nothing had been drawn."""
    if seed is None:
        yield
        return
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class Pass(NamedTuple):
    """What the ranks train on at the same time, each on its own part."""

    wanted: list[Tensor]  # the rows whose embeddings each rank needs
    count: int  # rows that this rank trains on, perhaps none
    seed: int | None = None  # of its random numbers; None to go on drawing as all ranks do
    places: Tensor | None = None  # where in a batch of `size` the rows that it needs lie
    size: int | None = None


def deal(rows: Tensor, config: RQVAEConfig, device: torch.device) -> list[Pass]:
    """Shares the rows (R) of an optimizer step out.

    On a GPU each rank works on a share of every batch. CPUs take smaller batches, whole and with random numbers of
    their own, so that it makes no difference which rank does; where there are fewer of them, some ranks have none.
    """
    most = TRAINED_PER_PASS.get(device.type)
    size = min(config.batch_size, most or config.batch_size)
    batches = rows.chunk(math.ceil(len(rows) / size))  # of one size, so that each has rows to mix
    if most:
        seed = int(torch.randint(2**32, ()))
        bounds = [math.ceil(len(batches) * rank / RANKS) for rank in range(RANKS + 1)]
        dealt = [batches[first:end] for first, end in itertools.pairwise(bounds)]
        together = itertools.zip_longest(*dealt, fillvalue=rows[:0])
        return [Pass(list(wanted), len(wanted[RANK]), seed + bounds[RANK] + i) for i, wanted in enumerate(together)]
    if RANKS == 1:
        return [Pass([batch], len(batch)) for batch in batches]
    if len(batches[-1]) < RANKS:  # and each rank has some
        batches = rows.tensor_split(min(len(batches), len(rows) // RANKS))
    shared = [(batch, shares(len(batch))) for batch in batches]
    return [
        Pass([batch[each] for each in places], len(places[RANK]) - 1, None, places[RANK], len(batch))
        for batch, places in shared
    ]


def random_signs(drawn: Tensor) -> Tensor:
    """The bits of random int32 (B, W) as signs of numbers that mean nothing else, for copysign: (B, 32 W) float32.

    A sixth of the time of normal deviates on a CPU; to a layer that adds up hundreds of inputs they are alike.
    """
    shifts = torch.arange(32, dtype=drawn.dtype, device=drawn.device)
    return torch.bitwise_left_shift(drawn.unsqueeze(2), shifts).flatten(1).view(torch.float32)


def augment(
    x: Tensor, model: RQVAE, noise: float, mixing: float, places: Tensor | None = None, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Training inputs and what they should become, standardised (B, D) both, of embeddings x (B, D) as stored.

    So that a small catalogue is not learned by heart, inputs are mixed in pairs with weights from Beta(mixing,
    mixing), as in mixup (arXiv:1710.09412), and drawn out to the variance they had; then noise is added that the
    reconstruction should not have, as in a denoising autoencoder: `noise` in size, each with a random sign.

    With `places`, x is what lies there in a batch of `size`, and the first is only mixed with. Random numbers are
    drawn for all the batch: so all ranks draw the same, which are those of one process, and none need be saved but
    rank 0's state.
    """
    stretch = 1 / model.input_scale
    size, places, mine = (len(x), slice(None), slice(None)) if places is None else (size, places, slice(1, None))
    drawn_on = "cpu" if x.device.type == "mps" else x.device  # MPS cannot draw from Beta, nor perhaps every int32
    if mixing:
        alpha = torch.full((), mixing, device=drawn_on)
        beta = torch.distributions.Beta(alpha, alpha, validate_args=False)  # a look at alpha would wait for the GPU
        share = beta.sample((size, 1)).to(x)[places]  # (B, 1)
        x = torch.lerp(x.roll(1, dims=0), x, share)
        stretch = stretch / (share.square() + (1 - share).square()).sqrt()
    target = (x - model.input_mean).mul_(stretch)[mine]
    if not noise:
        return target, target
    words = (size, math.ceil(x.shape[1] / 32))
    drawn = torch.randint(-(2**31), 2**31, words, dtype=torch.int32, device=drawn_on).to(x.device)[places][mine]
    signed = torch.full((), noise, device=x.device).copysign(random_signs(drawn)[:, : x.shape[1]])  # (B, D)
    return target + signed, target


class StepResult(NamedTuple):
    """One optimizer step; everything stays on the device until it is logged."""

    terms: Tensor  # (3 + 2L) total, reconstruction, vq, codebook and commitment loss of each level
    codes: Tensor | None  # (rows, L), None for a plain autoencoder step
    gradient_norm: Tensor  # () before clipping


def train_step(
    model: RQVAE, optimizers: list[Optimizer], embeddings: Tensor | Shards, rows: Tensor, noise: float, width: int
) -> StepResult:
    """Gradients of batch after batch, weighted to be those of all `rows` (R) at once, then one optimizer step.

    `width` is that of RQVAE.forward: 0 for a step as a plain autoencoder. Of several processes, each works on its
    share of the rows, with `model` wrapped; the result's terms add up to those of all, its codes are of the share.
    """
    wrapped, model = model, getattr(model, "module", model)
    config, parameters = model.config, list(model.parameters())
    terms, codes = torch.zeros(3 + 2 * config.codebook_quantization_levels, device=embeddings.device), []
    passes = deal(rows, config, embeddings.device)
    # on CPUs two processes add up one half of the passes each: so does one, for its sums to be rounded like theirs
    in_halves = RANKS == 1 and embeddings.device.type in TRAINED_PER_PASS
    half = math.ceil(len(passes) / 2) if in_halves else len(passes)
    aside = [None] * len(parameters)  # gradients of the first half
    for number, (wanted, count, seed, places, size) in enumerate(passes, start=1):
        x, share = fetch(embeddings, wanted), count / len(rows)
        with drawing_from(seed):
            inputs = augment(x, model, noise, config.input_mixing, places, size)
        with nullcontext() if wrapped is model or number == len(passes) else wrapped.no_sync():
            losses = wrapped(*inputs, width)
            (losses.total * (share * RANKS)).backward()  # the wrapper takes the mean over the ranks
        if count:
            terms += loss_terms(losses, config).detach() * share
        codes += [losses.quantized.codes] if width else []
        if number == half < len(passes):
            aside = [parameter.grad for parameter in parameters]
            model.zero_grad()
            for quantizer in model.quantizers:
                quantizer.set_aside()
    for parameter, gradient in zip(parameters, aside, strict=True):
        if gradient is not None:
            parameter.grad += gradient
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip_norm or math.inf)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if width:
        for quantizer in model.quantizers:
            quantizer.end_step()
    return StepResult(terms, torch.cat(codes) if width else None, norm)


def step_metrics(steps: range, results: list[StepResult], config: RQVAEConfig) -> dict[str, float]:
    """The last step's losses and gradient norms by name; ends the run where one of any step (S) is no number."""
    values = torch.stack([torch.cat([result.terms, result.gradient_norm.reshape(1)]) for result in results])
    values = values.float().cpu()  # (S, 4 + 2L)
    values[:, :-1] = summed(values[:, :-1].clone())  # the gradient norm is the same on all ranks
    for step, row in zip(steps, values, strict=True):
        metrics = loss_metrics("train", row[:-1], config) | {"train/gradient_norm": row[-1].item()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                diverged(f"{name} became {value} in step {step}")
    clip = config.gradient_clip_norm or math.inf
    return metrics | {"train/clipped_gradient_norm": min(metrics["train/gradient_norm"], clip)}


class Plan(NamedTuple):
    """Sizes that follow from the configuration and the number of items."""

    train_rows: Tensor  # (M)
    val_rows: Tensor  # (V)
    rows_per_step: int
    steps_per_epoch: int
    total_steps: int
    autoencoder_steps: int  # of those, the first, before k-means


def plan_training(n: int, config: RQVAEConfig) -> Plan:
    train_rows, val_rows = split_rows(n, config)
    rows_per_step = min(config.batch_size * config.gradient_accumulation_steps, len(train_rows))
    steps_per_epoch = len(train_rows) // rows_per_step
    total_steps = config.num_epochs * steps_per_epoch
    if config.max_steps > 0:
        total_steps = min(total_steps, config.max_steps)
    if not config.use_kmeans_init:
        autoencoder_steps = 0
    elif config.autoencoder_steps is None:
        autoencoder_steps = min(total_steps // 5, MOST_AUTOENCODER_STEPS)
    else:
        autoencoder_steps = config.autoencoder_steps
    return Plan(train_rows, val_rows, rows_per_step, steps_per_epoch, total_steps, autoencoder_steps)


@contextmanager
def finishing_steps() -> Iterator[list[int]]:
    """Yields a list that Ctrl-C or SIGTERM appends to, for the loop to end after its step; a second ends at once."""
    asked: list[int] = []

    def ask(number: int, frame) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    except RuntimeError:
        if RANKS > 1 and asked:  # torchrun ends this rank as another one, without which it cannot go on, has failed
            raise SystemExit(130) from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"].cpu())


def same_flags(trained: dict, config: dict) -> bool:
    """Whether two configurations are of one run, but for what may differ when it goes on."""
    return all(trained.get(name) == value for name, value in config.items() if name not in FREE_FIELDS)


def holds_best(path: Path, config: dict, data: str, lowest_val_loss: float) -> bool:
    """Whether best_model.pth is of this run: not gone, damaged or left by another one."""
    try:
        best, _ = load_whole(path, "cpu", CHECKPOINT_KEYS | {"data"})
    except ValueError:
        return False
    good = best["val_loss"] <= lowest_val_loss * (1 + EQUAL_LOSSES)
    return good and best["data"] == data and same_flags(best["config"], config)


def final_step(folder: Path, config: dict, data: str) -> int:
    """The steps of final_model.pth; -1 where that is gone, damaged or left by another run."""
    try:
        final, _ = load_whole(folder / "final_model.pth", "cpu", CHECKPOINT_KEYS | {"data"})
    except ValueError:
        return -1
    return final["step"] if final["data"] == data and same_flags(final["config"], config) else -1


def train(
    model: RQVAE, embeddings: Tensor | Shards, plan: Plan, data: str, resumed: dict | None, run
) -> tuple[bool, float]:
    """Trains and writes the checkpoints; returns whether the last step was reached, and the lowest validation loss.

    embeddings (N, D) lie on the device and `data` names them in the checkpoints; `resumed` is the checkpoint to go
    on from; `run` is W&B's. Several processes take every step and every decision in common, and draw the random
    numbers of one.
    """
    config, device, folder = model.config, embeddings.device, Path(model.config.checkpoint_dir)
    train_rows, val_rows = plan.train_rows.to(device), plan.val_rows.to(device)
    levels, size = config.codebook_quantization_levels, config.codebook_size
    usage = torch.zeros(levels, size, dtype=torch.int64, device=device)  # (L, K) since the last reset
    optimizers = make_optimizers(model, config.max_lr)
    rate_factor = lambda step: learning_rate(step, plan.total_steps, config) / config.max_lr  # noqa: E731
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor) for optimizer in optimizers]
    start, lowest, metrics = 0, math.inf, {}
    if resumed:
        start, metrics = resumed["step"], resumed["metrics"]
        if on_rank_0(lambda: holds_best(config.best_path, resumed["config"], data, resumed["lowest_val_loss"])):
            lowest = resumed["lowest_val_loss"]
        try:
            model.load_state_dict(resumed["model_state_dict"])
            states = resumed["optimizer_states"] + resumed["scheduler_states"]
            for each, state in zip(optimizers + schedulers, states, strict=True):
                each.load_state_dict(state)
            if RANK == 0:  # the ranks' counts are summed where they are needed
                usage.copy_(resumed["usage"])
            restore_random_states(resumed["random_states"])  # after holds_best, as building a model draws from them
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            path, trouble = folder / f"checkpoint_step_{start}.pth", "what it holds of the training does not fit"
            fail(path, f"{trouble} ({first_line(error)})", "delete it, for an earlier one to be used")
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group["lr"] = config.max_lr * rate_factor(start)  # another number of steps makes another schedule
    else:
        here, places = held_here(embeddings, train_rows)
        fit_standardisation(model, here, places)

    def save(name: str, step: int, **training) -> None:
        if RANK:
            return
        if not torch.stack([weight.isfinite().all() for weight in model.state_dict().values()]).all():
            diverged(f"a weight became NaN or infinite in step {step}")
        epoch = step // plan.steps_per_epoch
        save_checkpoint(folder / name, model, step, epoch, metrics.get("val/total_loss", math.inf), **training,
                        metrics=metrics, data=data)  # fmt: skip

    def save_numbered(step: int) -> None:
        summed(usage)
        if RANK:
            usage.zero_()  # rank 0 keeps the sum
            return
        save(f"checkpoint_step_{step}.pth", step, optimizer_states=[each.state_dict() for each in optimizers],
             scheduler_states=[each.state_dict() for each in schedulers], random_states=random_states(),
             usage=usage, lowest_val_loss=lowest, wandb_run_id=run.id,
             autoencoder_steps=plan.autoencoder_steps)  # fmt: skip
        there = numbered_checkpoints(folder)
        kept = [number for number in there if number <= step][: config.keep_checkpoints]
        for number in there.keys() - kept:  # the oldest, and what an earlier run left that had come further
            with suppress(OSError):
                there[number].unlink()

    model.train()
    last_log, last_time, order, order_epoch, unseen = start, time.perf_counter(), None, None, []
    wrapped, host = model, torch.device("cpu") if RANKS > 1 else device  # which tells the ranks who holds what
    bar = tqdm(total=plan.total_steps, initial=start, desc="train", unit=" steps", smoothing=0.05, disable=RANK > 0)
    with finishing_steps() as asked_to_stop, bar:
        for step in range(start + 1, plan.total_steps + 1):
            epoch, place = divmod(step - 1, plan.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = shuffled(train_rows, epoch, config.seed).to(host), epoch
            rows = order[place * plan.rows_per_step : (place + 1) * plan.rows_per_step]
            if step == plan.autoencoder_steps + 1 and config.use_kmeans_init:
                start_quantizing(
                    model, fetch(embeddings, [train_rows[:KMEANS_ROWS]]), optimizers, plan.rows_per_step, config.seed
                )
            quantize = step > plan.autoencoder_steps
            if RANKS > 1 and step in (start + 1, plan.autoencoder_steps + 1):
                model.quantizers.requires_grad_(quantize)  # the wrapper waits for the gradients of all that require one
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # of a new name that torch 2.11 does not know
                    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
            noise = config.input_noise * (1 - (step - 1) / plan.total_steps)  # none at the end, for the codes to settle
            width = TRAINING_SEARCH_WIDTH if step > SEARCH_FROM * plan.total_steps else 1
            result = train_step(wrapped, optimizers, embeddings, rows, noise, width if quantize else 0)
            unseen.append(result._replace(codes=None))  # looked at where the host waits for the device anyway
            rate = schedulers[0].get_last_lr()[0]
            for scheduler in schedulers:
                scheduler.step()
            if quantize:
                usage.scatter_add_(1, result.codes.T, torch.ones_like(result.codes.T))
                early = step <= LAST_RESET * plan.total_steps
                due = (step - plan.autoencoder_steps) % config.steps_per_codebook_reset == 0
                if config.reset_unused_codes and early and due:
                    batch = [rows[: config.batch_size]] * RANKS
                    reset_codes(model, fetch(embeddings, batch), summed(usage), optimizers[0])
                    usage.zero_()

            validating = quantize and (step % config.steps_per_val_log == 0 or step == plan.total_steps)
            is_logging = validating or step % config.steps_per_train_log == 0
            stopping = summed(torch.tensor(len(asked_to_stop))).item() > 0 and step < plan.total_steps
            saving = stopping or step % config.steps_per_checkpoint == 0
            if is_logging or saving:
                logged = step_metrics(range(step - len(unseen) + 1, step + 1), unseen, config)
                logged["train/learning_rate"] = rate
                unseen = []
            if is_logging:
                now = time.perf_counter()
                speed = (step - last_log) * plan.rows_per_step / (now - last_time)
                last_log, last_time = step, now
                run.log(logged | {"train/items_per_second": speed}, step=step)
                metrics |= logged
                bar.set_postfix_str(f"loss {logged['train/total_loss']:.4g}, lr {rate:.2e}")
            if validating:
                measured = validate(model, embeddings, val_rows)
                run.log(measured, step=step)
                metrics |= measured
                loss = measured["val/total_loss"]
                better = loss <= lowest * (1 + EQUAL_LOSSES)
                lowest = min(lowest, loss)
                if better:
                    save("best_model.pth", step)
                bar.write(progress_line(step, metrics, speed, config) + ("  best" if better else ""))
                last_log, last_time = step, time.perf_counter()  # items a second are those of training alone
            if saving:
                save_numbered(step)
            bar.update()
            if stopping:
                return False, lowest
    if not math.isfinite(lowest):
        diverged("no validation loss was finite")
    missing = final_step(folder, asdict(config), data) < start  # as after a kill between the last checkpoint and this
    if start < plan.total_steps or (start == plan.total_steps and missing):
        save("final_model.pth", plan.total_steps)
    return True, lowest


# ---------------------------------------------------------------- quality of the IDs


@torch.inference_mode()
def reconstruction_quality(x: Tensor, decoded: Tensor) -> tuple[float | None, float]:
    """Unexplained variance, sum |x - x^|^2 / sum |x - mean|^2 (None for equal items), and mean cosine: (N, D) both."""
    spread = (x - x.mean(0)).square().sum()
    alike = spread <= ROUNDING * x.square().sum()
    unexplained = None if alike else ((x - decoded).square().sum() / spread).item()
    return unexplained, F.cosine_similarity(x, decoded).mean().item()


@torch.inference_mode()
def neighbour_recall(x: Tensor, decoded: Tensor, queries: Tensor) -> float | None:
    """Share of the items nearest to each query that are still so where the catalogue is its reconstruction.

    x, decoded (N, D), queries (Q) rows of x; the NEIGHBOURS nearest by cosine, never the query itself. None for one
    item.
    """
    neighbours = min(NEIGHBOURS, len(x) - 1)

    def nearest(catalogue: Tensor) -> Tensor:
        catalogue, found = F.normalize(catalogue), []
        for rows in queries.split(128):
            cosine = x[rows] @ catalogue.T  # (q, N) times the length of the query
            cosine[torch.arange(len(rows), device=x.device), rows] = -math.inf
            found.append(cosine.topk(neighbours).indices)
        return torch.cat(found)  # (Q, neighbours)

    if neighbours == 0:
        return None
    return (nearest(x).unsqueeze(2) == nearest(decoded).unsqueeze(1)).any(2).float().mean().item()


@torch.inference_mode()
def coherence(x: Tensor, codes: np.ndarray, level: int, seed: int) -> float | None:
    """Mean cosine of two items that share their first `level` codes, of any two at 0: x (N, D), codes (N, L).

    Over COHERENCE_PAIRS random items, each with another of its prefix; None where no two items share one.
    """
    keys = prefix_keys(codes, level)
    order = np.argsort(keys, kind="stable")
    sizes = np.bincount(keys)  # (groups)
    starts = np.cumsum(sizes) - sizes  # their places in order
    shared = np.flatnonzero(sizes[keys[order]] > 1)
    if len(shared) == 0:
        return None
    generator = np.random.default_rng(seed)
    place = generator.choice(shared, COHERENCE_PAIRS)
    start, size = starts[keys[order[place]]], sizes[keys[order[place]]]
    other = start + (place - start + generator.integers(1, size)) % size  # of the same group, never itself
    return F.cosine_similarity(x[order[place]], x[order[other]]).mean().item()


def measure_quality(model: RQVAE, embeddings: Tensor, encoded: np.ndarray, written: np.ndarray) -> dict:
    """What the IDs are worth, ready for JSON: codes (N, L) as encoded, and as written, perhaps with a suffix.

    Of the whole catalogue, but reconstruction and recall, which are of a sample of at most QUALITY_ROWS embeddings.
    """
    n, levels, size, seed = *encoded.shape, model.config.codebook_size, model.config.seed
    device, statistics = model.input_mean.device, code_statistics(torch.from_numpy(encoded), size)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(n, generator=generator)[:QUALITY_ROWS].sort().values.numpy()
    queries = torch.randperm(len(rows), generator=generator)[:RECALL_QUERIES].to(device)
    x = embeddings[rows].to(device)  # (M, D)

    def decode(codes: np.ndarray) -> Tensor:
        return model.decode_from_semantic_ids(torch.from_numpy(codes[rows]).to(device))

    def of_ids(codes: np.ndarray) -> dict:
        ids = code_statistics(torch.from_numpy(codes), int(codes.max()) + 1)
        decoded = decode(codes[:, :levels])
        unexplained, cosine = reconstruction_quality(x, decoded)
        return {
            "distinct": ids.distinct,
            "singleton": ids.singleton,
            "largest_collision": ids.largest,
            "unexplained_variance": unexplained,
            "mean_cosine": cosine,
            "recall_at_10": neighbour_recall(x, decoded, queries),
        }

    def of_level(level: int) -> dict:
        unexplained, cosine = reconstruction_quality(x, decode(encoded[:, : level + 1]))
        return {
            "usage": statistics.usage[level],
            "dead_codes": int((statistics.counts[level] == 0).sum()),
            "perplexity": statistics.perplexity[level],
            "entropy_ratio": math.log(statistics.perplexity[level]) / math.log(size),
            "items_per_code": statistics.counts[level].tolist(),
            "unexplained_variance": unexplained,
            "mean_cosine": cosine,
            "coherence": coherence(embeddings, encoded, level + 1, seed),
        }

    return {
        "items": n,
        "sampled_items": len(rows),
        "recall_queries": len(queries),
        "coherence_pairs": COHERENCE_PAIRS,
        "codebook_size": size,
        "levels": [of_level(level) for level in range(levels)],  # each with those above it
        "coherence_of_any_two": coherence(embeddings, encoded, 0, seed),
        "as_encoded": of_ids(encoded),
        "as_written": of_ids(written),
        "displaced": float((written[:, :levels] != encoded).any(1).mean()),
    }


# ---------------------------------------------------------------- report


def bar_chart(counts: list[int]) -> str:
    """Items a code, from the commonest code to the rarest, each letter the mean of some codes: counts (K)."""
    columns = [part.mean() for part in np.array_split(np.sort(counts)[::-1], min(BAR_COLUMNS, len(counts)))]
    return "".join(BARS[math.ceil(column / columns[0] * (len(BARS) - 1))] for column in columns)


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def level_table(levels: list[dict]) -> str:
    width = BAR_COLUMNS + 2 * max(len(f"{max(level['items_per_code'])}") for level in levels) + 2
    lines = [
        f"level    used  dead  perplexity  entropy  {'items a code, sorted':<{width}}  unexplained  cosine  coherence"
    ]
    for i, level in enumerate(levels):
        counts = level["items_per_code"]
        chart = f"{max(counts)} {bar_chart(counts)} {min(counts)}"
        lines.append(
            f"{i:>5}  {level['usage']:>6.1%}  {level['dead_codes']:>4}  {level['perplexity']:>10.1f}"
            f"  {level['entropy_ratio']:>7.3f}  {chart:<{width}}  {show(level['unexplained_variance'], '.4f'):>11}"
            f"  {level['mean_cosine']:>6.3f}  {show(level['coherence'], '.3f'):>9}"
        )
    return "\n".join(lines)


def id_table(quality: dict) -> str:
    forms = {
        "distinct": ("distinct IDs", ".2%"),
        "singleton": ("items alone with their ID", ".2%"),
        "largest_collision": ("most items that share one", ","),
        "unexplained_variance": ("unexplained variance", ".4f"),
        "mean_cosine": ("mean cosine of the reconstruction", ".4f"),
        "recall_at_10": ("recall@10 of true neighbours", ".4f"),
    }
    lines = [f"{'':<35}{'as encoded':>12}{'--collisions ' + quality['collisions']:>22}"]
    for name, (title, form) in forms.items():
        before, after = (show(quality[when][name], form) for when in ("as_encoded", "as_written"))
        lines.append(f"{title:<35}{before:>12}{after:>22}")
    return "\n".join(lines)


def printable(text: str) -> str:
    """On one line, without what would steer the terminal; zero-width joiners stay, for emoji."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable() or letter == "\u200d")


class Example(NamedTuple):
    """A line of the tree of examples."""

    depth: int  # 0 for a first code, 1 for a second, 2 for an item
    name: str  # a prefix such as 12-201-, or an item's ID
    text: str  # how many items have the prefix, or the item's title


def example_tree(codes: np.ndarray, ids: pl.Series, labels: pl.Series) -> list[Example]:
    """First codes spread over the catalogue, their commonest second codes, and items of those: codes (N, L)."""
    groups = group_rows(codes[:, 0])
    groups = [rows for rows in groups if len(rows) >= EXAMPLE_BRANCHES * EXAMPLE_ITEMS] or groups
    count = lambda rows: f"{len(rows):,} item{'s' * (len(rows) > 1)}"  # noqa: E731
    tree = []
    for pick in np.unique(np.linspace(0, len(groups) - 1, EXAMPLE_PREFIXES).astype(int)):
        rows = groups[pick]
        if codes.shape[1] > 1:
            tree.append(Example(0, f"{codes[rows[0], 0]}-", count(rows)))
        branches = [rows[part] for part in group_rows(prefix_keys(codes[rows], 2))]
        for branch in sorted(branches, key=len, reverse=True)[:EXAMPLE_BRANCHES]:
            if codes.shape[1] > 2:
                tree.append(Example(1, "-".join(map(str, codes[branch[0], :2])) + "-", count(branch)))
            tree += [Example(2, ids[row], printable(labels[row])) for row in branch[:EXAMPLE_ITEMS].tolist()]
    return tree


def show_tree(tree: list[Example]) -> str:
    width = max(len("  " * line.depth + line.name) for line in tree)
    return "\n".join(f"{'  ' * line.depth + line.name:<{width}}  {line.text}".rstrip() for line in tree)


@torch.inference_mode()
def make_distinct(
    model: RQVAE,
    embeddings: Tensor | Shards,
    order: np.ndarray,
    latents: Tensor,
    codes: np.ndarray,
    collisions: str,
    taken: np.ndarray,
) -> np.ndarray:
    """The codes to write, none of taken (T, L or L + 1): embeddings (N, D); order (M) some of its rows.

    latents (M, E) and codes (M, L) are in that order, as is the result, (M, L), with a suffix (M, L + 1).
    """
    last, device = model.quantizers[-1].codebook, latents.device

    def decoding_errors(groups: list[np.ndarray], prefixes: np.ndarray) -> Iterator[np.ndarray]:
        """Squared distance of each item of a group (n) to every ID with its prefix, decoded, less |x|^2: (n, K)."""
        together = rows_per_pass(device, width=len(last))
        for i in range(0, len(groups), together):
            some = groups[i : i + together]
            above = model.decode_levels(torch.from_numpy(prefixes[i : i + together]).to(device))  # (groups, E)
            decoded = model.decoded(above.unsqueeze(1) + last)  # (groups, K, D)
            sizes = [len(group) for group in some]
            items = model.standardise(embeddings[order[np.concatenate(some)]].to(device)).split(sizes)
            errors = torch.cat([code_distances(x, ids) for x, ids in zip(items, decoded, strict=True)])
            yield from np.split(errors.cpu().numpy(), np.cumsum(sizes)[:-1])

    if collisions == "assign":
        codebooks = np.stack([level.codebook.detach().cpu().double().numpy() for level in model.quantizers])
        return assign_distinct(latents.cpu().numpy(), codes, codebooks, decoding_errors, taken)
    return count_within(codes, taken) if collisions == "suffix" else codes


# ---------------------------------------------------------------- IDs that stay


def packed(codes: np.ndarray) -> str:
    """Numbers (n, w) below 2^31, sorted by the first, as text for the metadata of a parquet file: some bytes a row."""
    columns = np.array(codes.T, "<i4", order="C")
    columns[0] = np.diff(columns[0], prepend=0)
    return base64.b64encode(zlib.compress(columns)).decode()


def unpacked(text: str, width: int) -> np.ndarray:
    """What was packed: (n, width) int64."""
    columns = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i4").reshape(width, -1)
    codes = np.array(columns.T, np.int64)
    codes[:, 0] = codes[:, 0].cumsum()
    return codes


def ids_digest(names: pl.Series, ids: np.ndarray, *packed_codes: str) -> str:
    """SHA-256 of the names of items, of their IDs (N, w), and of what else an export tells the next one."""
    texts = names_digest(names) + "".join(packed_codes)
    return hashlib.sha256(texts.encode() + np.ascontiguousarray(ids, "<i4").tobytes()).hexdigest()


class Earlier(NamedTuple):
    """An earlier export beside the items of now (N), in their order; rows of -1 for those that it does not hold."""

    ids: np.ndarray  # (N, w) as written: w is L, or L + 1 with a suffix
    codes: np.ndarray  # (N, L) as encoded, before collisions were resolved
    vanished: np.ndarray  # (V, w) IDs of items that are no more
    retired: np.ndarray  # (R, w) IDs that it would not have given out either

    @classmethod
    def none(cls, n: int, levels: int, width: int) -> "Earlier":
        nothing = np.empty((0, width), dtype=np.int64)
        return cls(np.full((n, width), -1), np.full((n, levels), -1), nothing, nothing)


def read_earlier(path: Path, names: pl.Series, metadata: dict[str, str], shape: RQVAEConfig) -> Earlier:
    """The earlier export for items with these names (N); ends the run where it is damaged, or of another model.

    `metadata` is what made_from says of the IDs to write.
    """
    levels, size = shape.codebook_quantization_levels, shape.codebook_size
    width, another = levels + (metadata["collisions"] == "suffix"), "name another, or leave --keep_ids out for new IDs"
    try:
        found, columns = pl.read_parquet_metadata(path), [f"semantic_id_{level}" for level in range(width)]
        if found.get("model") != metadata["model"]:
            fail(path, "not made with this model, so that its IDs mean other things", another)
        if found.get("collisions") != metadata["collisions"]:
            fail(path, f"not made with --collisions {metadata['collisions']}", "give the same as then, or name another")
        if "ids" not in found:
            way_out = "run --export_only without --keep_ids on the embeddings of then: it writes the same IDs, and that"
            fail(path, "written by an earlier version, which did not note what has to be kept", way_out)
        table = pl.read_parquet(path, columns=["parent_asin", *columns], glob=False)
        ids = table.select(pl.col(columns).cast(pl.Int64).fill_null(-1)).to_numpy()
        if found["ids"] != ids_digest(table["parent_asin"], ids, found["displaced"], found["retired"]):
            raise ValueError("its IDs are not those that were written")
        displaced, retired = unpacked(found["displaced"], 1 + levels), unpacked(found["retired"], width)
        every = np.concatenate([ids, retired])
        all_codes = np.concatenate([every[:, :levels], displaced[:, 1:]])
        sound = table["parent_asin"].n_unique() == len(table) > 0 and pl.DataFrame(every).n_unique() == len(every)
        sound = sound and all_codes.min() >= 0 and all_codes.max() < size and every.min() >= 0
        if not sound or not ((displaced[:, 0] >= 0) & (displaced[:, 0] < len(table))).all():
            raise ValueError("its IDs are not distinct IDs of distinct items")
    except (*UNREADABLE, ValueError, KeyError, zlib.error) as error:
        fail(path, f"damaged, or not an export with distinct IDs ({first_line(error)})", another)
    codes = ids[:, :levels].copy()
    codes[displaced[:, 0]] = displaced[:, 1:]
    there = pl.DataFrame({"parent_asin": table["parent_asin"]}).with_row_index("row")
    row = pl.DataFrame({"parent_asin": names}).join(there, on="parent_asin", how="left", maintain_order="left")["row"]
    known, row = row.is_not_null().to_numpy(), row.fill_null(0).to_numpy()
    vanished = np.ones(len(ids), dtype=bool)
    vanished[row[known]] = False
    ids_now, codes_now = (np.where(known[:, None], each[row], -1) for each in (ids, codes))
    return Earlier(ids_now, codes_now, ids[vanished], retired)


@torch.inference_mode()
def decoded_errors(model: RQVAE, embeddings: Tensor | Shards, rows: np.ndarray, codes: np.ndarray) -> Tensor:
    """Mean square over D of what codes (M, L or L + 1) miss of rows (M) of embeddings (N, D), standardised: (M).

    Their mean is the unexplained variance, as a share of that of the training items.
    """
    device, found = model.input_mean.device, [torch.empty(0)]
    at_once = rows_per_pass(device, width=1)
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        ids = torch.from_numpy(codes[some, : len(model.quantizers)]).to(device)
        decoded = model.decoded(model.decode_levels(ids)).float()
        found.append((model.standardise(embeddings[rows[some]].to(device)) - decoded).square().mean(1).cpu())
    return torch.cat(found)


class Given(NamedTuple):
    """IDs, and what the next export has to know to keep them. All in the order that was asked for."""

    ids: np.ndarray  # (N, w)
    codes: np.ndarray  # (N, L) the best ones when the item got its ID, or last found none better
    kept: np.ndarray  # (N) whether it had that ID before
    known: np.ndarray  # (N) whether it had any
    retired: np.ndarray  # (R, w) sorted


def give_ids(
    model: RQVAE,
    embeddings: Tensor | Shards,
    order: np.ndarray,
    latents: Tensor,
    codes: np.ndarray,
    config: RQVAEConfig,
    earlier: Earlier,
) -> Given:
    """An ID for each of embeddings (N, D): order (N) of its rows, latents (N, E) and codes (N, L) in that order.

    An item keeps the ID that it had, unless the codes which that was given for decode worse than the best ones by now,
    as when its text has become another, and there is a free ID that decodes better too. IDs of such items and of
    vanished ones are not given out again.
    """

    def still_fits(rows: np.ndarray, old_codes: np.ndarray, new_codes: np.ndarray) -> np.ndarray:
        old, new = (decoded_errors(model, embeddings, order[rows], some[rows]) for some in (old_codes, new_codes))
        return (old <= KEPT_ERROR * new.clamp_min(NO_ERROR)).numpy()

    known = earlier.ids[:, 0] >= 0
    fits, doubtful = known.copy(), np.flatnonzero(known & (earlier.codes != codes).any(1))
    fits[doubtful] = still_fits(doubtful, earlier.codes, codes)
    kept = fits.copy()
    closed = earlier.ids[:0] if config.recycle_ids else np.concatenate([earlier.retired, earlier.vanished])
    taken = np.concatenate([earlier.ids[known], closed])  # also those of items that may move: nobody else gets them
    free = model.config.codebook_size**model.config.codebook_quantization_levels - len(taken)
    if config.collisions == "assign" and free < (~kept).sum():  # no room to move
        kept, new = known.copy(), (~known).sum()
        if free < new:
            trouble = f"{new:,} new items, and only {free:,} IDs are left beside those kept and retired"
            fail(config.keep_ids, trouble, "give --recycle_ids too, or train again with more codes or levels")
    ids, rest = earlier.ids.copy(), np.flatnonzero(~kept)
    ids[rest] = make_distinct(
        model, embeddings, order[rest], latents[torch.from_numpy(rest)], codes[rest], config.collisions, taken
    )
    moved = np.flatnonzero(known & ~kept)
    kept[moved] = still_fits(moved, earlier.ids, ids)
    ids[kept] = earlier.ids[kept]
    retired = closed if config.recycle_ids else np.concatenate([closed, earlier.ids[known & ~kept]])
    retired = retired[np.lexsort(retired.T[::-1])]
    # an item that keeps its ID for want of a better one keeps it until its vector changes again
    return Given(ids, np.where(fits[:, None], earlier.codes, codes), kept, known, retired)


def keeping_quality(
    model: RQVAE, embeddings: Tensor | Shards, order: np.ndarray, codes: np.ndarray, given: Given, held_out_loss: float
) -> dict:
    """What became of the items of an earlier export, ready for JSON; codes (N, L) are the best ones, in `order` (N).

    Figures that need embeddings are of at most QUALITY_ROWS of the items that they speak of.
    """
    generator = np.random.default_rng(model.config.seed)

    def sample(which: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(which)
        return np.sort(generator.choice(rows, QUALITY_ROWS, replace=False)) if len(rows) > QUALITY_ROWS else rows

    def errors(rows: np.ndarray, some_codes: np.ndarray) -> Tensor:
        return decoded_errors(model, embeddings, order[rows], some_codes[rows])

    def mean(some: Tensor) -> float | None:
        return some.mean().item() if len(some) else None

    others, rest = sample(~given.kept), sample(given.known)
    is_new, encoded = torch.from_numpy(~given.known[others]), errors(others, codes)
    judged = len(others) >= FEWEST_JUDGED and math.isfinite(held_out_loss)
    return {
        "kept": int(given.kept.sum()),
        "moved": int((given.known & ~given.kept).sum()),
        "new": int((~given.known).sum()),
        "retired_ids": len(given.retired),
        "unexplained_of_training_variance": {  # of IDs as written, and of new items as encoded
            "new": mean(errors(others, given.ids)[is_new]),
            "new_as_encoded": mean(encoded[is_new]),
            "rest": mean(errors(rest, given.ids)),
        },
        "loss_of_new_and_moved_as_encoded": reconstruction_loss(encoded).item() if judged else None,
        "held_out_loss": held_out_loss if judged else None,
    }


def show_keeping(quality: dict) -> None:
    counts = (f"{quality[name]:,}" for name in ("kept", "moved", "new", "vanished", "retired_ids"))
    print("\n{} items keep their ID, {} moved to another, {} are new and {} have vanished; "
          "{} IDs are not given out again".format(*counts))  # fmt: skip
    new, encoded, rest = (show(value, ".4f") for value in quality["unexplained_of_training_variance"].values())
    print(f"unexplained, as a share of the training items' variance: {new} of the new items ({encoded} as encoded), "
          f"{rest} of the rest")  # fmt: skip
    loss, held_out = quality["loss_of_new_and_moved_as_encoded"], quality["held_out_loss"]
    if loss is not None and loss > OUTDATED_LOSS * held_out:
        warn(
            f"the model no longer fits this catalogue (reconstruction loss {loss:.3f} of the new and moved items, "
            f"{held_out:.3f} of those held out in its training): train again"
        )


# ---------------------------------------------------------------- export


def made_from(config: RQVAEConfig, data: str) -> dict[str, str]:
    """What the IDs follow from, for the metadata of their file; `data` is the digest of the embeddings."""
    model = hashlib.sha256(config.best_path.read_bytes()).hexdigest()
    return {"model": model, "embeddings": data, "collisions": config.collisions}


def export(
    model: RQVAE,
    dataset: EmbeddingDataset,
    data: str,
    config: RQVAEConfig,
    run=None,
    held_out_loss: float = math.inf,
) -> None:
    """Encodes the whole catalogue, makes the IDs distinct, and writes, prints and sends to W&B what they are worth."""
    metadata = on_rank_0(lambda: made_from(config, data))  # before the long work: the model's file may be replaced
    # in the order of their names, so that the IDs do not depend on the order of the rows
    order = on_rank_0(lambda: dataset.parent_asin.arg_sort().to_numpy().astype(np.int64))
    levels = model.config.codebook_quantization_levels
    earlier = Earlier.none(len(order), levels, levels + (config.collisions == "suffix"))
    if config.keep_ids is not None and RANK == 0:
        earlier = read_earlier(Path(config.keep_ids), dataset.parent_asin[order], metadata, model.config)
    latents, codes, residual_norm = encode_catalogue(model, dataset.embeddings, order=torch.from_numpy(order))
    if RANK:
        return dataset.embeddings.serve()
    best = codes.cpu().numpy()
    start = time.perf_counter()
    given = give_ids(model, dataset.embeddings, order, latents, best, config, earlier)
    seconds = time.perf_counter() - start
    back = np.argsort(order)
    encoded, written, before = best[back], given.ids[back], given.codes[back]  # all in input order from here on

    table = pl.DataFrame({"parent_asin": dataset.parent_asin}).with_columns(
        pl.Series(f"semantic_id_{level}", column, dtype=pl.Int32) for level, column in enumerate(written.T)
    )
    table = table.with_columns(pl.concat_str(pl.exclude("parent_asin"), separator="-").alias("semantic_id"))
    distinct = table["semantic_id"].n_unique() / len(table)
    assert distinct == 1 or config.collisions == "keep", "two items have one ID"
    rows = np.flatnonzero((written[:, :levels] != before).any(1))
    displaced, retired = packed(np.column_stack([rows, before[rows]])), packed(given.retired)
    # for the next export to keep these IDs
    metadata |= {"displaced": displaced, "retired": retired}
    metadata["ids"] = ids_digest(dataset.parent_asin, written, displaced, retired)
    quality = {"category": config.category, "collisions": config.collisions, "residual_norm": residual_norm}
    quality |= measure_quality(model, dataset.embeddings, encoded, written)
    if config.keep_ids is not None:
        found = keeping_quality(model, dataset.embeddings, order, best, given, held_out_loss)
        quality["keep_ids"] = found | {"vanished": len(earlier.vanished)}
    on_rank_0(lambda: None)  # the others have served
    tree = example_tree(written, table["semantic_id"], dataset.labels)
    with replacing(config.ids_path) as ids_file:
        table.write_parquet(ids_file, metadata=metadata)
        quality["semantic_ids_sha256"] = hashlib.sha256(ids_file.read_bytes()).hexdigest()
        with replacing(config.quality_path) as quality_file:  # before the IDs take their place: both or none
            quality_file.write_text(json.dumps(quality, indent=1) + "\n")

    print(
        f"\n{len(table):,} items, {levels} levels of {quality['codebook_size']} codes\n{level_table(quality['levels'])}"
    )
    any_two = show(quality["coherence_of_any_two"], ".3f")
    print("unexplained variance and cosine: of the reconstruction from the codes down to that level; coherence: mean")
    print(f"cosine of items that share them, {any_two} for any two items, over {COHERENCE_PAIRS:,} random pairs")
    print(f"\n{id_table(quality)}")
    if config.collisions == "assign":
        print(f"{quality['displaced']:.2%} of the items have another ID than as encoded, found in {seconds:.1f} s")
    print(f"mean norm of the last residual: {residual_norm:.3f}")
    whole = quality["sampled_items"] == len(table)
    print(f"recall is of {quality['recall_queries']:,} items", end="" if whole else "; ")
    print("" if whole else f"it and the reconstruction are of a sample of {quality['sampled_items']:,} items")
    if config.keep_ids is not None:
        show_keeping(quality["keep_ids"])
    print(f"\nsome prefixes and their items:\n{show_tree(tree)}")
    print(f"\nwrote {config.ids_path}: {len(table):,} items, {distinct:.2%} distinct IDs; and {config.quality_path}")
    if run:
        send_report(run, quality, tree)


# ---------------------------------------------------------------- W&B


def start_wandb(config: RQVAEConfig, values: dict, run_id: str | None):
    """A run that is online where an API key is configured, else offline; WANDB_MODE decides where it is set."""
    mode = os.environ.get("WANDB_MODE")
    os.environ.setdefault("WANDB_SILENT", "true")  # its own lines would break into the progress bar
    options = {
        "project": config.wandb_project,
        "config": values,
        "dir": os.environ.get("WANDB_DIR", config.checkpoint_dir),
        "id": run_id,
        "resume": "allow" if run_id else None,
    }
    settings = wandb.Settings(console="off", init_timeout=30)
    try:
        if mode is None:
            mode = "online" if wandb.login(prompt=False) else "offline"
        run = wandb.init(mode=mode, settings=settings, **options)
    except wandb.errors.UsageError as error:
        if "project" not in str(error):
            raise
        fail(f"--wandb_project {config.wandb_project}", first_line(error), "choose another name")
    except wandb.errors.Error as error:  # no network, or a key that is not known there
        warn(f"W&B is out of reach ({first_line(error)}): this run is logged offline")
        mode, run = "offline", wandb.init(mode="offline", settings=settings, **options)
    except ValueError as error:
        fail(f"WANDB_MODE={mode}", first_line(error), "use online, offline or disabled")
    if mode == "offline":
        print(f"W&B: offline; to upload this run later: wandb sync {run.settings.sync_dir}")
    else:
        print(f"W&B: {mode} {run.url or ''}")
    return run


def send_report(run, quality: dict, tree: list[Example]) -> None:
    """Sends W&B the quality figures, a histogram of the codes of each level, and the tree of examples as a table."""
    size, levels = quality["codebook_size"], quality["levels"]
    codes_a_bar = math.ceil(size / wandb.Histogram.MAX_LENGTH)
    edges = np.arange(0, size + codes_a_bar, codes_a_bar)
    histograms = {
        f"codes/level_{i}": wandb.Histogram(
            np_histogram=np.histogram(np.arange(size), edges, weights=level["items_per_code"])
        )
        for i, level in enumerate(levels)
    }
    rows = [[line.name, line.text] for line in tree]
    run.log(histograms | {"example_prefixes": wandb.Table(["prefix or ID", "items or title"], rows)})
    figures = [{name: value for name, value in level.items() if name != "items_per_code"} for level in levels]
    run.summary["quality"] = quality | {"levels": figures}


def upload_best(run, path: Path, config: RQVAEConfig) -> None:
    """Hands best_model.pth to W&B once, with what it is worth."""
    best, _ = read_checkpoint(path, "cpu")
    names = [f"catalogue/usage_{level}" for level in range(config.codebook_quantization_levels)]
    metadata = {name.removeprefix("catalogue/"): best["metrics"][name] for name in names}
    metadata |= {
        "val_loss": best["val_loss"],
        "unique_proportion": best["metrics"]["catalogue/distinct"],
        "residual_norm": best["metrics"]["catalogue/residual_norm"],
        "step": best["step"],
        "config": best["config"],
    }
    artifact = wandb.Artifact(f"rqvae-{re.sub(r'[^A-Za-z0-9_.-]', '-', config.category)}", "model", metadata=metadata)
    try:
        artifact.add_file(str(path))
        run.log_artifact(artifact)
    except (wandb.errors.Error, OSError) as error:  # the IDs and the model are safe on this disk
        warn(f"W&B did not take {path} ({first_line(error)}): upload it by hand")


# ---------------------------------------------------------------- main


def read_digest(dataset: EmbeddingDataset, source: Path) -> str:
    """The data_digest of the embeddings; ends the run where it is not the one that their file tells."""
    here = getattr(dataset.embeddings, "mine", dataset.embeddings)
    digest = data_digest(here.numpy(), n=dataset.embeddings.shape[0])
    if dataset.digest not in (None, digest):
        fail(source, "damaged: its embeddings are not those that were written", "run embed_items.py again")
    return digest


def make_model(config: RQVAEConfig, device: torch.device) -> RQVAE:
    try:
        return RQVAE(config).to(device)
    except (RuntimeError, MemoryError, OverflowError) as error:  # each device has its own for too little memory
        trouble = f"a model of these sizes cannot be made ({first_line(error)})"
        fail("command line", trouble, "lower --encoder_hidden_dims, --codebook_size or --codebook_embedding_dim")


def check_sizes(n: int, source: Path, shape: RQVAEConfig, collisions: str) -> None:
    """Ends the run where n items cannot all have IDs of this shape."""
    levels, size = shape.codebook_quantization_levels, shape.codebook_size
    if collisions == "assign" and n > size**levels:
        trouble = f"{n:,} items, but only {size**levels:,} IDs with {levels} levels of {size} codes"
        fail(source, trouble, "use more levels or codes, or --collisions suffix")


def check_plan(plan: Plan, source: Path, config: RQVAEConfig) -> None:
    """Ends the run where the steps or the items do not suffice for what the flags ask for."""
    if config.use_kmeans_init and len(plan.train_rows) < config.codebook_size:
        trouble = f"{len(plan.train_rows)} training items, fewer than the {config.codebook_size} codes of k-means"
        fail(source, trouble, "lower --codebook_size or --val_split, or give --use_kmeans_init False")
    if plan.rows_per_step < RANKS:
        trouble = f"fewer items a step than the {RANKS} processes"
        fail(f"--batch_size {config.batch_size}", trouble, "raise it, or start fewer")
    if plan.autoencoder_steps >= plan.total_steps:
        trouble = f"leaves no step of the {plan.total_steps} to train the codes"
        fail(f"--autoencoder_steps {plan.autoencoder_steps}", trouble, "lower it, or train longer")


def check_model(path: Path, trained: RQVAEConfig, config: RQVAEConfig, dim: int) -> None:
    """Ends the run where a model to export with does not fit the embeddings, or flags given (not left at default)."""
    if trained.item_embedding_dim != dim:
        trouble = f"a model of {trained.item_embedding_dim}-dimensional embeddings, and these have {dim}"
        fail(path, trouble, "embed with the same model and --target_dim, or train again")
    if trained.category != config.category:
        warn(f"{path} was trained on {trained.category}: {config.category} gets the IDs of that model")
    default = RQVAEConfig()
    for name in MODEL_FIELDS:
        asked = getattr(config, name)
        if asked not in (getattr(default, name), getattr(trained, name)):
            fail(path, f"trained with --{name} {getattr(trained, name)}, not {asked}", "leave that flag out")


def is_complete(config: RQVAEConfig, dataset: EmbeddingDataset, data: str, total_steps: int) -> bool:
    """Whether this run has been trained to its end, and its IDs are written."""
    try:
        if final_step(Path(config.checkpoint_dir), asdict(config), data) != total_steps:
            return False
        digest = hashlib.sha256(config.ids_path.read_bytes()).hexdigest()
        if json.loads(config.quality_path.read_text())["semantic_ids_sha256"] != digest:
            return False
        found = pl.read_parquet_metadata(config.ids_path)
        same = all(found.get(name) == value for name, value in made_from(config, data).items())
        return same and pl.read_parquet(config.ids_path)["parent_asin"].equals(dataset.parent_asin)
    except (*UNREADABLE, ValueError, TypeError, KeyError):  # gone, or damaged
        return False


def find_resumed(folder: Path, config: RQVAEConfig, data: str) -> dict | None:
    """The last numbered checkpoint that is whole, if it belongs to this command; a damaged one is passed over."""
    for path in numbered_checkpoints(folder).values():
        try:
            checkpoint, _ = load_whole(path, "cpu", RESUME_KEYS)
        except ValueError as error:
            warn(f"{path} is damaged ({error}): passed over")
            continue
        way_out = "give the same flags as before, or another --checkpoint_dir"
        trained = asdict(RQVAEConfig(**checkpoint["config"]))
        for name, value in asdict(config).items():
            if name not in FREE_FIELDS and trained[name] != value:
                fail(path, f"trained with --{name} {trained[name]}, not {value}", way_out)
        if checkpoint["data"] != data:
            fail(path, "trained on other embeddings than these", "train again in another --checkpoint_dir")
        print(f"going on from {path}")
        return checkpoint
    print(f"no sound checkpoint in {folder}: starting from the beginning")
    return None


def train_and_export(config: RQVAEConfig, dataset: EmbeddingDataset, device: torch.device) -> int:
    """The whole run; returns the exit status."""
    source, folder = config.source, Path(config.checkpoint_dir)
    n, dim = dataset.embeddings.shape
    if config.item_embedding_dim not in (None, dim):
        trouble = f"embeddings of {dim} dimensions, not of the model's {config.item_embedding_dim}"
        fail(source, trouble, f"leave --item_embedding_dim out, or embed with --target_dim {config.item_embedding_dim}")
    config.item_embedding_dim = dim
    config.dtype = choose_dtype(device, config.dtype)
    check_sizes(n, source, config, config.collisions)
    plan = plan_training(n, config)
    check_plan(plan, source, config)
    data = read_digest(dataset, source)
    if not config.overwrite and on_rank_0(lambda: is_complete(config, dataset, data, plan.total_steps)):
        print(f"{folder / 'final_model.pth'} and {config.ids_path} are complete already: nothing to do; --overwrite "
              "trains again, --export_only writes the IDs again")  # fmt: skip
        return 0
    resumed = on_rank_0(lambda: find_resumed(folder, config, data)) if config.resume else None
    if resumed:  # by default these follow from the number of steps, which may be another now
        plan = plan._replace(autoencoder_steps=resumed["autoencoder_steps"])
        check_plan(plan, source, config)
        if resumed["step"] >= plan.total_steps:
            print(f"nothing left to train: {resumed['step']} of {plan.total_steps} steps are done")
            if not on_rank_0(lambda: holds_best(config.best_path, resumed["config"], data, resumed["lowest_val_loss"])):
                fail(config.best_path, "gone, or another run's", "train again without --resume")
    elif numbered := numbered_checkpoints(folder):
        newest = next(iter(numbered.values()))
        warn(f"{newest} and what else an earlier run left there will be replaced; --resume would go on from it")
    for path in folder.glob(".*.pth.tmp") if RANK == 0 else ():  # of a run that was killed as it saved
        with suppress(OSError):
            path.unlink()
    torch.manual_seed(config.seed)
    model = make_model(config, device)
    model.mlp_dtype = getattr(torch, config.dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held_out = n - len(plan.train_rows)
    print(
        f"{len(plan.train_rows):,} training and {held_out:,} validation items, "
        f"{parameters / 1e6:.2f} million parameters, MLPs trained in {config.dtype}"
    )
    print(
        f"{plan.total_steps:,} steps of {plan.rows_per_step:,} items, {plan.steps_per_epoch} an epoch; "
        f"the first {plan.autoencoder_steps:,} as a plain autoencoder"
    )
    run_id = resumed["wandb_run_id"] if resumed else None
    run = start_wandb(config, asdict(config), run_id) if RANK == 0 else wandb.init(mode="disabled")
    embeddings = dataset.embeddings.to(device)
    if device.type == "cpu":
        keep_freed_memory()  # for the steps; an export alone would take a fifth less time with it, but twice the memory
    finished, lowest = train(model, embeddings, plan, data, resumed, run)
    if finished:
        best = on_rank_0(lambda: load_model(config.best_path)).to(device)
        export(best, dataset, data, config, run)
    if RANK == 0 and math.isfinite(lowest):  # else best_model.pth, if there is one, is of an earlier run
        upload_best(run, config.best_path, config)
    run.finish()
    if not finished:
        if RANK == 0:
            print(f"interrupted: saved in {folder}; go on with the same command and --resume", file=sys.stderr)
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    config = parse_config(argv)
    for name, value in asdict(config).items():
        print(f"{name}: {value}")
    check_files(config)
    if RANKS > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=LONGEST_WAIT)
    device, why = choose_device(config.device)
    with alone(config.ids_path), nullcontext() if config.export_only else alone(config.best_path):
        dataset = EmbeddingDataset(config.source, config.num_rows)
        n, dim = dataset.embeddings.shape
        print(f"{n:,} items of {dim} dimensions from {config.source}")
        print(f"device {device} ({why})")
        if not config.export_only:
            return train_and_export(config, dataset, device)
        data = read_digest(dataset, config.source)  # before the model, whose file another run may replace meanwhile
        checkpoint, model = on_rank_0(lambda: read_checkpoint(config.best_path, "cpu"))
        model = model.to(device)
        check_model(config.best_path, model.config, config, dim)
        check_sizes(n, config.source, model.config, config.collisions)
        held_out_loss = checkpoint.get("metrics", {}).get("val/reconstruction_loss", math.inf)
        held_out_loss = held_out_loss if model.config.val_split else math.inf  # that of training rows tells nothing
        export(model, dataset, data, config, held_out_loss=held_out_loss)
        return 0


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of few letters is no reason to stop
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
        print(end="", flush=True)
        if RANKS > 1:
            dist.destroy_process_group()
        sys.exit(status)
    except RuntimeError:
        if RANKS > 1:  # as a rule because another rank has gone
            await_end()
        raise
    except KeyboardInterrupt:
        print("interrupted: files written so far are whole", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.ENOSPC:  # else whoever read our lines has left
            print(f"error: standard output: {error.strerror}; make room and run it again", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
