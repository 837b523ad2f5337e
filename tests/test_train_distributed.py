"""train_rqvae.py under torchrun: several processes train, save, resume and export what one process does."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT, files_of

import train_rqvae

N, DIM, LEVELS, STEPS = 3000, 24, 3, 20  # of these rows, the digest makes three pieces: each rank holds some
TINY = {
    "category": "Tiny",
    "device": "cpu",
    "dtype": "float32",
    "encoder_hidden_dims": [32, 16],
    "codebook_embedding_dim": 8,
    "codebook_quantization_levels": LEVELS,
    "codebook_size": 16,
    "batch_size": 600,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "max_lr": 1e-3,
    "warmup_steps": 4,
    "autoencoder_steps": 6,
    "input_mixing": 0.3,
    "val_split": 0.1,
    "steps_per_codebook_reset": 5,
    "steps_per_train_log": 1,
    "steps_per_val_log": 8,
    "steps_per_checkpoint": 1,
    "keep_checkpoints": STEPS,
    "collisions": "keep",  # one other code could otherwise move many items
}
AS_ON_GPUS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_rqvae
train_rqvae.RANK, train_rqvae.RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
train_rqvae.TRAINED_PER_PASS = {{}}
status = train_rqvae.main()
train_rqvae.dist.destroy_process_group()
sys.exit(status)
"""  # where every rank works on a share of every batch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- helpers


def catalogue(n: int = N) -> pl.DataFrame:
    """Items around thirty centres, of unit length, in an order that is not that of their names."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(30, DIM))[generator.integers(30, size=n)] + 0.2 * generator.normal(size=(n, DIM))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    names, vectors = [f"B{name:05}" for name in generator.permutation(n)], pl.Series(x, dtype=pl.Array(pl.Float32, DIM))
    return pl.DataFrame({"parent_asin": names, "embedding": vectors.cast(pl.List(pl.Float32))})


def source(folder: Path) -> Path:
    return folder / "data" / "Tiny_items_with_embeddings.parquet"


def new_folder(folder: Path, table: pl.DataFrame | None = None) -> Path:
    """A folder with a catalogue whose file tells the digest that the ranks have to find together."""
    source(folder).parent.mkdir(parents=True)
    table = catalogue() if table is None else table
    digest = train_rqvae.data_digest(np.stack(table["embedding"].to_list()).astype(np.float32))
    table.write_parquet(source(folder), metadata={"vectors": digest})
    return folder


def command(folder: Path, *switches: str, **changes) -> list[str]:
    argv = []
    flags = TINY | {"data_dir": folder / "data", "checkpoint_dir": folder / "checkpoints"} | changes
    for name, value in flags.items():
        argv += [f"--{name}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    return [*argv, *switches]


def torchrun(ranks: int, *argv: str, script: Path = ROOT / "train_rqvae.py") -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*launcher, str(script), *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(ranks: int, folder: Path, *switches: str, as_on_gpus: bool = False, **changes) -> str:
    """Runs to the end, in this process where it is one; returns what was printed by several."""
    argv, script = command(folder, *switches, **changes), ROOT / "train_rqvae.py"
    if ranks == 1:
        with pytest.MonkeyPatch.context() as patch:
            if as_on_gpus:
                patch.setattr(train_rqvae, "TRAINED_PER_PASS", {})
            assert train_rqvae.main(argv) == 0
        return ""
    if as_on_gpus:
        script = folder / "as_on_gpus.py"
        script.write_text(AS_ON_GPUS)
    process = torchrun(ranks, *argv, script=script)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Warning" not in err, err
    return out


def load(folder: Path, name: str | int) -> dict:
    name = f"checkpoint_step_{name}" if isinstance(name, int) else name
    return torch.load(folder / "checkpoints" / f"{name}.pth", weights_only=True)


def ids_of(folder: Path) -> list[str]:
    return pl.read_parquet(folder / "data" / "Tiny_semantic_ids.parquet")["semantic_id"].to_list()


def assert_equal_models(one: dict, other: dict) -> None:
    """Bit for bit."""
    for name, tensor in one["model_state_dict"].items():
        assert torch.equal(tensor, other["model_state_dict"][name]), name


def assert_same_model(one: dict, other: dict) -> None:
    """But for rounding."""
    assert one.keys() == other.keys()
    for name, tensor in one["model_state_dict"].items():
        assert (tensor - other["model_state_dict"][name]).norm() <= 1e-3 * tensor.norm() + 1e-6, name


def wait_for(path: Path, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 60
    while not path.exists() and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.05)
    assert path.exists(), process.communicate(timeout=30)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By kind of quantizer and the way of sharing, folders after a run of one process, and of two; only to be read."""
    done = {}

    def pair(ema: bool, as_on_gpus: bool = False) -> tuple[Path, Path]:
        if (ema, as_on_gpus) not in done:
            folders = done[ema, as_on_gpus] = tuple(new_folder(tmp_path_factory.mktemp("ranks")) for _ in range(2))
            for ranks, folder in enumerate(folders, start=1):
                run(ranks, folder, use_ema_vq=ema, as_on_gpus=as_on_gpus)
        return done[ema, as_on_gpus]

    return pair


# ---------------------------------------------------------------- the parts


@pytest.fixture
def ranks(request, monkeypatch) -> int:
    monkeypatch.setattr(train_rqvae, "RANKS", request.param)
    return request.param


@pytest.mark.parametrize("ranks", [2, 3, 8], indirect=True)
@pytest.mark.parametrize("size", [8, 9, 600])
def test_ranks_share_a_batch_out_evenly_and_draw_the_numbers_of_one_process(ranks, size):
    model, x = train_rqvae.RQVAE(train_rqvae.RQVAEConfig(item_embedding_dim=DIM)), torch.randn(size, DIM)
    torch.manual_seed(1)
    whole = train_rqvae.augment(x, model, 0.5, 0.3)
    places, parts = train_rqvae.shares(size), []
    assert {len(each) - 1 for each in places} <= {size // ranks, size // ranks + 1}
    for each in places:
        torch.manual_seed(1)
        parts.append(train_rqvae.augment(x[each], model, 0.5, 0.3, each, size))
    for all_rows, shared in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(all_rows, torch.cat(shared))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8], indirect=True)
@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 3000, 100_000])
def test_shards_are_whole_pieces_of_the_digest_and_cover_the_catalogue(ranks, n):
    bounds = train_rqvae.shard_bounds(n)
    assert bounds[0] == 0
    assert bounds[-1] == n
    assert all(bound % train_rqvae.DIGEST_ROWS == 0 for bound in bounds[:-1])
    sizes = np.diff(bounds)
    assert sizes.min() >= 0
    assert sizes.max() <= n / ranks + train_rqvae.DIGEST_ROWS


@pytest.mark.parametrize("ranks", [601], indirect=True)
def test_a_step_of_fewer_items_than_ranks_is_refused(ranks, capsys):
    config = train_rqvae.RQVAEConfig(batch_size=600)
    with pytest.raises(SystemExit):
        train_rqvae.check_plan(train_rqvae.plan_training(N, config), Path("a"), config)
    assert "--batch_size 600: fewer items a step than the 601 processes" in capsys.readouterr().err


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize("as_on_gpus", [False, True], ids=["cpu", "as on gpus"])
@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_two_processes_train_the_model_of_one_step_by_step(pairs, ema, as_on_gpus):
    pair = pairs(ema, as_on_gpus)
    for step in range(1, STEPS + 1):
        one, two = (load(folder, step) for folder in pair)
        assert_same_model(one, two)
        if not as_on_gpus:
            assert_equal_models(one, two)
            assert torch.equal(one["usage"], two["usage"])
        assert one["metrics"].keys() == two["metrics"].keys()
        for name in set(one["metrics"]) - {"catalogue/distinct", "catalogue/singleton"}:
            close = 1e-5  # sums over the ranks
            if as_on_gpus:  # one item midway between two codes shows
                close = 3e-2 if "gradient_norm" in name else 1e-2
            assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=close, abs=1e-6), (step, name)
        for name in ("distinct", "singleton") if step >= 8 else ():
            numbers = [each["metrics"][f"catalogue/{name}"] for each in (one, two)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.01 if as_on_gpus else 1e-9)
        assert (one["usage"] - two["usage"]).abs().sum() <= 0.01 * one["usage"].sum()
        assert torch.equal(one["random_states"]["cpu"], two["random_states"]["cpu"])
        assert one["data"] == two["data"]
    first, last = (load(pair[1], step)["metrics"]["train/reconstruction_loss"] for step in (1, STEPS))
    assert last < first  # it learns, with total losses that the quantizers' add to from k-means on


@pytest.mark.parametrize("as_on_gpus", [False, True], ids=["cpu", "as on gpus"])
@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_two_processes_end_with_the_model_and_the_ids_of_one(pairs, ema, as_on_gpus):
    pair = pairs(ema, as_on_gpus)
    for name in ("best_model", "final_model"):
        one, two = (load(folder, name) for folder in pair)
        (assert_same_model if as_on_gpus else assert_equal_models)(one, two)
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)
        assert one["step"] == two["step"]
    assert [path.name for path in sorted((pair[0] / "data").iterdir())] == [
        path.name for path in sorted((pair[1] / "data").iterdir())
    ]
    same = np.mean([one == two for one, two in zip(*map(ids_of, pair), strict=True)])
    assert same > 0.99 if as_on_gpus else same == 1  # an item midway between two codes may fall to either


@pytest.mark.parametrize(
    ("ranks", "batch_size", "batches"),
    [(2, 400, 5), (2, 1000, 1), (4, 1000, 1)],
    ids=["3 + 2", "1 + 0", "1 + 0 + 0 + 0"],
)
@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_processes_with_unequally_many_batches_or_none_train_the_model_of_one(
    tmp_path, ranks, batch_size, batches, ema
):
    folders, flags = [new_folder(tmp_path / name) for name in ("one", "more")], {"use_ema_vq": ema, "dtype": "bfloat16"}
    for number, folder in zip((1, ranks), folders, strict=True):
        run(number, folder, batch_size=batch_size, gradient_accumulation_steps=batches, **flags)
    for step in range(1, STEPS + 1):
        assert_equal_models(*(load(folder, step) for folder in folders))
    assert ids_of(folders[0]) == ids_of(folders[1])


@pytest.mark.parametrize(("ranks", "ema", "step"), [(1, False, 13), (2, True, 13)], ids=["2 to 1", "1 to 2"])
def test_a_run_goes_on_with_another_number_of_processes(pairs, ranks, ema, step, tmp_path):
    pair = pairs(ema)
    folder = shutil.copytree(pair[2 - ranks], tmp_path / "copy")  # stopped with the other number
    for path in (folder / "checkpoints").glob("*.pth"):
        number = re.search(r"_step_(\d+)", path.name)
        if path.name == "final_model.pth" or (number and int(number[1]) > step):
            path.unlink()
    (folder / "data" / "Tiny_semantic_ids.parquet").unlink()
    run(ranks, folder, "--resume", use_ema_vq=ema)
    for name in ("final_model", "best_model", step + 1, STEPS):
        assert_equal_models(load(pair[0], name), load(folder, name))
    assert ids_of(pair[0]) == ids_of(folder)


def test_the_same_model_gives_the_same_ids_to_the_byte(pairs, tmp_path):
    folders = [shutil.copytree(pairs(False)[0], tmp_path / str(ranks)) for ranks in (1, 3)]
    for ranks, folder in zip((1, 3), folders, strict=True):
        out = run(ranks, folder, "--export_only", collisions="assign")
    assert files_of(folders[0] / "data") == files_of(folders[1] / "data")
    assert out.count("recall@10") == 1  # told by one of them
    renamed = pl.when(pl.int_range(pl.len()) < 200).then(pl.concat_str(pl.lit("A"), "parent_asin"))
    for ranks, folder in zip((1, 3), folders, strict=True):  # a day later, some items have gone and others come
        new_folder(
            tmp_path / f"day-{ranks}",
            catalogue()[100:].with_columns(renamed.otherwise("parent_asin").alias("parent_asin")),
        )
        source(tmp_path / f"day-{ranks}").replace(source(folder))
        out = run(
            ranks, folder, "--export_only", collisions="assign", keep_ids=folder / "data" / "Tiny_semantic_ids.parquet"
        )
    assert files_of(folders[0] / "data") == files_of(folders[1] / "data")
    assert "2,700 items keep their ID, 0 moved to another, 200 are new and 300 have vanished" in out


@pytest.mark.parametrize("as_on_gpus", [False, True], ids=["cpu", "as on gpus"])
@pytest.mark.parametrize(("batch_size", "batches"), [(20, 15), (3, 101)])  # 301 = 3 * 100 + 1
def test_a_rank_without_items_and_a_last_batch_smaller_than_the_ranks(tmp_path, batch_size, batches, as_on_gpus):
    flags = {"batch_size": batch_size, "gradient_accumulation_steps": batches, "val_split": 0.0, "max_steps": 9}
    folder, one = (new_folder(tmp_path / name, catalogue(301)) for name in ("two", "one"))  # all in the last shard
    run(2, folder, **flags, collisions="assign", as_on_gpus=as_on_gpus)
    assert len(set(ids_of(folder))) == 301
    run(1, one, **flags, as_on_gpus=as_on_gpus)
    if not as_on_gpus:
        assert_equal_models(load(one, 9), load(folder, 9))
    elif batch_size > 3:
        assert_same_model(load(one, 9), load(folder, 9))
    else:  # two processes cut the step elsewhere, for each to have some rows of every batch
        losses = [load(each, 9)["metrics"]["train/total_loss"] for each in (one, folder)]
        assert losses[0] == pytest.approx(losses[1], rel=0.1)


# ---------------------------------------------------------------- stops and failures


def test_a_stopped_job_is_saved_at_one_step_and_goes_on_with_one_process(tmp_path):
    folder = new_folder(tmp_path)
    process = torchrun(2, *command(folder, max_steps=10**6, steps_per_checkpoint=20, steps_per_train_log=50))
    wait_for(folder / "checkpoints" / "checkpoint_step_20.pth", process)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert err.count("interrupted: saved in") == 1, err
    newest = max(int(path.stem.rpartition("_")[2]) for path in (folder / "checkpoints").glob("checkpoint_step_*"))
    run(1, folder, "--resume", max_steps=newest + 3)
    assert load(folder, "final_model")["step"] == newest + 3


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks through /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_within_seconds(tmp_path, victim):
    folder = new_folder(tmp_path)
    process = torchrun(2, *command(folder, max_steps=10**6, steps_per_checkpoint=20))
    wait_for(folder / "checkpoints" / "checkpoint_step_20.pth", process)
    ranks = {}
    for pid in children(process.pid):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks |= {int(each[5:]): pid for each in environment if each.startswith(b"RANK=")}
    start = time.monotonic()
    os.kill(ranks[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 15
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert 'train_rqvae.py", line' not in err  # the rank that is left has nothing to tell
    assert not list((folder / "checkpoints").glob(".*.tmp"))


def broken(table: pl.DataFrame) -> pl.DataFrame:
    vectors = table["embedding"].to_list()
    for row in (700, 1500, 2900):  # in both shards
        vectors[row][3] = float("nan")
    return table.with_columns(pl.Series("embedding", vectors, dtype=pl.List(pl.Float32)))


WRONG = {
    "flag": (None, {"batch_size": 0}, "--batch_size 0: must be at least 1"),
    "vectors": (broken, {}, "3 NaN or infinite embeddings, the first is item '{}'"),
    "diverged": (None, {"max_lr": 1e12, "gradient_clip_norm": 0, "warmup_steps": 0}, "train again with a lower"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_told_once(tmp_path, kind):
    change, flags, words = WRONG[kind]
    table = catalogue()
    folder = new_folder(tmp_path, change(table) if change else table)
    process = torchrun(2, *command(folder, **flags))
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("error: ") == 1, err
    assert words.format(table["parent_asin"][700]) in err
    assert 'train_rqvae.py", line' not in err
    assert not (folder / "data" / "Tiny_semantic_ids.parquet").exists()


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices here")
@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_two_gpus_train_the_model_of_one(tmp_path, ema):
    folders = [new_folder(tmp_path / str(ranks)) for ranks in (1, 2)]
    for ranks, folder in enumerate(folders, start=1):
        run(ranks, folder, device="cuda", use_ema_vq=ema)
    for step in (1, 6, STEPS):
        assert_same_model(*(load(folder, step) for folder in folders))
    assert np.mean([one == two for one, two in zip(*map(ids_of, folders), strict=True)]) > 0.98
