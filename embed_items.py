"""Turns the tokens of every item into an L2-normalised embedding. CUDA, MPS or CPU.

Reads   data/output/{category}_tokenized.npz, and the catalogue that it was made from
Writes  data/output/{category}_items_with_embeddings.parquet   (every catalogue column, and embedding)

    python embed_items.py --category Video_Games                             # the best device there is
    python embed_items.py --category Video_Games --num_rows 256 --device cpu # a first look on a laptop
    python embed_items.py --category Video_Games --model_name /models/qwen3  # a local copy of the npz's model
    python embed_items.py --category Video_Games --pooling mean              # MiniLM, E5; cls for BGE

Stopped at any instant, the same command goes on from the vectors finished so far, which wait in
data/output/.{category}_items_with_embeddings.parquet.partial until the output is complete.

Before: tokenize_items.py. Next: train_rqvae.py.
Shapes: N items, B items in a batch, T tokens in each of it, H the model's size, D target_dim.
"""

import copy
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

FORMAT_VERSION = 2
FINGERPRINT_ROWS, DIGEST_ROWS = 4096, 1024  # of texts and of vectors digested at once; part of the formats
LIST_FLAGS = "--help lists the flags"
LARGEST = 10**12  # of any number on the command line
TOKENS_PER_BATCH = {"cuda": 32768, "mps": 8192, "cpu": 4096}  # a CPU's caches hold few, a GPU is idle with few
ITEMS_CHECKED = 8  # embedded alone and together before the long work
GOOD_AGREEMENT = 0.999
SHORTEST_PREFIX = 8  # tokens; below, sharing them saves less than it costs
ROWS_PER_GROUP = 8192  # of the parquet file, for train_rqvae.py to read several at once
BATCHES_IN_FLIGHT = 16  # queued on a GPU before the host waits for their vectors

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
        help="How hidden states become one vector: last for Qwen3, mean or cls for BERT's kin.",
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
    overwrite: bool = HfArg(default=False, help="Embed again where the output is complete already.")

    def __post_init__(self):
        for name in ("target_dim", "tokens_per_batch", "num_rows"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST:
                raise ValueError(f"--{name} {value}: must be at least 1 and at most {LARGEST:,}")

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
    """Ends the run over wrong use or wrong input: one line on standard error, exit status 2."""
    line = " ".join(f"error: {what}: {trouble}; {way_out}".split())
    tqdm.write(line, file=sys.stderr)  # on a line of its own, also where there is a progress bar
    raise SystemExit(2)


def warn(message: str) -> None:
    print("warning:", message, file=sys.stderr)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse_config(argv: list[str] | None) -> EmbedConfig:
    parser = HfArgumentParser(EmbedConfig, description=__doc__.splitlines()[0], allow_abbrev=False)
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


def check_files(config: EmbedConfig) -> None:
    """Ends the run where a file to read is missing, or cannot be looked at."""
    if not os.path.isfile(config.tokens_path):
        fail(config.tokens_path, "not found", "run tokenize_items.py first")
    if not os.path.isfile(config.catalogue_path):
        trouble = f"not found, though {config.tokens_path} was made from it"
        fail(config.catalogue_path, trouble, "put the catalogue back")


if __name__ == "__main__":  # what is wrong here is told before the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    check_files(parse_config(None))

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None

RECORD = np.dtype([("row", "<i8"), ("crc", "<u4")])  # of a finished vector: its item, and its CRC-32

# ---------------------------------------------------------------- input


class Tokens(NamedTuple):
    """What tokenize_items.py wrote, without its padding."""

    ids: np.ndarray  # (sum of lengths,) int32, item after item
    starts: np.ndarray  # (N + 1,) where each item begins in it, and the end
    model_name: str
    instruction: str
    fingerprint: str  # of the whole catalogue
    max_length: int

    @property
    def lengths(self) -> np.ndarray:  # (N,)
        return np.diff(self.starts)

    def of(self, row: int) -> np.ndarray:  # (length,)
        return self.ids[self.starts[row] : self.starts[row + 1]]

    def head(self, n: int) -> "Tokens":
        return self._replace(ids=self.ids[: self.starts[n]], starts=self.starts[: n + 1])


def read_tokens(path: Path) -> Tokens:
    """Reads the npz, and ends the run where it is missing, damaged or not of this format."""
    again = "run tokenize_items.py again"
    try:
        with np.load(path, allow_pickle=False) as npz:
            if "format_version" not in npz or int(npz["format_version"]) != FORMAT_VERSION:
                fail(path, f"not of format {FORMAT_VERSION}", again)
            ids, mask = npz["input_ids"], npz["attention_mask"]  # (N, W) both
            texts = {name: str(npz[name]) for name in ("model_name", "instruction", "fingerprint")}
            max_length, n_items = int(npz["max_length"]), int(npz["n_items"])
    except Exception as error:  # numpy, zipfile and the parser of numpy's header each raise their own
        fail(path, f"damaged, or not an npz of tokenize_items.py ({first_line(error)})", again)
    sound = ids.ndim == 2 and ids.shape == mask.shape and len(ids) == n_items
    if not sound or ids.dtype != np.int32 or mask.dtype not in (bool, np.uint8) or mask.max(initial=0) > 1:
        shapes = f"input_ids {ids.dtype} {ids.shape}, attention_mask {mask.dtype} {mask.shape}, n_items {n_items}"
        fail(path, f"its parts do not fit together: {shapes}", again)
    if n_items == 0:
        fail(path, "no rows", again)
    lengths = mask.sum(axis=1, dtype=np.int64)  # (N,)
    if count := (lengths == 0).sum():
        fail(path, f"{count} items have no token, the first in row {lengths.argmin()}", again)
    return Tokens(ids[mask.view(bool)], np.append(0, lengths.cumsum()), max_length=max_length, **texts)


def fingerprint(catalogue: pl.DataFrame) -> str:
    """SHA-256 over parent_asin and item_context in row order: 64 hex digits, as in tokenize_items.py."""
    digest = hashlib.sha256()
    for rows in catalogue.select("parent_asin", "item_context").iter_slices(FINGERPRINT_ROWS):
        for text in rows:
            digest.update(text.str.len_bytes().to_numpy().tobytes())  # so that values cannot run together
            digest.update(text.str.join().item().encode())
    return digest.hexdigest()


def read_catalogue(path: Path, tokens: Tokens, tokens_path: Path) -> pl.DataFrame:
    """Reads every column, and ends the run where this is not the catalogue that was tokenized."""
    try:
        catalogue = pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        fail(path, f"not a readable parquet file ({first_line(error)})", "write it again")
    if "embedding" in catalogue.columns:
        fail(path, "already has a column embedding", "drop or rename it, so that nothing is overwritten")
    texts = {column.name for column in catalogue if column.dtype == pl.String}
    same = {"parent_asin", "item_context"} <= texts and fingerprint(catalogue) == tokens.fingerprint
    if not same or len(tokens.lengths) > catalogue.height:
        trouble = f"made from another catalogue, or another order of it, than {path} is now"
        fail(tokens_path, trouble, "run tokenize_items.py again")
    return catalogue


# ---------------------------------------------------------------- model


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device and, in words, why."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        best = next(kind for kind, is_there in there.items() if is_there)
        return torch.device(best), "the best one here"
    if not there[name]:
        fail(f"--device {name}", "there is none here", "use --device auto")
    return torch.device(name), "asked for"


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        return AutoModel.from_pretrained(name, dtype=dtype).to(device).eval()
    except Exception as error:  # the hub, the file system and the parsers each raise their own
        if isinstance(error, torch.OutOfMemoryError):
            raise
        trouble = f"no model can be loaded from there ({first_line(error)})"
        fail(f"--model_name {name}", trouble, "check the name and the network, or give a local folder")


def check_fit(model: PreTrainedModel, name: str, tokens: Tokens, texts: pl.Series, tokens_path: Path) -> None:
    """Ends the run where the model cannot have been meant by these tokens."""
    again = f"run tokenize_items.py with --model_name {name}"
    try:
        known = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        fail(f"--model_name {name}", "a model that reads no tokens", "choose a text encoder")
    low, top = int(tokens.ids.min()), int(tokens.ids.max())
    if low < 0 or top >= known:
        fail(tokens_path, f"holds token {low if low < 0 else top}, but {name} knows 0 to {known - 1}", again)
    longest, limit = tokens.lengths.max(), getattr(model.config, "max_position_embeddings", None)
    if limit and 0 < limit < longest:  # XLNet, which knows no limit, says -1
        fail(
            tokens_path,
            f"items of {longest} tokens; {name} reads only {limit}",
            f"{again} --max_length {limit}",
        )
    if name == tokens.model_name:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception:  # a folder of weights alone: the vocabulary's size has been checked
        return
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what AutoTokenizer makes up where there is none
        return
    for row, text in enumerate(texts):
        prompt = f"Instruct: {tokens.instruction}\nQuery:{text}" if tokens.instruction else text
        expected = tokenizer(prompt, truncation=True, max_length=tokens.max_length)["input_ids"]
        if expected != tokens.of(row).tolist():
            trouble = f"made for {tokens.model_name}, and {name} cuts the same text into other tokens"
            fail(tokens_path, trouble, again)


def tokens_digest(tokens: Tokens) -> str:
    """SHA-256 over where the items begin and their tokens: 64 hex digits."""
    digest = hashlib.sha256(tokens.starts.astype("<i8").tobytes())
    digest.update(np.ascontiguousarray(tokens.ids, "<i4"))
    return digest.hexdigest()


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over the names and numbers of the model's weights: 64 hex digits, the same on every device."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
    position = (order * real).argmax(1) if pooling == "last" else real.int().argmax(1)  # (B,)
    return hidden[torch.arange(len(hidden), device=mask.device), position]


# ---------------------------------------------------------------- batches


def batches_by_length(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Rows in batches of similar length, longest first: what fits in memory at the start fits to the end."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens_per_batch // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def lay_out(tokens: Tokens, rows: np.ndarray, skip: int) -> tuple[Tensor, Tensor]:
    """What rows (B) hold after their first `skip` tokens, padded on the right: input_ids and mask (B, T) int64."""
    start, end = tokens.starts[rows] + skip, tokens.starts[rows + 1]  # (B,)
    place = start[:, None] + np.arange((end - start).max())  # (B, T)
    mask = place < end[:, None]
    input_ids = np.where(mask, tokens.ids[np.minimum(place, len(tokens.ids) - 1)], 0)
    return torch.from_numpy(input_ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))


def first_rows(texts: pl.Series) -> np.ndarray:
    """For each of N texts the first row with the same one: (N,)."""
    rows = texts.to_frame("text").with_row_index("row")
    return rows.select(pl.col("row").first().over("text")).to_series().to_numpy()


def common_start(tokens: Tokens) -> np.ndarray:
    """The first tokens that all items share, the instruction's, without the last one of any: (P) int32."""
    first, shortest = tokens.of(0), int(tokens.lengths.min())
    for i in range(shortest - 1):
        if (tokens.ids[tokens.starts[:-1] + i] != first[i]).any():
            return first[:i]
    return first[: shortest - 1]


# ---------------------------------------------------------------- output


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Ends the run where another one is writing `path`, or where nothing can be written; keeps others out meanwhile."""
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
def writing(path: Path) -> Iterator[None]:
    """Ends the run where the block cannot write."""
    try:
        yield
    except (OSError, pl.exceptions.ComputeError) as error:  # polars' own for a full disk
        trouble = f"cannot be written ({first_line(error)})"
        fail(path, trouble, "make room or set the rights there, or choose another --data_dir")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and moves it there, flushed, once the block has filled it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


# ---------------------------------------------------------------- finished vectors


class FinishedVectors:
    """The vectors that are finished, kept in a folder until the output is complete.

    settings.json  what they depend on, written first
    vectors        (N, D) float32; a row that is not finished is empty, or missing at the end
    finished       a RECORD for each finished row, appended after its vector; where the two do not agree, as after a
                   power cut, the row counts as not finished
    """

    def __init__(self, folder: Path, dim: int, settings: dict[str, str]):
        """Opens the folder or makes it; ends the run where its vectors were made with other settings."""
        self.folder, self.dim = folder, dim
        self.vectors, self.finished = folder / "vectors", folder / "finished"
        path = folder / "settings.json"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            if path.exists():
                self._compare(path, settings)
            else:
                with replacing(path) as temporary:
                    temporary.write_text(json.dumps(settings, indent=1) + "\n")
            self.vectors.touch()
            self.finished.touch()
            size = self.finished.stat().st_size
            os.truncate(self.finished, size - size % RECORD.itemsize)  # without what a stop left of a last record

    def _compare(self, path: Path, settings: dict[str, str]) -> None:
        try:
            kept = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            fail(path, f"damaged ({first_line(error)})", f"delete the folder {self.folder} to start over")
        if other := [name for name in settings | kept if settings.get(name) != kept.get(name)]:
            trouble = f"holds the vectors of a stopped run with another {', '.join(other)}"
            fail(self.folder, trouble, "finish that run with its own command, or delete the folder to start over")

    def keep(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Adds the vectors (B, D) of rows (B)."""
        vectors = vectors.astype("<f4")
        records = np.empty(len(rows), RECORD)
        records["row"], records["crc"] = rows, [zlib.crc32(vector) for vector in vectors]
        with writing(self.folder):
            with open(self.vectors, "rb+") as file:
                for row, vector in zip(rows.tolist(), vectors, strict=True):
                    file.seek(row * vector.nbytes)
                    file.write(vector)
            with open(self.finished, "ab") as file:
                file.write(records)

    def read(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of the first n rows, NaN where not finished, and which are: (n, D) float32, (n)."""
        embeddings, is_done = np.full((n, self.dim), np.nan, dtype=np.float32), np.zeros(n, dtype=bool)
        records = np.fromfile(self.finished, RECORD)
        with open(self.vectors, "rb") as file:
            for row, crc in records[(records["row"] >= 0) & (records["row"] < n)].tolist():
                file.seek(row * self.dim * 4)
                vector = file.read(self.dim * 4)
                if zlib.crc32(vector) == crc and len(vector) == self.dim * 4:
                    embeddings[row], is_done[row] = np.frombuffer(vector, "<f4"), True
        return embeddings, is_done

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# ---------------------------------------------------------------- embedding


@torch.inference_mode()
def read_prefix(model: PreTrainedModel, ids: np.ndarray) -> Cache | None:
    """Keys and values of tokens (P) that every item starts with.

    None where the model keeps none (BERT's kin), or keeps what cannot be repeated for a batch (linear attention).
    """
    input_ids = torch.from_numpy(ids.astype(np.int64)).unsqueeze(0).to(model.device)
    cache = getattr(model(input_ids=input_ids, use_cache=True), "past_key_values", None)
    kinds = {type(layer) for layer in getattr(cache, "layers", [])}
    return cache if kinds and kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else None


@torch.inference_mode()
def embed(
    model: PreTrainedModel, tokens: Tokens, rows: np.ndarray, config: EmbedConfig, prefix: Cache | None = None
) -> Tensor:
    """Unit vectors of rows (B) in float32, truncated first and normalised after: (B, D), on the model's device.

    `prefix` stands for the tokens that all items start with. A model that can use one is causal: what it reads off
    an item's last token does not see the padding that follows, and needs no mask.
    """
    input_ids, mask = lay_out(tokens, rows, prefix.get_seq_length() if prefix else 0)
    if model.device.type == "cuda":  # the host goes on while pinned memory is copied
        input_ids, mask = (tensor.pin_memory().to(model.device, non_blocking=True) for tensor in (input_ids, mask))
    input_ids, mask = input_ids.to(model.device), mask.to(model.device)
    if prefix:
        past = copy.deepcopy(prefix)  # the model adds the items' own to it
        past.batch_repeat_interleave(len(rows))
        output = model(input_ids=input_ids, past_key_values=past)
    else:
        output = model(input_ids=input_ids, attention_mask=mask)
    pooled = pool(output.last_hidden_state, mask, config.pooling)  # (B, H)
    return F.normalize(pooled.float()[:, : config.target_dim], dim=-1)


def vector_size(model: PreTrainedModel, name: str, tokens: Tokens, config: EmbedConfig) -> int:
    """How long the model's vectors are; ends the run where it cannot embed the longest item."""
    longest = int(tokens.lengths.argmax())
    whole = replace(config, target_dim=LARGEST)
    try:
        return embed(model, tokens, np.array([longest]), whole).shape[1]
    except Exception as error:  # every kind of model raises its own
        if isinstance(error, torch.OutOfMemoryError):
            raise
        trouble = f"cannot embed an item of {tokens.lengths[longest]} tokens ({first_line(error)})"
        fail(f"--model_name {name}", trouble, "choose a text encoder that reads as many, or tokenize to fewer")


def alone_and_together(model: PreTrainedModel, tokens: Tokens, config: EmbedConfig, prefix: Cache | None) -> float:
    """The worst cosine between items embedded alone, without the prefix, and in one batch: 1 where they agree."""
    by_length = np.argsort(tokens.lengths, kind="stable")
    count = min(ITEMS_CHECKED, len(by_length), max(2, config.tokens_per_batch // int(tokens.lengths.max())))
    rows = by_length[np.linspace(0, len(by_length) - 1, count).astype(int)]
    together = embed(model, tokens, rows, config, prefix)
    alone = torch.cat([embed(model, tokens, rows[i : i + 1], config) for i in range(len(rows))])
    return F.cosine_similarity(alone, together).min().item()


def embed_all(
    model: PreTrainedModel,
    tokens: Tokens,
    first: np.ndarray,
    config: EmbedConfig,
    prefix: Cache | None,
    finished: FinishedVectors,
) -> np.ndarray:
    """Every item's vector in catalogue order, (N, D) float32; first (N) is the first row of the same text.

    The target_dim of `config` is at most the size of the model's vectors here. Batches that an earlier run finished are
    not embedded again; the others are those that it would have formed, so that its vectors come out bit for bit.
    """
    embeddings, is_done = finished.read(len(first))
    is_first = first == np.arange(len(first))
    distinct = np.flatnonzero(is_first)
    batches = [distinct[batch] for batch in batches_by_length(tokens.lengths[distinct], config.tokens_per_batch)]
    batches = [batch for batch in batches if not is_done[batch].all()]
    left = sum(map(len, batches))
    if left < len(distinct):
        print(f"{len(distinct) - left:,} items were finished by an earlier run, {left:,} are left")
    at_once = BATCHES_IN_FLIGHT if model.device.type == "cuda" else 1
    done, start = 0, time.perf_counter()
    # counted in tokens, because the longest items come first and items alone would make the time left too long
    total = sum(int(tokens.lengths[batch].sum()) for batch in batches)
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc="embed") as progress:
        for i in range(0, len(batches), at_once):
            vectors = [embed(model, tokens, batch, config, prefix) for batch in batches[i : i + at_once]]
            rows = np.concatenate(batches[i : i + at_once])
            embeddings[rows] = torch.cat(vectors).cpu().numpy()
            finished.keep(rows, embeddings[rows])
            done += len(rows)
            progress.set_postfix_str(f"{done / (time.perf_counter() - start):,.1f} items/s", refresh=False)
            progress.update(int(tokens.lengths[rows].sum()))
    if done:
        print(f"{done / (time.perf_counter() - start):,.0f} items a second")
    embeddings[~is_first] = embeddings[first[~is_first]]
    return embeddings


def embed_catalogue(
    model: PreTrainedModel, tokens: Tokens, texts: pl.Series, config: EmbedConfig, finished: FinishedVectors
) -> np.ndarray:
    """The vectors (N, D) of all items; tells how far they can be trusted, and how fast they were made."""
    first = first_rows(texts)
    if repeated := int((first != np.arange(len(first))).sum()):
        print(f"{repeated:,} items repeat the text of another: each text is embedded once")
    prefix, common = None, common_start(tokens)
    if config.pooling == "last" and len(common) >= SHORTEST_PREFIX:
        prefix = read_prefix(model, common)
    agreement = alone_and_together(model, tokens, config, prefix)
    if prefix and agreement < GOOD_AGREEMENT:
        prefix, agreement = None, alone_and_together(model, tokens, config, None)
    if prefix:
        print(f"the {len(common)} tokens that all items start with are read once")
    print(f"items embedded alone and inside a batch agree to a cosine of {agreement:.6f} at the worst")
    if agreement < GOOD_AGREEMENT:
        warn(f"below {GOOD_AGREEMENT}: padding changes the vectors; try --dtype float32 or another --pooling")
    return embed_all(model, tokens, first, config, prefix, finished)


# ---------------------------------------------------------------- main


def is_complete(path: Path, catalogue: pl.DataFrame, metadata: dict[str, str]) -> bool:
    """Whether the output is there already, of this catalogue (N rows) and made in the same way."""
    try:
        found = pl.read_parquet_metadata(path)
        same = all(found.get(name) == value for name, value in metadata.items())
        return same and pl.read_parquet(path, columns=catalogue.columns, glob=False).equals(catalogue)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError):  # none, or another's, or damaged
        return False


def data_digest(embeddings: np.ndarray) -> str:
    """SHA-256 of the shape of embeddings (N, D) and of the digests of their pieces: the same in train_rqvae.py."""
    digest = hashlib.sha256(str(embeddings.shape).encode())
    for start in range(0, len(embeddings), DIGEST_ROWS):
        piece = np.ascontiguousarray(embeddings[start : start + DIGEST_ROWS], "<f4")
        digest.update(hashlib.sha256(piece).digest())
    return digest.hexdigest()


def write(path: Path, catalogue: pl.DataFrame, embeddings: np.ndarray, metadata: dict[str, str]) -> None:
    vectors = pl.Series("embedding", embeddings).cast(pl.List(pl.Float32))
    metadata = metadata | {
        "rows_per_group": str(ROWS_PER_GROUP),
        "vectors": data_digest(embeddings),
    }
    with replacing(path) as temporary:
        table = catalogue.with_columns(vectors)
        # zstd would make the vectors 7% smaller in twice the time
        table.write_parquet(temporary, compression="uncompressed", row_group_size=ROWS_PER_GROUP, metadata=metadata)
    print(f"wrote {path}: {len(embeddings):,} x {embeddings.shape[1]}, {path.stat().st_size / 1e6:.1f} MB")


def run(config: EmbedConfig) -> None:
    """All the work, in a folder where no other run does the same."""
    device, why = choose_device(config.device)
    tokens = read_tokens(config.tokens_path)
    catalogue = read_catalogue(config.catalogue_path, tokens, config.tokens_path)
    made_from = tokens_digest(tokens)
    n = min(config.num_rows or len(tokens.lengths), len(tokens.lengths))
    tokens = tokens.head(n)
    print(f"{n:,} of {catalogue.height:,} items of {config.catalogue_path}")
    catalogue = catalogue.head(n)

    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    model_name = config.model_name or tokens.model_name
    model = load_model(model_name, getattr(torch, dtype), device)
    check_fit(model, model_name, tokens, catalogue["item_context"].head(ITEMS_CHECKED), config.tokens_path)
    size = vector_size(model, model_name, tokens, config)
    print(f"{model_name}: {model.num_parameters() / 1e6:.1f} million parameters, vectors of {size}")
    config.tokens_per_batch = config.tokens_per_batch or TOKENS_PER_BATCH[device.type]
    print(
        f"device {device} ({why}), dtype {dtype}, pooling {config.pooling}, batches of {config.tokens_per_batch} tokens"
    )
    if config.target_dim > size:
        print(f"target_dim {config.target_dim} is more than the model has: all {size} dimensions are kept")
        config.target_dim = size

    settings = {
        "format_version": str(FORMAT_VERSION),
        "model_name": model_name,
        "weights": weights_digest(model),
        "instruction": tokens.instruction,
        "pooling": config.pooling,
        "dtype": dtype,
        "target_dim": str(config.target_dim),
        "tokens": made_from,
        "fingerprint": tokens.fingerprint,
    }
    metadata = settings | {"n_items": str(n)}
    partial = config.target.with_name(f".{config.target.name}.partial")
    if not config.overwrite and is_complete(config.target, catalogue, metadata):
        print(f"{config.target} is complete already: nothing to do; --overwrite embeds again")
        shutil.rmtree(partial, ignore_errors=True)
        return
    finished = FinishedVectors(partial, config.target_dim, settings)
    embeddings = embed_catalogue(model, tokens, catalogue["item_context"], config, finished)  # (N, D)
    broken = ~(np.abs(np.linalg.norm(embeddings, axis=1) - 1) < 1e-3)
    if count := int(broken.sum()):
        finished.delete()
        name = catalogue["parent_asin"][int(broken.argmax())]
        trouble = f"{count} items became NaN, infinite or zero with {model_name} in {dtype}, the first is {name!r}"
        fail(config.tokens_path, trouble, "use --dtype float32")
    write(config.target, catalogue, embeddings, metadata)
    finished.delete()


def main(argv: list[str] | None = None) -> None:
    config = parse_config(argv)
    for name, value in asdict(config).items():
        print(f"{name}: {value}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every retry, where there is no network
    transformers_logging.disable_progress_bar()  # one bar is enough, and loading is short
    check_files(config)
    with alone(config.target):
        run(config)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of few letters is no reason to stop
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the vectors finished so far", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our lines has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
