"""Train an RQ-VAE on item embeddings and give every item its semantic ID. CUDA, MPS or CPU.

Reads   data/output/{category}_items_with_embeddings.parquet   parent_asin, embedding; of embed_items.py or your own
Writes  checkpoints/rqvae/{checkpoint_step_N,best_model,final_model}.pth
        data/output/{category}_semantic_ids.parquet            one distinct ID an item
        data/output/{category}_quality.json                    the figures of the closing report

    python train_rqvae.py --category Video_Games                                    # 20,000 epochs, for a GPU
    python train_rqvae.py --category Video_Games --batch_size 1024 --max_steps 1500 --max_lr 1e-2  # thousands of items
    python train_rqvae.py --category Video_Games --resume                           # go on after a stop
    python train_rqvae.py --category Video_Games --export_only                      # IDs of best_model.pth
    torchrun --nproc_per_node=8 train_rqvae.py --category Video_Games               # on eight GPUs

Papers: TIGER (Rajput et al., arXiv:2305.05065, section 3.1); residual quantizer (Lee et al., arXiv:2203.01941).
Shapes: N items, B batch, D embedding dimensions, E latent (codebook) dimensions, L levels, K codes of a level.
"""

import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Literal, NamedTuple, NoReturn

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
import wandb
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import entropy
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

if os.name == "posix":  # on Windows, two runs are not kept apart
    import fcntl

# Set by torchrun, and read only under torchrun, because clusters set RANK and WORLD_SIZE for other purposes.
RANK, WORLD, LOCAL_RANK = 0, 1, 0
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, WORLD, LOCAL_RANK = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
print0 = print if RANK == 0 else lambda *_, **__: None

# training
RECONSTRUCTION_WEIGHT = 5.0  # against the quantization losses; codes spread more evenly than at 1
ERROR_SCALE = 0.5  # share of the variance; larger errors count by their logarithm
ADAM_BETAS = (0.9, 0.95)  # 0.95 instead of 0.999: short runs have only thousands of steps
MAX_AUTOENCODER_STEPS = 1000
SCALE_ROWS, KMEANS_ROWS = 2**15, 200_000  # standardisation and k-means take a sample of a larger catalogue
LAST_RESET = 0.8  # share of the steps; a code revived later would not settle
SEARCH_FROM = 0.5  # share of the steps; before it the nearest codes are good enough to learn from
TRAINING_SEARCH_WIDTH = 4  # candidate IDs decoded per item, in training and validation
SEARCH_WIDTH = 32  # the same in the export
TIE_TOLERANCE = 0.03  # validation losses this close are a tie, and the later checkpoint wins it
TINY = 1e-30  # instead of a variance of 0, should all items be equal

# On a CPU, few enough that the activations stay in cache.
ROWS_PER_PASS = {"cpu": 2**11, "mps": 2**15, "cuda": 2**16}  # rows of a forward and backward pass
DECODED_PER_PASS = {"cpu": 2**12, "mps": 2**15, "cuda": 2**16}  # reconstructions of a pass outside training
ROWS_READ = 2**13  # rows of the parquet file in memory at once

# keeping IDs and report
MOVE_RATIO = 1.05  # an item moves if another ID decodes with an error this many times smaller
MIN_ERROR = 1e-3  # share of the variance; smaller errors count as this
RETRAIN_RATIO = 1.25  # warn if the loss of new and moved items is this many times that of held-out ones
RETRAIN_ITEMS = 30  # fewer of them prove nothing
QUALITY_ROWS = 100_000  # figures that need vectors are of a sample of a larger catalogue
RECALL_QUERIES, NEIGHBOURS = 1000, 10
FEW_ITEMS = range(2_400, 5_000)  # catalogue sizes at which a recommender gained from two large levels and a suffix
EXAMPLE_PREFIXES, EXAMPLE_BRANCHES, EXAMPLE_ITEMS, LABEL_LENGTH = 5, 2, 3, 90
BARS, BAR_COLUMNS = " ▁▂▃▄▅▆▇█", 16

WRITABLE = "make room or set the rights there"
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)  # raised for a damaged parquet file
MANY = 10**12
BOUNDS = {  # (least, most) of the numeric flags; (1, MANY) of those not named here
    "seed": (0, 2**31), "item_embedding_dim": (1, 2**16), "encoder_hidden_dims": (1, 2**16), "ema_decay": (0, 0.999999),
    "codebook_embedding_dim": (1, 2**14), "codebook_quantization_levels": (1, 64), "codebook_size": (2, 2**16),
    "commitment_weight": (0, MANY), "max_lr": (1e-12, MANY), "min_lr": (0, MANY), "warmup_steps": (0, MANY),
    "gradient_clip_norm": (0, MANY), "input_mixing": (0, MANY), "val_split": (0, 0.99),
    "autoencoder_steps": (0, MANY), "max_steps": (-1, MANY),
}  # fmt: skip
FREE_FIELDS = {  # may change with --resume and --export_only
    "data_dir", "checkpoint_dir", "num_rows", "device", "dtype", "num_epochs", "max_steps", "steps_per_train_log",
    "steps_per_val_log", "steps_per_checkpoint", "keep_checkpoints", "wandb_project", "collisions", "resume",
    "overwrite", "export_only", "keep_ids",
}  # fmt: skip

# ---------------------------------------------------------------- configuration


@dataclass
class RQVAEConfig:
    """The command line of this script, and what checkpoints say of a run: every field is a flag."""

    category: str = HfArg(default="Video_Games", help="Catalogue name: the first part of every file name.")
    data_dir: str = HfArg(default="data/output", help="Folder of the embeddings and of the IDs.")
    checkpoint_dir: str = HfArg(default="checkpoints/rqvae", help="Folder of the checkpoints.")
    num_rows: int | None = HfArg(default=None, help="Only the first rows of the catalogue, for a trial.")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="Where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="Number type of the MLPs in training.")
    seed: int = HfArg(default=42, help="Seed of the weights, the split, the batches and k-means.")

    item_embedding_dim: int | None = HfArg(default=None, help="Dimension D of the embeddings; by default the file's.")
    encoder_hidden_dims: list[int] = HfArg(default_factory=lambda: [512, 256, 128], help="Encoder's hidden layers.")
    codebook_embedding_dim: int = HfArg(default=32, help="Dimension E of the latents and the codes.")
    codebook_quantization_levels: int | None = HfArg(default=None, help="Levels L: codes in an ID; by default 3.")
    codebook_size: list[int] = HfArg(default_factory=lambda: [256], help="Codes K: one number for all, or one a level.")
    commitment_weight: float = HfArg(default=0.25, help="Weight beta of the commitment loss.")
    use_rotation_trick: bool = HfArg(default=False, help="Rotation trick instead of straight-through gradients.")
    use_ema_vq: bool = HfArg(default=False, help="Move the codes by moving averages instead of gradients.")
    ema_decay: float = HfArg(default=0.99, help="Decay of these averages at each optimizer step.")

    batch_size: int = HfArg(default=32768, help="Rows in a batch (at most all training rows).")
    gradient_accumulation_steps: int = HfArg(default=1, help="Batches in an optimizer step.")
    num_epochs: int = HfArg(default=20000, help="Passes over the training rows; the last, short batch is left out.")
    max_steps: int = HfArg(default=-1, help="Optimizer steps in all, warm-up included; -1 for no limit.")
    max_lr: float = HfArg(default=3e-4, help="Peak learning rate.")
    min_lr: float = HfArg(default=1e-6, help="Learning rate at the end of the cosine.")
    scheduler_type: Literal["cosine", "cosine_with_warmup"] = HfArg(
        default="cosine_with_warmup", help="Learning rate: a cosine, without or after a linear rise."
    )
    warmup_steps: int = HfArg(default=100, help="Steps of the linear rise of the learning rate (at most half of all).")
    gradient_clip_norm: float = HfArg(default=1.0, help="Largest gradient norm; 0 for no clipping.")
    input_mixing: float = HfArg(default=0.1, help="Mix inputs in pairs, weights from Beta(a, a); 0 for none.")

    use_kmeans_init: bool = HfArg(default=True, help="Start the codes from k-means of an autoencoder's latents.")
    autoencoder_steps: int | None = HfArg(default=None, help="Steps before quantizing; by default a fifth, up to 1000.")
    reset_unused_codes: bool = HfArg(default=True, help="Move codes that no item uses to where items are.")
    steps_per_codebook_reset: int = HfArg(default=50, help="Steps between two looks for unused codes.")

    val_split: float = HfArg(default=0.02, help="Share of the rows held out to choose the best model.")
    steps_per_train_log: int = HfArg(default=50, help="Steps between two logged training losses.")
    steps_per_val_log: int = HfArg(default=250, help="Steps between two validations over the whole catalogue.")
    steps_per_checkpoint: int = HfArg(default=2500, help="Steps between two numbered checkpoints.")
    keep_checkpoints: int = HfArg(default=3, help="Numbered checkpoints to keep, beside best and final.")
    wandb_project: str = HfArg(default="semantic-ids", help="Weights & Biases project.")

    resume: bool = HfArg(default=False, help="Go on from the newest sound checkpoint in checkpoint_dir.")
    overwrite: bool = HfArg(default=False, help="Train again, and replace any result that is there.")
    export_only: bool = HfArg(default=False, help="Write the IDs from best_model.pth without training.")
    keep_ids: str | None = HfArg(default=None, help="With --export_only: an earlier export; its items keep their IDs.")
    collisions: Literal["assign", "suffix", "keep"] | None = HfArg(
        default=None,
        help="Items with equal codes: assign other last codes, add one more code, or keep them equal; "
        "by default assign, and with --export_only as best_model.pth was trained.",
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            least, most = BOUNDS.get(name, (1, MANY))
            for number in value if isinstance(value, list) else [value]:
                if type(number) in (int, float) and not least <= number <= most:
                    raise ValueError(f"--{name} {number}: must be at least {least:,} and at most {most:,}")
        sizes = self.codebook_size if isinstance(self.codebook_size, list) else [self.codebook_size]
        levels = self.codebook_quantization_levels or (3 if len(sizes) == 1 else len(sizes))
        if len(sizes) not in (1, levels):
            raise ValueError(f"--codebook_size {sizes}: not one size for each of {levels} levels")
        self.codebook_size = sizes * levels if len(sizes) == 1 else sizes
        self.codebook_quantization_levels = levels
        if self.max_steps == 0:
            raise ValueError("--max_steps 0: must be -1 or at least 1")
        if self.min_lr > self.max_lr:
            raise ValueError(f"--min_lr {self.min_lr}: must not be above --max_lr {self.max_lr}")
        if self.keep_ids and (not self.export_only or self.num_rows or self.collisions == "keep"):
            raise ValueError("--keep_ids: needs --export_only, all rows, and distinct IDs")
        self.collisions = self.collisions or (None if self.export_only else "assign")
        for name in ("data_dir", "checkpoint_dir", "keep_ids"):
            setattr(self, name, getattr(self, name) and os.path.expanduser(getattr(self, name)))
        self.source = Path(self.data_dir, f"{self.category}_items_with_embeddings.parquet")
        self.ids_path = Path(self.data_dir, f"{self.category}_semantic_ids.parquet")
        self.quality_path = Path(self.data_dir, f"{self.category}_quality.json")
        self.checkpoints = Path(self.checkpoint_dir)
        self.best_path, self.final_path = self.checkpoints / "best_model.pth", self.checkpoints / "final_model.pth"


def fail(subject: str | Path, trouble: str, way_out: str) -> NoReturn:
    """End the run over wrong use or wrong input: one line on standard error, exit status 2."""
    tqdm.write(" ".join(f"error: {subject}: {trouble}; {way_out}".split()), file=sys.stderr)  # below a progress bar
    raise SystemExit(2)


def warn(message: str) -> None:
    print0(f"warning: {message}", file=sys.stderr)


def brief(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__


@contextmanager
def fail_on(errors: type | tuple, subject: str | Path, trouble: str, way_out: str) -> Iterator[None]:
    """Turn exceptions of these types into the error line of `fail`."""
    try:
        yield
    except errors as error:
        fail(subject, f"{trouble} ({brief(error)})", way_out)


def parse_config(argv: list[str] | None) -> RQVAEConfig:
    parser = HfArgumentParser(RQVAEConfig, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: fail("command line", message, "--help lists the flags")
    with fail_on(ValueError, "command line", "wrong flag", "--help lists the flags"):
        return RQVAEConfig(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------- processes and devices


def start_processes(config: RQVAEConfig) -> torch.device:
    """Choose the device of this process; under torchrun, join the other processes."""
    has_mps = torch.backends.mps.is_available() and WORLD == 1  # gloo does not send MPS tensors
    available = {"cuda": torch.cuda.is_available(), "mps": has_mps, "cpu": True}
    name = next(kind for kind in available if available[kind]) if config.device == "auto" else config.device
    if not available[name]:
        fail(f"--device {config.device}", "there is none here", "use --device auto")
    if name == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # k-means runs on rank 0 alone and may take long
    return torch.device(name, LOCAL_RANK if name == "cuda" else None)


def all_sum(values: Tensor) -> Tensor:
    """Sum over the processes, in place. Collective: every process must call it at the same point."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values


def average_gradients(model: nn.Module) -> None:
    """Mean gradients over the processes, in one message."""
    if WORLD > 1:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        mean = all_sum(nn.utils.parameters_to_vector(gradients)) / WORLD
        nn.utils.vector_to_parameters(mean, gradients)


def gathered(rows: Tensor) -> Tensor:
    """Rows of all processes in their order, on the CPU: (n, ...) -> (N, ...)."""
    if WORLD == 1:
        return rows.cpu()
    parts = [None] * WORLD
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts)


def copy_from_rank_0(model: nn.Module) -> None:
    """Give every process the weights and buffers of rank 0."""
    if WORLD > 1:
        for values in model.state_dict().values():
            dist.broadcast(values, 0)


def choose_dtype(device: torch.device) -> str:
    """bfloat16 on CUDA and on CPUs with AVX512-BF16, where it is fast."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # torch 2.11 has no get_capabilities
        fast = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return "bfloat16" if fast else "float32"


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: the kernel clears each page that it hands out, up to 20% of the CPU time."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**29)  # M_TRIM_THRESHOLD


# ---------------------------------------------------------------- files


def lock(path: Path) -> IO:
    """Hold `path` for this process until the returned file is closed. The empty lock file stays."""
    with fail_on(OSError, path, "cannot be written", WRITABLE):
        if path.is_dir():
            fail(path, "is a folder", "move it away")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115  the caller holds it
    if os.name == "posix":
        with suppress(OSError), fail_on(BlockingIOError, path, "another run is writing it", "wait for it"):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # any other OSError: a file system without locks
    return file


def atomic_write(contents: dict[Path, bytes]) -> None:
    """Write temporary files beside their places and move them there, so that no reader ever sees half of one."""
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with fail_on(OSError, path, "cannot be written", WRITABLE), open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- data


class EmbeddingDataset:
    """The embeddings of a catalogue, in the order of the file.

    embeddings (N, D) float32; parent_asin (N); labels (N), titles or the start of the texts. fingerprint["data"] is a
    checksum of names, vectors and their order; fingerprint["recipe"] says how the vectors were made. Each of `world`
    processes holds consecutive rows. The checksums of all processes add up to that of the file.
    """

    def __init__(self, path: str | Path, num_rows: int | None = None, rank: int = 0, world: int = 1):
        way_out = "run embed_items.py with --overwrite, or correct your own file"
        with fail_on(UNREADABLE, path, "not a readable parquet file", way_out):
            file = pl.scan_parquet(path, n_rows=num_rows, glob=False)
            schema = file.collect_schema()
            if missing := [name for name in ("parent_asin", "embedding") if name not in schema]:
                fail(path, f"no column {missing[0]} among {', '.join(schema)}", way_out)
            id_type, vector_type = schema["parent_asin"], schema["embedding"]
            is_list = isinstance(vector_type, pl.List | pl.Array) and vector_type.inner.is_numeric()
            if id_type != pl.String or not is_list:
                trouble = f"parent_asin is {id_type}, embedding is {vector_type}"
                fail(path, trouble, "cast them to String and List(Float32)")
            metadata = pl.read_parquet_metadata(path)
            names = file.select("parent_asin").collect()["parent_asin"]
            if (n := len(names)) < world:
                fail(path, f"{n or 'no'} rows for {world} processes" if world > 1 else "no rows", "add items")
            wrong = names.is_null() | (names.str.strip_chars() == "") | ~names.is_first_distinct()
            if wrong.any():
                row = wrong.arg_max()
                trouble = f"{wrong.sum()} null, blank or duplicate parent_asin, the first {names[row]!r} in row {row}"
                fail(path, trouble, "keep one row of each item and run the three scripts again")
            first, end = n * rank // world, n * (rank + 1) // world
            texts = [name for name in ("title", "item_context", "parent_asin") if schema.get(name) == pl.String]
            start_of_text = pl.col(texts).str.strip_chars().str.slice(0, LABEL_LENGTH).replace("", None)
            label = pl.coalesce(start_of_text).str.replace_all(r"[\s\p{C}]+", " ")  # no control characters in terminals
            own, lists = file.slice(first, end - first), pl.col("embedding").cast(pl.List(pl.Float32))
            self.parent_asin, self.labels = names[first:end], own.select(label).collect().to_series()
            dim = file.select(lists.head(1).list.len()).collect().item()
            if not dim:
                fail(path, "the first embedding is null or empty", way_out)
            vectors, start = np.empty((end - first, dim), dtype=np.float32), 0
            rows = pl.when(lists.list.len() == dim).then(lists).list.to_array(dim)  # others become null, and then NaN
            for piece in own.select(rows).collect_batches(chunk_size=ROWS_READ, maintain_order=True):
                vectors[start : start + len(piece)] = piece.to_series().to_numpy()
                start += len(piece)
        wrong = ~np.isfinite(np.einsum("nd,nd->n", vectors, vectors))
        if wrong.any():
            trouble = f"{wrong.sum()} embeddings are null, not of {dim} dimensions, NaN, infinite or too large"
            fail(path, f"{trouble}, the first in row {first + wrong.argmax()}", way_out)
        items = zip(range(first, end), self.parent_asin, vectors, strict=True)
        contents = (f"{row} {name} ".encode() + x.tobytes() for row, name, x in items)
        # not CRCs: they are linear, so their sum may stay equal when two vectors change places
        checksum = sum(int.from_bytes(hashlib.blake2b(content, digest_size=4).digest()) for content in contents)
        recipe = {name: metadata[name] for name in ("model_name", "instruction", "pooling") if name in metadata}
        self.fingerprint = {"data": checksum, "recipe": recipe}
        self.embeddings = torch.from_numpy(vectors)  # (N, D)

    def __len__(self) -> int:
        return len(self.embeddings)


# ---------------------------------------------------------------- quantization


def code_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """Squared Euclidean distances without |x|^2, which all codes share: x (B, E), codebook (K, E) -> (B, K)."""
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2)


def nearest_codes(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest in Euclidean distance: x (B, E), codebook (K, E) -> (B)."""
    return code_distances(x, codebook).min(1).indices  # on a CPU less than half the time of argmin


def straight_through(x: Tensor, code: Tensor) -> Tensor:
    """Exactly `code` forwards; backwards the gradient goes to x unchanged (arXiv:1711.00937, section 3.2)."""
    return code.detach() + (x - x.detach())


def rotate_to(x: Tensor, code: Tensor) -> Tensor:
    """Exactly `code` forwards; backwards the rotation trick (arXiv:2410.06424, equation 4): x, code (B, E).

    The gradient is that of lambda R x. The constant R rotates x onto the direction of the code, and
    lambda = |code| / |x| matches their lengths; R = I - 2 r r^T + 2 q e^T with e = x/|x|, q = code/|code|
    and r = (e + q)/|e + q|.
    """
    with torch.no_grad():
        e, q = F.normalize(x, dim=-1), F.normalize(code, dim=-1)
        r = F.normalize(e + q, dim=-1)
        scale = code.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    rotated = scale * (x - 2 * (x * r).sum(-1, keepdim=True) * r + 2 * (x * e).sum(-1, keepdim=True) * q)
    return code.detach() + (rotated - rotated.detach())


class Quantized(NamedTuple):
    """Output of one quantizer level, or of the residual walk down all of them."""

    codes: Tensor  # (B) int64; (B, L) of all levels
    vectors: Tensor  # (B, E) the codes' vectors, detached; of all levels their sum, with the estimator's gradient
    loss: Tensor  # () codebook loss + beta commitment loss; the sum over the levels


class VectorQuantizer(nn.Module):
    """A learnable codebook (arXiv:1711.00937): K codes of dimension E, moved by the codebook loss."""

    def __init__(self, codebook_size: int, codebook_embedding_dim: int, commitment_weight: float = 0.25):
        super().__init__()
        self.commitment_weight = commitment_weight
        codebook = torch.randn(codebook_size, codebook_embedding_dim) / math.sqrt(codebook_embedding_dim)
        self.codebook = nn.Parameter(codebook)  # (K, E)

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Quantized:
        """Quantize x (B, E) in float32, by the nearest codes or by the given ones (B)."""
        x = x.float()
        codes = nearest_codes(x.detach(), self.codebook.detach()) if codes is None else codes
        vectors = F.embedding(codes, self.codebook)  # (B, E); indexing would sum its gradient in no fixed order
        codebook_loss, commitment_loss = F.mse_loss(vectors, x.detach()), F.mse_loss(x, vectors.detach())
        return Quantized(codes, vectors.detach(), codebook_loss + self.commitment_weight * commitment_loss)


class EMAVectorQuantizer(VectorQuantizer):
    """A codebook moved by exponential moving averages (arXiv:1711.00937, appendix A.1) instead of gradients.

    The sums over all batches of an optimizer step enter the averages once, at its end, so that accumulation over
    small batches equals one large batch.
    """

    def __init__(
        self, codebook_size: int, codebook_embedding_dim: int, commitment_weight: float = 0.25, ema_decay: float = 0.99
    ):
        super().__init__(codebook_size, codebook_embedding_dim, commitment_weight)
        self.ema_decay = ema_decay
        self.codebook.requires_grad_(False)
        self.register_buffer("ema_counts", torch.ones(codebook_size))  # (K) items a code
        # (K, 1 + E) count and sum of this step's items
        self.register_buffer("step_sums", torch.zeros(codebook_size, 1 + codebook_embedding_dim), persistent=False)

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Quantized:
        """Quantize x (B, E) in float32; a training step also adds x to the sums."""
        output = super().forward(x, codes)
        if self.training and torch.is_grad_enabled():
            one_hot = F.one_hot(output.codes, len(self.codebook)).float()  # index_add_ has no fixed order on CUDA
            self.step_sums += one_hot.T @ F.pad(x.detach().float(), (1, 0), value=1.0)
        return output

    @torch.no_grad()
    def end_step(self) -> None:
        """Appendix A.1, where m = N code: N = decay N + (1 - decay) n, code = code + (1 - decay) (sum - n code) / N."""
        n, sums = all_sum(self.step_sums).tensor_split([1], dim=1)  # (K, 1), (K, E)
        self.ema_counts.lerp_(n.squeeze(1), 1 - self.ema_decay)
        counts = self.ema_counts.unsqueeze(1).clamp_min(1e-12)  # an unused code stays in place
        self.codebook += (1 - self.ema_decay) * (sums - n * self.codebook) / counts
        self.step_sums.zero_()


# ---------------------------------------------------------------- model


def robust_loss(errors: Tensor) -> Tensor:
    """Cauchy loss (alpha = 0 in Barron, arXiv:1701.03077) of the mean square errors (B) of items: ()."""
    return RECONSTRUCTION_WEIGHT * ERROR_SCALE * (errors / ERROR_SCALE).log1p().mean()


def mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers with a SiLU between each two."""
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def chunk_rows(device: torch.device, width: int) -> int:
    """Items per pass outside training, with `width` reconstructions of each."""
    return max(1, DECODED_PER_PASS[device.type] // width)


class RQVAE(nn.Module):
    """Residual-quantized autoencoder of embeddings (TIGER, arXiv:2305.05065, section 3.1).

    One mean vector and one scale, kept in the model, standardise the embeddings, so that reconstruction and
    quantization losses have one magnitude. The two methods on semantic IDs take and return embeddings as stored;
    all others work on standardised ones.
    """

    def __init__(self, config: RQVAEConfig):
        super().__init__()
        self.config = config
        self.metrics, self.recipe = {}, {}  # load_model fills them
        dim, latent_dim = config.item_embedding_dim or 1024, config.codebook_embedding_dim
        sizes = [dim, *config.encoder_hidden_dims, latent_dim]
        self.register_buffer("input_mean", torch.zeros(dim))
        self.register_buffer("input_scale", torch.ones(()))
        self.encoder, self.decoder = mlp(sizes), mlp(sizes[::-1])
        self.estimator = rotate_to if config.use_rotation_trick else straight_through
        kind, weights = VectorQuantizer, [config.commitment_weight]
        if config.use_ema_vq:
            kind, weights = EMAVectorQuantizer, [config.commitment_weight, config.ema_decay]
        self.quantizers = nn.ModuleList(kind(size, latent_dim, *weights) for size in config.codebook_size)

    def _autocast(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, torch.bfloat16, self.training and self.config.dtype == "bfloat16")

    def encode(self, x: Tensor) -> Tensor:
        """Latents: (B, D) -> (B, E) float32. The last layer runs in float32, or similar items become equal."""
        with self._autocast(x):
            x = self.encoder[:-1](x)
        return self.encoder[-1](x.float())

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstructions: (..., E) -> (..., D). The first layer runs in float32."""
        hidden = self.decoder[0](latents)
        with self._autocast(hidden):
            return self.decoder[1:](hidden)

    def standardise(self, x: Tensor) -> Tensor:
        return (x - self.input_mean) / self.input_scale

    def quantize(self, latents: Tensor, codes: Tensor | None = None) -> Quantized:
        """The residual walk of latents (B, E): each level quantizes the residual of the level above it.

        Uses the nearest codes, or the given ones (B, L). The estimator is applied once, to the sum of the codes: at
        every level, it would multiply the encoder's gradient by L.
        """
        residuals, outputs = latents, []
        for level, quantizer in enumerate(self.quantizers):
            outputs.append(quantizer(residuals, None if codes is None else codes[:, level]))
            residuals = residuals - outputs[-1].vectors
        codes, vectors, losses = zip(*outputs, strict=True)
        return Quantized(torch.stack(codes, dim=1), self.estimator(latents, sum(vectors)), sum(losses))

    @torch.no_grad()
    def search(self, latents: Tensor, x: Tensor, width: int) -> Tensor:
        """Codes of the ID that decodes nearest to x (B, D), among `width` candidates: latents (B, E) -> (B, L).

        A beam search, as in Babenko and Lempitsky's additive quantization (CVPR 2014): each level keeps the `width`
        prefixes (W) with the smallest residuals. The decoded error ranks the candidates, because distances between
        latents are not those between embeddings. Returns codes only; quantize() computes their losses.
        """
        residuals = latents.unsqueeze(1)  # (B, W, E), W is 1 at first
        codes = torch.empty(*residuals.shape[:2], 0, dtype=torch.int64, device=latents.device)  # (B, W, l)
        for quantizer in self.quantizers:
            book = quantizer.codebook
            distance = code_distances(residuals.flatten(0, 1), book).add_(residuals.square().sum(2).reshape(-1, 1))
            distance = distance.reshape(len(residuals), residuals.shape[1] * len(book))  # (B, W K)
            best = distance.topk(min(width, distance.shape[1]), largest=False).indices  # (B, W of the next level)
            prefix, code = (best // len(book)).unsqueeze(2), best % len(book)
            codes = torch.cat([codes.gather(1, prefix.expand(-1, -1, codes.shape[2])), code.unsqueeze(2)], dim=2)
            residuals = residuals.gather(1, prefix.expand(-1, -1, book.shape[1])) - book[code]
        decoded = self.decode(latents.unsqueeze(1) - residuals)  # (B, W, D)
        difference = decoded.sub_(x.to(decoded.dtype).unsqueeze(1))
        nearest = torch.linalg.vector_norm(difference, dim=2, dtype=torch.float32).argmin(1)  # (B)
        return codes[torch.arange(len(codes), device=codes.device), nearest]

    def forward(self, x: Tensor, search_width: int) -> tuple[Tensor, Tensor | None]:
        """Reconstruct x (B, D). Returns the loss terms (3), total, reconstruction and vq, and codes.

        The codes (B, L) are the best of `search_width` IDs; 1 takes the nearest codes, 0 none: a plain autoencoder.
        """
        latents, codes, vq = self.encode(x), None, torch.zeros((), device=x.device)
        if search_width:
            searched = self.search(latents, x, search_width) if search_width > 1 else None
            codes, latents, vq = self.quantize(latents, searched)
        errors = F.mse_loss(self.decode(latents).float(), x, reduction="none").mean(1)  # (B)
        reconstruction = robust_loss(errors)
        return torch.stack([reconstruction + vq, reconstruction, vq]), codes

    def decode_levels(self, ids: Tensor) -> Tensor:
        """Sum of the codes of IDs or of their first levels; a suffix is left out: ids (..., l) -> (..., E)."""
        return sum(quantizer.codebook[codes] for quantizer, codes in zip(self.quantizers, ids.unbind(-1), strict=False))

    def encode_to_semantic_ids(self, x: Tensor, search_width: int = SEARCH_WIDTH) -> Tensor:
        """Codes of embeddings as stored: x (B, D) -> (B, L) int64, by `search`. Similar items may get equal codes."""
        return encode_catalogue(self, x, search_width)[1]

    @torch.no_grad()
    def decode_from_semantic_ids(self, ids: Tensor) -> Tensor:
        """Embeddings as stored: ids (B, L), or their first levels (B, l) -> (B, D)."""
        return self.decode(self.decode_levels(ids)) * self.input_scale + self.input_mean


# ---------------------------------------------------------------- initialisation and reset


def fit_standardisation(model: RQVAE, embeddings: Tensor, rows: Tensor) -> None:
    """Set the mean vector and the scale that give embeddings (N, D) variance 1, on average over D."""
    x = embeddings[rows[:SCALE_ROWS]].cpu().double()
    mean = all_sum(x.mean(0)) / WORLD
    variance = all_sum((x - mean).square().mean()) / WORLD
    model.input_mean.copy_(mean)
    model.input_scale.copy_(variance.sqrt().clamp_min(TINY))


@torch.no_grad()
def rescale_latents(model: RQVAE, latents: Tensor) -> Tensor:
    """Centre latents (N, E) and give them unit variance; the decoder's first layer takes the inverse."""
    mean = latents.mean(0)
    scale = (latents - mean).std().clamp_min(1e-6)  # equal items differ by rounding alone
    last, first = model.encoder[-1], model.decoder[0]
    last.bias.sub_(mean).div_(scale)
    last.weight.div_(scale)
    first.bias.add_(first.weight @ mean)
    first.weight.mul_(scale)
    return (latents - mean) / scale


@torch.no_grad()
def init_codebooks(model: RQVAE, latents: Tensor, items_per_step: int) -> None:
    """k-means of each level's residuals, one level after the other: latents (M, E)."""
    residuals = latents
    for level, quantizer in enumerate(model.quantizers):
        size = len(quantizer.codebook)
        kmeans = KMeans(size, n_init=1, random_state=model.config.seed + level).fit(residuals.cpu().numpy())
        quantizer.codebook.copy_(torch.from_numpy(kmeans.cluster_centers_))
        if model.config.use_ema_vq:
            share = np.bincount(kmeans.labels_, minlength=size) / len(residuals)  # (K)
            quantizer.ema_counts.copy_(torch.from_numpy(share * items_per_step))
        residuals = residuals - quantizer(residuals).vectors


@torch.no_grad()
def start_quantizing(model: RQVAE, embeddings: Tensor, rows: Tensor, items_per_step: int) -> None:
    """End the autoencoder training: k-means of the latents of `rows` of embeddings (N, D), from all processes."""
    parts = rows.split(chunk_rows(embeddings.device, 1))
    latents = torch.cat([model.encode(model.standardise(embeddings[part])) for part in parts])
    latents = gathered(latents).to(embeddings.device)
    if not latents.isfinite().all():
        raise SystemExit("error: latents became NaN or infinite; train again with a lower --max_lr and --overwrite")
    if RANK == 0:  # changes the MLPs and the codebooks here; the others get copies
        init_codebooks(model, rescale_latents(model, latents), items_per_step)
    copy_from_rank_0(model)


@torch.no_grad()
def reset_codes(model: RQVAE, x: Tensor, usage: Tensor, adam: Optimizer) -> None:
    """Move codes without usage (L, K) onto residuals of the batch x (B, D), and reset their averages and moments."""
    residuals = model.encode(model.standardise(x))
    for quantizer, counts in zip(model.quantizers, usage, strict=True):
        unused = (counts[: len(quantizer.codebook)] == 0).nonzero().squeeze(1)  # (M)
        if len(unused):
            # every row is used once before one is used twice
            rows = torch.randperm(len(residuals), device=x.device).repeat(1 + len(unused) // len(residuals))
            quantizer.codebook[unused] = residuals[rows[: len(unused)]]
            if model.config.use_ema_vq:
                quantizer.ema_counts[unused] = 1
            for moments in adam.state.get(quantizer.codebook, {}).values():
                if moments.ndim == 2:  # not Adam's step count
                    moments[unused] = 0
        residuals = residuals - quantizer(residuals).vectors
    copy_from_rank_0(model)


# ---------------------------------------------------------------- evaluation


def code_statistics(codes: np.ndarray) -> dict[str, float]:
    """Of IDs (N, L): the proportion of unique IDs (distinct IDs / items) and the number of items of the commonest."""
    sizes = np.bincount(prefix_keys(codes, codes.shape[1]))  # items an ID
    return {"distinct": len(sizes) / len(codes), "largest_collision": int(sizes.max())}


def level_statistics(codes: np.ndarray, sizes: list[int]) -> list[dict]:
    """For each level of codes (N, L): share of its codes in use, their perplexity, and items a code (K)."""
    levels = []
    for column, size in zip(codes.T, sizes, strict=True):
        items = np.bincount(column, minlength=size)
        figures = {"usage": float((items > 0).mean()), "perplexity": float(np.exp(entropy(items)))}
        levels.append(figures | {"items_per_code": items.tolist()})
    return levels


@torch.no_grad()
def encode_catalogue(model: RQVAE, embeddings: Tensor, search_width: int = SEARCH_WIDTH) -> tuple[Tensor, ...]:
    """Latents (N, E), codes (N, L) and norms (N) of the last residual, of embeddings (N, D) as stored."""
    n, device, config = len(embeddings), model.input_mean.device, model.config
    # allocated first: small results between large temporary tensors would fragment the memory, up to 25% of its peak
    latents = torch.empty(n, config.codebook_embedding_dim, device=device)
    codes = torch.empty(n, config.codebook_quantization_levels, dtype=torch.int64, device=device)
    norms = torch.empty(n, device=device)
    size = chunk_rows(device, search_width)
    for part in (slice(start, start + size) for start in range(0, n, size)):
        x = model.standardise(embeddings[part].to(device).float())
        latents[part] = model.encode(x)
        codes[part] = model.search(latents[part], x, search_width)
        norms[part] = (latents[part] - model.decode_levels(codes[part])).norm(dim=1)
    return latents, codes, norms


def checked_losses(prefix: str, terms: Tensor) -> dict[str, float]:
    """The loss terms (3) by name, each the mean over the processes; a NaN or infinity ends the run."""
    total, reconstruction, vq = (all_sum(terms.clone()) / WORLD).tolist()
    if not math.isfinite(total):
        raise SystemExit(f"error: the {prefix} loss became {total}; train again with a lower --max_lr and --overwrite")
    return {f"{prefix}/total_loss": total, f"{prefix}/reconstruction_loss": reconstruction, f"{prefix}/vq_loss": vq}


@torch.inference_mode()
def validate(model: RQVAE, embeddings: Tensor, val_rows: Tensor) -> dict[str, float]:
    """Losses of val_rows (V), held out, and code statistics of all embeddings (N, D); codes are searched."""
    model.eval()
    terms = torch.zeros(3, device=embeddings.device)
    for rows in val_rows.split(chunk_rows(embeddings.device, TRAINING_SEARCH_WIDTH)):
        x = model.standardise(embeddings[rows])
        terms += model(x, TRAINING_SEARCH_WIDTH)[0] * (len(rows) / len(val_rows))
    _, codes, norms = encode_catalogue(model, embeddings, TRAINING_SEARCH_WIDTH)
    model.train()
    codes = gathered(codes).numpy()
    metrics = checked_losses("val", terms) | {"catalogue/distinct": code_statistics(codes)["distinct"]}
    metrics["catalogue/residual_norm"] = all_sum(norms.mean()).item() / WORLD
    for i, level in enumerate(level_statistics(codes, model.config.codebook_size)):
        metrics |= {f"catalogue/{name}_{i}": level[name] for name in ("usage", "perplexity")}
    return metrics


# ---------------------------------------------------------------- checkpoints


def read_checkpoint(path: Path) -> dict:
    """The dict of a .pth file of this script, on the CPU, with an RQVAEConfig; ValueError if missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not verify checksums
                raise ValueError("its checksums do not match")
        checkpoint = {**torch.load(path, map_location="cpu", weights_only=True)}  # an error if it is no dict
        fields = RQVAEConfig.__dataclass_fields__.keys() & checkpoint["config"].keys()  # an older script had others
        return {**checkpoint, "config": RQVAEConfig(**{name: checkpoint["config"][name] for name in fields})}
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise ValueError(brief(error)) from error


def load_model(path: str | Path, device: torch.device | str = "cpu") -> RQVAE:
    """The RQVAE of any checkpoint, in evaluation mode on `device`; a missing or damaged file ends the run."""
    with fail_on(Exception, path, "missing, damaged or not a checkpoint", "train again, or name another file"):
        checkpoint = read_checkpoint(Path(path))
        model = RQVAE(checkpoint["config"])
        model.load_state_dict(checkpoint["model_state_dict"])
        model.metrics = checkpoint["metrics"] | {"step": checkpoint["step"]}
        model.recipe = checkpoint.get("recipe", {})  # an older script saved none
    return model.to(device).eval()


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoint_step_N.pth files by N, the newest first."""
    matches = [(re.fullmatch(r"checkpoint_step_(\d+)\.pth", path.name), path) for path in folder.glob("*.pth")]
    return dict(sorted(((int(match[1]), path) for match, path in matches if match), reverse=True))


def read_own_checkpoint(path: Path, config: RQVAEConfig, fingerprint: dict, total_steps: int) -> dict:
    """As read_checkpoint, but LookupError if another or a longer run wrote the file."""
    checkpoint = read_checkpoint(path)
    for name, value in asdict(config).items():
        trained = getattr(checkpoint["config"], name)
        if name not in FREE_FIELDS and trained != value:
            raise LookupError(f"trained with --{name} {trained}, not {value}")
    if max(checkpoint["step"], checkpoint.get("autoencoder_steps", -1) + 1) > total_steps:
        raise LookupError(f"of a run of more than {total_steps} steps")
    if checkpoint.get("data") != fingerprint["data"]:
        raise LookupError("trained on other embeddings than these")
    return checkpoint


def find_resumed(config: RQVAEConfig, fingerprint: dict, total_steps: int) -> dict | None:
    """The newest sound numbered checkpoint. Skips damaged ones; ends the run if it is of another run."""
    way_out = "give the same flags and no smaller --max_steps, or --overwrite instead of --resume"
    for path in numbered_checkpoints(config.checkpoints).values():
        try:
            checkpoint = read_own_checkpoint(path, config, fingerprint, total_steps)
        except ValueError as error:
            warn(f"{path} is damaged ({error}): passed over")
            continue
        except LookupError as error:
            fail(path, str(error), way_out)
        print0(f"going on from {path}")
        with suppress(ValueError, LookupError):
            read_own_checkpoint(config.best_path, config, fingerprint, total_steps)
            return checkpoint
        if checkpoint["step"] == total_steps:
            fail(config.best_path, "missing, damaged or of a longer run, and no step is left to write it", way_out)
        return checkpoint | {"lowest_val_loss": math.inf}  # the next validation writes a best model
    print0(f"no sound checkpoint in {config.checkpoints}: starting from the beginning")
    return None


# ---------------------------------------------------------------- training


def step_seed(seed: int, step: int) -> int:
    """Seed of the random numbers of a step or an epoch in this process, so that a resume needs no saved generator."""
    return hash((seed, step, RANK)) % 2**63


class Plan(NamedTuple):
    """Sizes that follow from the configuration and the number of items. Rows are those of this process."""

    train_rows: Tensor  # (M)
    val_rows: Tensor  # (V)
    rows_per_step: int  # of this process
    steps_per_epoch: int
    total_steps: int
    autoencoder_steps: int  # the first ones, before k-means


def make_plan(n: int, config: RQVAEConfig, device: torch.device) -> Plan:
    """The plan for the n items of all processes; ends the run if they or the steps do not suffice.

    With no row to hold out, all rows are trained on and validated.
    """
    own = n * (RANK + 1) // WORLD - n * RANK // WORLD  # rows of this process
    smallest = n // WORLD  # rows of the smallest process: all of them take equally many steps
    order = torch.randperm(own, generator=torch.Generator().manual_seed(config.seed)).to(device)
    held_out = min(round(smallest * config.val_split), smallest - 1)
    rows_per_step = config.batch_size * config.gradient_accumulation_steps // WORLD
    rows_per_step = max(1, min(rows_per_step, smallest - held_out))
    steps_per_epoch = (smallest - held_out) // rows_per_step
    total_steps = config.num_epochs * steps_per_epoch
    if config.max_steps > 0:
        total_steps = min(total_steps, config.max_steps)
    autoencoder_steps = config.autoencoder_steps
    if autoencoder_steps is None:
        autoencoder_steps = min(total_steps // 5, MAX_AUTOENCODER_STEPS) if config.use_kmeans_init else 0
    train_rows, val_rows = (order[held_out:], order[:held_out]) if held_out else (order, order)
    if autoencoder_steps >= total_steps:
        fail(f"--autoencoder_steps {autoencoder_steps}", f"takes all {total_steps} steps", "lower it, or train longer")
    if config.use_kmeans_init and (items := len(train_rows) * WORLD) < max(config.codebook_size):
        trouble = f"only {items} training items for the {max(config.codebook_size)} codes of k-means"
        fail(config.source, trouble, "lower --codebook_size or --val_split, or give --use_kmeans_init False")
    return Plan(train_rows, val_rows, rows_per_step, steps_per_epoch, total_steps, autoencoder_steps)


def make_optimizers(model: RQVAE, max_lr: float) -> list[Optimizer]:
    """Adam, and Muon for the matrices between hidden layers, where it learns more per step.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes an update orthogonal; scaled as in
    arXiv:2502.16982, section 2.2, one learning rate suits both.
    """
    # the linear layers between the first and the last; every second layer is a SiLU
    inner = [layer.weight for layer in (*model.encoder[2:-1:2], *model.decoder[2:-1:2])]
    others = [parameter for parameter in model.parameters() if all(parameter is not weight for weight in inner)]
    optimizers: list[Optimizer] = [torch.optim.Adam(others, lr=max_lr, betas=ADAM_BETAS, fused=True)]
    if inner:
        optimizers.append(torch.optim.Muon(inner, lr=max_lr, weight_decay=0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(step: int, total_steps: int, config: RQVAEConfig) -> float:
    """After `step` steps: a linear rise over warmup_steps, at most half of all, then a cosine from max_lr to min_lr."""
    warmup = min(config.warmup_steps, total_steps // 2) if config.scheduler_type == "cosine_with_warmup" else 0
    if step < warmup:
        return config.max_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.min_lr + (config.max_lr - config.min_lr) * (1 + math.cos(math.pi * min(1, progress))) / 2


def augment(x: Tensor, model: RQVAE) -> Tensor:
    """Standardised training inputs (B, D) of embeddings x (B, D) as stored.

    Against overfitting of a small catalogue: pairs are mixed with weights from Beta(a, a), a = input_mixing, as in
    mixup (arXiv:1710.09412), and stretched to their former variance.
    """
    mixing, stretch = model.config.input_mixing, 1 / model.input_scale
    if mixing and len(x) > 1:
        alpha = torch.full((), mixing, device="cpu" if x.device.type == "mps" else x.device)  # MPS has no Beta
        beta = torch.distributions.Beta(alpha, alpha, validate_args=False)  # validation would wait for the GPU
        share = beta.sample((len(x), 1)).to(x)  # (B, 1)
        x = torch.lerp(x.roll(1, dims=0), x, share)
        stretch = stretch / (share.square() + (1 - share).square()).sqrt()
    return (x - model.input_mean).mul_(stretch)


def train_step(
    model: RQVAE, optimizers: list[Optimizer], embeddings: Tensor, rows: Tensor, search_width: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One optimizer step on `rows` (R) of embeddings (N, D). It never waits for the GPU.

    Returns the loss terms (3), the codes (R, L), None in an autoencoder step, and the gradient norm before clipping.
    """
    config = model.config
    batch_size = min(max(1, config.batch_size // WORLD), ROWS_PER_PASS[embeddings.device.type])
    terms, codes = torch.zeros(3, device=embeddings.device), []
    for batch in rows.tensor_split(math.ceil(len(rows) / batch_size)):  # of equal sizes: a single row cannot be mixed
        x = augment(embeddings.index_select(0, batch), model)
        batch_terms, batch_codes = model(x, search_width)
        batch_terms = batch_terms * (len(batch) / len(rows))
        batch_terms[0].backward()
        terms += batch_terms.detach()
        codes.append(batch_codes)
    average_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip_norm or math.inf)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    for quantizer in model.quantizers if search_width and config.use_ema_vq else ():
        quantizer.end_step()
    return terms, torch.cat(codes) if search_width else None, norm


class TrainingState:
    """The model, and everything else that changes in training."""

    def __init__(self, model: RQVAE, plan: Plan, fingerprint: dict, run):
        self.model, self.plan, self.run, self.config, self.fingerprint = model, plan, run, model.config, fingerprint
        self.optimizers = make_optimizers(model, self.config.max_lr)
        shape = len(self.config.codebook_size), max(self.config.codebook_size)
        self.usage = torch.zeros(shape, dtype=torch.int64, device=plan.train_rows.device)  # (L, K) since the last reset
        self.step, self.lowest_val_loss, self.metrics = 0, math.inf, {}
        self.autoencoder_steps, self.stop_requested = plan.autoencoder_steps, False

    def request_stop(self, number: int, frame) -> None:
        """On Ctrl-C or SIGTERM, let the loop finish its step; a second Ctrl-C stops at once."""
        self.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["model_state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        self.usage.copy_(checkpoint["usage"])
        for name in ("step", "lowest_val_loss", "metrics", "autoencoder_steps"):
            setattr(self, name, checkpoint[name])

    def save(self, path: Path, **for_resume) -> None:
        """Write a dict of tensors and plain Python types."""
        checkpoint = {
            "model_state_dict": self.model.state_dict(),
            "config": asdict(self.config) | {"resume": False, "overwrite": False},  # a resumed run writes equal bytes
            "step": self.step,
            "epoch": self.step // self.plan.steps_per_epoch,
            "val_loss": self.metrics.get("val/total_loss", math.inf),
            "metrics": self.metrics,
            **self.fingerprint,
        }
        file = io.BytesIO()
        torch.save(checkpoint | for_resume, file)
        atomic_write({path: file.getvalue()})

    def save_numbered(self) -> None:
        """Save all that an exact resume needs; delete old numbered checkpoints."""
        self.save(
            self.config.checkpoints / f"checkpoint_step_{self.step}.pth",
            optimizer_states=[optimizer.state_dict() for optimizer in self.optimizers],
            usage=self.usage,
            lowest_val_loss=self.lowest_val_loss,
            autoencoder_steps=self.autoencoder_steps,
            wandb_run_id=self.run.id if self.run else None,
        )
        for path in list(numbered_checkpoints(self.config.checkpoints).values())[self.config.keep_checkpoints :]:
            path.unlink()

    def save_if_best(self) -> None:
        """Save the best model, and print a line of the last validation."""
        loss = self.metrics["val/total_loss"]
        is_best = loss <= self.lowest_val_loss * (1 + TIE_TOLERANCE)
        self.lowest_val_loss = min(self.lowest_val_loss, loss)
        if is_best:
            self.save(self.config.best_path)
        usage = "/".join(f"{value:.0%}" for name, value in self.metrics.items() if name.startswith("catalogue/usage"))
        line = "train loss {train/total_loss:.4g}, val loss {val/total_loss:.4g}, distinct {catalogue/distinct:.1%}"
        tqdm.write(f"step {self.step}: {line.format_map(self.metrics)}, codes used {usage}{', best' * is_best}")


def train(config: RQVAEConfig, embeddings: Tensor, plan: Plan, fingerprint: dict, resumed: dict | None, run) -> bool:
    """Train on embeddings (N, D) on the device, and write the checkpoints; False if a signal stopped it."""
    torch.manual_seed(config.seed)
    model, device = RQVAE(config).to(embeddings.device), embeddings.device
    state, total, size = TrainingState(model, plan, fingerprint, run), plan.total_steps, plan.rows_per_step
    if resumed:
        state.restore(resumed)
    else:
        fit_standardisation(model, embeddings, plan.train_rows)
    print0(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, MLPs trained in {config.dtype}")
    print0(f"{len(plan.val_rows) * WORLD:,} items to validate on, {size * WORLD:,} items a step")
    print0(f"{total:,} steps, {plan.steps_per_epoch} an epoch, first {state.autoencoder_steps:,} without quantizing")
    if RANK == 0:
        for step, path in numbered_checkpoints(config.checkpoints).items():
            if step > state.step:  # of an earlier run, or damaged: --resume must not go on from it
                path.unlink()
        config.final_path.unlink(missing_ok=True)  # it stands for a finished run
    model.train()
    order, stopping = None, False
    signal.signal(signal.SIGINT, state.request_stop)
    signal.signal(signal.SIGTERM, state.request_stop)
    with tqdm(total=total, initial=state.step, desc="train", unit=" steps", disable=RANK > 0) as bar:
        while state.step < total and not stopping:
            state.step += 1
            step = state.step
            torch.manual_seed(step_seed(config.seed, step))
            if step == state.autoencoder_steps + 1 and config.use_kmeans_init:
                start_quantizing(model, embeddings, plan.train_rows[: KMEANS_ROWS // WORLD], size * WORLD)
                for optimizer in state.optimizers:
                    optimizer.state.clear()  # moments of another loss, and of the weights before the rescaling

            epoch, place = divmod(step - 1, plan.steps_per_epoch)
            if place == 0 or order is None:  # an epoch begins, or a resumed run in the middle of one
                # seed + 1: else epoch n and step n would draw the same numbers
                generator = torch.Generator(device).manual_seed(step_seed(config.seed + 1, epoch))
                order = plan.train_rows[torch.randperm(len(plan.train_rows), generator=generator, device=device)]
            rows = order[place * size : (place + 1) * size]
            rate = learning_rate(step - 1, total, config)
            for optimizer in state.optimizers:
                optimizer.param_groups[0]["lr"] = rate
            is_quantizing = step > state.autoencoder_steps
            width = (TRAINING_SEARCH_WIDTH if step > SEARCH_FROM * total else 1) if is_quantizing else 0
            terms, codes, norm = train_step(model, state.optimizers, embeddings, rows, width)
            if is_quantizing:
                ones = torch.ones_like(codes.T)
                state.usage += all_sum(torch.zeros_like(state.usage).scatter_add_(1, codes.T, ones))
                reset_due = (step - state.autoencoder_steps) % config.steps_per_codebook_reset == 0
                if config.reset_unused_codes and reset_due and step <= LAST_RESET * total:
                    reset_codes(model, embeddings[rows[: config.batch_size]], state.usage, state.optimizers[0])
                    state.usage.zero_()

            stopping = all_sum(torch.tensor(int(state.stop_requested))).item() > 0
            saving = stopping or step == total or step % config.steps_per_checkpoint == 0
            validating = is_quantizing and (step % config.steps_per_val_log == 0 or step == total)
            if saving or validating or step % config.steps_per_train_log == 0:
                figures = checked_losses("train", terms) | {"train/gradient_norm": norm.item()}
                figures["train/learning_rate"] = rate
                figures["train/clipped_gradient_norm"] = min(norm.item(), config.gradient_clip_norm or math.inf)
                if validating:
                    figures |= validate(model, embeddings, plan.val_rows)
                state.metrics |= figures
                if run:
                    run.log(figures, step=step)
                bar.set_postfix_str(f"loss {figures['train/total_loss']:.4g}, lr {rate:.2e}")
            if validating and RANK == 0:
                state.save_if_best()
            if saving and RANK == 0:
                state.save_numbered()
            bar.update()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if state.step == total and RANK == 0:
        state.save(config.final_path)
    return not stopping


# ---------------------------------------------------------------- distinct IDs


def group_rows(keys: np.ndarray) -> list[np.ndarray]:
    """Rows (N) that share a key, one array a group, rows in order."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1) if len(keys) else []


def prefix_keys(codes: np.ndarray, level: int) -> np.ndarray:
    """One number from 0 on for each distinct prefix of `level` codes: codes (N, L) -> (N)."""
    keys = np.zeros(len(codes), dtype=np.int64)
    for column in codes.T[:level]:
        _, keys = np.unique(keys * (codes.max() + 1) + column, return_inverse=True)
    return keys


def spill(codes: np.ndarray, residuals: np.ndarray, codebook: np.ndarray, room: np.ndarray) -> np.ndarray:
    """While a code has more items than `room` (K), move some to the nearest code with room.

    The items that lose least move first. codes (n), residuals (n, E), codebook (K, E) -> codes (n).
    """
    codes = codes.copy()
    counts = np.bincount(codes, minlength=len(codebook))  # (K)
    while (counts > room).any():
        full = (counts - room).argmax()
        members = np.flatnonzero(codes == full)  # (m)
        cost = cdist(residuals[members], codebook, "sqeuclidean")  # (m, K)
        loss = cost[:, counts < room].min(1) - cost[:, full]
        for i in np.argsort(loss, kind="stable")[: counts[full] - room[full]]:
            target = np.where(counts < room, cost[i], np.inf).argmin()
            codes[members[i]] = target
            counts[[full, target]] += [-1, 1]
    return codes


def crowded_groups(codes: np.ndarray, occupied: np.ndarray, level: int, capacity: int) -> Iterator[tuple]:
    """Groups of items with equal first `level` codes in which more than `capacity` IDs share the next code.

    codes (N, L), occupied (T, L) IDs already given, which count too -> for each group its rows (n) and the next codes
    of its occupied IDs (t). With capacity 0, these are all groups.
    """
    n, all_ids = len(codes), np.concatenate([codes, occupied])
    for group in group_rows(prefix_keys(all_ids, level)):
        if group[0] < n and np.bincount(all_ids[group, level]).max() > capacity:
            yield group[group < n], all_ids[group[group >= n], level]


@torch.inference_mode()
def last_code_errors(model: RQVAE, x: Tensor, codes: np.ndarray, occupied: np.ndarray, capacity: int) -> Iterator:
    """For each crowded group of the last level its rows (n), free codes (F), and mean square errors with them (n, F).

    x (N, D) as stored, codes (N, L). Decodes the IDs of several groups at once, for speed.
    """
    device, size = model.input_mean.device, model.config.codebook_size[-1]
    groups = list(crowded_groups(codes, occupied, codes.shape[1] - 1, capacity))
    step = chunk_rows(device, size)
    for some in (groups[start : start + step] for start in range(0, len(groups), step)):
        members = [rows for rows, _ in some]
        ids = torch.from_numpy(codes[[rows[0] for rows in members]]).unsqueeze(1).repeat(1, size, 1)  # (G, K, L)
        ids[..., -1] = torch.arange(size)
        targets = model.standardise(x[np.concatenate(members)].to(device)).split([len(rows) for rows in members])
        decoded = model.decode(model.decode_levels(ids.to(device)))  # (G, K, D)
        for (rows, taken), target, vectors in zip(some, targets, decoded, strict=True):
            errors = (code_distances(target, vectors) + target.square().sum(1, keepdim=True)) / x.shape[1]
            free = np.setdiff1d(np.arange(size), taken)
            yield rows, free, errors.cpu().numpy()[:, free]


def add_suffix(codes: np.ndarray, occupied: np.ndarray) -> np.ndarray:
    """TIGER's suffix (section 3.1): codes (N, L), and a number that counts equal ones on from occupied (T, L + 1)."""
    n, levels = codes.shape
    keys = prefix_keys(np.concatenate([codes, occupied[:, :levels]]), levels)
    start = np.zeros(keys.max(initial=0) + 1, dtype=np.int64)  # the first free number of each key
    np.maximum.at(start, keys[n:], occupied[:, levels] + 1)
    suffix = pl.Series(keys[:n]).to_frame("key").select(pl.int_range(pl.len()).over("key")).to_series().to_numpy()
    return np.column_stack([codes, start[keys[:n]] + suffix])


@torch.inference_mode()
def decoded_errors(model: RQVAE, x: Tensor, codes: np.ndarray) -> np.ndarray:
    """Mean square errors of embeddings x (M, D) as stored, decoded from codes (M, L), perhaps with a suffix: (M)."""
    device, ids = model.input_mean.device, torch.from_numpy(codes)
    size, errors = chunk_rows(device, 1), []
    for part, some in zip(x.split(size), ids.split(size), strict=True):
        decoded = model.decode(model.decode_levels(some.to(device)))
        errors.append((model.standardise(part.to(device)) - decoded).square().mean(1).cpu())
    return torch.cat(errors).numpy()


def make_distinct(
    model: RQVAE, x: Tensor, latents: np.ndarray, codes: np.ndarray, collisions: str, occupied: np.ndarray
) -> np.ndarray:
    """IDs of x (N, D) with latents (N, E) and codes (N, L), none of them in occupied: (N, L), with a suffix L + 1.

    To assign: from the first level down, a prefix with more items than free IDs below it gives some to the nearest code
    with room. At the last level, the items of a prefix get different codes at the least total error
    (scipy.optimize.linear_sum_assignment). Only items below crowded prefixes change. Needs IDs for all, occupied too.
    """
    if collisions != "assign":
        return add_suffix(codes, occupied) if collisions == "suffix" else codes
    codebooks = [quantizer.codebook.detach().cpu().double().numpy() for quantizer in model.quantizers]
    codes, sizes, n = codes.copy(), model.config.codebook_size, len(codes) + len(occupied)
    assert n <= math.prod(sizes), "more items than IDs"
    for level in range(len(sizes) - 1):
        capacity = min(n, math.prod(sizes[level + 1 :]))  # IDs below a code; their full number may exceed int64
        for rows, taken in crowded_groups(codes, occupied, level, capacity):
            room = capacity - np.bincount(taken, minlength=sizes[level])
            left = latents[rows] - sum(codebooks[above][codes[rows, above]] for above in range(level))  # (n, E)
            target = spill(codes[rows, level], left, codebooks[level], room)
            moved = target != codes[rows, level]
            codes[rows, level] = target
            for below in range(level + 1, len(sizes)):
                left = left - codebooks[below - 1][codes[rows, below - 1]]
                codes[rows[moved], below] = cdist(left[moved], codebooks[below]).argmin(1)
    for rows, free, errors in last_code_errors(model, x, codes, occupied, capacity=1):
        codes[rows, -1] = free[linear_sum_assignment(errors)[1]]
    return codes


# ---------------------------------------------------------------- keeping the IDs of an earlier export


class PreviousIDs(NamedTuple):
    """An earlier export, matched to the current items (N). IDs have w codes: L, or L + 1 with a suffix."""

    ids: np.ndarray  # (N, w), rows of -1 for new items
    vanished: np.ndarray  # (V, w) IDs of items that are gone
    retired: np.ndarray  # (R, w) IDs that it had already retired


def read_previous(config: RQVAEConfig, sizes: list[int], names: pl.Series, model_hash: str) -> PreviousIDs:
    """The export that --keep_ids names, for items with these names; ends the run if it is unfit."""
    path, way_out = Path(config.keep_ids), "name another export, or leave --keep_ids out for new IDs"
    width = len(sizes) + (config.collisions == "suffix")
    columns = [f"semantic_id_{level}" for level in range(width)]
    trouble = "damaged, saved again by another program, or not an export"
    with fail_on((*UNREADABLE, LookupError, ValueError, TypeError), path, trouble, way_out):
        metadata = pl.read_parquet_metadata(path)
        if metadata["model"] != model_hash:
            fail(path, "made with another model, so that its IDs mean other things", way_out)
        if metadata["collisions"] != config.collisions or config.collisions == "keep":
            trouble = f"made with --collisions {metadata['collisions']}"
            fail(path, trouble, "give the same, assign or suffix, or name another export")
        table = pl.read_parquet(path, glob=False).select("parent_asin", pl.col(columns).cast(pl.Int64))
        if not (table.select(columns).to_numpy() >= 0).all():
            raise ValueError("null or negative codes")
        retired = np.frombuffer(bytes.fromhex(metadata["retired"]), "<i4").reshape(-1, width).astype(np.int64)
        now = names.to_frame("parent_asin")
        ids = now.join(table, on="parent_asin", how="left", maintain_order="left", validate="1:1").fill_null(-1)
        vanished = table.join(now, on="parent_asin", how="anti", maintain_order="left")
    return PreviousIDs(ids.select(columns).to_numpy(), vanished.select(columns).to_numpy(), retired)


def is_clearly_better(errors: np.ndarray, old_errors: np.ndarray) -> np.ndarray:
    return MOVE_RATIO * np.maximum(errors, MIN_ERROR) < old_errors


def keep_or_assign(
    model: RQVAE, x: Tensor, latents: np.ndarray, codes: np.ndarray, config: RQVAEConfig, previous: PreviousIDs
) -> tuple[np.ndarray, np.ndarray]:
    """IDs (N, w) of embeddings x (N, D), with latents (N, E) and codes (N, L), and the IDs retired from now on (R, w).

    An item keeps its ID unless a free ID below its encoded prefix decodes better by MOVE_RATIO. IDs of vanished and
    moved items are retired: nobody gets them again.
    """
    ids, levels = previous.ids.copy(), codes.shape[1]
    is_new, retired = ids[:, 0] < 0, np.concatenate([previous.retired, previous.vanished])
    occupied = np.concatenate([ids[~is_new], retired])
    has_suffix = config.collisions == "suffix"  # there is always a free one
    free = math.inf if has_suffix else math.prod(model.config.codebook_size) - len(occupied)
    if free < is_new.sum():
        trouble = f"{is_new.sum():,} new items, and only {free:,} IDs are left beside those kept and retired"
        fail(config.keep_ids, trouble, "train again with more codes or levels")
    rows = np.flatnonzero(~is_new & (ids[:, :levels] != codes).any(1))
    old_errors = decoded_errors(model, x[rows], ids[rows])
    if not has_suffix:
        best = np.full(len(rows), np.inf)  # least errors of the free IDs below each encoded prefix
        for group, _, errors in last_code_errors(model, x[rows], codes[rows], occupied, capacity=0):
            best[group] = errors.min(1, initial=np.inf)
        may_move = is_clearly_better(best, old_errors)
        rows, old_errors = rows[may_move], old_errors[may_move]
    if is_new.sum() + len(rows) <= free:  # else no item moves: new items come first
        offered = make_distinct(model, x[rows], latents[rows], codes[rows], config.collisions, occupied)
        # some are offered a worse ID, as another item got their best one: these stay
        moves = is_clearly_better(decoded_errors(model, x[rows], offered), old_errors)
        retired = np.concatenate([retired, ids[rows[moves]]])
        occupied = np.concatenate([occupied, offered[moves]])
        ids[rows[moves]] = offered[moves]
    ids[is_new] = make_distinct(model, x[is_new], latents[is_new], codes[is_new], config.collisions, occupied)
    return ids, retired


def keeping_quality(model: RQVAE, x: Tensor, ids: np.ndarray, previous: PreviousIDs) -> dict:
    """Figures of an export of embeddings x (N, D) with kept IDs (N, w), ready for JSON."""
    is_new, kept = previous.ids[:, 0] < 0, (ids == previous.ids).all(1)
    quality = {"kept": int(kept.sum()), "moved": int((~is_new & ~kept).sum())}
    quality |= {"new": int(is_new.sum()), "vanished": len(previous.vanished)}
    if (~kept).sum() >= RETRAIN_ITEMS and model.config.val_split > 0:
        codes = model.encode_to_semantic_ids(x[~kept], TRAINING_SEARCH_WIDTH)  # as for the held-out items
        errors = decoded_errors(model, x[~kept], codes.cpu().numpy())
        quality["loss_of_new_and_moved"] = robust_loss(torch.from_numpy(errors)).item()
        quality["held_out_loss"] = model.metrics["val/reconstruction_loss"]
    return quality


# ---------------------------------------------------------------- quality of the IDs


def unexplained_variance(x: Tensor, decoded: Tensor) -> float:
    """sum |x - x^|^2 / sum |x - mean|^2 of x, decoded (N, D)."""
    spread = x.var(0, correction=0).sum().clamp_min(TINY)
    return (F.mse_loss(decoded, x, reduction="sum") / len(x) / spread).item()


def neighbour_recall(x: Tensor, decoded: Tensor, queries: Tensor) -> float:
    """Share of the NEIGHBOURS nearest reconstructions, by cosine, that belong to true neighbours.

    A tie with the last true neighbour is a hit. x, decoded (N, D), queries (Q) rows of x.
    """
    neighbours = min(NEIGHBOURS, max(1, len(x) - 1))  # a single item has none, and counts as found
    lengths, decoded_lengths = (catalogue.norm(dim=1).clamp_min(1e-12) for catalogue in (x, decoded))  # (N)
    hits = []
    for rows in queries.split(128):
        own = torch.arange(len(rows), device=x.device), rows
        unit = F.normalize(x[rows])  # (q, D)
        true, found = unit @ x.T / lengths, unit @ decoded.T / decoded_lengths  # (q, N)
        true[own], found[own] = -math.inf, -math.inf
        least = true.topk(neighbours).values[:, -1:]  # (q, 1)
        hits.append(true.gather(1, found.topk(neighbours).indices) >= least - 1e-6)
    return torch.cat(hits).float().mean().item()


def coherence(x: Tensor, codes: np.ndarray, level: int) -> float | None:
    """Mean cosine of two items that share their first `level` codes, of any two at 0: x (N, D), codes (N, L).

    The mean over items of the mean over their pairs, from the sum of each group's unit vectors; None if no two items
    share a prefix.
    """
    keys = torch.from_numpy(prefix_keys(codes, level)).to(x.device)
    sizes = keys.bincount()  # (groups)
    sums = torch.zeros(len(sizes), x.shape[1], device=x.device)
    sums.index_add_(0, keys, F.normalize(x))
    shared = sizes > 1
    weighted = (sums.norm(dim=1).square() - sizes) / (sizes - 1)  # (groups) size times the mean over pairs
    return (weighted[shared].sum() / sizes[shared].sum()).item() if shared.any() else None


def measure_quality(model: RQVAE, embeddings: Tensor, encoded: np.ndarray, written: np.ndarray) -> dict:
    """Figures of the IDs, ready for JSON: codes (N, L) as encoded, and as written, perhaps with a suffix."""
    (n, levels), device, sizes = encoded.shape, model.input_mean.device, model.config.codebook_size
    generator = torch.Generator().manual_seed(model.config.seed)
    rows = torch.randperm(n, generator=generator)[:QUALITY_ROWS].sort().values.numpy()
    queries = torch.randperm(len(rows), generator=generator)[:RECALL_QUERIES].to(device)
    x = (embeddings if n == len(rows) else embeddings[rows]).to(device)  # (M, D)
    ids = torch.from_numpy(encoded[rows]).to(device)
    quality = {"items": n, "sampled_items": len(rows), "recall_queries": len(queries), "codebook_size": sizes}
    quality["coherence_of_any_two"] = coherence(x, encoded[rows], 0)
    quality["displaced"] = float((written[:, :levels] != encoded).any(1).mean())
    quality["levels"] = level_statistics(encoded, sizes)
    for level, figures in enumerate(quality["levels"], start=1):  # decoded from the codes down to this one
        figures["unexplained_variance"] = unexplained_variance(x, model.decode_from_semantic_ids(ids[:, :level]))
        figures["coherence"] = coherence(x, encoded[rows], level)
    for name, codes in (("as_encoded", encoded), ("as_written", written)):
        decoded = model.decode_from_semantic_ids(torch.from_numpy(codes[rows]).to(device))
        figures = {"unexplained_variance": unexplained_variance(x, decoded)}
        quality[name] = code_statistics(codes) | figures | {"recall@10": neighbour_recall(x, decoded, queries)}
    return quality


# ---------------------------------------------------------------- report


def bar_chart(counts: pl.Series) -> str:
    """Items a code, from the most common code to the rarest; each bar is the mean of some codes: counts (K)."""
    columns = [part.mean() for part in np.array_split(np.sort(counts)[::-1], min(BAR_COLUMNS, len(counts)))]
    bars = "".join(BARS[math.ceil(column / columns[0] * (len(BARS) - 1))] for column in columns)
    return f"{counts.max()} {bars} {counts.min()}"


def print_table(table: pl.DataFrame) -> None:
    plain = {"tbl_hide_dataframe_shape": True, "tbl_hide_column_data_types": True, "tbl_formatting": "NOTHING"}
    with pl.Config(**plain, tbl_rows=-1, tbl_cols=-1, tbl_width_chars=1000, fmt_str_lengths=200, float_precision=4):
        print(table)


def example_tree(codes: np.ndarray, ids: pl.Series, labels: pl.Series) -> str:
    """First codes spread over the catalogue, their most common second codes, and items of those: codes (N, L)."""
    groups = group_rows(codes[:, 0])
    groups = [rows for rows in groups if len(rows) >= EXAMPLE_BRANCHES * EXAMPLE_ITEMS] or groups
    count = lambda rows: f"{len(rows):,} item{'s' * (len(rows) > 1)}"  # noqa: E731
    lines = []  # (prefix or ID, text)
    for pick in np.unique(np.linspace(0, len(groups) - 1, EXAMPLE_PREFIXES).astype(int)):
        rows = groups[pick]
        if codes.shape[1] > 1:
            lines.append((f"{codes[rows[0], 0]}-", count(rows)))
        branches = [rows[part] for part in group_rows(prefix_keys(codes[rows], 2))]
        for branch in sorted(branches, key=len, reverse=True)[:EXAMPLE_BRANCHES]:
            if codes.shape[1] > 2:
                lines.append((f"  {codes[branch[0], 0]}-{codes[branch[0], 1]}-", count(branch)))
            lines += [(f"    {ids[row]}", labels[row]) for row in branch[:EXAMPLE_ITEMS].tolist()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in lines)


def print_report(quality: dict, tree: str) -> None:
    print(f"\n{quality['items']:,} items, codebooks of {' × '.join(map(str, quality['codebook_size']))} codes")
    levels = pl.DataFrame(quality["levels"]).with_row_index("level")
    print_table(levels.with_columns(pl.col("items_per_code").map_elements(bar_chart, pl.String)))
    print("unexplained variance: what is lost when items are rebuilt from the codes down to that level")
    any_two = quality["coherence_of_any_two"] or 1  # None for a single item
    print(f"coherence: mean cosine of two items that share these codes ({any_two:.3f} for any two items)\n")
    names = {"as_encoded": "as encoded", "as_written": f"as written: {quality['collisions']}"}
    print_table(pl.DataFrame([{"IDs": name} | quality[key] for key, name in names.items()]))
    samples = "recall@10 is of {recall_queries:,} items, unexplained variance and coherence of {sampled_items:,}"
    print(samples.format_map(quality))
    displaced, norm = quality["displaced"], quality["residual_norm"]
    print(f"{displaced:.2%} of the items have other codes than as encoded; mean norm of the last residual {norm:.3f}")
    if keeping := quality.get("keep_ids"):
        counts = "{kept:,} items keep their ID, {moved:,} moved to another, {new:,} are new, {vanished:,} have vanished"
        print("\n" + counts.format_map(keeping))
        if keeping["moved"] >= keeping["kept"]:
            warn("most items of the earlier export lose their ID: has each name still its own vector?")
        loss, held_out = keeping.get("loss_of_new_and_moved", 0), keeping.get("held_out_loss", 0)
        if loss > RETRAIN_RATIO * held_out:
            trouble = f"reconstruction loss {loss:.3f} of the new and moved items, {held_out:.3f} of the held-out ones"
            warn(f"the model no longer fits this catalogue ({trouble}): train again")
    if quality["items"] in FEW_ITEMS and len(quality["codebook_size"]) > 2:
        flags = "--codebook_size 1024 1024 --collisions suffix"
        print(f"\non so few items, if each has many interactions, a recommender does better with {flags}: see README")
    print(f"\nsome prefixes and their items:\n{tree}")


# ---------------------------------------------------------------- export


def provenance(config: RQVAEConfig, dataset: EmbeddingDataset) -> dict[str, str]:
    """Hashes of the model and the embeddings, for the metadata of the IDs."""
    model = hashlib.sha256(config.best_path.read_bytes()).hexdigest()
    return {"model": model, "collisions": config.collisions, "embeddings": str(dataset.fingerprint["data"])}


def export(model: RQVAE, dataset: EmbeddingDataset, config: RQVAEConfig) -> dict:
    """Encode the whole catalogue, make the IDs distinct, write them, and report and return their quality."""
    metadata, x, sizes = provenance(config, dataset), dataset.embeddings, model.config.codebook_size
    previous = read_previous(config, sizes, dataset.parent_asin, metadata["model"]) if config.keep_ids else None
    latents, codes, norms = encode_catalogue(model, x)
    latents, codes = latents.cpu().numpy(), codes.cpu().numpy()
    if previous:
        ids, retired = keep_or_assign(model, x, latents, codes, config, previous)
    else:
        retired = np.empty((0, len(sizes) + (config.collisions == "suffix")), dtype=np.int64)
        ids = make_distinct(model, x, latents, codes, config.collisions, retired)

    columns = [pl.Series(f"semantic_id_{level}", column, dtype=pl.Int32) for level, column in enumerate(ids.T)]
    table = pl.DataFrame([dataset.parent_asin, *columns])
    table = table.with_columns(pl.concat_str(pl.exclude("parent_asin"), separator="-").alias("semantic_id"))
    assert config.collisions == "keep" or table["semantic_id"].is_unique().all(), "two items have one ID"
    with suppress(*UNREADABLE):  # there may be no earlier export
        if not previous or not config.ids_path.samefile(config.keep_ids):
            replaced = pl.read_parquet(config.ids_path, columns=["parent_asin", "semantic_id"], glob=False)
            both = table.join(replaced, on="parent_asin")
            if changed := (both["semantic_id"] != both["semantic_id_right"]).sum():
                warn(f"{changed:,} of {len(both):,} items get another ID than in the export that this one replaces")
    quality = {"category": config.category, "collisions": config.collisions, "residual_norm": norms.mean().item()}
    quality |= measure_quality(model, x, codes, ids)
    if previous:
        quality["keep_ids"] = keeping_quality(model, x, ids, previous)
    file = io.BytesIO()
    metadata["retired"] = retired.astype("<i4").tobytes().hex()
    table.write_parquet(file, metadata=metadata)
    report = (json.dumps(quality, indent=1) + "\n").encode()
    atomic_write({config.quality_path: report, config.ids_path: file.getvalue()})
    print_report(quality, example_tree(ids, table["semantic_id"], dataset.labels))
    distinct = quality["as_written"]["distinct"]
    print(f"\nwrote {config.ids_path}: {len(table):,} items, {distinct:.2%} distinct IDs; and {config.quality_path}")
    return quality


# ---------------------------------------------------------------- W&B


def start_wandb(config: RQVAEConfig, run_id: str | None):
    """An online run if an API key is configured, else an offline one; WANDB_MODE decides if it is set."""
    os.environ.setdefault("WANDB_SILENT", "true")  # its own lines would break into the progress bar
    way_out = "set --wandb_project and the WANDB_ variables right, or WANDB_MODE=offline"
    with fail_on((wandb.errors.Error, ValueError), "W&B", "refuses its settings", way_out):
        options = {"project": config.wandb_project, "config": asdict(config), "id": run_id}
        options |= {"resume": "allow" if run_id else None, "dir": os.environ.get("WANDB_DIR", config.checkpoints)}
        options["settings"] = wandb.Settings(console="off", init_timeout=30)
        has_key = wandb.login(prompt=False, verify=False)  # asks no server, but refuses a malformed key
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        try:
            run = wandb.init(mode=mode, **options)
        except wandb.errors.CommError as error:
            warn(f"W&B is out of reach or refuses the key ({brief(error)}): this run is logged offline")
            mode, run = "offline", wandb.init(mode="offline", **options)
    sync = f"; to upload this run later: wandb sync {run.settings.sync_dir}" if mode == "offline" else ""
    print("W&B:", " ".join(filter(None, (mode, run.url))) + sync)
    return run


def finish_wandb(run, model: RQVAE, quality: dict, config: RQVAEConfig) -> None:
    """Send the figures of the report, a histogram of the codes of each level, and best_model.pth as an artifact."""
    for i, level in enumerate(quality["levels"]):
        counts = level["items_per_code"]
        histogram = np.histogram(range(len(counts)), min(len(counts), wandb.Histogram.MAX_LENGTH), weights=counts)
        run.log({f"codes/level_{i}": wandb.Histogram(np_histogram=histogram)})
    run.summary["quality"] = {name: value for name, value in quality.items() if name != "levels"}
    metadata = model.metrics | {"config": asdict(model.config)}
    metadata["unique_proportion"] = model.metrics["catalogue/distinct"]
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"rqvae-{config.category}")[:128]
    artifact = wandb.Artifact(name, "model", metadata=metadata)
    artifact.add_file(str(config.best_path))
    run.log_artifact(artifact)
    run.finish()


# ---------------------------------------------------------------- main


def check_model(model: RQVAE, config: RQVAEConfig, recipe: dict) -> None:
    """End the run if the model to export with does not fit the embeddings, or a flag that was given."""
    trained, defaults = model.config, RQVAEConfig()
    for name, value in asdict(trained).items():
        given, default = getattr(config, name), getattr(defaults, name)  # a default counts as not given
        if name not in FREE_FIELDS | {"category"} and given not in (default, value):
            trouble = f"trained with --{name} {value}, not {given}"
            fail(config.best_path, trouble, "give all flags of training or none, and embeddings of the same kind")
    trained_on = model.recipe | {"--category": trained.category, "--num_rows": trained.num_rows}
    # a model of all rows may export some of them
    exported = recipe | {"--category": config.category, "--num_rows": trained.num_rows and config.num_rows}
    for name, value in trained_on.items():
        if value != exported.get(name, value):
            trouble = f"was trained with {name} {value!r}, and this is {exported[name]!r}"
            warn(f"{config.best_path} {trouble}: train again, unless the model fits all the same")
    if not config.final_path.exists():
        warn(f"no {config.final_path}: if training was stopped, these are the IDs of its step {model.metrics['step']}")


def check_outputs(config: RQVAEConfig, n: int, from_start: bool) -> None:
    """End the run if there are too few IDs for n items, or if it would replace what only --overwrite may replace.

    Only --overwrite replaces a model of another catalogue, starts a stopped training over, or lets a trial replace IDs
    of more items.
    """
    if config.collisions == "assign" and n > (ids := math.prod(config.codebook_size)):
        trouble = f"{n:,} items, but only {ids:,} IDs with codebooks of {config.codebook_size}"
        fail(config.source, trouble, "train with more levels or codes, or with --collisions suffix")
    if config.overwrite:
        return
    if from_start:
        if numbered_checkpoints(config.checkpoints) and not config.final_path.exists():
            way_out = "--resume goes on with its flags, --overwrite starts over"
            fail(config.checkpoints, "has checkpoints of a run that was stopped", way_out)
        with suppress(ValueError):
            source = read_checkpoint(config.best_path)["config"].source
            if source.resolve() != config.source.resolve():
                trouble = f"trained on {source}, not on {config.source}"
                fail(config.best_path, trouble, "give --overwrite, or another --checkpoint_dir")
    with suppress(*UNREADABLE):
        items = pl.scan_parquet(config.ids_path, glob=False).select(pl.len()).collect().item()
        if config.num_rows and items > n:
            fail(config.ids_path, f"has {items:,} items, and this trial {n:,}", "give --overwrite, or move it away")


def main(argv: list[str] | None = None) -> int:
    config = parse_config(argv)
    if not config.source.is_file():
        fail(config.source, "no such file", "run embed_items.py first, or write one file there")
    if config.export_only and not config.best_path.is_file():
        fail(config.best_path, "no such file", "train first, or name another --checkpoint_dir")
    if config.keep_ids is not None and not Path(config.keep_ids).is_file():
        fail(config.keep_ids, "no such file for --keep_ids", "name an earlier export, or leave it out for new IDs")
    device = start_processes(config)
    keep_freed_memory()
    for name, value in asdict(config).items():
        print0(f"{name}: {value}")
    print0(f"device {device} (--device {config.device}), processes: {WORLD}")
    paths = [config.ids_path] if config.export_only else [config.ids_path, config.best_path]
    if RANK == 0:
        _locks = [lock(path) for path in paths]  # closed, and so released, at the end of this function

    # data
    dataset = EmbeddingDataset(config.source, config.num_rows, RANK, WORLD)  # the rows of this process
    n, dataset.fingerprint["data"] = all_sum(torch.tensor([len(dataset), dataset.fingerprint["data"]])).tolist()
    fingerprint, dim = dataset.fingerprint, dataset.embeddings.shape[1]
    print0(f"{n:,} items of {dim} dimensions from {config.source}")

    # model
    run, resumed, is_trained, is_complete = None, None, config.export_only, False
    if config.item_embedding_dim not in (None, dim):
        fail(f"--item_embedding_dim {config.item_embedding_dim}", f"{config.source} has {dim}", "leave the flag out")
    config.item_embedding_dim = dim
    if config.export_only:
        model = load_model(config.best_path)
        check_model(model, config, fingerprint["recipe"])
        config.codebook_size = model.config.codebook_size
        config.collisions = config.collisions or model.config.collisions
    else:
        config.dtype = choose_dtype(device) if config.dtype == "auto" else config.dtype
        plan = make_plan(n, config, device)
        with suppress(ValueError, LookupError, *UNREADABLE):  # a file is missing, damaged or of another run
            final = read_own_checkpoint(config.final_path, config, fingerprint, plan.total_steps)
            read_own_checkpoint(config.best_path, config, fingerprint, plan.total_steps)
            is_trained = final["step"] == plan.total_steps and not config.overwrite
            exported = pl.read_parquet_metadata(config.ids_path)  # IDs that --keep_ids kept count, too
            is_exported = provenance(config, dataset).items() <= exported.items() and config.quality_path.exists()
            is_complete = is_trained and is_exported
        resumed = find_resumed(config, fingerprint, plan.total_steps) if config.resume and not is_trained else None
    check_outputs(config, n, from_start=not (is_trained or resumed))
    seen = torch.tensor([resumed["step"] if resumed else 0, is_trained, is_complete])
    if not all_sum(seen.clone()).equal(seen * WORLD):  # another machine has another folder
        fail(config.checkpoints, "not the same for all processes", "put it on a shared file system")
    if is_complete:
        print0(f"{config.final_path} and {config.ids_path} are complete; --overwrite trains again")
        return 0
    if not is_trained:
        run = start_wandb(config, resumed and resumed["wandb_run_id"]) if RANK == 0 else None
        if not train(config, dataset.embeddings.to(device), plan, fingerprint, resumed, run):
            print0(f"interrupted: saved in {config.checkpoints}; go on with the same command and --resume")
            return 130

    # IDs
    if RANK > 0:
        return 0
    if WORLD > 1:
        dataset = EmbeddingDataset(config.source, config.num_rows)  # all rows
    if not config.export_only:
        model = load_model(config.best_path)
        if (step := model.metrics["step"]) < plan.total_steps / 2:
            warn(f"the best model is of step {step:,} of {plan.total_steps:,}: README has flags for such a catalogue")
    quality = export(model.to(device), dataset, config)
    if run:
        finish_wandb(run, model, quality, config)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: files written so far are whole", file=sys.stderr)
        sys.exit(130)
