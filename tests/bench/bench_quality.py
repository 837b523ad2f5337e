"""Semantic IDs of this repository beside those of other systems, on the same vectors.

    pip install -r requirements.txt -r tests/bench/requirements.txt
    python tests/bench/bench_quality.py OUT/Office_items_with_embeddings.parquet --max_steps 1500
    python tests/bench/bench_quality.py OUT/Debian_items_with_embeddings.parquet --max_steps 5859 \\
        --ours "--max_lr 1e-2 --steps_per_val_log 1000"

(make_debian_catalogue.py makes the second one.) Of every catalogue 5% of the rows, others for each seed, are
shown to no system. All have 3 levels of 256 codes; the three networks have the same MLP and see as many items, in
as many steps, with the same schedule of the learning rate:

ours               train_rqvae.py by its command line with the flags that the README names for such catalogues;
                   codes of best_model.pth as encoded, and the distinct IDs as written
usual recipe       our model with the mean squared error of unit vectors, k-means of an untrained encoder's latents
                   and the rotation trick; Adam, peak learning rate 3e-4; unused codes are reset as in ours
ResidualVQ         of vector-quantize-pytorch, k-means and dead codes as its README shows, inputs standardised as
                   ours are; Adam, peak learning rate --peer_lr; straight-through, or --peer_rotation
faiss              ResidualQuantizer, codebooks refined, default beam search, in the space of the embeddings
residual k-means   of scikit-learn, in the space of the embeddings

Printed: the figures of every seed, then a table of their medians. Unexplained variance is of the 95% and of the
5%; usage and perplexity are the lowest of a level; the coherence is of items that share 1, 2 and 3 codes. The
seconds are of the fit, and of the whole command for ours: start, validations, distinct IDs and report included.
"""

import argparse
import itertools
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_rqvae  # noqa: E402

LEVELS, SIZE = 3, 256
SEEN = "Seen"  # category of the 95%


class Task(NamedTuple):
    """What a system is given."""

    folder: Path  # with {SEEN}_items_with_embeddings.parquet, the 95%
    x: Tensor  # (N, D) their embeddings
    seed: int
    flags: argparse.Namespace
    sizes: list[int] = [SIZE] * LEVELS  # codes of each level


class System(NamedTuple):
    """What a system gives back."""

    encode: Callable[[Tensor], Tensor]  # (B, D) -> (B, L)
    decode: Callable[[Tensor], Tensor]  # (B, L) -> (B, D)
    written: Tensor | None = None  # (N, L) of the 95%, where they are other than its codes


def ours(task: Task) -> System:
    flags, folder = task.flags, task.folder
    command = [sys.executable, ROOT / "train_rqvae.py", "--category", SEEN, "--data_dir", folder]
    command += ["--checkpoint_dir", folder, "--batch_size", flags.batch_size, "--max_steps", flags.max_steps]
    command += ["--seed", task.seed, *shlex.split(flags.ours)]
    environment = os.environ | {"WANDB_MODE": "disabled"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    model = train_rqvae.load_model(folder / "best_model.pth")
    columns = pl.read_parquet(
        folder / f"{SEEN}_semantic_ids.parquet", columns=[f"semantic_id_{i}" for i in range(LEVELS)]
    )
    written = torch.from_numpy(columns.to_numpy()).long()
    return System(model.encode_to_semantic_ids, model.decode_from_semantic_ids, written)


def fit(optimizer: torch.optim.Adam, loss_of: Callable[[Tensor], Tensor], task: Task, max_lr: float) -> None:
    """Takes steps over shuffled batches, with the schedule of train_rqvae.py."""
    flags = task.flags
    config = train_rqvae.RQVAEConfig(max_lr=max_lr)
    generator = torch.Generator().manual_seed(task.seed)
    batch_size = min(flags.batch_size, len(task.x))
    epochs = (torch.randperm(len(task.x), generator=generator) for _ in itertools.count())
    batches = (rows for order in epochs for rows in order.split(batch_size) if len(rows) == batch_size)
    for step, rows in enumerate(itertools.islice(batches, flags.max_steps)):
        for group in optimizer.param_groups:
            group["lr"] = train_rqvae.learning_rate(step, flags.max_steps, config)
        loss = loss_of(task.x[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def usual_recipe(task: Task) -> System:
    config = train_rqvae.RQVAEConfig(
        item_embedding_dim=task.x.shape[1], codebook_size=task.sizes, use_rotation_trick=True, seed=task.seed
    )
    model = train_rqvae.RQVAE(config)  # its mean and scale stay 0 and 1: unit vectors as they are
    with torch.no_grad():
        latents = model.encode(task.x)
    train_rqvae.init_codebooks(model, latents, task.flags.batch_size)

    optimizer = torch.optim.Adam(model.parameters())
    usage, steps = torch.zeros(len(task.sizes), max(task.sizes), dtype=torch.int64), itertools.count(1)

    def loss_of(x: Tensor) -> Tensor:
        step = next(steps)
        quantized = model.quantize(model.encode(x))
        usage.scatter_add_(1, quantized.codes.T, torch.ones_like(quantized.codes.T))
        if step % config.steps_per_codebook_reset == 0 and step < train_rqvae.LAST_RESET * task.flags.max_steps:
            train_rqvae.reset_codes(model, x, usage, optimizer)
            usage.zero_()
            quantized = model.quantize(model.encode(x))
        return F.mse_loss(model.decode(quantized.vectors), x) + quantized.loss

    fit(optimizer, loss_of, task, config.max_lr)
    return System(lambda x: model.quantize(model.encode(x)).codes, model.decode_from_semantic_ids)


def residual_vq(task: Task) -> System:
    config = train_rqvae.RQVAEConfig(item_embedding_dim=task.x.shape[1])
    shell = train_rqvae.RQVAE(config)  # for its MLPs and its standardisation
    train_rqvae.fit_standardisation(shell, task.x, torch.arange(len(task.x)))
    quantizer = ResidualVQ(
        dim=config.codebook_embedding_dim, num_quantizers=len(task.sizes), codebook_size=tuple(task.sizes),
        kmeans_init=True, kmeans_iters=10, threshold_ema_dead_code=2, rotation_trick=task.flags.peer_rotation,
    )  # fmt: skip

    def loss_of(x: Tensor) -> Tensor:
        x = shell.standardise(x)
        quantized, _, commitment = quantizer(shell.encode(x).unsqueeze(0))
        return F.mse_loss(shell.decode(quantized.squeeze(0)), x) + commitment.sum()

    fit(torch.optim.Adam([*shell.encoder.parameters(), *shell.decoder.parameters()]), loss_of, task, task.flags.peer_lr)
    quantizer.eval()
    return System(
        encode=lambda x: quantizer(shell.encode(shell.standardise(x)).unsqueeze(0))[1].squeeze(0),
        decode=lambda codes: (
            shell.decode(quantizer.get_output_from_indices(codes)) * shell.input_scale + shell.input_mean
        ),
    )


def faiss_quantizer(task: Task) -> System:
    bits = [int(math.log2(size)) for size in task.sizes]
    bits_vector = faiss.UInt64Vector()
    faiss.copy_array_to_vector(np.array(bits, dtype=np.uint64), bits_vector)
    quantizer = faiss.ResidualQuantizer(task.x.shape[1], bits_vector)
    quantizer.cp.seed = 1234 + task.seed
    quantizer.train_type |= faiss.ResidualQuantizer.Train_refine_codebook
    quantizer.train(task.x.numpy())
    return System(
        encode=lambda x: torch.from_numpy(faiss.unpack_bitstrings(quantizer.compute_codes(x.numpy()), bits)).long(),
        decode=lambda codes: torch.from_numpy(quantizer.decode(faiss.pack_bitstrings(codes.int().numpy(), bits))),
    )


def residual_k_means(task: Task) -> System:
    mean, codebooks = task.x.mean(0), []
    residuals = task.x - mean
    for size in task.sizes:
        fitted = KMeans(size, n_init=1, random_state=task.seed).fit(residuals.numpy())
        codebooks.append(torch.from_numpy(fitted.cluster_centers_))
        residuals = residuals - codebooks[-1][torch.from_numpy(fitted.labels_).long()]

    def encode(x: Tensor) -> Tensor:
        left, codes = x - mean, []
        for codebook in codebooks:
            codes.append(train_rqvae.nearest_codes(left, codebook))
            left = left - codebook[codes[-1]]
        return torch.stack(codes, dim=1)

    return System(
        encode, lambda codes: mean + sum(book[column] for book, column in zip(codebooks, codes.T, strict=True))
    )


SYSTEMS = {
    "ours": ours,
    "usual recipe": usual_recipe,
    "ResidualVQ": residual_vq,
    "faiss": faiss_quantizer,
    "residual k-means": residual_k_means,
}
FORMS = {  # figure: how it is printed
    "unexplained": ".4f",
    "held out": ".4f",
    "recall@10": ".4f",
    "distinct": ".4f",
    "usage": ".3f",
    "perplexity": ".0f",
    "coherence 1": ".3f",
    "coherence 2": ".3f",
    "coherence 3": ".3f",
    "seconds": ".0f",
}


@torch.inference_mode()
def figures(x: Tensor, codes: Tensor, decoded: Tensor) -> dict[str, float | None]:
    """Of x (N, D) with these codes (N, L), decoded (N, D): the lowest usage and perplexity of a level."""
    codes = codes.numpy()
    levels = train_rqvae.level_statistics(codes, [SIZE] * LEVELS)
    queries = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: train_rqvae.RECALL_QUERIES]
    return {
        "unexplained": train_rqvae.unexplained_variance(x, decoded),
        "recall@10": train_rqvae.neighbour_recall(x, decoded, queries),
        "distinct": train_rqvae.code_statistics(codes)["distinct"],
        "usage": min(level["usage"] for level in levels),
        "perplexity": min(level["perplexity"] for level in levels),
    } | {f"coherence {level}": train_rqvae.coherence(x, codes, level) for level in range(1, LEVELS + 1)}


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def compare(path: Path, flags: argparse.Namespace) -> dict[str, list[dict[str, float | None]]]:
    """The figures of every system, seed by seed."""
    table, dataset = pl.read_parquet(path, columns=["parent_asin", "embedding"]), train_rqvae.EmbeddingDataset(path)
    found = {name: [] for name in ("ours", "ours, as written", *list(SYSTEMS)[1:])}
    for seed in flags.seeds:
        order = np.random.default_rng(seed).permutation(len(table))
        seen, unseen = order[len(table) // 20 :], order[: len(table) // 20]
        x, held_out = dataset.embeddings[seen], dataset.embeddings[unseen]
        with tempfile.TemporaryDirectory() as folder:
            table[seen].write_parquet(Path(folder, f"{SEEN}_items_with_embeddings.parquet"))
            for name in flags.systems:
                torch.manual_seed(seed)
                start = time.perf_counter()
                system = SYSTEMS[name](Task(Path(folder), x, seed, flags))
                seconds = time.perf_counter() - start
                with torch.no_grad():
                    codes, guess = system.encode(x), system.decode(system.encode(held_out))
                    row = figures(x, codes, system.decode(codes)) | {"seconds": seconds}
                    row["held out"] = train_rqvae.unexplained_variance(held_out, guess)
                    found[name].append(row)
                    if system.written is not None:
                        found[f"{name}, as written"].append(figures(x, system.written, system.decode(system.written)))
                shown = ", ".join(f"{figure} {show(row[figure], form)}" for figure, form in FORMS.items())
                print(f"seed {seed}, {name}: {shown}", flush=True)
    return {name: rows for name, rows in found.items() if rows}


def print_table(found: dict[str, list[dict[str, float | None]]]) -> None:
    print(f"{'':<17}" + "".join(f"{figure:>13}" for figure in FORMS))
    for name, rows in found.items():
        cells = []
        for figure, form in FORMS.items():
            seen = [row[figure] for row in rows if row.get(figure) is not None]
            cells.append(format(np.median(seen), form) if seen else "-")
        print(f"{name:<17}" + "".join(f"{cell:>13}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", type=Path, help="a C_items_with_embeddings.parquet")
    parser.add_argument("--max_steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--ours", default="--max_lr 1e-2", help="more flags of train_rqvae.py (%(default)s)")
    parser.add_argument("--peer_lr", type=float, default=1e-3, help="of ResidualVQ (%(default)s)")
    parser.add_argument("--peer_rotation", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    flags = parser.parse_args()
    found = compare(flags.catalogue, flags)
    seen = flags.batch_size * flags.max_steps
    print(
        f"\n{flags.catalogue.name}: {seen / 1e6:.2f} million items seen by each network, medians of seeds {flags.seeds}"
    )
    print_table(found)


if __name__ == "__main__":
    main()
