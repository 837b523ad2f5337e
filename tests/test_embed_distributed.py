"""embed_items.py under torchrun: two gloo processes write what one writes, and none waits for one that is gone."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import torch
from conftest import ROOT, files_of, make_texts

import embed_items
import tokenize_items

N = 400
TARGET = "Tiny_items_with_embeddings.parquet"
PARTIAL = f".{TARGET}.partial"


@pytest.fixture(scope="module")
def tokenized(tiny_encoder, tmp_path_factory) -> Path:
    """A folder of a catalogue, a tenth of it equal texts, and its tokens."""
    folder = tmp_path_factory.mktemp("tokenized")
    texts = make_texts(N - N // 10, seed=3)
    items = pl.DataFrame({"parent_asin": [f"B{i:04}" for i in range(N)], "item_context": texts + texts[: N // 10]})
    items.write_parquet(folder / "Tiny_items_updated.parquet")
    tokenize_items.main(["--category", "Tiny", "--data_dir", str(folder), "--model_name", str(tiny_encoder)])
    return folder


@pytest.fixture(scope="module")
def wanted(tokenized, tmp_path_factory) -> dict[str, bytes]:
    """The files after a run of one process."""
    folder = shutil.copytree(tokenized, tmp_path_factory.mktemp("wanted") / "data")
    embed_items.main(flags(folder))
    return files_of(folder)


@pytest.fixture
def folder(tokenized, tmp_path) -> Path:
    return shutil.copytree(tokenized, tmp_path / "data")


def flags(folder: Path, *more: str) -> list[str]:
    argv = ["--category", "Tiny", "--data_dir", str(folder), "--device", "cpu", "--tokens_per_batch", "60"]
    return [*argv, *more]


def start(processes: int, *argv: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, str(ROOT / "embed_items.py"), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """The exit status and what was printed, once it has ended."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for_vectors(folder: Path, processes: int) -> None:
    """Returns when each process has finished some vectors."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        paths = list((folder / PARTIAL).glob("*/vectors-*"))
        if len(paths) == processes and all(path.stat().st_blocks for path in paths):
            return
        time.sleep(0.002)
    raise AssertionError("no vectors")


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun started, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("no /proc here to find the processes in")
    return [int(child) for child in children.read_text().split()]


def kill(job: subprocess.Popen) -> None:
    """Ends all its processes at one instant."""
    for worker in workers(job):  # before the job, which would let them write on
        os.kill(worker, signal.SIGSTOP)
    for worker in workers(job):
        os.kill(worker, signal.SIGKILL)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()


def test_two_processes_write_the_bytes_of_one(folder, wanted):
    status, out, err = end(start(2, *flags(folder)))
    assert status == 0, err
    assert files_of(folder) == wanted
    assert out.count("category: Tiny") == out.count("wrote ") == 1


def test_a_job_that_was_killed_goes_on_with_another_number_of_processes(folder, wanted, capsys):
    job = start(2, *flags(folder))
    wait_for_vectors(folder, 2)
    kill(job)
    assert (folder / PARTIAL).exists()
    capsys.readouterr()
    embed_items.main(flags(folder))
    assert int(re.search(r"([\d,]+) were finished by an earlier run", capsys.readouterr().out)[1]) > 0
    assert files_of(folder) == wanted


@pytest.fixture
def edited(tokenized, tmp_path) -> Path:
    """A folder with the output of an earlier catalogue, in which a third of the texts were others."""
    folder = shutil.copytree(tokenized, tmp_path / "edited")
    embed_items.main(flags(folder))
    text = pl.when(pl.int_range(pl.len()) % 3 == 1).then(pl.format("{} anew", "item_context")).otherwise("item_context")
    items = pl.read_parquet(folder / "Tiny_items_updated.parquet").with_columns(item_context=text)
    items.sample(fraction=1.0, shuffle=True, seed=1).write_parquet(folder / "Tiny_items_updated.parquet")
    model = pl.read_parquet_metadata(folder / TARGET)["model_name"]
    tokenize_items.main(["--category", "Tiny", "--data_dir", str(folder), "--model_name", model])
    return folder


def test_two_processes_reuse_as_one_does(edited, tmp_path):
    other = shutil.copytree(edited, tmp_path / "one")
    embed_items.main(flags(other, "--reuse"))
    status, out, err = end(start(2, *flags(edited, "--reuse")))
    assert status == 0, err
    assert files_of(edited) == files_of(other)
    assert out.count("texts keep the vector of an earlier run") == 1


def test_variables_of_a_cluster_do_not_matter_without_torchrun(folder, wanted):
    environment = os.environ | {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "embed_items.py"), *flags(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "wrote " in done.stdout
    assert files_of(folder) == wanted


def test_a_job_that_loses_a_process_ends_within_seconds(folder, wanted):
    job = start(2, *flags(folder))
    wait_for_vectors(folder, 2)
    os.kill(workers(job)[1], signal.SIGKILL)
    killed = time.monotonic()
    status, _, _ = end(job)
    assert status != 0
    assert time.monotonic() - killed < 30
    embed_items.main(flags(folder))
    assert files_of(folder) == wanted


def test_what_is_wrong_is_told_by_a_line(folder):
    (folder / "Tiny_tokenized.npz").unlink()
    status, _, err = end(start(2, *flags(folder)))
    assert status != 0
    assert re.search(r"^error: .*Tiny_tokenized.npz: not a readable npz", err, flags=re.M), err
    assert not re.search(r"^  File .*embed_items\.py", err, flags=re.M), err  # no traceback of ours


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_embed_as_one(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "one")
    more = ["--device", "cuda", "--dtype", "float32"]
    assert end(start(2, *flags(folder, *more)))[0] == 0
    embed_items.main(flags(other, *more))
    one, two = (pl.read_parquet(place / TARGET)["embedding"].to_list() for place in (other, folder))
    assert (torch.tensor(one) - torch.tensor(two)).abs().max() < 1e-5
