"""Turns the text of every item into tokens of an embedding model. CPU only.

Reads   data/output/{category}_items_updated.parquet   (parent_asin, item_context)
Writes  data/output/{category}_tokenized.npz           (input_ids, attention_mask, how they were made)

    python tokenize_items.py --category Video_Games
    python tokenize_items.py --category Video_Games --num_rows 1000                # a first look
    python tokenize_items.py --category Sample --model_name data/sample/encoder   # offline

Next: embed_items.py. Shapes: N items, W tokens of the longest item, at most max_length.
"""

import hashlib
import json
import logging
import os
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import polars as pl
from huggingface_hub import try_to_load_from_cache
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg
from transformers.utils import cached_file

MAX_LENGTH = 2048  # by default also where a model declares more
TEXTS_PER_CALL = 512  # enough to keep all threads of the tokenizer busy

# ---------------------------------------------------------------- configuration


@dataclass
class TokenizeConfig:
    """The command line of this script: every field is a flag."""

    category: str = HfArg(default="Video_Games", help="Catalogue name: the first part of every file name.")
    data_dir: str = HfArg(default="data/output", help="Folder of the catalogue and of the output.")
    model_name: str = HfArg(default="Qwen/Qwen3-Embedding-0.6B", help="Embedding model: a hub name or a local folder.")
    instruction: str = HfArg(
        default="Represent this product so that similar products have similar representations",
        help="Task put before every text, 'Instruct: {instruction}\\nQuery:{text}'; '' for none.",
    )
    max_length: int | None = HfArg(default=None, help="Most tokens of an item; by default the model's, at most 2048.")
    num_rows: int | None = HfArg(default=None, help="Only the first rows of the catalogue, for a trial.")


def fail(what: str | Path, trouble: str, way_out: str) -> NoReturn:
    """Ends the run because of a wrong flag or file: one line on standard error, exit status 2."""
    print("error:", " ".join(f"{what}: {trouble}; {way_out}".split()), file=sys.stderr)
    raise SystemExit(2)


def parse_config(argv: list[str] | None) -> TokenizeConfig:
    parser = HfArgumentParser(TokenizeConfig, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: fail("command line", message, "--help lists the flags")
    config = TokenizeConfig(**vars(parser.parse_args(argv)))
    for name, minimum in {"max_length": 2, "num_rows": 1}.items():
        if (value := getattr(config, name)) is not None and value < minimum:
            parser.error(f"--{name} {value}: must be at least {minimum}")
    config.data_dir, config.model_name = map(os.path.expanduser, (config.data_dir, config.model_name))
    return config


# ---------------------------------------------------------------- catalogue


def read_catalogue(path: Path) -> pl.DataFrame:
    """Reads parent_asin and item_context, and ends the run if they break the contract."""
    way_out = "write your catalogue there as one file, with the columns parent_asin and item_context"
    try:
        with open(path, "rb") as file:  # polars would also read a folder
            catalogue = pl.read_parquet(file, columns=["parent_asin", "item_context"])
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        first_line = str(error).partition("\n")[0]  # the query plan follows
        fail(path, f"cannot be read ({first_line})", way_out)
    if catalogue.height == 0:
        fail(path, "no rows", "write a catalogue of at least one item")
    checks = {}
    for name, column in catalogue.to_dict().items():
        if column.dtype != pl.String:
            fail(path, f"{name} is {column.dtype}, not text", f"pl.col({name!r}).cast(pl.String) makes it text")
        checks[f"null or blank {name}"] = column.is_null() | (column.str.strip_chars() == "")
    checks["duplicate parent_asin"] = ~catalogue["parent_asin"].is_first_distinct()
    for trouble, wrong in checks.items():
        if wrong.any():
            fail(path, f"{wrong.sum()} {trouble}, the first in row {wrong.arg_max()}", "drop or fill those rows")
    return catalogue


def fingerprint(catalogue: pl.DataFrame) -> str:
    """SHA-256 over parent_asin and item_context in row order: 64 hex digits. embed_items.py computes the same."""
    digest = hashlib.sha256()
    for rows in catalogue.select("parent_asin", "item_context").iter_slices():
        digest.update(rows.write_ndjson().encode())  # a line for each row, however the rows are cut into slices
    return digest.hexdigest()


# ---------------------------------------------------------------- tokens


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    way_out = "check the name, the network and the files (git lfs pull in a clone), or choose another model"
    print(f"loading {name}", flush=True)  # without a network, it may take a minute to fail
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # from a folder with only a config.json, AutoTokenizer makes a tokenizer with an empty vocabulary
        if not tokenizer.is_fast or len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("no fast tokenizer, which is a tokenizer.json")
    except Exception as error:
        fail(f"--model_name {name}", f"no tokenizer can be loaded from there ({error!s:.200})", way_out)
    return tokenizer


def follow_declarations(config: TokenizeConfig, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Sets max_length. Warns if the model declares prompts and the first text begins with none of them."""
    declared = {}
    for name in ("sentence_bert_config.json", "config_sentence_transformers.json"):
        try:
            file = cached_file(config.model_name, name)
        except OSError as error:  # without a cause: there is no such file; with one: the hub could not be asked
            if error.__cause__ and try_to_load_from_cache(config.model_name, name) is None:
                trouble = "the hub cannot be asked for it, and it may declare a length or prompts; go online once"
                print(f"warning: {config.model_name}/{name}: {trouble}", file=sys.stderr)
            continue
        declared |= json.loads(Path(file).read_text("utf-8"))
    length, prompts = int(declared.get("max_seq_length") or 0), declared.get("prompts") or {}
    limit = tokenizer.model_max_length  # 10**30 where there is none
    config.max_length = min(config.max_length or min(length or MAX_LENGTH, MAX_LENGTH), limit)
    reads = f"at most {limit}" if limit < 10**9 else "any length"
    print(f"max_length {config.max_length}; the model declares {length or 'none'} and reads {reads}")

    # without an instruction, an item may start with any declared prompt, or plainly if none is declared for documents
    plain = {"document", "passage", "corpus"}.isdisjoint(prompts)
    starts = tuple(prompt or "" for prompt in prompts.values())
    fits = "Instruct:" in str(prompts) if config.instruction else (plain or text.startswith(starts))
    if "__version__" in declared and not fits:  # the model was saved by sentence-transformers
        trouble = f"texts start with {text[:30]!r}, but the model declares the prompts {prompts}"
        print(f"warning: {trouble}; see --instruction", file=sys.stderr)


def tokenize(texts: pl.Series, tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int) -> tuple[list, int]:
    """Tokens of the prompt and each text, N times (length,) int32, and the number of truncated items."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length, direction=tokenizer.truncation_side)  # keeps closing special tokens
    tokens, truncated = [], 0
    for start in tqdm(range(0, len(texts), TEXTS_PER_CALL), unit=" batches", desc="tokenize"):
        batch = [prompt + text for text in texts[start : start + TEXTS_PER_CALL]]
        encodings = backend.encode_batch_fast(batch)  # on all cores
        tokens += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        truncated += sum(bool(encoding.overflowing) for encoding in encodings)
    return tokens, truncated


# ---------------------------------------------------------------- output


def write(path: Path, tokens: list[np.ndarray], pad_id: int, settings: dict[str, str | int]) -> None:
    """Writes what np.savez would write, but pads one row at a time, to save memory."""
    shape = len(tokens), max(map(len, tokens))  # (N, W)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w+b") as file:
            np.savez(file, **settings)
            for name, pad in {"input_ids": np.int32(pad_id), "attention_mask": np.bool_(False)}.items():
                with zipfile.ZipFile(file, "a") as npz, npz.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = {"descr": pad.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    for ids in tokens:
                        member.write(ids if name == "input_ids" else np.ones_like(ids, bool))
                        member.write(np.full(shape[1] - len(ids), pad))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        fail(path, f"cannot be written ({error})", "free disk space or get write access there")
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {path}: {shape[0]:,} x {shape[1]} tokens, {path.stat().st_size / 1e6:.1f} MB")


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    config = parse_config(argv)
    for name, value in asdict(config).items():
        print(f"{name}: {value}")
    logging.disable(logging.WARNING)  # without a network, the hub's client prints a line for every retry
    source = Path(config.data_dir, f"{config.category}_items_updated.parquet")
    target = Path(config.data_dir, f"{config.category}_tokenized.npz")

    catalogue = read_catalogue(source)
    if not os.access(target.parent, os.W_OK):
        fail(target, "cannot be written", "get write access there")
    tokenizer = load_tokenizer(config.model_name)
    texts = catalogue["item_context"].head(config.num_rows or catalogue.height)
    # as in the model card of Qwen3-Embedding: no space after `Query:`
    prompt = f"Instruct: {config.instruction}\nQuery:" if config.instruction else ""
    follow_declarations(config, tokenizer, prompt + texts[0])
    print(f"{len(texts):,} of {catalogue.height:,} items of {source}, {os.cpu_count()} cores")

    # before tokenize(), which sets a truncation in the backend
    behaviour = tokenizer.backend_tokenizer.to_str() + tokenizer.truncation_side
    tokens, truncated = tokenize(texts, tokenizer, prompt, config.max_length)
    if empty := [row for row, ids in enumerate(tokens) if len(ids) == 0]:
        fail(source, f"{len(empty)} items have no token, the first in row {empty[0]}", "drop or describe them")
    print(f"truncated to {config.max_length} tokens: {truncated:,} of {len(texts):,} items")
    settings = {name: getattr(config, name) for name in ("max_length", "model_name", "instruction")}
    settings |= {"n_items": len(texts), "fingerprint": fingerprint(catalogue), "format_version": 3}
    settings["tokenizer"] = hashlib.sha256(behaviour.encode()).hexdigest()
    write(target, tokens, tokenizer.pad_token_id or 0, settings)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
