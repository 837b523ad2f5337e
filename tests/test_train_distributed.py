"""train_rqvae.py under torchrun: the gradient of one process, a loss as good as one's, and jobs that are stopped."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT
from processes import end, rank_log, start_ranks

import train_rqvae

N, DIM, STEPS = 3000, 24, 300
TINY = {
    "category": "Tiny",
    "data_dir": "data",
    "checkpoint_dir": "checkpoints",
    "device": "cpu",
    "dtype": "float32",
    "encoder_hidden_dims": [64, 32],
    "codebook_embedding_dim": 8,
    "codebook_size": 64,
    "codebook_quantization_levels": 2,
    "batch_size": 256,
    "max_steps": STEPS,
    "max_lr": 1e-2,
    "warmup_steps": 4,
    "input_mixing": 0,
    "val_split": 0.1,
    "steps_per_codebook_reset": 10,
    "steps_per_val_log": 50,
    "steps_per_checkpoint": 50,
}

# ---------------------------------------------------------------- helpers


def unit_vectors(n: int, seed: int) -> np.ndarray:
    """Around thirty centres, which are the same for every seed."""
    generator = np.random.default_rng(seed)
    middle = np.random.default_rng(0).normal(size=(30, DIM))
    x = middle[generator.integers(30, size=n)] + 0.2 * generator.normal(size=(n, DIM))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def new_folder(folder: Path, n: int = N, x: np.ndarray | None = None) -> Path:
    """A folder with a catalogue, whose rows are not in the order of their names."""
    (folder / "data").mkdir(parents=True)
    x = unit_vectors(n, seed=1) if x is None else x
    names = [f"B{name:05}" for name in np.random.default_rng(2).permutation(len(x))]
    table = pl.DataFrame({"parent_asin": names, "embedding": pl.Series(x.tolist(), dtype=pl.List(pl.Float32))})
    table.write_parquet(source(folder))
    return folder


def source(folder: Path) -> Path:
    return folder / "data" / "Tiny_items_with_embeddings.parquet"


def arguments(*switches: str, **changes) -> list[str]:
    argv = []
    for name, value in (TINY | changes).items():
        argv += [f"--{name}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    return [*argv, *switches]


def run_ranks(folder: Path, *argv: str, script: Path = ROOT / "train_rqvae.py") -> str:
    """Runs two processes to their end; returns what rank 0 printed."""
    ranks = start_ranks(script, *argv, folder=folder)
    assert [end(rank) for rank in ranks] == [0, 0], rank_log(folder, 0).read_text() + rank_log(folder, 1).read_text()
    return rank_log(folder, 0).read_text()


def wait_for(path: Path, is_running) -> None:
    limit = time.monotonic() + 60
    while not path.exists() and time.monotonic() < limit and is_running():
        time.sleep(0.02)
    assert path.exists()


def results(folder: Path) -> dict[str, bytes]:
    names = ("data/Tiny_semantic_ids.parquet", "data/Tiny_quality.json")
    return {name: (folder / name).read_bytes() for name in (*names, *MODELS)}


MODELS = ("checkpoints/best_model.pth", "checkpoints/final_model.pth")


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process one of several, for code that communicates with none."""

    def become(rank: int, world: int) -> None:
        monkeypatch.setattr(train_rqvae, "RANK", rank)
        monkeypatch.setattr(train_rqvae, "WORLD", world)

    return become


# ---------------------------------------------------------------- rows and steps of a process


@pytest.mark.parametrize("world", [2, 3])
def test_each_item_is_read_by_one_process(tmp_path, world):
    path = source(new_folder(tmp_path, n=100))
    whole = train_rqvae.EmbeddingDataset(path)
    parts = [train_rqvae.EmbeddingDataset(path, None, rank, world) for rank in range(world)]
    assert pl.concat([part.parent_asin for part in parts]).equals(whole.parent_asin)  # consecutive
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert torch.equal(torch.cat([part.embeddings for part in parts]), whole.embeddings)
    checksums = [each.fingerprint["data"] for each in (*parts, whole)]
    assert sum(checksums[:-1]) == checksums[-1]


def test_fewer_items_than_processes_are_refused(tmp_path, capsys):
    path = source(new_folder(tmp_path, n=3))
    with pytest.raises(SystemExit):
        train_rqvae.EmbeddingDataset(path, None, 0, 4)
    assert "3 rows for 4 processes" in capsys.readouterr().err


def test_a_broken_row_is_named_by_its_place_in_the_file(tmp_path, capsys):
    x = unit_vectors(100, seed=1)
    x[90, 3] = np.nan
    path = source(new_folder(tmp_path, x=x))
    with pytest.raises(SystemExit):
        train_rqvae.EmbeddingDataset(path, None, 1, 2)
    assert "row 90" in capsys.readouterr().err


@pytest.mark.parametrize("n", [100, 101, 3000])
def test_processes_take_as_many_steps_of_as_many_rows_as_one(as_rank, n):
    config = train_rqvae.RQVAEConfig(batch_size=30, num_epochs=3, val_split=0.1, codebook_size=64)
    world, device = 3, torch.device("cpu")
    one, plans, seeds = train_rqvae.make_plan(n, config, device), [], set()
    for rank in range(world):
        as_rank(rank, world)
        plan = train_rqvae.make_plan(n, config, device)
        held = torch.cat([plan.train_rows, plan.val_rows])
        assert sorted(held.tolist()) == list(range(n * (rank + 1) // world - n * rank // world))
        assert plan.rows_per_step * plan.steps_per_epoch <= len(plan.train_rows)
        seeds.add(train_rqvae.step_seed(config.seed, 1))
        plans.append(plan)
    assert (
        len({(plan.rows_per_step, plan.total_steps, plan.steps_per_epoch, len(plan.val_rows)) for plan in plans}) == 1
    )
    assert plans[0].rows_per_step * world == one.rows_per_step
    assert abs(plans[0].steps_per_epoch - one.steps_per_epoch) <= 1
    assert len(seeds) == world  # each draws batches of its own


# ---------------------------------------------------------------- one step


ONE_STEP = """
import torch
import train_rqvae
from test_train_distributed import one_step
train_rqvae.dist.init_process_group("gloo")
rank = train_rqvae.RANK
torch.save([one_step(ema, rank, train_rqvae.WORLD) for ema in (False, True)], f"rank-{rank}.pt")
rows = torch.arange(3 + rank).unsqueeze(1) + 10 * rank
assert train_rqvae.gathered(rows).flatten().tolist() == [0, 1, 2, 10, 11, 12, 13]
train_rqvae.dist.destroy_process_group()
"""


def one_step(ema: bool, rank: int, world: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """The model, the gradient norm and the codes after a step of gradient descent on every world-th of 512 rows."""
    config = train_rqvae.RQVAEConfig(
        item_embedding_dim=DIM,
        encoder_hidden_dims=[16],
        codebook_size=8,
        codebook_embedding_dim=4,
        use_ema_vq=ema,
        batch_size=128,  # four passes of one process, two of two
        input_mixing=0,
        gradient_clip_norm=0,
    )
    torch.manual_seed(0)
    model = train_rqvae.RQVAE(config).train()
    x = torch.from_numpy(unit_vectors(512, seed=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # the weights move by the gradient itself
    rows = torch.arange(rank, 512, world)
    _, codes, norm = train_rqvae.train_step(model, [optimizer], x, rows, search_width=4)
    return model.state_dict(), norm, codes


@pytest.fixture(scope="module")
def steps_of_ranks(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("step")
    script = folder / "step.py"
    script.write_text(ONE_STEP)
    run_ranks(folder, script=script)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_two_processes_take_the_step_of_one_on_all_their_rows(steps_of_ranks, ema):
    weights, norm, codes = one_step(ema, 0, 1)
    assert norm > 0.01
    for rank, (weights_of_rank, norm_of_rank, codes_of_rank) in enumerate(steps[ema] for steps in steps_of_ranks):
        assert norm_of_rank == pytest.approx(norm.item(), rel=1e-4)
        assert torch.equal(codes_of_rank, codes[rank::2])
        for name, tensor in weights.items():
            assert torch.allclose(weights_of_rank[name], tensor, rtol=1e-4, atol=1e-6), name


# ---------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, str]:
    """A folder after an undisturbed run of two processes, and what rank 0 printed."""
    folder = new_folder(tmp_path_factory.mktemp("two") / "folder")
    return folder, run_ranks(folder, *arguments())


def test_two_processes_reach_the_loss_of_one(two_ranks, tmp_path, monkeypatch):
    folder, out = two_ranks
    one = new_folder(tmp_path / "one")
    monkeypatch.chdir(one)
    assert train_rqvae.main(arguments()) == 0
    unseen, losses = torch.from_numpy(unit_vectors(2000, seed=4)), []
    for each in (one, folder):
        model = train_rqvae.load_model(each / MODELS[0])
        with torch.inference_mode():
            inside = model.standardise(unseen)
            losses.append(model(inside, train_rqvae.TRAINING_SEARCH_WIDTH)[0][0].item())
        assert model.metrics["val/total_loss"] == pytest.approx(losses[-1], rel=0.15)  # of a few held-out items
    assert losses[1] < 1.05 * losses[0]
    assert out.count("recall@10 is of") == 1  # rank 0 alone reports
    table = pl.read_parquet(folder / "data" / "Tiny_semantic_ids.parquet")
    assert table["parent_asin"].equals(pl.read_parquet(source(folder))["parent_asin"])
    assert table["semantic_id"].n_unique() == N


# ---------------------------------------------------------------- stops and failures


def ranks_of(job: subprocess.Popen) -> dict[int, int]:
    """The process ids of the ranks of a job."""
    found = {}
    for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(each[5:]): int(pid) for each in environment if each.startswith(b"RANK=")}
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks through /proc")
def test_a_job_of_which_a_process_is_killed_ends_at_once_and_resumes_to_the_same_bytes(two_ranks, tmp_path):
    folder = new_folder(tmp_path / "folder")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(tmp_path / "log", "w") as log:
        command = [*launcher, str(ROOT / "train_rqvae.py"), *arguments()]
        job = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    wait_for(folder / "checkpoints" / "checkpoint_step_100.pth", lambda: job.poll() is None)
    ranks, killed_at = ranks_of(job), time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    assert job.wait(60) != 0
    assert time.monotonic() - killed_at < 15
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert not (folder / "data" / "Tiny_semantic_ids.parquet").exists()
    assert "going on from checkpoints/checkpoint_step_" in run_ranks(folder, *arguments("--resume"))
    assert results(folder) == results(two_ranks[0])


def test_a_job_of_which_a_process_is_stopped_saves_first_and_resumes_to_the_same_bytes(two_ranks, tmp_path):
    folder = new_folder(tmp_path / "folder")
    ranks = start_ranks("train_rqvae.py", *arguments(), folder=folder)
    wait_for(folder / "checkpoints" / "checkpoint_step_50.pth", ranks[0].is_alive)
    ranks[1].terminate()
    assert [end(each) for each in ranks] == [130, 130]
    assert rank_log(folder, 0).read_text().count("interrupted: saved in checkpoints") == 1
    assert not (folder / "data" / "Tiny_semantic_ids.parquet").exists()
    out = run_ranks(folder, *arguments("--resume"))
    assert "going on from checkpoints/checkpoint_step_" in out
    assert "checkpoint_step_50.pth" not in out
    assert results(folder) == results(two_ranks[0])


def test_trouble_in_the_rows_of_one_process_ends_the_job(tmp_path):
    x = unit_vectors(N, seed=1)
    x[2900, 3] = np.nan
    folder = new_folder(tmp_path / "folder", x=x)
    ranks = start_ranks("train_rqvae.py", *arguments(), folder=folder)
    assert end(ranks[1], 30) == 2
    assert end(ranks[0], 30) != 0
    (line,) = [line for line in rank_log(folder, 1).read_text().splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: data/Tiny_items_with_embeddings.parquet: 1 embeddings are null, not of 24 dimensions"
    )
    assert "NaN, infinite or too large, the first in row 2900" in line
    assert not (folder / "checkpoints" / "final_model.pth").exists()


# ---------------------------------------------------------------- one process


def test_a_rank_that_torchrun_did_not_set_changes_nothing(tmp_path, monkeypatch):
    folders, flags = [new_folder(tmp_path / name, n=200) for name in ("plain", "cluster")], {"max_steps": 10}
    monkeypatch.chdir(folders[0])
    assert train_rqvae.main(arguments(**flags)) == 0
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("train_rqvae_on_a_cluster", ROOT / "train_rqvae.py")
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, fresh)
    spec.loader.exec_module(fresh)
    monkeypatch.chdir(folders[1])
    assert fresh.main(arguments(**flags)) == 0
    assert results(folders[1]) == results(folders[0])


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices here")
def test_two_gpus_reach_the_loss_of_one_process(two_ranks, tmp_path):
    folder = new_folder(tmp_path / "folder")
    run_ranks(folder, *arguments(device="cuda"))
    losses = [train_rqvae.load_model(each / MODELS[0]).metrics["val/total_loss"] for each in (two_ranks[0], folder)]
    assert losses[1] < 1.1 * losses[0]
