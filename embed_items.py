"""Turns the tokens of every item into an L2-normalised embedding. CUDA, MPS or CPU.

Reads   data/output/{category}_tokenized.npz, and the catalogue that it was made from
Writes  data/output/{category}_items_with_embeddings.parquet   (every catalogue column, and embedding)

    python embed_items.py --category Video_Games                             # the best device there is
    python embed_items.py --category Video_Games --num_rows 256 --device cpu # a first look on a laptop
    python embed_items.py --category Video_Games --reuse                     # only the items that are new or changed
    torchrun --nproc_per_node=8 embed_items.py --category Video_Games        # eight GPUs

After a kill, the same command goes on from the vectors finished so far, also with another number of processes.

Before: tokenize_items.py. Next: train_rqvae.py.
Shapes: N items, B items in a batch, T tokens of the longest item in it, D target_dim, H the model's own size.
"""

import copy
import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, NoReturn

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from polars.io.plugins import register_io_source
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, Cache, HfArgumentParser, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.hf_argparser import HfArg
from transformers.utils import cached_file

if os.name == "posix":
    import fcntl

TOKENS, CATALOGUE, OUTPUT = "tokenized.npz", "items_updated.parquet", "items_with_embeddings.parquet"
FORMAT_VERSION = 3  # of the npz
TOKENS_PER_BATCH = {"cuda": 32768, "mps": 8192, "cpu": 4096}  # many to fill a GPU, few to fit in a CPU's caches
TEXTS_CHECKED = 8  # texts tokenized again, to compare with the npz
GOOD_AGREEMENT = 0.999  # cosine of a vector made alone and the same one made in a batch
POOLER = "pooler."  # a layer of models like BERT that no pooling here reads
MIN_PREFIX = 8  # tokens; a shorter prefix saves less time than it costs
ROWS_PER_GROUP = 8192  # rows per row group of the output, and rows of a parquet file in memory at once
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)  # raised for a damaged parquet file
ROOM = "free disk space or get write access there"

# Set by torchrun, and read only under torchrun, because clusters set RANK and WORLD_SIZE for other purposes.
RANK, WORLD, LOCAL_RANK = 0, 1, 0
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, WORLD, LOCAL_RANK = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
print0 = print if RANK == 0 else lambda *_, **__: None

# ---------------------------------------------------------------- configuration


@dataclass
class EmbedConfig:
    """The command line of this script: every field is a flag."""

    category: str = HfArg(default="Video_Games", help="Catalogue name: the first part of every file name.")
    data_dir: str = HfArg(default="data/output", help="Folder of the tokens, the catalogue and the output.")
    model_name: str | None = HfArg(default=None, help="Hub name or folder of the model; by default that of the tokens.")
    pooling: Literal["auto", "last", "mean", "cls"] = HfArg(
        default="auto", help="How hidden states become one vector; auto is what the model's folder declares, else last."
    )
    target_dim: int = HfArg(default=1024, help="Leading dimensions kept of each vector (at most all).")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        default="auto", help="Number type of the model; auto is bfloat16 on CUDA and float32 elsewhere."
    )
    tokens_per_batch: int | None = HfArg(
        default=None, help="Tokens in a batch, padding included; by default 32768 on CUDA, 8192 on MPS, 4096 on a CPU."
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="Where the model runs.")
    num_rows: int | None = HfArg(default=None, help="Only the first rows of the tokens, for a trial.")
    reuse: bool = HfArg(default=False, help="Keep vectors of equal texts in the earlier output, if made the same way.")
    overwrite: bool = HfArg(default=False, help="Replace an output that is complete already, or has more rows.")

    def path(self, file: str) -> Path:
        """Path of TOKENS, CATALOGUE or OUTPUT."""
        return Path(os.path.expanduser(self.data_dir), f"{self.category}_{file}")


def fail(what: str | Path, trouble: str, way_out: str) -> NoReturn:
    """Ends the run because of a wrong flag or file: one line on standard error, exit status 2."""
    tqdm.write(" ".join(f"error: {what}: {trouble}; {way_out}".split()), file=sys.stderr)  # below a progress bar
    raise SystemExit(2)


@contextmanager
def fail_on(errors: Any, what: str | Path, trouble: str, way_out: str) -> Iterator[None]:
    """Turns exceptions of these types into the error line of `fail`."""
    try:
        yield
    except errors as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(what, f"{trouble} ({first_line})", way_out)


def parse_config(argv: list[str] | None) -> EmbedConfig:
    parser = HfArgumentParser(EmbedConfig, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: fail("command line", message, "--help lists the flags")
    config = EmbedConfig(**vars(parser.parse_args(argv)))
    for name in ("target_dim", "tokens_per_batch", "num_rows"):
        if (value := getattr(config, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    return config


def choose_device(name: str) -> torch.device:
    """The device of this process; auto is the best one here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind in available if available[kind]) if name == "auto" else name
    if not available[kind]:
        fail(f"--device {name}", "there is none here", "use --device auto")
    return torch.device(kind, LOCAL_RANK if kind == "cuda" else None)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next batch; giving it back to the kernel costs 10% of the CPU time."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**29)  # M_TRIM_THRESHOLD


# ---------------------------------------------------------------- files


def lock(path: Path) -> IO:
    """Keeps other runs from writing `path` until the returned file is closed. The empty file stays."""
    with fail_on(OSError, path, "cannot be written", ROOM):
        file = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115  the caller closes it
    if os.name == "posix":
        with suppress(OSError), fail_on(BlockingIOError, path, "another run is writing it", "wait for it"):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # any other OSError: a file system without locks
    return file


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- input


class Tokens(NamedTuple):
    """The tokens that tokenize_items.py wrote, without padding."""

    ids: np.ndarray  # int32, the tokens of all items, one item after the other
    starts: np.ndarray  # (N) int64, where each item begins in ids
    lengths: np.ndarray  # (N) int64
    model_name: str
    instruction: str
    fingerprint: str  # of the whole catalogue
    tokenizer: str  # SHA-256 over what the tokenizer does
    max_length: int


def read_rows(archive: zipfile.ZipFile, name: str, size: int = 4096) -> Iterator[np.ndarray]:
    """Rows of an array (N, W) in an npz, some at a time."""
    with archive.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        (n, width), _, dtype = np.lib.format.read_array_header_1_0(file)
        for start in range(0, n, size):
            rows = min(size, n - start)
            # zipfile compares the checksum when the last byte is read
            yield np.frombuffer(file.read(rows * width * dtype.itemsize), dtype).reshape(rows, width)


def read_tokens(path: Path, num_rows: int | None) -> Tokens:
    """Reads the npz, and ends the run if it is missing, damaged or of another format."""
    way_out = "run tokenize_items.py"
    with fail_on(Exception, path, "not a readable npz of tokenize_items.py", way_out), np.load(path) as npz:
        assert npz["format_version"] == FORMAT_VERSION, f"not of format {FORMAT_VERSION}"
        settings = {name: npz[name].item() for name in Tokens._fields[3:]}  # all but the arrays
        ids, lengths = bytearray(), []
        for rows, mask in zip(read_rows(npz.zip, "input_ids"), read_rows(npz.zip, "attention_mask"), strict=True):
            ids += rows[mask > 0].astype(np.int32).tobytes()
            lengths.append((mask > 0).sum(axis=1))
        lengths = np.concatenate(lengths)
    starts = lengths.cumsum() - lengths
    return Tokens(np.frombuffer(ids, np.int32), starts[:num_rows], lengths[:num_rows], **settings)


def read_earlier(config: EmbedConfig, n: int, total: int) -> dict[str, str]:
    """Metadata of the earlier output, if any; ends the run if it may not be replaced by n of `total` items."""
    path, earlier, columns = config.path(OUTPUT), {}, []
    with suppress(*UNREADABLE):  # there is none, or nothing to keep
        earlier, columns = pl.read_parquet_metadata(path), pl.scan_parquet(path, glob=False).collect_schema()
    rows = int(earlier.get("n_items", 0))
    if n < min(total, rows) and not config.overwrite:
        trouble = f"holds {rows:,} items, more than the {n:,} of this trial"
        fail(path, trouble, "--overwrite replaces it; both scripts without --num_rows embed all items")
    if "embedding" in columns and "weights" not in earlier and not config.overwrite:
        fail(path, "holds embeddings that this script has not made", "move it away, or --overwrite replaces it")
    return earlier


def read_catalogue(config: EmbedConfig, tokens: Tokens) -> tuple[np.ndarray, str, int]:
    """Checks that the tokens are of this catalogue.

    Returns 64-bit hashes of the texts (N), the file's SHA-256, and the number of all its rows.
    """
    path, fingerprint, hashes = config.path(CATALOGUE), hashlib.sha256(), [np.empty(0, dtype=np.uint64)]
    with fail_on(UNREADABLE, path, "not a readable parquet file", "put the catalogue back"):
        sha256 = file_digest(path)  # before the texts are read: `write` asks if the file is still the same
        catalogue = pl.scan_parquet(path, glob=False)
        if "embedding" in catalogue.collect_schema():
            fail(path, "already has a column embedding", "drop or rename it")
        texts = catalogue.select("parent_asin", "item_context")
        for rows in texts.collect_batches(chunk_size=ROWS_PER_GROUP, maintain_order=True):
            fingerprint.update(rows.write_ndjson().encode())  # as in tokenize_items.py
            hashes.append(rows["item_context"].hash().to_numpy())
    hashes, n = np.concatenate(hashes), len(tokens.lengths)
    if fingerprint.hexdigest() != tokens.fingerprint or len(hashes) < n:
        trouble = f"does not fit {path}: items, texts or order have changed"
        fail(config.path(TOKENS), trouble, "run tokenize_items.py again")
    print0(f"{n:,} of {len(hashes):,} items of {path}")
    return hashes[:n], sha256, len(hashes)


# ---------------------------------------------------------------- model


def read_json(config: EmbedConfig, name: str) -> Any:
    """A JSON file of the model, from its folder or the hub; empty if there is none."""
    try:
        path = cached_file(config.model_name, name)
    except OSError as error:  # without a cause: there is no such file; with one: the hub could not be asked
        if error.__cause__ and try_to_load_from_cache(config.model_name, name) is None:
            trouble = "the hub cannot be asked for it, and it may declare a pooling"
            if config.pooling == "auto":
                fail(f"{config.model_name}/{name}", trouble, "go online once, or give --pooling")
            print0(f"warning: {config.model_name}/{name}: {trouble}", file=sys.stderr)
        return {}
    return json.loads(Path(path).read_text("utf-8"))


def choose_pooling(config: EmbedConfig) -> tuple[str, str]:
    """The pooling and the reason for it; ends the run if the model declares what this script cannot do."""
    flag, way_out = f"--model_name {config.model_name}", "choose another model"
    modules = read_json(config, "modules.json")  # of sentence-transformers; 1_Pooling may be there without it
    paths = {module["type"].split(".")[-1]: module["path"] for module in modules} or {"Pooling": "1_Pooling"}
    if unknown := paths.keys() - {"Transformer", "Pooling", "Normalize", "Dropout"}:
        fail(flag, f"its modules.json asks for {min(unknown)}, which this script cannot do", way_out)
    settings = read_json(config, f"{paths['Pooling']}/config.json") if "Pooling" in paths else {}
    # {"pooling_mode": "mean"} or, before version 5, {"pooling_mode_mean_tokens": true}; pooling_mode_lasttoken is last
    modes = settings.get("pooling_mode") or [mode for mode in settings if "mode_" in mode and settings[mode]]
    modes = "+".join([modes] if isinstance(modes, str) else modes)
    declared = re.sub("pooling_mode_|_tokens?$|token$", "", modes) or ("unknown" if modules else None)
    if declared and not settings.get("include_prompt", True):
        declared = f"{declared} without the prompt"
    if config.pooling != "auto":
        if declared not in (None, config.pooling):
            print0(f"warning: --pooling {config.pooling}, but the model declares {declared}", file=sys.stderr)
        return config.pooling, "asked for"
    if declared not in (None, "last", "mean", "cls"):
        fail(flag, f"it declares pooling {declared}, which this script cannot do", f"{way_out} or a --pooling")
    return declared or "last", "declared by the model" if declared else "the model declares none"


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model; ends the run if its files lack weights that the vectors depend on."""
    flag = f"--model_name {name}"
    way_out = "check the name, the network and the files (git lfs pull in a clone), or choose another model"
    print0(f"loading {name}", flush=True)  # without a network, it may take a minute to fail
    with fail_on(Exception, flag, "no model can be loaded from there", way_out):
        model, info = AutoModel.from_pretrained(name, dtype=dtype, output_loading_info=True, trust_remote_code=False)
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(POOLER)):  # now random numbers
        trouble = f"{len(missing)} weights are not in its files, {missing[0]} first"
        fail(flag, trouble, "download it again, or save it with the names that transformers gives")
    if getattr(model.config, "auto_map", None):
        print0(f"warning: {name} brings code of its own, which is not used", file=sys.stderr)
    return model.to(device).eval()


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over configuration and weights, the same on every device and for every copy of a model."""
    ignored = ("_name_or_path", "transformers_version", "dtype")
    settings = {name: value for name, value in model.config.to_dict().items() if name not in ignored}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        if not name.startswith(POOLER):
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def batches_by_length(rows: np.ndarray, lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Groups rows of similar length into batches, the longest first, so that too large a batch fails at the start."""
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    batches, start = [], 0
    while start < len(rows):
        size = max(1, tokens_per_batch // int(lengths[rows[start]]))
        batches.append(rows[start : start + size])
        start += size
    return batches


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector an item, padded on the right: hidden (B, T, H), mask (B, T) -> (B, H).

    last token as for Qwen3-Embedding (its model card), mean as in Sentence-BERT (arXiv:1908.10084).
    """
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)


def is_unit(vectors: np.ndarray) -> np.ndarray:  # (B, D) -> (B)
    return np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-3


@torch.inference_mode()
def embed(
    model: PreTrainedModel, tokens: Tokens, rows: np.ndarray, config: EmbedConfig, prefix: Cache | None = None
) -> np.ndarray:
    """Vectors of rows (B), truncated and then normalised: (B, D) float32; ends the run if one is not of length 1.

    A prefix comes from a causal model only. There no token sees the padding on its right, so no mask is needed.
    """
    skip = prefix.get_seq_length() if prefix else 0
    items = [torch.from_numpy(tokens.ids[tokens.starts[row] :][skip : tokens.lengths[row]]) for row in rows]
    input_ids = pad_sequence(items, batch_first=True).long().to(model.device)  # (B, T)
    mask = pad_sequence([torch.ones_like(ids) for ids in items], batch_first=True).long().to(model.device)
    if prefix:
        past = copy.deepcopy(prefix)  # the model appends to it
        past.batch_repeat_interleave(len(rows))
        output = model(input_ids=input_ids, past_key_values=past)
    else:
        output = model(input_ids=input_ids, attention_mask=mask)
    pooled = pool(output.last_hidden_state, mask, config.pooling)  # (B, H)
    vectors = F.normalize(pooled.float()[:, : config.target_dim], dim=-1).cpu().numpy()
    if not (sound := is_unit(vectors)).all():
        trouble = f"row {rows[~sound].min()} becomes NaN, infinite or zero in {config.dtype}"
        fail(config.path(TOKENS), trouble, "use --dtype float32, or get the model's weights again")
    return vectors


def check_tokens(model: PreTrainedModel, tokens: Tokens, config: EmbedConfig) -> None:
    """Ends the run if the tokens were made for another model, or are more than this one reads."""
    name, path = config.model_name, config.path(TOKENS)
    again = f"run tokenize_items.py with --model_name {name}"
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    if (largest := tokens.ids.max()) >= vocabulary:
        fail(path, f"holds token {largest}, but the model knows {vocabulary} tokens", again)
    longest, limit = tokens.lengths.max(), getattr(model.config, "max_position_embeddings", None)
    if limit and 0 < limit < longest:  # XLNet says -1 for no limit
        fail(path, f"items of {longest} tokens, but the model reads only {limit}", f"{again} and a lower --max_length")
    with fail_on(Exception, f"--model_name {name}", "has no tokenizer", "put the tokenizer's files beside the weights"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    texts = pl.scan_parquet(config.path(CATALOGUE), glob=False).select("item_context").head(TEXTS_CHECKED).collect()
    for text, start, length in zip(texts.to_series(), tokens.starts, tokens.lengths, strict=False):
        prompt = f"Instruct: {tokens.instruction}\nQuery:{text}" if tokens.instruction else text
        expected = tokenizer(prompt, truncation=True, max_length=tokens.max_length)["input_ids"]
        if expected != tokens.ids[start : start + length].tolist():
            fail(path, f"made for {tokens.model_name}, and {name} now cuts the same text into other tokens", again)
    last = tokens.ids[tokens.starts + tokens.lengths - 1]
    if config.pooling == "last" and ((last != last[0]).any() or last[0] not in tokenizer.all_special_ids):
        trouble = "--pooling last expects one end token, but the tokenizer adds none"
        print0(f"warning: {trouble}; set tokenizer.add_eos_token = True in Python and save it", file=sys.stderr)


@torch.inference_mode()
def read_prefix(model: PreTrainedModel, tokens: Tokens, config: EmbedConfig) -> Cache | None:
    """Keys and values of the tokens that all items start with; None if fewer than MIN_PREFIX or not reusable."""
    size, most = 0, tokens.lengths.min() - 1  # at least one token is left of each item
    while size < most and (tokens.ids[tokens.starts + size] == tokens.ids[size]).all():
        size += 1
    if config.pooling != "last" or size < MIN_PREFIX:
        return None
    input_ids = torch.from_numpy(tokens.ids[:size].astype(np.int64)).unsqueeze(0).to(model.device)
    cache = getattr(model(input_ids=input_ids, use_cache=True), "past_key_values", None)
    layers = {type(layer) for layer in getattr(cache, "layers", [])}
    # other layers (convolutions, states) cannot be repeated for each item of a batch
    return cache if layers and layers <= {DynamicLayer, DynamicSlidingWindowLayer} else None


def check_vectors(model: PreTrainedModel, tokens: Tokens, config: EmbedConfig) -> tuple[Cache | None, int]:
    """Embeds the longest and the shortest item alone and in one batch, and prints how well the two agree.

    Returns the prefix, None if there is none or it changes the vectors, and their size D.
    """
    flag, trouble = f"--model_name {config.model_name}", f"cannot embed an item of {tokens.lengths.max()} tokens"
    rows = np.array([tokens.lengths.argmax(), tokens.lengths.argmin()])
    with fail_on(Exception, flag, trouble, "tokenize with a smaller --max_length or another model"):
        alone = np.concatenate([embed(model, tokens, row, config) for row in rows[:, None]])
    for prefix in (read_prefix(model, tokens, config), None):
        agreement = (alone * embed(model, tokens, rows, config, prefix)).sum(axis=1).min()
        if agreement >= GOOD_AGREEMENT:
            break
    if prefix:
        print0(f"the {prefix.get_seq_length()} tokens that all items start with are read once")
    print0(f"items embedded alone and inside a batch agree to a cosine of {agreement:.6f} at the worst")
    if agreement < GOOD_AGREEMENT:
        print0("warning: padding changes the vectors; try --dtype float32 or another --pooling", file=sys.stderr)
    return prefix, alone.shape[1]


# ---------------------------------------------------------------- finished vectors


class Store:
    """Finished vectors (N, D) on disk, until the output is complete.

    A folder for each catalogue and recipe. In it a sparse float32 file for each process, zero where that process has
    embedded nothing.
    """

    def __init__(self, output: Path, metadata: dict[str, str], n: int, dim: int):
        digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = output.with_name(f".{output.name}.partial") / digest
        self.shape, self.row_bytes = (n, dim), 4 * dim

    def write(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Keeps the vectors (B, D) of rows (B)."""
        path = self.folder / f"vectors-{RANK}"
        with fail_on(OSError, path, "cannot be written", ROOM):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "r+b" if path.exists() else "w+b") as file:
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


# ---------------------------------------------------------------- output


def reuse(config: EmbedConfig, store: Store, other: list[str], hashes: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Copies vectors of the earlier output into the store. Returns which of the texts it held: (M) bool.

    hashes (M) are those of the distinct texts in ascending order, first (M) the rows that stand for them, `other` the
    settings in which the earlier output differs.
    """
    path, kept = config.path(OUTPUT), np.zeros(len(hashes), dtype=bool)
    if other:
        trouble = f"not found, damaged, or made with other settings ({', '.join(other)})"
        print(f"warning: no vector of {path} is kept: {trouble}", file=sys.stderr)
        return kept
    with fail_on(UNREADABLE, path, "not a readable parquet file", "delete it"):
        earlier = pl.scan_parquet(path, glob=False).select("item_context", "embedding")
        for piece in earlier.collect_batches(chunk_size=ROWS_PER_GROUP):
            text = piece["item_context"].hash().to_numpy()
            vectors = piece["embedding"].list.to_array(store.shape[1]).to_numpy()
            place = np.searchsorted(hashes, text).clip(max=len(hashes) - 1)
            known = (hashes[place] == text) & is_unit(vectors)
            store.write(first[place[known]], vectors[known])
            kept[place[known]] = True
    print(f"{kept.sum():,} of {len(kept):,} texts keep the vector of an earlier run, {(~kept).sum():,} are new")
    return kept


def write(config: EmbedConfig, store: Store, source: np.ndarray, metadata: dict[str, str]) -> None:
    """Writes the catalogue with the finished vectors; item i gets the one of row source[i], source (N)."""
    catalogue, path = config.path(CATALOGUE), config.path(OUTPUT)
    if not catalogue.is_file() or file_digest(catalogue) != metadata["catalogue"]:
        trouble = "another file than when this run began, so its vectors would go to other items"
        fail(catalogue, trouble, "put it back and run the same command again, or tokenize the new one")
    items = pl.scan_parquet(catalogue, n_rows=len(source), glob=False)

    def pieces(*_) -> Iterator[pl.DataFrame]:  # polars passes columns and limits, none here
        start = 0
        for piece in items.collect_batches(chunk_size=ROWS_PER_GROUP, maintain_order=True):
            vectors = store.read(source[start : start + piece.height])
            start += piece.height
            if not is_unit(vectors).all():
                fail(store.folder, "vectors are missing", "run the command again; machines must share --data_dir")
            yield piece.with_columns(pl.Series("embedding", vectors).cast(pl.List(pl.Float32)))

    schema = items.collect_schema() | {"embedding": pl.List(pl.Float32)}
    # zstd would make the vectors 7% smaller in twice the time
    options = {"compression": "uncompressed", "row_group_size": ROWS_PER_GROUP, "sync_on_close": "all"}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with fail_on((OSError, pl.exceptions.ComputeError), path, "cannot be written", ROOM):
            register_io_source(pieces, schema=schema).sink_parquet(temporary, metadata=metadata, **options)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {path}: {len(source):,} x {store.shape[1]}")


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    config = parse_config(argv)
    for name, value in asdict(config).items():
        print0(f"{name}: {value}")
    logging.disable(logging.WARNING)  # the libraries print every retry without a network, and every unused weight
    device = choose_device(config.device)
    keep_freed_memory()
    if WORLD > 1:
        # gloo, also on GPUs: only lists of batches are sent, the vectors go through files
        dist.init_process_group("gloo", timeout=timedelta(days=1))

    tokens = read_tokens(config.path(TOKENS), config.num_rows)
    hashes, sha256, total = read_catalogue(config, tokens)
    n = len(hashes)
    if config.dtype == "auto":
        config.dtype = "bfloat16" if device.type == "cuda" else "float32"
    config.model_name = os.path.expanduser(config.model_name or tokens.model_name)
    config.tokens_per_batch = config.tokens_per_batch or TOKENS_PER_BATCH[device.type]
    with lock(config.path(OUTPUT)) if RANK == 0 else nullcontext():
        earlier = read_earlier(config, n, total)
        model = load_model(config.model_name, getattr(torch, config.dtype), device)
        config.pooling, why = choose_pooling(config)  # after load_model: without a network its error is the clearer one
        check_tokens(model, tokens, config)
        prefix, config.target_dim = check_vectors(model, tokens, config)
        print0(f"device {device} (--device {config.device}), dtype {config.dtype}, pooling {config.pooling} ({why})")
        print0(f"batches of {config.tokens_per_batch} tokens, {config.target_dim} dimensions kept")
        # `recipe` is what a vector depends on, `metadata` what the whole output depends on
        recipe = {name: str(getattr(tokens, name)) for name in ("tokenizer", "instruction", "max_length")}
        recipe |= {name: str(getattr(config, name)) for name in ("pooling", "dtype", "target_dim")}
        recipe["weights"] = weights_digest(model)
        metadata = recipe | {"fingerprint": tokens.fingerprint, "n_items": str(n)}
        store = Store(config.path(OUTPUT), metadata, n, config.target_dim)
        if not config.overwrite and metadata.items() <= earlier.items():
            if earlier.get("catalogue") == sha256:
                print0(f"{config.path(OUTPUT)} is complete already: nothing to do; --overwrite embeds again")
                shutil.rmtree(store.folder, ignore_errors=True)  # a kill may have come before
                return
            config.reuse = True  # only other columns have changed

        # each distinct text is embedded once, in its first row: hashes, first (M); inverse (N), a row's place in them
        hashes, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        todo = [None]  # rank 0 puts the list of batches here, and the others receive it
        if RANK == 0:
            rows = first
            if config.reuse:
                other = [name for name in recipe if earlier.get(name) != recipe[name]]
                rows = first[~reuse(config, store, other, hashes, first)]
            batches = batches_by_length(np.sort(rows), tokens.lengths, config.tokens_per_batch)
            # an unfinished batch is embedded again as a whole, because the last bits of a vector depend on its batch
            todo = [[batch for batch in batches if not is_unit(store.read(batch)).all()]]
            size = sum(map(len, todo[0]))
            print(f"{size:,} texts to embed; {len(rows) - size:,} were finished by an earlier run")
        if WORLD > 1:
            dist.broadcast_object_list(todo)
        batches = todo[0][RANK::WORLD]
        # progress in tokens, of which a batch holds about tokens_per_batch, because the longest items come first
        for rows in tqdm(batches, "embed", unit=" tokens", unit_scale=config.tokens_per_batch, disable=RANK > 0):
            store.write(rows, embed(model, tokens, rows, config, prefix))
        if WORLD > 1:
            dist.barrier()  # rank 0 writes when all have finished their vectors
        if RANK == 0:
            write(config, store, first[inverse], metadata | {"catalogue": sha256, "model_name": config.model_name})
            # after a run of all items, the vectors of stopped runs are of no use; after a trial they are
            shutil.rmtree(store.folder.parent if n == total else store.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    try:
        main()
    except KeyboardInterrupt:
        print0("interrupted: the same command goes on from the vectors finished so far", file=sys.stderr)
        sys.exit(130)
