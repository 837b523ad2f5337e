"""Turns the tokens of every item into an L2-normalised embedding. CUDA, MPS or CPU.

Reads   data/output/{category}_tokenized.npz, and the catalogue that it was made from
Writes  data/output/{category}_items_with_embeddings.parquet   (every catalogue column, and embedding)

    python embed_items.py --category Video_Games                             # the best device there is
    python embed_items.py --category Video_Games --num_rows 256 --device cpu # a first look on a laptop
    python embed_items.py --category Video_Games --model_name /models/qwen3  # a local copy of the npz's model
    python embed_items.py --category Video_Games --pooling mean              # MiniLM, E5; cls for BGE
    python embed_items.py --category Video_Games --reuse                     # only the items that are new or changed
    torchrun --nproc_per_node=8 embed_items.py --category Video_Games        # eight GPUs

Finished vectors wait in data/output/.{category}_items_with_embeddings.parquet.partial until the output is complete.
After a kill, the same command goes on from there, also with another number of processes.

Before: tokenize_items.py. Next: train_rqvae.py.
Shapes: N items, B items in a batch, T tokens of the longest item in it, D target_dim, H the model's own size.
"""

import copy
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ContextManager, Literal, NamedTuple, NoReturn

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from polars.io.plugins import register_io_source
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, Cache, HfArgumentParser, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

if os.name == "posix":
    import fcntl

FORMAT_VERSION = 2  # of the npz
FINGERPRINT_ROWS = 4096  # rows per update of the fingerprint; tokenize_items.py must use the same
TOKENS_PER_BATCH = {"cuda": 32768, "mps": 8192, "cpu": 4096}  # more fills a GPU, fewer fit in a CPU's caches
BATCHES_IN_FLIGHT = 16  # batches queued on a GPU before the host waits for their vectors
ITEMS_CHECKED = 8  # items embedded alone and in one batch, to compare the two
GOOD_AGREEMENT = 0.999  # cosine
MIN_PREFIX = 8  # tokens; a shorter prefix saves less time than it costs
ROWS_PER_GROUP = 8192  # rows per row group of the output, which train_rqvae.py reads in parallel
ROWS_READ = 8 * ROWS_PER_GROUP  # rows of a parquet file in memory at once

# Set by torchrun. Without it, RANK and WORLD_SIZE of a cluster do not concern this process.
RANK, WORLD, LOCAL_RANK = (
    int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default
    for name, default in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items()
)

# ---------------------------------------------------------------- configuration


@dataclass
class EmbedConfig:
    """The command line of this script: every field is a flag."""

    category: str = HfArg(default="Video_Games", help="Catalogue name: the first part of every file name.")
    data_dir: str = HfArg(default="data/output", help="Folder of the tokens, the catalogue and the output.")
    model_name: str | None = HfArg(
        default=None,
        help="Hub name or folder of the model; by default the one the tokens were made for.",
    )
    pooling: Literal["last", "mean", "cls"] = HfArg(
        default="last",
        help="How hidden states become one vector: last for Qwen3, mean or cls for BERT-style models.",
    )
    target_dim: int = HfArg(default=1024, help="Leading dimensions kept of each vector (at most all).")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        default="auto", help="Number type of the model; auto is bfloat16 on CUDA and float32 elsewhere."
    )
    tokens_per_batch: int | None = HfArg(
        default=None,
        help="Tokens in a batch, padding included, fewer to save memory; by default 32768 on CUDA, 8192 on MPS, 4096 "
        "on the CPU.",
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="Where the model runs.")
    num_rows: int | None = HfArg(default=None, help="Only the first rows of the tokens, for a trial.")
    reuse: bool = HfArg(
        default=False,
        help="Keep the vectors of the earlier output for all texts that it holds, and embed only the others; embed all "
        "if it was made with another model or other settings.",
    )
    overwrite: bool = HfArg(default=False, help="Embed again even if the output is complete already.")

    @property
    def tokens_path(self) -> Path:
        return Path(self.data_dir, f"{self.category}_tokenized.npz")

    @property
    def catalogue_path(self) -> Path:
        return Path(self.data_dir, f"{self.category}_items_updated.parquet")

    @property
    def target(self) -> Path:
        return Path(self.data_dir, f"{self.category}_items_with_embeddings.parquet")


def fail(what: str | Path, trouble: str, way_out: str) -> NoReturn:
    """Ends the run because of a wrong flag or file: one line on standard error, exit status 2."""
    line = " ".join(f"error: {what}: {trouble}; {way_out}".split())
    tqdm.write(line, file=sys.stderr)  # on a line of its own even beside a progress bar
    raise SystemExit(2)


@contextmanager
def fail_on(errors: Any, what: str | Path, trouble: str, way_out: str) -> Iterator[None]:
    """Turns exceptions of these types into the error line of `fail`."""
    try:
        yield
    except errors as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(what, f"{trouble} ({first_line})", way_out)


def print0(message: str) -> None:
    if RANK == 0:
        print(message)


def from_rank_0(value: Any) -> Any:
    """Collective: the value that rank 0 gives, once all processes are here."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]


def parse_config(argv: list[str] | None) -> EmbedConfig:
    parser = HfArgumentParser(EmbedConfig, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: fail("command line", message, "--help lists the flags")
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    for name in ("target_dim", "tokens_per_batch", "num_rows"):
        value = getattr(config, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if config.reuse and config.overwrite:
        parser.error("--overwrite embeds every item again, --reuse does not: choose one")
    return config


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device of this process, and the reason for it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    reason = "the best one here" if name == "auto" else "asked for"
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available[name]:
        fail(f"--device {name}", "there is none here", "use --device auto")
    if WORLD > 1:
        reason = f"{reason}; {WORLD} processes"
    if name != "cuda":
        return torch.device(name), reason
    if torch.cuda.device_count() <= LOCAL_RANK:
        trouble = f"more processes than the {torch.cuda.device_count()} GPUs of this machine"
        fail("torchrun", trouble, "lower --nproc_per_node, or use --device cpu")
    return torch.device(name, LOCAL_RANK), reason


# ---------------------------------------------------------------- files

UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)  # raised for a damaged parquet file
ROOM = "make room or set the rights there, or choose another --data_dir"


def lock(path: Path) -> ContextManager:
    """Keeps other runs from writing `path` until this file is closed. The empty lock file stays."""
    if RANK > 0:
        return nullcontext()
    with fail_on(OSError, path, "cannot be written", ROOM):
        if path.is_dir():
            raise IsADirectoryError("a folder has that name")
        file = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115  the caller closes it
    try:
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):  # other errors: this file system has no locks
            fail(path, "another run is writing it", "wait for that one, or choose another folder")
    return file


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path, and moves that file to `path` when the block has written it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with fail_on((OSError, pl.exceptions.ComputeError), path, "cannot be written", ROOM):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def slices(path: Path, columns: list[str] | None = None, n: int | None = None) -> Iterator[pl.DataFrame]:
    """The first n rows of a parquet file, or all, at most ROWS_PER_GROUP at a time."""
    frame = pl.scan_parquet(path, glob=False).select(columns or pl.all())
    n = frame.select(pl.len()).collect().item() if n is None else n
    for start in range(0, n, ROWS_READ):
        yield from frame.slice(start, min(ROWS_READ, n - start)).collect().iter_slices(ROWS_PER_GROUP)


# ---------------------------------------------------------------- input


class Tokens(NamedTuple):
    """The tokens that tokenize_items.py wrote, without padding."""

    ids: np.ndarray  # int32, the tokens of all items, one item after the other
    starts: np.ndarray  # (N + 1) int64, where each item begins in ids, and the end
    model_name: str
    instruction: str
    fingerprint: str  # of the whole catalogue
    tokenizer: str  # SHA-256 over the tokenizer's files and settings
    max_length: int

    @property
    def lengths(self) -> np.ndarray:  # (N)
        return np.diff(self.starts)


def read_rows(archive: zipfile.ZipFile, name: str) -> Iterator[np.ndarray]:
    """Rows of an array (N, W) in an npz, some at a time: (n, W). The zip checksum is compared at the end."""
    with archive.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        (n, width), is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if is_fortran or dtype not in (np.int32, np.uint8, bool):
            raise ValueError(f"{name} is not an array of tokens")
        for start in range(0, n, FINGERPRINT_ROWS):
            rows = min(FINGERPRINT_ROWS, n - start)
            yield np.frombuffer(file.read(rows * width * dtype.itemsize), dtype).reshape(rows, width)


def read_tokens(path: Path, num_rows: int | None) -> Tokens:
    """Reads the npz, and ends the run if it is damaged or of another format."""
    if not path.is_file():
        fail(path, "not found", "run tokenize_items.py first")
    # numpy, zipfile and the parser of numpy's header raise many kinds of errors
    with (
        fail_on(Exception, path, "damaged, or not an npz of tokenize_items.py", "run tokenize_items.py again"),
        np.load(path, allow_pickle=False) as npz,
    ):
        if npz["format_version"] != FORMAT_VERSION:
            raise ValueError(f"not of format {FORMAT_VERSION}")
        settings = {name: str(npz[name]) for name in ("model_name", "instruction", "fingerprint", "tokenizer")}
        lengths = np.concatenate([mask.sum(axis=1, dtype=np.int64) for mask in read_rows(npz.zip, "attention_mask")])
        if len(lengths) != npz["n_items"]:
            raise ValueError(f"{len(lengths)} rows, not {npz['n_items']}")
        if not lengths.all():
            raise ValueError(f"{(lengths == 0).sum()} items have no token, the first in row {lengths.argmin()}")
        starts = np.append(0, lengths.cumsum())
        ids, end = np.empty(starts[-1], dtype=np.int32), 0
        masks = read_rows(npz.zip, "attention_mask")
        for rows, mask in zip(read_rows(npz.zip, "input_ids"), masks, strict=True):
            tokens = rows[mask.view(bool)]
            ids[end : end + len(tokens)] = tokens
            end += len(tokens)
        if end != len(ids):
            raise ValueError("attention_mask holds other numbers than 0 and 1")
        starts = starts[: num_rows + 1] if num_rows else starts
        return Tokens(ids, starts, **settings, max_length=int(npz["max_length"]))


def add_to_fingerprint(digest: Any, catalogue: pl.DataFrame) -> None:
    """SHA-256 over parent_asin and item_context in row order, the same as in tokenize_items.py."""
    for rows in catalogue.select("parent_asin", "item_context").iter_slices(FINGERPRINT_ROWS):
        for text in rows:
            digest.update(text.str.len_bytes().to_numpy().tobytes())  # tells ("ab", "c") from ("a", "bc")
            digest.update(text.str.join().item().encode())


def read_catalogue(config: EmbedConfig, tokens: Tokens) -> np.ndarray:
    """Checks that the tokens were made from this catalogue; returns a 64-bit hash of each of their texts: (N)."""
    path, names = config.catalogue_path, ["parent_asin", "item_context"]
    if not path.is_file():
        fail(path, f"not found, though {config.tokens_path} was made from it", "put the catalogue back")
    digest, hashes = hashlib.sha256(), [np.empty(0, dtype=np.uint64)]
    with fail_on(UNREADABLE, path, "not a readable parquet file", "write it again"):
        schema = pl.scan_parquet(path, glob=False).collect_schema()
        if "embedding" in schema:
            fail(path, "already has a column embedding", "drop or rename it, so that nothing is overwritten")
        if all(schema.get(name) == pl.String for name in names):
            for piece in slices(path, names):
                add_to_fingerprint(digest, piece)
                hashes.append(piece["item_context"].hash().to_numpy())
    hashes, n = np.concatenate(hashes), len(tokens.lengths)
    if digest.hexdigest() != tokens.fingerprint or len(hashes) < n:
        trouble = f"made from another catalogue, or another order of it, than {path} is now"
        fail(config.tokens_path, trouble, "run tokenize_items.py again")
    print0(f"{n:,} of {len(hashes):,} items of {path}")
    return hashes[:n]


# ---------------------------------------------------------------- model


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    way_out = "check the name and the network, or give a local folder"
    with fail_on(Exception, f"--model_name {name}", "no model can be loaded from there", way_out):
        return AutoModel.from_pretrained(name, dtype=dtype).to(device).eval()


def check_fit(model: PreTrainedModel, tokens: Tokens, config: EmbedConfig) -> None:
    """Ends the run if these tokens were made for another kind of model."""
    name, again = config.model_name, f"run tokenize_items.py with --model_name {config.model_name}"
    with fail_on(
        (AttributeError, NotImplementedError), f"--model_name {name}", "reads no tokens", "choose a text encoder"
    ):
        vocabulary = model.get_input_embeddings().num_embeddings
    for token in (tokens.ids.min(), tokens.ids.max()):
        if not 0 <= token < vocabulary:
            fail(config.tokens_path, f"holds token {token}, but {name} knows 0 to {vocabulary - 1}", again)
    longest, limit = tokens.lengths.max(), getattr(model.config, "max_position_embeddings", None)
    if limit and 0 < limit < longest:  # XLNet says -1 for no limit
        trouble = f"items of {longest} tokens; {name} reads only {limit}"
        fail(config.tokens_path, trouble, f"{again} --max_length {limit}")
    if name == tokens.model_name:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception:  # a folder of weights without a tokenizer
        return
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # AutoTokenizer makes such a one of a config.json alone
        return
    texts = pl.scan_parquet(config.catalogue_path, glob=False).select("item_context").head(ITEMS_CHECKED).collect()
    for text, start, end in zip(texts.to_series(), tokens.starts, tokens.starts[1:]):
        prompt = f"Instruct: {tokens.instruction}\nQuery:{text}" if tokens.instruction else text
        expected = tokenizer(prompt, truncation=True, max_length=tokens.max_length)["input_ids"]
        if expected != tokens.ids[start:end].tolist():
            trouble = f"made for {tokens.model_name}, and {name} cuts the same text into other tokens"
            fail(config.tokens_path, trouble, again)


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over configuration and weights, the same on every device and for every copy of a model."""
    settings = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype"):
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- embedding


def batches_by_length(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Rows in batches of similar length, the longest first, so that too large a batch fails at the start."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens_per_batch // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def pad_right(tokens: Tokens, rows: np.ndarray, skip: int) -> tuple[Tensor, Tensor]:
    """input_ids and mask of rows (B) without their first `skip` tokens: (B, T) int64."""
    start, end = tokens.starts[rows] + skip, tokens.starts[rows + 1]  # (B)
    place = start[:, None] + np.arange((end - start).max())  # (B, T)
    mask = place < end[:, None]
    input_ids = np.where(mask, tokens.ids[np.minimum(place, len(tokens.ids) - 1)], 0)
    return torch.from_numpy(input_ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector an item, whichever side is padded: hidden (B, T, H), mask (B, T) -> (B, H).

    last: the last real token, as Qwen3-Embedding was trained (its model card); cls: the first; mean: all,
    as in Sentence-BERT (arXiv:1908.10084).
    """
    if pooling == "mean":
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(1) / weights.sum(1)
    order = torch.arange(mask.shape[1], device=mask.device)
    real = mask > 0
    position = (order * real).argmax(1) if pooling == "last" else real.int().argmax(1)  # (B)
    return hidden[torch.arange(len(hidden), device=mask.device), position]


@torch.inference_mode()
def embed(
    model: PreTrainedModel, tokens: Tokens, rows: np.ndarray, config: EmbedConfig, prefix: Cache | None = None
) -> Tensor:
    """Unit vectors of rows (B) in float32, truncated first and normalised after: (B, D), on the model's device.

    `prefix` holds the tokens that all items start with. Only a causal model has one: its last real token does not
    see the padding on its right, and needs no mask.
    """
    input_ids, mask = pad_right(tokens, rows, prefix.get_seq_length() if prefix else 0)
    if model.device.type == "cuda":  # pinned memory is copied while the host goes on
        input_ids, mask = input_ids.pin_memory(), mask.pin_memory()
    input_ids, mask = (tensor.to(model.device, non_blocking=True) for tensor in (input_ids, mask))
    if prefix:
        past = copy.deepcopy(prefix)  # the model appends to it
        past.batch_repeat_interleave(len(rows))
        output = model(input_ids=input_ids, past_key_values=past)
    else:
        output = model(input_ids=input_ids, attention_mask=mask)
    pooled = pool(output.last_hidden_state, mask, config.pooling)  # (B, H)
    return F.normalize(pooled.float()[:, : config.target_dim], dim=-1)


def vector_size(model: PreTrainedModel, tokens: Tokens, config: EmbedConfig) -> int:
    """Size of the model's vectors; ends the run if the model cannot embed the longest item."""
    longest = int(tokens.lengths.argmax())
    trouble = f"cannot embed an item of {tokens.lengths[longest]} tokens"
    way_out = "choose a text encoder that reads as many, or tokenize to fewer"
    with fail_on(Exception, f"--model_name {config.model_name}", trouble, way_out):  # each model raises its own
        return embed(model, tokens, np.array([longest]), replace(config, target_dim=None)).shape[1]


@torch.inference_mode()
def read_prefix(model: PreTrainedModel, tokens: Tokens, config: EmbedConfig) -> Cache | None:
    """Keys and values of the tokens that all items start with, such as the instruction, to compute them once.

    None if there are few such tokens, or if the model has other layers than causal attention.
    """
    ids = tokens.ids[: tokens.lengths.min() - 1]  # at least one token is left of each item
    for i, token in enumerate(ids):
        if (tokens.ids[tokens.starts[:-1] + i] != token).any():
            ids = ids[:i]
            break
    if config.pooling != "last" or len(ids) < MIN_PREFIX:
        return None
    input_ids = torch.from_numpy(ids.astype(np.int64)).unsqueeze(0).to(model.device)
    cache = getattr(model(input_ids=input_ids, use_cache=True), "past_key_values", None)
    layers = {type(layer) for layer in getattr(cache, "layers", [])}
    return cache if layers and layers <= {DynamicLayer, DynamicSlidingWindowLayer} else None


def batch_agreement(model: PreTrainedModel, tokens: Tokens, config: EmbedConfig, prefix: Cache | None) -> float:
    """Lowest cosine between items embedded alone, without the prefix, and in one batch: 1 if they agree."""
    by_length = np.argsort(tokens.lengths, kind="stable")
    count = min(ITEMS_CHECKED, len(by_length), max(2, config.tokens_per_batch // int(tokens.lengths.max())))
    rows = by_length[np.linspace(0, len(by_length) - 1, count).astype(int)]
    single = torch.cat([embed(model, tokens, row[None], config) for row in rows])
    return F.cosine_similarity(single, embed(model, tokens, rows, config, prefix)).min().item()


def checked_prefix(model: PreTrainedModel, tokens: Tokens, config: EmbedConfig) -> Cache | None:
    """The prefix, if vectors computed with it are right; prints how well batches agree with single items."""
    prefix = read_prefix(model, tokens, config)
    agreement = batch_agreement(model, tokens, config, prefix)
    if prefix and agreement < GOOD_AGREEMENT:
        prefix = None
        agreement = batch_agreement(model, tokens, config, prefix)
    if prefix:
        print0(f"the {prefix.get_seq_length()} tokens that all items start with are read once")
    print0(f"items embedded alone and inside a batch agree to a cosine of {agreement:.6f} at the worst")
    if agreement < GOOD_AGREEMENT and RANK == 0:
        trouble = f"below {GOOD_AGREEMENT}: padding changes the vectors"
        print(f"warning: {trouble}; try --dtype float32 or another --pooling", file=sys.stderr)
    return prefix


# ---------------------------------------------------------------- finished vectors


class Store:
    """Finished vectors (N, D) on disk, until the output is complete.

    recipe.json      what the vectors depend on
    vectors-R        vectors of the process of rank R: sparse, float32, zero where it has embedded nothing
    vectors-reused   vectors of an earlier output
    """

    def __init__(self, folder: Path, n: int, dim: int):
        self.folder, self.shape = folder, (n, dim)
        self.row_bytes = 4 * dim

    def open(self, recipe: dict[str, str]) -> None:
        """Makes the folder if there is none; ends the run if its vectors were made with another recipe."""
        path = self.folder / "recipe.json"
        if not path.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            with fail_on(OSError, self.folder, "cannot be written", ROOM):
                self.folder.mkdir()
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(recipe, indent=1) + "\n")
        earlier = json.loads(path.read_text())
        if other := [name for name in recipe if recipe[name] != earlier.get(name)]:
            trouble = f"holds the vectors of a stopped run with another {', '.join(other)}"
            fail(self.folder, trouble, "finish that run with its own command, or delete the folder to start over")

    def write(self, rows: np.ndarray, vectors: np.ndarray, name: str = f"vectors-{RANK}") -> None:
        """Keeps the vectors (B, D) of rows (B)."""
        path = self.folder / name
        with fail_on(OSError, path, "cannot be written", ROOM), open(path, "r+b" if path.exists() else "w+b") as file:
            file.truncate(self.shape[0] * self.row_bytes)
            for row, vector in zip(rows.tolist(), vectors, strict=True):
                file.seek(row * self.row_bytes)
                file.write(vector)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of rows (B), whichever process wrote them: (B, D). Zero if not finished or torn by a power cut."""
        result = np.zeros((len(rows), self.shape[1]), dtype=np.float32)
        for path in sorted(self.folder.glob("vectors-*")):
            if path.stat().st_size == self.shape[0] * self.row_bytes:
                vectors = np.memmap(path, np.float32, "r", shape=self.shape)[rows]
                result = np.where(is_unit(vectors)[:, None], vectors, result)
        return result

    def delete(self) -> None:
        (self.folder / "recipe.json").unlink()
        shutil.rmtree(self.folder)


def is_unit(vectors: np.ndarray) -> np.ndarray:  # (B, D) -> (B)
    return np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-3


def embed_all(
    model: PreTrainedModel,
    tokens: Tokens,
    config: EmbedConfig,
    prefix: Cache | None,
    store: Store,
    batches: list[np.ndarray],
) -> None:
    """Embeds these batches of rows and keeps their vectors."""
    lengths, at_once = tokens.lengths, BATCHES_IN_FLIGHT if model.device.type == "cuda" else 1
    title = "embed" if WORLD == 1 else f"embed (1 of {WORLD} processes)"
    # counted in tokens, because the first items are the longest and would make the time left look too long
    total = sum(int(lengths[rows].sum()) for rows in batches)
    done, start = 0, time.perf_counter()
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc=title, disable=RANK > 0) as progress:
        for i in range(0, len(batches), at_once):
            rows = np.concatenate(batches[i : i + at_once])
            vectors = [embed(model, tokens, batch, config, prefix) for batch in batches[i : i + at_once]]
            vectors = torch.cat(vectors).cpu().numpy()
            if not is_unit(vectors).all():
                row = rows[~is_unit(vectors)].min()
                trouble = f"the item in row {row} became NaN, infinite or zero with {config.model_name}"
                fail(config.tokens_path, f"{trouble} in {config.dtype}", f"delete {store.folder}, use --dtype float32")
            store.write(rows, vectors)
            done += len(rows)
            progress.set_postfix_str(f"{done / (time.perf_counter() - start):,.1f} items/s", refresh=False)
            progress.update(int(lengths[rows].sum()))


# ---------------------------------------------------------------- output


def read_metadata(path: Path) -> dict[str, str]:
    """Key-value metadata of an earlier output; empty if there is none or it is damaged."""
    try:
        return pl.read_parquet_metadata(path)
    except UNREADABLE:
        return {}


def reuse(
    model: PreTrainedModel,
    tokens: Tokens,
    config: EmbedConfig,
    store: Store,
    recipe: dict[str, str],
    rows: np.ndarray,
    texts: np.ndarray,
) -> np.ndarray:
    """Copies into the store the vectors that the earlier output holds for the same texts: the rows left to embed.

    rows (R) and hashes of their texts (R).
    """
    path, metadata = config.target, read_metadata(config.target)
    none_kept = f"no vector of {path} is kept ({{}}): all items are embedded"
    if other := [name for name in recipe if metadata.get(name) != recipe[name]]:
        print(none_kept.format(f"made with another {', '.join(other)}" if path.exists() else "not found"))
        return rows
    with fail_on(UNREADABLE, path, "not a readable parquet file", "delete it to embed all items"):
        earlier = np.concatenate([piece["item_context"].hash().to_numpy() for piece in slices(path, ["item_context"])])
        order = np.argsort(earlier)
        match = order[np.searchsorted(earlier, texts, sorter=order).clip(max=len(earlier) - 1)]  # (R) earlier rows
        is_known = earlier[match] == texts
        for i, piece in enumerate(slices(path, ["embedding"])):
            here = is_known & (match // ROWS_PER_GROUP == i)
            vectors = piece["embedding"].list.to_array(store.shape[1]).to_numpy()
            store.write(rows[here], vectors[match[here] % ROWS_PER_GROUP], "vectors-reused")
    known = rows[is_known]
    sample = known[np.linspace(0, len(known) - 1, min(ITEMS_CHECKED, len(known))).astype(int)]
    now = [embed(model, tokens, sample[i : i + 1], config).cpu().numpy()[0] for i in range(len(sample))]
    if len(known) and (store.read(sample) * now).sum(axis=1).min() < GOOD_AGREEMENT:
        print(none_kept.format("the model gives other vectors for the same texts now"))
        (store.folder / "vectors-reused").unlink()
        return rows
    print(f"{len(known):,} of {len(rows):,} texts keep the vector of the earlier output")
    return rows[~is_known]


def write(config: EmbedConfig, store: Store, first: np.ndarray, metadata: dict[str, str]) -> None:
    """Writes the catalogue with the vectors of the rows `first` (N)."""

    def pieces(*_) -> Iterator[pl.DataFrame]:
        start = 0
        for piece in slices(config.catalogue_path, n=len(first)):
            vectors = store.read(first[start : start + piece.height])
            start += piece.height
            if not is_unit(vectors).all():
                raise OSError(f"vectors are missing in {store.folder}: run the same command again")
            yield piece.with_columns(pl.Series("embedding", vectors).cast(pl.List(pl.Float32)))

    schema = pl.scan_parquet(config.catalogue_path, glob=False).collect_schema() | {"embedding": pl.List(pl.Float32)}
    with atomic_write(config.target) as temporary:
        register_io_source(pieces, schema=schema).sink_parquet(
            temporary,
            compression="uncompressed",  # zstd would make the vectors 7% smaller in twice the time
            row_group_size=ROWS_PER_GROUP,
            metadata=metadata | {"rows_per_group": str(ROWS_PER_GROUP)},
        )
    size = config.target.stat().st_size
    print(f"wrote {config.target}: {len(first):,} x {config.target_dim}, {size / 1e6:.1f} MB")


# ---------------------------------------------------------------- main


def plan_batches(
    model: PreTrainedModel,
    tokens: Tokens,
    config: EmbedConfig,
    store: Store,
    recipe: dict[str, str],
    rows: np.ndarray,
    texts: np.ndarray,
) -> list[np.ndarray]:
    """Batches of the rows that have no vector yet.

    A batch of an earlier run stays as it was, so that a run that was stopped ends with the same vectors.
    """
    if config.reuse:
        rows = reuse(model, tokens, config, store, recipe, rows, texts)
    batches = [rows[batch] for batch in batches_by_length(tokens.lengths[rows], config.tokens_per_batch)]
    batches = [batch for batch in batches if not is_unit(store.read(batch)).all()]
    left = sum(map(len, batches))
    if left < len(rows):
        print(f"{len(rows) - left:,} items were finished by an earlier run, {left:,} are left")
    return batches


def main(argv: list[str] | None = None) -> None:
    config = parse_config(argv)
    for name, value in asdict(config).items():
        print0(f"{name}: {value}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it prints a line for every retry without a network
    transformers_logging.disable_progress_bar()
    device, reason = choose_device(config.device)
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # no more than batch lists; vectors go through files

    tokens = read_tokens(config.tokens_path, config.num_rows)
    texts = read_catalogue(config, tokens)
    n = len(texts)
    if config.dtype == "auto":
        config.dtype = "bfloat16" if device.type == "cuda" else "float32"
    config.model_name = config.model_name or tokens.model_name
    config.tokens_per_batch = config.tokens_per_batch or TOKENS_PER_BATCH[device.type]
    with lock(config.target):
        model = load_model(config.model_name, getattr(torch, config.dtype), device)
        check_fit(model, tokens, config)
        size = vector_size(model, tokens, config)
        print0(f"{config.model_name}: {model.num_parameters() / 1e6:.1f} million parameters, vectors of {size}")
        print0(f"device {device} ({reason}), dtype {config.dtype}, pooling {config.pooling}, "
               f"batches of {config.tokens_per_batch} tokens")  # fmt: skip
        if config.target_dim > size:
            print0(f"target_dim {config.target_dim} is more than the model has: all {size} dimensions are kept")
            config.target_dim = size
        recipe = {
            "weights": weights_digest(model),
            "tokenizer": tokens.tokenizer,
            "instruction": tokens.instruction,
            "max_length": str(tokens.max_length),
            "pooling": config.pooling,
            "dtype": config.dtype,
            "target_dim": str(config.target_dim),
        }
        source = {"fingerprint": tokens.fingerprint, "n_items": str(n)}
        if not config.overwrite and (recipe | source).items() <= read_metadata(config.target).items():
            print0(f"{config.target} is complete already: nothing to do; --overwrite embeds again")
            return

        _, first, inverse = np.unique(texts, return_index=True, return_inverse=True)
        rows = np.sort(first)  # (R) equal texts are embedded once
        if len(rows) < n:
            print0(f"{n - len(rows):,} items repeat the text of another: they are embedded once")
        store, batches = Store(config.target.with_name(f".{config.target.name}.partial"), n, config.target_dim), None
        if RANK == 0:
            store.open(recipe | source)
            batches = plan_batches(model, tokens, config, store, recipe, rows, texts[rows])
        batches = from_rank_0(batches)
        prefix = checked_prefix(model, tokens, config)
        embed_all(model, tokens, config, prefix, store, batches[RANK::WORLD])
        from_rank_0(None)  # all vectors are finished
        if RANK == 0:
            write(config, store, first[inverse], recipe | source | {"model_name": config.model_name})
            store.delete()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # do not crash on terminals without UTF-8
    try:
        main()
    except KeyboardInterrupt:
        if RANK == 0:
            print("interrupted: the same command goes on from the vectors finished so far", file=sys.stderr)
        sys.exit(130)
