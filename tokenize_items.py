"""Turns the text of every item into tokens of an embedding model. CPU only.

Reads   data/output/{category}_items_updated.parquet   (parent_asin, item_context)
Writes  data/output/{category}_tokenized.npz           (input_ids, attention_mask, what they were made from)

    python tokenize_items.py --category Video_Games
    python tokenize_items.py --category Video_Games --num_rows 1000                # a first look
    python tokenize_items.py --category Sample --model_name data/sample/encoder   # offline

Next: embed_items.py. Shapes: N items, W the longest item's tokens, at most max_length.
"""

import errno
import hashlib
import logging
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import polars as pl
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2
FINGERPRINT_ROWS = 4096  # digested at once; part of the format
LIST_FLAGS = "--help lists the flags"
LARGEST = 10**12  # of any number on the command line
END_OF_TEXT = "<|endoftext|>"  # Qwen3-Embedding reads its vector off this last token
TEXTS_PER_CALL = 2048  # enough for the tokenizer's own threads to share, few enough to hold
ROWS_PER_WRITE = 1024  # padded at once: all of them would be many times the tokens
MANY_TRUNCATED = 0.05

# ---------------------------------------------------------------- configuration


@dataclass
class TokenizeConfig:
    """The command line of this script: every field is a flag."""

    category: str = HfArg(default="Video_Games", help="Catalogue name: the first part of every file name.")
    data_dir: str = HfArg(default="data/output", help="Folder of the catalogue and of the output.")
    model_name: str = HfArg(default="Qwen/Qwen3-Embedding-0.6B", help="Embedding model: a hub name or a local folder.")
    instruction: str = HfArg(
        default="Represent this product so that similar products have similar representations",
        help="Task put before every text, 'Instruct: {instruction}\\nQuery:{text}'; '' for the bare text.",
    )
    max_length: int = HfArg(default=2048, help="Tokens kept of an item, instruction included.")
    num_rows: int | None = HfArg(default=None, help="Only the first rows of the catalogue, for a trial.")
    overwrite: bool = HfArg(default=False, help="Tokenize again where the output is complete already.")

    def __post_init__(self):
        for name, least in {"max_length": 2, "num_rows": 1}.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= LARGEST:
                raise ValueError(f"--{name} {value}: must be at least {least} and at most {LARGEST:,}")


def fail(what: str | Path, trouble: str, way_out: str) -> NoReturn:
    """Ends the run over wrong use or wrong input: one line on standard error, exit status 2."""
    print("error:", " ".join(f"{what}: {trouble}; {way_out}".split()), file=sys.stderr)
    raise SystemExit(2)


def warn(message: str) -> None:
    print("warning:", message, file=sys.stderr)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse_config(argv: list[str] | None) -> TokenizeConfig:
    for argument in sys.argv[1:] if argv is None else argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            fail("command line", f"{argument!a} is not UTF-8", LIST_FLAGS)
    parser = HfArgumentParser(TokenizeConfig, description=__doc__.splitlines()[0], allow_abbrev=False)
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


# ---------------------------------------------------------------- catalogue


def read_catalogue(path: Path) -> pl.DataFrame:
    """Reads parent_asin and item_context, both text, and ends the run where they break the contract."""
    try:
        columns = pl.scan_parquet(path, glob=False).collect_schema()
        for name in ("parent_asin", "item_context"):
            if name not in columns:
                fail(path, f"no column {name} among {', '.join(columns)}", "rename one or add it")
        catalogue = pl.read_parquet(path, columns=["parent_asin", "item_context"], glob=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        fail(path, f"not a readable parquet file ({first_line(error)})", "write it again")
    if catalogue.height == 0:
        fail(path, "no rows", "write a catalogue of at least one item")
    for column in catalogue:
        if column.dtype != pl.String:
            trouble = f"{len(column)} values of {column.name}, from row 0 on, are {column.dtype}, not text"
            fail(path, trouble, f"cast the column: pl.col({column.name!r}).cast(pl.String)")
        blank = (column.is_null() | (column.str.strip_chars() == "")).to_numpy()
        if blank.any():
            trouble = f"{blank.sum()} null or blank values in {column.name}, the first in row {blank.argmax()}"
            fail(path, trouble, "drop those rows or fill them")
    repeated = (~catalogue["parent_asin"].is_first_distinct()).to_numpy()
    if repeated.any():
        first = catalogue["parent_asin"][int(repeated.argmax())]
        trouble = f"{repeated.sum()} duplicate parent_asin, the first is {first!r} in row {repeated.argmax()}"
        fail(path, trouble, "keep one row of each")
    return catalogue


def fingerprint(catalogue: pl.DataFrame) -> str:
    """SHA-256 over parent_asin and item_context in row order: 64 hex digits, the same in embed_items.py."""
    digest = hashlib.sha256()
    for rows in catalogue.select("parent_asin", "item_context").iter_slices(FINGERPRINT_ROWS):
        for text in rows:
            digest.update(text.str.len_bytes().to_numpy().tobytes())  # so that values cannot run together
            digest.update(text.str.join().item().encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- tokens


class Tokens(NamedTuple):
    """The tokens of N items."""

    ids: list[np.ndarray]  # N times (length,) int32
    lengths: np.ndarray  # (N,) int64
    truncated: int  # items that were longer than max_length


def load_tokenizer(model_name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer  # here: it imports torch, and a wrong flag is told before that

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    except Exception as error:  # the hub, the file system and the parsers each raise their own
        trouble = f"no tokenizer can be loaded from there ({first_line(error)})"
        fail(f"--model_name {model_name}", trouble, "check the name and the network, or give a local folder")
    if not tokenizer.is_fast:
        fail(f"--model_name {model_name}", "has no tokenizer.json", "choose a model with a fast tokenizer")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what AutoTokenizer makes up where there is none
        fail(f"--model_name {model_name}", "has weights, but no tokenizer", "put the tokenizer's files beside them")
    return tokenizer


def wrap(texts: list[str], instruction: str) -> list[str]:
    """Qwen3-Embedding's prompt (model card): no space after `Query:`."""
    return [f"Instruct: {instruction}\nQuery:{text}" for text in texts] if instruction else texts


def tokenize(texts: pl.Series, tokenizer: "PreTrainedTokenizerBase", config: TokenizeConfig) -> Tokens:
    """Tokenizes on all cores; the tokenizer's own truncation keeps its closing special tokens."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(config.max_length, direction=tokenizer.truncation_side)
    ids, truncated = [], 0
    with tqdm(total=len(texts), unit=" items", desc="tokenize") as progress:
        for start in range(0, len(texts), TEXTS_PER_CALL):
            batch = wrap(texts[start : start + TEXTS_PER_CALL].to_list(), config.instruction)
            encodings = backend.encode_batch_fast(batch)
            ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
            truncated += sum(bool(encoding.overflowing) for encoding in encodings)
            progress.update(len(batch))
    return Tokens(ids, np.array(list(map(len, ids))), truncated)


def pad(items: list[np.ndarray], width: int, pad_id: int, side: str) -> np.ndarray:
    """Lays the tokens of items (n) out as rows: input_ids (n, width) int32."""
    input_ids = np.full((len(items), width), pad_id, dtype=np.int32)
    for row, ids in enumerate(items):  # many times faster than one assignment through the mask
        input_ids[row, slice(-len(ids), None) if side == "left" else slice(len(ids))] = ids
    return input_ids


def mask_of(items: list[np.ndarray], width: int, side: str) -> np.ndarray:
    """Where pad puts the tokens of items (n): attention_mask (n, width) uint8."""
    lengths, place = np.array(list(map(len, items)))[:, None], np.arange(width)
    return (place >= width - lengths if side == "left" else place < lengths).astype(np.uint8)


def report(tokens: Tokens, tokenizer: "PreTrainedTokenizerBase", config: TokenizeConfig) -> None:
    """Prints the token lengths, and warns of truncation and of rows that do not end as the model expects."""
    n = len(tokens.lengths)
    low, median, high, top = np.percentile(tokens.lengths, [5, 50, 95, 99]).round().astype(int)
    print(
        f"tokens an item: mean {tokens.lengths.mean():.1f}, 5% {low}, median {median}, 95% {high}, "
        f"99% {top}, longest {tokens.lengths.max()}; {tokens.lengths.sum():,} in all"
    )
    share = tokens.truncated / n
    print(f"truncated to {config.max_length} tokens: {tokens.truncated:,} of {n:,} items ({share:.1%})")
    if share > MANY_TRUNCATED:
        warn(f"{share:.1%} of the items lose their end; consider a larger --max_length")
    end_id = tokenizer.get_vocab().get(END_OF_TEXT)
    if end_id is None:
        print(f"this tokenizer has no {END_OF_TEXT}: embed with --pooling mean or cls, as its model expects")
        return
    if missing := sum(ids[-1] != end_id for ids in tokens.ids):
        warn(
            f"{missing:,} of {n:,} items do not end in {END_OF_TEXT}: this tokenizer does not append it, so "
            f"last-token pooling will not read the vector that Qwen3-Embedding was trained to put there"
        )
    else:
        print(f"every item ends in {END_OF_TEXT}, as last-token pooling needs")


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
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and moves it there, flushed, once the block has filled it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        trouble = f"cannot be written ({first_line(error)})"
        fail(path, trouble, "make room or set the rights there, or choose another --data_dir")
    finally:
        with suppress(OSError):
            temporary.unlink()


def write(path: Path, tokens: Tokens, pad_id: int, side: str, settings: dict[str, str | int]) -> None:
    """The npz that np.savez would write of arrays which need not be in memory whole."""
    n, width = len(tokens.ids), int(tokens.lengths.max())
    arrays = {
        "input_ids": ("<i4", lambda items: pad(items, width, pad_id, side)),
        "attention_mask": ("|u1", lambda items: mask_of(items, width, side)),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, (dtype, rows_of) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": dtype, "fortran_order": False, "shape": (n, width)}
                np.lib.format.write_array_header_1_0(member, header)
                for start in range(0, n, ROWS_PER_WRITE):
                    member.write(rows_of(tokens.ids[start : start + ROWS_PER_WRITE]))
        for name, value in settings.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)


def is_complete(path: Path, settings: dict[str, str | int]) -> bool:
    """Whether the output is there already, whole, and made in the same way."""
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None
        with np.load(path, allow_pickle=False) as npz:
            arrays = {"input_ids", "attention_mask"} <= set(npz.files)
            return whole and arrays and all(npz[name] == value for name, value in settings.items())
    except Exception:  # none, or another's, or damaged: numpy and zipfile each raise their own
        return False


def run(config: TokenizeConfig, source: Path, target: Path) -> None:
    """All the work, in a folder where no other run does the same."""
    catalogue = read_catalogue(source)
    tokenizer = load_tokenizer(config.model_name)
    if config.max_length > tokenizer.model_max_length:
        config.max_length = tokenizer.model_max_length
        print(f"max_length lowered to {config.max_length}, the most that this model reads")
    texts = catalogue["item_context"].head(config.num_rows or catalogue.height)
    print(f"{len(texts):,} of {catalogue.height:,} items of {source}, {os.cpu_count()} cores")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ways = [tokenizer.backend_tokenizer.to_str(), pad_id, tokenizer.padding_side, tokenizer.truncation_side]
    settings = {
        "max_length": config.max_length,
        "n_items": len(texts),
        "model_name": config.model_name,
        "instruction": config.instruction,
        "fingerprint": fingerprint(catalogue),
        "tokenizer": hashlib.sha256(repr(ways).encode()).hexdigest(),
        "format_version": FORMAT_VERSION,
    }
    if not config.overwrite and is_complete(target, settings):
        print(f"{target} is complete already: nothing to do; --overwrite tokenizes again")
        return

    tokens = tokenize(texts, tokenizer, config)
    if count := (tokens.lengths == 0).sum():
        trouble = f"{count} items become no token at all, the first in row {tokens.lengths.argmin()}"
        fail(source, trouble, "drop or describe them")
    report(tokens, tokenizer, config)
    with replacing(target) as temporary:
        write(temporary, tokens, pad_id, tokenizer.padding_side, settings)
    width, size = tokens.lengths.max(), target.stat().st_size
    print(f"wrote {target}: {len(texts):,} x {width} tokens, {size / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(argv)
    source = Path(config.data_dir, f"{config.category}_items_updated.parquet")
    target = Path(config.data_dir, f"{config.category}_tokenized.npz")
    for name, value in asdict(config).items():
        print(f"{name}: {value}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every retry, where there is no network
    if not os.path.isfile(source):  # false, too, where it cannot be looked at
        fail(source, "not found", "write your catalogue there, with the columns parent_asin and item_context")
    with alone(target):
        run(config, source, target)


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of few letters is no reason to stop
    try:
        main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.ENOSPC:  # else whoever read our lines has left
            print(f"error: standard output: {error.strerror}; make room and run it again", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
