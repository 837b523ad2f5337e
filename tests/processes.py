"""Runs of the scripts in processes forked from one that has done the slow imports: a start takes no time."""

import multiprocessing
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "polars", "scipy.optimize", "sklearn.cluster", "torch.distributed", "torch.utils.data", "tqdm", "wandb",
    "transformers.hf_argparser", "transformers.models.qwen3.modeling_qwen3",
    "transformers.tokenization_utils_tokenizers",
])  # fmt: skip
RUN = """
import os, runpy, sys, torch
os.chdir({folder!r})
os.environ.update({environment!r})
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 1)
os.dup2(log, 2)
sys.stdout.reconfigure(line_buffering=True)
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(script: str | Path, *argv: str, folder: Path, log: Path, **environment: str) -> BaseProcess:
    """Starts a script of the repository in a folder, as a user does; what it prints goes to the log."""
    code = RUN.format(
        folder=str(folder),
        environment=environment,
        log=str(log),
        paths=[str(ROOT), str(ROOT / "tests")],
        argv=[str(ROOT / script), *argv],
    )
    log.write_text("")
    process = SERVER.Process(target=exec, args=(code, {}))
    process.start()
    return process


def start_ranks(script: str | Path, *argv: str, folder: Path, world: int = 2) -> list[BaseProcess]:
    """Starts several processes that work together, with what torchrun tells them; rank-N.log is beside the folder."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(world)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(script, *argv, folder=folder, log=rank_log(folder, rank), RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(world)
    ]


def rank_log(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}-rank-{rank}.log")


def end(process: BaseProcess, seconds: float = 120) -> int:
    """The exit status of a process, which has to end within that time."""
    process.join(seconds)
    assert process.exitcode is not None, f"{process} still runs"
    return process.exitcode
