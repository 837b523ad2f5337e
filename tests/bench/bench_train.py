"""The speed of a training step of train_rqvae.py beside its bare matrix products and beside ResidualVQ.

    pip install -r requirements.txt -r tests/bench/requirements.txt
    python tests/bench/bench_train.py                          # 32,768 x 384 on a CPU
    python tests/bench/bench_train.py --device cuda --dim 1024 --whole_run 20000  # a GPU, the default run included

On synthetic embeddings, in turn, several times, in one process:

nearest codes    a step of ours as in the first half of a run, in the number type that --dtype auto takes here for the
                 MLPs, and in float32
searched codes   the same as in the second half, where IDs are searched for
products         the matrix products of each alone, in the same number types and pieces: the layers' forward and two
                 backward ones, the distances to the codes, and the search's decoder passes
ResidualVQ       of vector-quantize-pytorch in the same MLP, float32, Adam, as its README shows

Then the time to read a parquet of embeddings into a tensor, as train_rqvae.py does and by way of lists, and the
memory of the first beside the tensor's (on Linux). With --whole_run, last, the seconds of train_rqvae.py as a command
with its default flags, for so many steps: start, validations, checkpoints, IDs and report included.
"""

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_rqvae  # noqa: E402
from embed_items import ROWS_PER_GROUP  # noqa: E402

MEMORY = r"""
import re, sys
import train_rqvae
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
embeddings = train_rqvae.EmbeddingDataset(sys.argv[1]).embeddings
print(peak() - before, embeddings.nbytes)
"""


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], object], steps: int, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(steps):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / steps * 1e3


def our_step(config: train_rqvae.RQVAEConfig, x: Tensor, width: int) -> Callable[[], object]:
    torch.manual_seed(0)
    model = train_rqvae.RQVAE(config).to(x.device)
    model.training_dtype = getattr(torch, config.dtype)
    rows = torch.arange(len(x), device=x.device)
    train_rqvae.fit_standardisation(model, x, rows)
    optimizers = train_rqvae.make_optimizers(model, config.max_lr)
    train_rqvae.start_quantizing(model, x, rows[:4096], config.batch_size)
    rows = torch.randperm(len(x), device=x.device)[: config.batch_size]
    return lambda: train_rqvae.train_step(model, optimizers, x, rows, width)


def bare_products(config: train_rqvae.RQVAEConfig, x: Tensor, width: int) -> Callable[[], object]:
    """What a step cannot do without, in pieces as large as ours, operands and results in memory beforehand."""
    dtype, rows = getattr(torch, config.dtype), config.batch_size
    pieces = math.ceil(rows / train_rqvae.ROWS_PER_PASS[x.device.type])
    rows //= pieces
    sizes = [config.item_embedding_dim, *config.encoder_hidden_dims, config.codebook_embedding_dim]
    dim = config.codebook_embedding_dim

    def product(n: int, inner: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        empty = lambda *shape: torch.empty(*shape, dtype=dtype, device=x.device)  # noqa: E731
        return empty(n, inner).normal_(), empty(inner, m).normal_(), empty(n, m)

    products = []
    for stack in (sizes, sizes[::-1]):
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(stack)):
            products += [product(rows, fan_in, fan_out, dtype), product(fan_in, rows, fan_out, dtype)]
            if i or stack is not sizes:  # the inputs need no gradient
                products.append(product(rows, fan_out, fan_in, dtype))
    beams = 1
    for size in config.codebook_size:
        products.append(product(rows * beams, dim, size, torch.float32))
        beams = min(width, beams * size)
    if width > 1:
        products += [product(rows * beams, *layer, dtype) for layer in itertools.pairwise(sizes[::-1])]
    return lambda: [torch.mm(a, b, out=c) for _ in range(pieces) for a, b, c in products]


def residual_vq_step(config: train_rqvae.RQVAEConfig, x: Tensor) -> Callable[[], object]:
    torch.manual_seed(0)
    shell = train_rqvae.RQVAE(config).to(x.device)  # for its MLPs and its standardisation
    train_rqvae.fit_standardisation(shell, x, torch.arange(len(x), device=x.device))
    target = shell.standardise(x)
    quantizer = ResidualVQ(
        dim=config.codebook_embedding_dim, num_quantizers=config.codebook_quantization_levels,
        codebook_size=config.codebook_size[0], kmeans_init=True, kmeans_iters=10, threshold_ema_dead_code=2,
    ).to(x.device)  # fmt: skip
    parameters = [*shell.encoder.parameters(), *shell.decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    rows = torch.randperm(len(x), device=x.device)[: config.batch_size]

    def step() -> None:
        batch = target[rows]
        quantized, _, commitment = quantizer(shell.encoder(batch).unsqueeze(0))
        loss = F.mse_loss(shell.decoder(quantized.squeeze(0)), batch) + commitment.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_steps(flags: argparse.Namespace) -> None:
    device = torch.device(flags.device)
    torch.manual_seed(0)
    x = F.normalize(torch.randn(flags.rows, 64) @ torch.randn(64, flags.dim) + torch.randn(flags.rows, flags.dim))
    x = x.to(device)
    widths = {"nearest": 1, "searched": train_rqvae.TRAINING_SEARCH_WIDTH}
    dtypes = list(dict.fromkeys([train_rqvae.choose_dtype(device), "float32"]))
    sides = {}
    for dtype, (codes, width) in itertools.product(dtypes, widths.items()):
        config = train_rqvae.RQVAEConfig(item_embedding_dim=flags.dim, batch_size=flags.batch_size, dtype=dtype)
        sides[f"{codes} codes, {dtype}"] = our_step(config, x, width)
        sides[f"products of {codes}, {dtype}"] = bare_products(config, x, width)
    sides["ResidualVQ, float32"] = residual_vq_step(config, x)
    times = {side: [] for side in sides}
    for work in sides.values():
        milliseconds(work, 2, device)  # k-means of ResidualVQ, the optimizers' states
    for _, (side, work) in itertools.product(range(flags.repeats), sides.items()):
        times[side].append(milliseconds(work, flags.steps, device))
    print(f"steps of {flags.batch_size:,} x {flags.dim} on {device} ({os.cpu_count()} cores); medians of "
          f"{flags.repeats} turns of {flags.steps} steps")  # fmt: skip
    median = {side: statistics.median(found) for side, found in times.items()}
    for side, found in times.items():
        print(f"{side:<30}{median[side]:>9.2f} ms   ({min(found):.2f} to {max(found):.2f})")
    for dtype, codes in itertools.product(dtypes, widths):
        ours, products = median[f"{codes} codes, {dtype}"], median[f"products of {codes}, {dtype}"]
        print(f"{codes} codes, {dtype}: {ours / products:.2f} times its products; ", end="")
        print(f"ResidualVQ takes {median['ResidualVQ, float32'] / ours:.2f} times as long")


def write_embeddings(folder: str, rows: int) -> Path:
    """A parquet as embed_items.py writes it, of rows x 1024."""
    path = Path(folder, "Bench_items_with_embeddings.parquet")
    names = pl.Series("parent_asin", [f"item {i}" for i in range(rows)])
    vectors = pl.Series("embedding", torch.randn(rows, 1024).numpy()).cast(pl.List(pl.Float32))
    table = pl.DataFrame([names, vectors])
    table.write_parquet(path, compression="uncompressed", row_group_size=ROWS_PER_GROUP)
    return path


def compare_reading(rows: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_embeddings(folder, rows)
        ways = {
            "ours": lambda: train_rqvae.EmbeddingDataset(path).embeddings,
            "through lists": lambda: torch.tensor(pl.read_parquet(path)["embedding"].to_list()),
        }
        seconds, cpu = {way: [] for way in ways}, torch.device("cpu")
        for _, (way, work) in itertools.product(range(repeats), ways.items()):
            seconds[way].append(milliseconds(work, 1, cpu) / 1e3)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, path],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
    ours, lists = (statistics.median(found) for found in seconds.values())
    peak, size = map(int, done.stdout.split())
    print(f"reading {rows:,} x 1024: {ours:.2f} s, through lists {lists:.1f} s: {lists / ours:.1f} times")
    print(f"peak memory of ours {peak / 1e6:,.0f} MB, {peak / size:.2f} times the tensor")


def time_whole_run(rows: int, steps: int, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_embeddings(folder, rows)
        command = ["--category", "Bench", "--data_dir", folder, "--checkpoint_dir", folder, "--device", device]
        command = [sys.executable, ROOT / "train_rqvae.py", *command, "--max_steps", str(steps)]
        start = time.perf_counter()
        subprocess.run(command, env=os.environ | {"WANDB_MODE": "disabled"}, capture_output=True, check=True)
        seconds = time.perf_counter() - start
    print(f"train_rqvae.py on {rows:,} x 1024, {steps:,} steps: {seconds:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--batch_size", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=66_000)
    parser.add_argument("--steps", type=int, default=3, help="in a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole_run", type=int, metavar="STEPS", help="of the default run, 20000; none by default")
    parser.add_argument(
        "--keep_freed_memory", action="store_true", help="for all sides; train_rqvae.py does it on a CPU"
    )
    flags = parser.parse_args()
    if flags.keep_freed_memory:
        train_rqvae.keep_freed_memory()
    compare_steps(flags)
    compare_reading(flags.rows, 3)
    if flags.whole_run:
        time_whole_run(flags.rows, flags.whole_run, flags.device)


if __name__ == "__main__":
    main()
