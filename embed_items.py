"""Turns the tokens of every item into an L2-normalised embedding. CUDA, MPS or CPU.

Reads   data/output/{category}_tokenized.npz, and the catalogue that it was made from
Writes  data/output/{category}_items_with_embeddings.parquet   (every catalogue column, and embedding)

    python embed_items.py --category Video_Games                             # the best device there is
    python embed_items.py --category Video_Games --num_rows 256 --device cpu # a first look on a laptop
    python embed_items.py --category Video_Games --model_name /models/qwen3  # a local copy of the npz's model
    python embed_items.py --category Video_Games --pooling mean              # MiniLM, E5; cls for BGE
    python embed_items.py --category Video_Games --reuse                     # only the items that are new or changed
    torchrun --nproc_per_node=8 embed_items.py --category Video_Games        # eight GPUs

Stopped at any instant, the same command goes on from the vectors finished so far, which wait in
data/output/.{category}_items_with_embeddings.parquet.partial until the output is complete.

Before: tokenize_items.py. Next: train_rqvae.py.
Shapes: N items, B items in a batch, T tokens in each of it, H the model's size, D target_dim.
"""

import copy
import ctypes
import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

FORMAT_VERSION = 2
KEY_BYTES = 16  # of what tells the tokens or the text of one item from another's
FINGERPRINT_ROWS, DIGEST_ROWS = 4096, 1024  # of texts and of vectors digested at once; part of the formats
LIST_FLAGS = "--help lists the flags"
LARGEST = 10**12  # of any number on the command line
TOKENS_PER_BATCH = {"cuda": 32768, "mps": 8192, "cpu": 4096}  # a CPU's caches hold few, a GPU is idle with few
ITEMS_CHECKED = 8  # embedded alone and together before the long work
GOOD_AGREEMENT = 0.999
SHORTEST_PREFIX = 8  # tokens; below, sharing them saves less than it costs
ROWS_PER_GROUP = 8192  # of the parquet file, for train_rqvae.py to read several at once
ROWS_READ, SLICE_ROWS = 2**12, 2**16  # of tokens or vectors, and of the catalogue (whole groups), in memory at once
BATCHES_IN_FLIGHT = 16  # queued on a GPU before the host waits for their vectors

# what torchrun tells this process, of which only a run of this script makes use; rank 0 speaks and writes for all
RANK, RANKS, LOCAL_RANK = (
    int(os.environ.get(name, default)) if __name__ == "__main__" else default
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
)
PATIENCE = 5  # seconds in which torchrun ends the ranks that are left when one has failed
LONGEST_WAIT = timedelta(days=1)  # of ranks for one another: rank 0 alone puts the output together

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
    reuse: bool = HfArg(
        default=False,
        help="Keep the vectors of the output that is there for every text that it holds, and embed only the rest; all "
        "where it was made with another model or other settings.",
    )
    overwrite: bool = HfArg(default=False, help="Embed again where the output is complete already.")

    def __post_init__(self):
        for name in ("target_dim", "tokens_per_batch", "num_rows"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST:
                raise ValueError(f"--{name} {value}: must be at least 1 and at most {LARGEST:,}")
        if self.reuse and self.overwrite:
            raise ValueError("--overwrite embeds every item again, --reuse does not: choose one")

    @property
    def tokens_path(self) -> Path:
        return Path(self.data_dir, f"{self.category}_tokenized.npz")

    @property
    def catalogue_path(self) -> Path:
        return Path(self.data_dir, f"{self.category}_items_updated.parquet")

    @property
    def partial(self) -> Path:
        return self.target.with_name(f".{self.target.name}.partial")

    @property
    def target(self) -> Path:
        return Path(self.data_dir, f"{self.category}_items_with_embeddings.parquet")


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


def warn(message: str) -> None:
    if RANK == 0:
        print("warning:", message, file=sys.stderr)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse_config(argv: list[str] | None) -> EmbedConfig:
    for argument in sys.argv[1:] if argv is None else argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            fail("command line", f"{argument!a} is not UTF-8", LIST_FLAGS)
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
    if RANK:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115  open to the end
    check_files(parse_config(None))

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from polars.io.plugins import register_io_source
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None

UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)  # what a damaged parquet file raises

# ---------------------------------------------------------------- processes


def from_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, which alone does it, once all ranks have come here."""
    result = [work() if RANK == 0 else None]
    if RANKS > 1:
        dist.broadcast_object_list(result)
        dist.barrier()
    return result[0]


# ---------------------------------------------------------------- input


def stamp(path: Path) -> tuple[int, int]:
    """What tells a file from another one that replaced it: its size, and when it was written."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def check_unchanged(path: Path, before: tuple[int, int]) -> None:
    """Ends the run where the file is no longer that of this stamp."""
    if not path.exists() or stamp(path) != before:
        fail(path, "replaced while this run was reading it", "run the same command again")


class StoredRows(NamedTuple):
    """An array (N, W) inside an uncompressed npz, of which rows are read as they are needed."""

    path: Path
    stamp: tuple[int, int]
    offset: int  # bytes before its first row
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, rows: np.ndarray) -> np.ndarray:  # (B) -> (B, W)
        check_unchanged(self.path, self.stamp)
        return np.asarray(np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[rows])


def stored_rows(path: Path, before: tuple[int, int], archive: zipfile.ZipFile, name: str) -> StoredRows:
    """Where the npz holds an array; ValueError where it cannot be read in place."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
        header = member.tell()
    if info.compress_type != zipfile.ZIP_STORED or version != (1, 0) or is_fortran or dtype.hasobject:
        raise ValueError(f"{name} is compressed, or not laid out row by row")
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # where a zip member tells the lengths of its name and of its extra field
        header += 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
    return StoredRows(path, before, info.header_offset + header, shape, dtype)


class Tokens(NamedTuple):
    """What tokenize_items.py wrote, without its padding."""

    input_ids: StoredRows
    attention_mask: StoredRows
    lengths: np.ndarray  # (N) int32
    first: np.ndarray  # (N) the first row with the same tokens
    common: np.ndarray  # (P) int32, the first tokens that all items share, without the last one of any
    low: int  # the smallest token
    top: int
    digest: str  # SHA-256 over the tokens of all items
    model_name: str
    instruction: str
    fingerprint: str  # of the whole catalogue
    max_length: int
    tokenizer: str  # SHA-256 over all that the tokenizer does

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of rows (B), one item after the other, and where each begins, and the end: (sum), (B + 1)."""
        ids, mask = self.input_ids.read(rows), self.attention_mask.read(rows)
        return ids[mask.view(bool)], np.append(0, self.lengths[rows].cumsum(dtype=np.int64))

    def head(self, n: int) -> "Tokens":
        return self._replace(lengths=self.lengths[:n], first=self.first[:n])


def common_start(common: np.ndarray | None, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The first tokens of `common` (P), if any, that more items begin with too, without the last one of any: (p)."""
    common = ids[: starts[1]] if common is None else common
    common = common[: min(len(common), int(np.diff(starts).min()) - 1)]
    for i, token in enumerate(common):
        if (ids[starts[:-1] + i] != token).any():
            return common[:i]
    return common


def first_rows(keys: np.ndarray) -> np.ndarray:
    """For each of the keys (N, 2) the first row with the same one: (N)."""
    order = np.lexsort(keys.T)  # stable: of equal keys the first row comes first
    begins = np.append(True, (keys[order[1:]] != keys[order[:-1]]).any(axis=1))  # (N) a group of equal ones
    first = np.empty_like(order)
    first[order] = order[begins][begins.cumsum() - 1]
    return first


def keys_of(items: Iterable[bytes | np.ndarray]) -> np.ndarray:
    """What tells items (B) from one another: (B, 2) uint64."""
    keys = b"".join(hashlib.blake2b(item, digest_size=KEY_BYTES).digest() for item in items)
    return np.frombuffer(keys, dtype="<u8").reshape(-1, KEY_BYTES // 8)


def read_tokens(path: Path) -> Tokens:
    """Surveys the npz, piece by piece; ends the run where it is damaged or not of this format."""
    again = "run tokenize_items.py again"
    try:
        before = stamp(path)
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as npz:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
            if "format_version" not in npz or int(npz["format_version"]) != FORMAT_VERSION:
                fail(path, f"not of format {FORMAT_VERSION}", again)
            ids, mask = (stored_rows(path, before, archive, name) for name in ("input_ids", "attention_mask"))
            texts = {name: str(npz[name]) for name in ("model_name", "instruction", "fingerprint", "tokenizer")}
            max_length, n = int(npz["max_length"]), int(npz["n_items"])
    except Exception as error:  # numpy, zipfile and the parser of numpy's header each raise their own
        fail(path, f"damaged, or not an npz of tokenize_items.py ({first_line(error)})", again)
    sound = len(ids.shape) == 2 and ids.shape == mask.shape and ids.shape[0] == n
    if not sound or ids.dtype != np.int32 or mask.dtype not in (bool, np.uint8):
        shapes = f"input_ids {ids.dtype} {ids.shape}, attention_mask {mask.dtype} {mask.shape}, n_items {n}"
        fail(path, f"its parts do not fit together: {shapes}", again)
    if n == 0:
        fail(path, "no rows", again)
    pieces = np.split(np.arange(n), range(ROWS_READ, n, ROWS_READ))
    lengths = np.empty(n, dtype=np.int32)
    for rows in pieces:
        real = mask.read(rows)
        if real.max(initial=0) > 1:
            fail(path, f"its parts do not fit together: attention_mask holds {real.max()}", again)
        lengths[rows] = real.sum(axis=1)
    if count := (lengths == 0).sum():
        fail(path, f"{count} items have no token, the first in row {lengths.argmin()}", again)
    tokens = Tokens(ids, mask, lengths, lengths, lengths, 0, 0, "", max_length=max_length, **texts)
    common, bounds, keys = None, [], np.empty((n, KEY_BYTES // 8), dtype=np.uint64)
    for rows in pieces:
        flat, starts = tokens.of(rows)
        common = common_start(common, flat, starts)
        bounds += [int(flat.min()), int(flat.max())]
        keys[rows] = keys_of(flat[start:end] for start, end in itertools.pairwise(starts))
    digest = hashlib.sha256(keys.astype("<u8", copy=False)).hexdigest()
    return tokens._replace(first=first_rows(keys), common=common, low=min(bounds), top=max(bounds), digest=digest)


def slices(path: Path, columns: list[str] | None = None, n: int | None = None) -> Iterator[pl.DataFrame]:
    """Those columns, or all, of the first n rows of a parquet file, or of all, some rows at a time."""
    frame = pl.scan_parquet(path, glob=False)
    frame = frame if columns is None else frame.select(columns)
    n = frame.select(pl.len()).collect().item() if n is None else n
    for start in range(0, n, SLICE_ROWS):
        yield frame.slice(start, min(SLICE_ROWS, n - start)).collect()


def add_texts(digest: Any, texts: pl.Series) -> None:
    digest.update(texts.str.len_bytes().to_numpy().tobytes())  # so that values cannot run together
    digest.update(texts.str.join().item().encode())


def text_keys(catalogue: pl.DataFrame) -> np.ndarray:
    """What tells the texts of rows (B) from one another: (B, 2) uint64."""
    return keys_of(catalogue["item_context"].cast(pl.Binary).to_list())


def fingerprint(catalogue: Iterable[pl.DataFrame]) -> str:
    """SHA-256 over parent_asin and item_context in row order: 64 hex digits, as in tokenize_items.py."""
    digest = hashlib.sha256()
    for piece in catalogue:
        for rows in piece.select("parent_asin", "item_context").iter_slices(FINGERPRINT_ROWS):
            for texts in rows:
                add_texts(digest, texts)
    return digest.hexdigest()


def check_catalogue(path: Path, tokens: Tokens, tokens_path: Path) -> int:
    """The number of rows; ends the run where this is not the catalogue that was tokenized."""
    try:
        schema = pl.scan_parquet(path, glob=False).collect_schema()
        if "embedding" in schema:
            fail(path, "already has a column embedding", "drop or rename it, so that nothing is overwritten")
        height = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
        names = ["parent_asin", "item_context"]
        same = all(schema.get(name) == pl.String for name in names) and len(tokens.lengths) <= height
        same = same and fingerprint(slices(path, names)) == tokens.fingerprint
    except UNREADABLE as error:
        fail(path, f"not a readable parquet file ({first_line(error)})", "write it again")
    if not same:
        trouble = f"made from another catalogue, or another order of it, than {path} is now"
        fail(tokens_path, trouble, "run tokenize_items.py again")
    return height


# ---------------------------------------------------------------- model


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device, of several GPUs the one of this process, and, in words, why."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    why = "the best one here" if name == "auto" else "asked for"
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    if not there[name]:
        fail(f"--device {name}", "there is none here", "use --device auto")
    if RANKS == 1:
        return torch.device(name), why
    if name == "cuda" and torch.cuda.device_count() <= LOCAL_RANK:
        trouble = f"more processes than the {torch.cuda.device_count()} GPUs of this machine"
        fail("torchrun", trouble, "lower --nproc_per_node, or use --device cpu")
    return torch.device(name, LOCAL_RANK if name == "cuda" else None), f"{why}; {RANKS} processes"


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next tensor: what it returns to the kernel comes back in pages to be cleared.

    On a CPU that clearing takes up to a fifth of all time. Other C libraries go on as they are.
    """
    with suppress(AttributeError, OSError, TypeError):  # each system's way not to have it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its most: only what is larger gets pages of its own
        mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: unused bytes at the end of the heap before they are returned


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
    if tokens.low < 0 or tokens.top >= known:
        odd = tokens.low if tokens.low < 0 else tokens.top
        fail(tokens_path, f"holds token {odd}, but {name} knows 0 to {known - 1}", again)
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
        if expected != tokens.of(np.array([row]))[0].tolist():
            trouble = f"made for {tokens.model_name}, and {name} cuts the same text into other tokens"
            fail(tokens_path, trouble, again)


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over a model's weights, their names and its configuration: 64 hex digits, the same on every device."""
    told = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype"):  # where from, by what, and what the weights tell
        told.pop(name, None)
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
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
    ids, starts = tokens.of(rows)
    start, end = starts[:-1] + skip, starts[1:]  # (B,)
    place = start[:, None] + np.arange((end - start).max())  # (B, T)
    mask = place < end[:, None]
    input_ids = np.where(mask, ids[np.minimum(place, len(ids) - 1)], 0)
    return torch.from_numpy(input_ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))


# ---------------------------------------------------------------- files


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

    settings.json   what they depend on, written first and deleted first
    vectors-R       of the process of rank R: a record of row, checksum and vector for each, in the order they came
    vectors-reused  of an earlier output, in its order
    """

    def __init__(self, folder: Path, dim: int):
        self.folder, self.settings_path, self.own = folder, folder / "settings.json", folder / f"vectors-{RANK}"
        self.record = np.dtype([("row", "<i8"), ("crc", "<u4"), ("vector", "<f4", (dim,))])

    def settings(self) -> dict[str, str]:
        """What the vectors there depend on; ends the run where that is damaged."""
        try:
            return dict(json.loads(self.settings_path.read_text()))
        except (ValueError, TypeError, OSError) as error:
            trouble = f"damaged ({first_line(error)})"
            fail(self.settings_path, trouble, f"delete the folder {self.folder} to start over")

    def open(self, settings: dict[str, str]) -> None:
        """Makes the folder where there is none; ends the run where its vectors were made with other settings."""
        if not self.settings_path.exists():
            self.delete()  # vectors of nobody knows what
            with writing(self.folder):
                self.folder.mkdir(exist_ok=True)
            with replacing(self.settings_path) as temporary:
                temporary.write_text(json.dumps(settings, indent=1) + "\n")
        kept = self.settings()
        if other := [name for name in settings | kept if settings.get(name) != kept.get(name)]:
            trouble = f"holds the vectors of a stopped run with another {', '.join(other)}"
            fail(self.folder, trouble, "finish that run with its own command, or delete the folder to start over")
        with writing(self.folder):
            for path in self.folder.glob("vectors-*"):  # without what a stop left of a last record
                os.truncate(path, path.stat().st_size // self.record.itemsize * self.record.itemsize)

    def checksums(self, records: np.ndarray) -> np.ndarray:
        """Of the rows and vectors of records (B): (B)."""
        pairs = zip(records["row"].tolist(), records["vector"], strict=True)
        return np.array([zlib.crc32(vector, row & 0xFFFFFFFF) for row, vector in pairs], dtype=np.uint32)

    def keep(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Adds the vectors (B, D) of rows (B)."""
        records = np.empty(len(rows), self.record)
        records["row"], records["vector"] = rows, vectors
        records["crc"] = self.checksums(records)
        with writing(self.own), open(self.own, "ab") as file:
            file.write(records)

    def places(self, n: int) -> tuple[list[Path], np.ndarray, np.ndarray]:
        """Where the vectors of the first n rows are: the files, which of them (n), -1 for none, and which record (n).

        A record that disagrees with its checksum, as after a power cut, does not count.
        """
        files = sorted(self.folder.glob("vectors-*"))
        which, position = np.full(n, -1, dtype=np.int32), np.zeros(n, dtype=np.int64)
        for number, path in enumerate(files):
            for start in itertools.count(step=ROWS_READ):
                records = np.fromfile(path, self.record, ROWS_READ, offset=start * self.record.itemsize)
                if len(records) == 0:
                    break
                sound = (self.checksums(records) == records["crc"]) & (records["row"] >= 0) & (records["row"] < n)
                which[records["row"][sound]] = number
                position[records["row"][sound]] = start + np.flatnonzero(sound)
        return files, which, position

    def read(self, files: list[Path], which: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The vectors at some of those places: which (B), position (B) -> (B, D)."""
        vectors = np.empty((len(which), *self.record["vector"].shape), dtype=np.float32)
        for number in np.unique(which):
            of_file = which == number
            table = np.memmap(files[number], "<f4", "r").reshape(-1, self.record.itemsize // 4)  # faster than records
            vectors[of_file] = table[position[of_file]][:, -vectors.shape[1] :]
        return vectors

    def delete(self) -> None:
        with suppress(OSError):
            self.settings_path.unlink()
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


def shares_its_start(model: PreTrainedModel, tokens: Tokens, config: EmbedConfig) -> bool:
    """Whether what all items start with can be read once; tells that, and how far the vectors can be trusted."""
    prefix = None
    if config.pooling == "last" and len(tokens.common) >= SHORTEST_PREFIX:
        prefix = read_prefix(model, tokens.common)
    agreement = alone_and_together(model, tokens, config, prefix)
    if prefix and agreement < GOOD_AGREEMENT:
        prefix, agreement = None, alone_and_together(model, tokens, config, None)
    if prefix:
        print(f"the {len(tokens.common)} tokens that all items start with are read once")
    print(f"items embedded alone and inside a batch agree to a cosine of {agreement:.6f} at the worst")
    if agreement < GOOD_AGREEMENT:
        warn(f"below {GOOD_AGREEMENT}: padding changes the vectors; try --dtype float32 or another --pooling")
    return prefix is not None


def embed_all(
    model: PreTrainedModel,
    tokens: Tokens,
    config: EmbedConfig,
    prefix: Cache | None,
    finished: FinishedVectors,
    wanted: np.ndarray,
    is_done: np.ndarray,
) -> None:
    """Finishes the vectors of the rows `wanted` (W) that are not done yet: is_done (N).

    The target_dim of `config` is at most the size of the model's vectors here. Batches are those of all wanted rows,
    whatever is done and by whom, so that vectors come out bit for bit; each process takes every R-th of them.
    """
    batches = [wanted[batch] for batch in batches_by_length(tokens.lengths[wanted], config.tokens_per_batch)]
    batches = [batch for batch in batches if not is_done[batch].all()]
    left = sum(map(len, batches))
    if left < len(wanted):
        print(f"{len(wanted) - left:,} items were finished by an earlier run, {left:,} are left")
    batches = batches[RANK::RANKS]  # of nearly as many tokens each, so that none waits long for the others
    at_once = BATCHES_IN_FLIGHT if model.device.type == "cuda" else 1
    done, start = 0, time.perf_counter()
    # counted in tokens, because the longest items come first and items alone would make the time left too long
    total = sum(int(tokens.lengths[batch].sum()) for batch in batches)
    name = "embed" if RANKS == 1 else f"embed (1 of {RANKS} processes)"
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc=name, disable=RANK > 0) as progress:
        for i in range(0, len(batches), at_once):
            vectors = [embed(model, tokens, batch, config, prefix) for batch in batches[i : i + at_once]]
            rows = np.concatenate(batches[i : i + at_once])
            finished.keep(rows, torch.cat(vectors).cpu().numpy())
            done += len(rows)
            progress.set_postfix_str(f"{done / (time.perf_counter() - start):,.1f} items/s", refresh=False)
            progress.update(int(tokens.lengths[rows].sum()))
    from_rank_0(lambda: None)  # all have finished
    if left:
        print(f"{left / (time.perf_counter() - start):,.0f} items a second")


# ---------------------------------------------------------------- output


class Job(NamedTuple):
    """What rank 0 finds out for all."""

    config: EmbedConfig  # with names and sizes that follow from the tokens, the model and the device
    tokens: Tokens  # of the first num_rows items
    catalogue_stamp: tuple[int, int]
    metadata: dict[str, str]  # of the output
    shares_start: bool  # whether the tokens that all items start with are read once
    wanted: np.ndarray  # (W) rows to embed: the first with its tokens, where no vector of an earlier output is kept
    is_done: np.ndarray  # (N) whose vectors an earlier run has finished


def start_digest(n: int, dim: int) -> Any:
    """To add vectors to: comes to what data_digest of train_rqvae.py says of all (n, dim)."""
    return hashlib.sha256(str((n, dim)).encode())


def add_vectors(digest: Any, vectors: np.ndarray) -> None:  # (B, D), B a multiple of DIGEST_ROWS but for the last
    for start in range(0, len(vectors), DIGEST_ROWS):
        piece = np.ascontiguousarray(vectors[start : start + DIGEST_ROWS], "<f4")
        digest.update(hashlib.sha256(piece).digest())


def is_complete(path: Path, catalogue_path: Path, metadata: dict[str, str]) -> bool:
    """Whether the output is there already, whole, of this catalogue and made in the same way."""
    try:
        found, n, dim = pl.read_parquet_metadata(path), int(metadata["n_items"]), int(metadata["target_dim"])
        if any(found.get(name) != value for name, value in metadata.items()):
            return False
        digest = start_digest(n, dim)
        for piece, catalogue in zip(slices(path), slices(catalogue_path, n=n), strict=True):
            if not piece.drop("embedding").equals(catalogue):
                return False
            add_vectors(digest, piece["embedding"].list.to_array(dim).to_numpy())
        return digest.hexdigest() == found.get("vectors")
    except (*UNREADABLE, ValueError):  # none, or damaged
        return False


def write(job: Job, finished: FinishedVectors) -> None:
    """Puts the output together, some rows at a time; ends the run where a vector is not of length 1."""
    config, first, n = job.config, job.tokens.first, len(job.tokens.first)
    files, which, position = finished.places(n)
    digests = {"vectors": start_digest(n, config.target_dim), "names": hashlib.sha256(), "texts": hashlib.sha256()}
    hashing = ThreadPoolExecutor(1)  # beside the writing, of whose time SHA-256 would take a fifth
    hashed = hashing.submit(int)  # the piece before, at first none
    broken, broken_name = 0, None

    def pieces(*_) -> Iterator[pl.DataFrame]:
        nonlocal broken, broken_name, hashed
        for start, catalogue in zip(itertools.count(step=SLICE_ROWS), slices(config.catalogue_path, n=n)):
            for piece in catalogue.iter_slices(ROWS_PER_GROUP):
                rows = first[start : start + piece.height]
                start += piece.height
                if (which[rows] < 0).any():
                    fail(finished.folder, "some of its vectors were damaged just now", "run the same command again")
                vectors = finished.read(files, which[rows], position[rows])  # (B, D)
                hashed.result()
                hashed = hashing.submit(add_vectors, digests["vectors"], vectors)
                digests["texts"].update(text_keys(piece))
                for some in piece["parent_asin"].to_frame().iter_slices(DIGEST_ROWS):
                    add_texts(digests["names"], some.to_series())
                odd = ~(np.abs(np.einsum("bd,bd->b", vectors, vectors) - 1) < 2e-3)
                if odd.any() and not broken:
                    broken_name = piece["parent_asin"][int(odd.argmax())]
                broken += int(odd.sum())
                yield piece.with_columns(pl.Series("embedding", vectors).cast(pl.List(pl.Float32)))

    def metadata(_) -> dict[str, str]:  # called at the end
        hashed.result()
        return job.metadata | {name: digest.hexdigest() for name, digest in digests.items()}

    schema = pl.scan_parquet(config.catalogue_path, glob=False).collect_schema() | {"embedding": pl.List(pl.Float32)}
    with hashing, replacing(config.target) as temporary:
        register_io_source(pieces, schema=schema).sink_parquet(
            temporary,
            compression="uncompressed",  # zstd would make the vectors 7% smaller in twice the time
            row_group_size=ROWS_PER_GROUP,
            metadata=metadata,
        )
        check_unchanged(config.catalogue_path, job.catalogue_stamp)
        if broken:
            finished.delete()
            trouble = f"{broken} items became NaN, infinite or zero with {job.metadata['model_name']} in"
            trouble = f"{trouble} {job.metadata['dtype']}, the first is {broken_name!r}"
            fail(config.tokens_path, trouble, "use --dtype float32")
    print(f"wrote {config.target}: {n:,} x {config.target_dim}, {config.target.stat().st_size / 1e6:.1f} MB")


# ---------------------------------------------------------------- vectors of an earlier output


def heirs(job: Job, texts: str | None) -> np.ndarray:
    """The row that stands for the text of each row of an earlier output now, -1 for none: (M).

    `texts` is the digest of its texts, as they were written.
    """
    old, new = (
        np.concatenate([text_keys(piece) for piece in slices(file, ["item_context"], rows)])
        for file, rows in ((job.config.target, None), (job.config.catalogue_path, len(job.tokens.first)))
    )
    if hashlib.sha256(old).hexdigest() != texts:
        raise ValueError("damaged: its texts are not those that were written")
    check_unchanged(job.config.catalogue_path, job.catalogue_stamp)
    match = first_rows(np.concatenate([old, new]))[len(old) :]  # (N)
    is_known, heir = match < len(old), np.full(len(old), -1)
    heir[match[is_known]] = job.tokens.first[is_known]
    return heir


def still_agrees(job: Job, model: PreTrainedModel, heir: np.ndarray) -> bool:
    """Whether the model gives some heirs (M) the vectors that they have: no digest tells all that it does."""
    known, frame = np.flatnonzero(heir >= 0), pl.scan_parquet(job.config.target, glob=False).select("embedding")
    sample = known[np.linspace(0, len(known) - 1, min(ITEMS_CHECKED, len(known))).astype(int)]
    kept = pl.concat([frame.slice(row, 1) for row in sample]).collect()["embedding"]
    now = torch.cat([embed(model, job.tokens, heir[row : row + 1], job.config) for row in sample]).cpu()
    return F.cosine_similarity(kept.list.to_array(now.shape[1]).to_torch(), now).min().item() >= GOOD_AGREEMENT


def take_over(path: Path, heir: np.ndarray, vectors_digest: str | None, finished: FinishedVectors) -> None:
    """Keeps the vectors of an earlier output for its heirs (M), once all its vectors are those that were written."""
    dim, taken = finished.record["vector"].shape[0], copy.copy(finished)
    taken.own = finished.folder / "reused"  # its vectors count under its final name alone
    taken.own.unlink(missing_ok=True)
    digest, start = start_digest(len(heir), dim), 0
    try:
        for some in slices(path, ["embedding"]):
            for piece in some.iter_slices(ROWS_PER_GROUP):
                vectors = piece["embedding"].list.to_array(dim).to_numpy()  # (B, D)
                add_vectors(digest, vectors)
                rows = heir[start : start + piece.height]
                start += piece.height
                taken.keep(rows[rows >= 0], vectors[rows >= 0])
        if digest.hexdigest() != vectors_digest:
            raise ValueError("damaged: its vectors are not those that were written")
        os.replace(taken.own, finished.folder / "vectors-reused")
    finally:
        taken.own.unlink(missing_ok=True)


def reuse(job: Job, model: PreTrainedModel, way: dict[str, str], finished: FinishedVectors) -> np.ndarray:
    """Keeps the vectors of the earlier output for the texts that are there still, and returns their rows: (R).

    A text and `way` decide a vector: nothing is kept of an output that was made in another way.
    """
    path, n = job.config.target, len(job.tokens.first)
    try:
        if not path.exists():
            raise ValueError("not found")
        told = pl.read_parquet_metadata(path)
        if other := [name for name in way if told.get(name) != way[name]]:
            raise ValueError(f"made with another or an unknown {', '.join(other)}")
        heir = heirs(job, told.get("texts"))
        rows = np.unique(heir[heir >= 0])
        if len(rows) and not still_agrees(job, model, heir):
            raise ValueError("its vectors are not those that the model gives for the same texts now")
        if not job.is_done[rows].all():
            take_over(path, heir, told.get("vectors"), finished)
    except (*UNREADABLE, ValueError, TypeError) as error:
        print(f"no vector of {path} is kept ({first_line(error)}): all items are embedded")
        (finished.folder / "vectors-reused").unlink(missing_ok=True)  # as a stopped run may have kept some
        return np.empty(0, dtype=int)
    kept = int(np.isin(job.tokens.first, rows).sum())
    print(f"{kept:,} of {n:,} items keep the vector of an earlier run, {n - kept:,} are embedded")
    return rows


# ---------------------------------------------------------------- main


def prepare(config: EmbedConfig, device: torch.device, why: str) -> tuple[Job | None, PreTrainedModel]:
    """Checks all that is the same for all ranks, and loads the model; no job where the output is complete."""
    tokens = read_tokens(config.tokens_path)
    catalogue_stamp = stamp(config.catalogue_path)
    height = check_catalogue(config.catalogue_path, tokens, config.tokens_path)
    n = min(config.num_rows or len(tokens.lengths), len(tokens.lengths))
    tokens = tokens.head(n)
    print(f"{n:,} of {height:,} items of {config.catalogue_path}")

    if config.dtype == "auto":
        config.dtype = "bfloat16" if device.type == "cuda" else "float32"
    config.model_name = config.model_name or tokens.model_name
    config.tokens_per_batch = config.tokens_per_batch or TOKENS_PER_BATCH[device.type]
    model = load_model(config.model_name, getattr(torch, config.dtype), device)
    texts = next(slices(config.catalogue_path, ["item_context"], min(n, ITEMS_CHECKED)))
    check_fit(model, config.model_name, tokens, texts.to_series(), config.tokens_path)
    size = vector_size(model, config.model_name, tokens, config)
    print(f"{config.model_name}: {model.num_parameters() / 1e6:.1f} million parameters, vectors of {size}")
    print(f"device {device} ({why}), dtype {config.dtype}, pooling {config.pooling}, batches of "
          f"{config.tokens_per_batch} tokens")  # fmt: skip
    if config.target_dim > size:
        print(f"target_dim {config.target_dim} is more than the model has: all {size} dimensions are kept")
        config.target_dim = size

    way = {
        "format_version": str(FORMAT_VERSION),
        "model_name": config.model_name,
        "weights": weights_digest(model),
        "instruction": tokens.instruction,
        "pooling": config.pooling,
        "dtype": config.dtype,
        "target_dim": str(config.target_dim),
    }
    settings = way | {"tokens": tokens.digest, "fingerprint": tokens.fingerprint, "n_items": str(n)}
    metadata = settings | {"rows_per_group": str(ROWS_PER_GROUP)}
    way |= {"max_length": str(tokens.max_length), "tokenizer": tokens.tokenizer}  # which `tokens` stands for above
    finished = FinishedVectors(config.partial, config.target_dim)
    if not config.overwrite and is_complete(config.target, config.catalogue_path, metadata):
        print(f"{config.target} is complete already: nothing to do; --overwrite embeds again")
        if finished.settings_path.exists() and finished.settings() == settings:
            finished.delete()
        return None, model
    finished.open(settings)
    _, which, _ = finished.places(n)
    distinct = np.flatnonzero(tokens.first == np.arange(n))
    if repeated := n - len(distinct):
        print(f"{repeated:,} items repeat the tokens of another: they are embedded once")
    shares_start = shares_its_start(model, tokens, config)
    job = Job(config, tokens, catalogue_stamp, metadata | way, shares_start, distinct, which >= 0)
    if config.reuse:
        job = job._replace(wanted=np.setdiff1d(distinct, reuse(job, model, way, finished)))
        if len(job.wanted) == len(distinct):  # nothing is kept, nor what a stopped run had kept
            job = job._replace(is_done=finished.places(n)[1] >= 0)
    return job, model


def run(config: EmbedConfig, device: torch.device, why: str) -> None:
    """All the work, with all ranks in step, in a folder where no other run does the same."""
    job, model = prepare(config, device, why) if RANK == 0 else (None, None)
    job = from_rank_0(lambda: job)
    if job is None:
        return
    model = model or load_model(job.config.model_name, getattr(torch, job.config.dtype), device)
    prefix = read_prefix(model, job.tokens.common) if job.shares_start else None
    finished = FinishedVectors(job.config.partial, job.config.target_dim)
    embed_all(model, job.tokens, job.config, prefix, finished, job.wanted, job.is_done)
    if RANK == 0:
        write(job, finished)
        finished.delete()


def main(argv: list[str] | None = None) -> None:
    config = parse_config(argv)
    for name, value in asdict(config).items():
        print(f"{name}: {value}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # else a line for every retry without a network
    transformers_logging.disable_progress_bar()  # one bar is enough, and loading is short
    check_files(config)
    device, why = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    if RANKS > 1:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)  # for a few words; the vectors go by way of the disk
    with alone(config.target) if RANK == 0 else nullcontext():
        run(config, device, why)
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of few letters is no reason to stop
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        print(end="", flush=True)
    except RuntimeError:
        if RANKS > 1:  # as a rule because another rank has gone
            await_end()
        raise
    except KeyboardInterrupt:
        if RANK == 0:
            print("interrupted: the same command goes on from the vectors finished so far", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.ENOSPC:  # else whoever read our lines has left
            print(f"error: standard output: {error.strerror}; make room and run it again", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
