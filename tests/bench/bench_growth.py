"""How the time and the memory of each stage grow with the number of items.

    pip install -r requirements.txt
    python tests/bench/bench_growth.py                           # 10, 40 and 160 thousand items
    python tests/bench/bench_growth.py --device cuda --dim 1024  # a GPU

Each stage runs as a user runs it, as a command of its own, at every size:

tokenize   texts of the sample catalogue, each made distinct by a number, with the sample encoder's tokenizer
embed      the same with the sample encoder
train      synthetic embeddings, --steps steps: start, k-means, validation, IDs, distinct IDs and report included
export     --export_only of that model: the encoding, the distinct IDs and the report alone

Printed for each: seconds, peak memory, and both per thousand more items since the size before; where the last two
columns do not rise down a stage, it grows linearly or less. Peak memory counts the libraries, some 300 to 700 MB.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "output" / "Sample_items_updated.parquet"
CATEGORY = "Growth"
ROWS_PER_GROUP = 8192  # as in embed_items.py, which would make this process large


def run(*command: str) -> tuple[float, float]:
    """Seconds and peak megabytes of a command; this process is small, which matters, as a child starts from it."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=log, env=os.environ | {"WANDB_MODE": "disabled"}
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            raise SystemExit(log.read())
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit / 1e6


def write_texts(folder: Path, n: int) -> None:
    sample = pl.read_parquet(SAMPLE, columns=["item_context"])["item_context"]
    number = pl.Series(np.arange(n)).cast(pl.String)
    texts = sample.gather(np.arange(n) % len(sample)) + " No. " + number
    items = pl.DataFrame({"parent_asin": "item " + number, "item_context": texts})
    items.write_parquet(folder / f"{CATEGORY}_items_updated.parquet")


def write_embeddings(folder: Path, n: int, dim: int) -> None:
    """Families of some ten items around points of a 48-dimensional space, as real catalogues have them."""
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.standard_normal(shape, dtype=np.float32)  # noqa: E731
    families = draw(max(1, n // 10), 48)
    vectors = (families[generator.integers(len(families), size=n)] + 0.4 * draw(n, 48)) @ draw(48, dim)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items = pl.DataFrame({"parent_asin": "item " + pl.Series(np.arange(n)).cast(pl.String)})
    items = items.with_columns(pl.Series("embedding", vectors).cast(pl.List(pl.Float32)))
    path = folder / f"{CATEGORY}_items_with_embeddings.parquet"
    items.write_parquet(path, compression="uncompressed", row_group_size=ROWS_PER_GROUP)


def measure(n: int, flags: argparse.Namespace) -> dict[str, tuple[float, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = ["--category", CATEGORY, "--data_dir", name]
        script = lambda stage: str(ROOT / stage)  # noqa: E731
        write_texts(folder, n)
        encoder = str(ROOT / "data" / "sample" / "encoder")
        found = {"tokenize": run(script("tokenize_items.py"), *common, "--model_name", encoder)}
        found["embed"] = run(script("embed_items.py"), *common, "--device", flags.device)
        write_embeddings(folder, n, flags.dim)
        train = [script("train_rqvae.py"), *common, "--checkpoint_dir", name, "--device", flags.device]
        found["train"] = run(*train, "--batch_size", "1024", "--max_steps", str(flags.steps), "--max_lr", "1e-2")
        found["export"] = run(*train, "--export_only")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 40_000, 160_000])
    parser.add_argument("--dim", type=int, default=384, help="of the synthetic embeddings (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="of the training (%(default)s)")
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()
    found = {}
    for n in flags.sizes:
        found[n] = measure(n, flags)
        print(f"{n:,} items done", file=sys.stderr, flush=True)
    print(f"{os.cpu_count()} cores, device {flags.device}; embeddings of {flags.dim} dimensions, {flags.steps} steps")
    print(f"{'stage':<10}{'items':>10}{'seconds':>10}{'MB':>9}{'s / 1,000 more':>17}{'MB / 1,000 more':>17}")
    for stage in found[flags.sizes[0]]:
        for i, n in enumerate(flags.sizes):
            seconds, memory = found[n][stage]
            more = ""
            if i:
                before = flags.sizes[i - 1]
                slopes = [
                    (now - then) / (n - before) * 1e3
                    for now, then in zip(found[n][stage], found[before][stage], strict=True)
                ]
                more = f"{slopes[0]:>17.3f}{slopes[1]:>17.2f}"
            print(f"{stage:<10}{n:>10,}{seconds:>10.1f}{memory:>9,.0f}{more}")


if __name__ == "__main__":
    main()
