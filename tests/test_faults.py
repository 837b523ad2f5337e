"""Runs that are killed, files that are damaged, flags that make no sense, disks that are full: nothing is lost.

KILLS=20 python -m pytest tests/test_faults.py is the nightly mode: 20 kills a stage, and ten times more damage.
"""

import io
import os
import pickle
import random
import re
import shutil
import subprocess
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import polars as pl
import pytest
import torch
from conftest import files_of, make_texts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from processes import end, start

import embed_items
import tokenize_items
import train_rqvae

KILLS = int(os.environ.get("KILLS", "2"))
N = 200
MAIN = {"tokenize": tokenize_items.main, "embed": embed_items.main, "train": train_rqvae.main}
SCRIPT = {"tokenize": "tokenize_items.py", "embed": "embed_items.py", "train": "train_rqvae.py"}
CONFIG = {
    "tokenize": tokenize_items.TokenizeConfig,
    "embed": embed_items.EmbedConfig,
    "train": train_rqvae.RQVAEConfig,
}
INPUTS = {
    "tokenize": ["data/Tiny_items_updated.parquet"],
    "embed": ["data/Tiny_items_updated.parquet", "data/Tiny_tokenized.npz"],
    "train": ["data/Tiny_items_with_embeddings.parquet"],
}
OUTPUTS = {
    "tokenize": ["data/Tiny_tokenized.npz"],
    "embed": ["data/Tiny_items_with_embeddings.parquet"],
    "train": ["data/Tiny_semantic_ids.parquet", "data/Tiny_quality.json", "checkpoints/best_model.pth",
              "checkpoints/final_model.pth"],
}  # fmt: skip
TRAINING = (
    "--encoder_hidden_dims 32 16 --codebook_embedding_dim 8 --codebook_size 16 --batch_size 64 --max_steps 60 "
    "--max_lr 3e-3 --warmup_steps 4 --val_split 0.1 --steps_per_codebook_reset 10 --steps_per_val_log 10 "
    "--steps_per_checkpoint 10"
)
BARS = re.compile(r"(tokenize|embed|train|Loading weights): |step \d+: |warning: ")


@dataclass
class Stages:
    """A folder after all three stages, none of which was disturbed."""

    folder: Path
    model: Path

    def argv(self, stage: str, *more: str) -> list[str]:
        """The command of a stage, for the folder it is run in."""
        own = {
            "tokenize": ["--model_name", str(self.model)],
            "embed": ["--device", "cpu", "--tokens_per_batch", "400"],
            "train": ["--device", "cpu", "--checkpoint_dir", "checkpoints", "--resume", *TRAINING.split()],
        }
        return ["--category", "Tiny", "--data_dir", "data", *own[stage], *more]

    def start(self, stage: str, folder: Path) -> Path:
        """A new folder of that stage's inputs and, where its output will be, an earlier file."""
        for name in INPUTS[stage]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / name, folder / name)
        (folder / OUTPUTS[stage][0]).write_bytes(b"earlier")
        return folder

    def wanted(self, stage: str) -> dict[str, bytes]:
        return {name: (self.folder / name).read_bytes() for name in OUTPUTS[stage]}


@pytest.fixture(scope="module")
def stages(tmp_path_factory, tiny_encoder) -> Stages:
    folder = tmp_path_factory.mktemp("undisturbed")
    stages = Stages(folder, tiny_encoder)
    (folder / "data").mkdir()
    texts = make_texts(N, seed=2)
    items = pl.DataFrame({"parent_asin": [f"B{i:04}" for i in range(N)], "item_context": texts})
    items.write_parquet(folder / "data" / "Tiny_items_updated.parquet")
    for stage in MAIN:
        assert run_here(stages, stage, folder)[0] == 0
    return stages


def run_alone(stages: Stages, stage: str, folder: Path) -> BaseProcess:
    """Starts the script in a process of its own, to be killed."""
    return start(SCRIPT[stage], *stages.argv(stage), folder=folder, log=said(folder))


def said(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def run_here(stages: Stages, stage: str, folder: Path, *more: str) -> tuple[int, str]:
    """The exit status and what was printed on standard error; anything but an exit is raised."""
    before, errors = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(errors):
            status = MAIN[stage](stages.argv(stage, *more))
    except SystemExit as ended:
        if isinstance(ended.code, str):  # Python prints it
            print(ended.code, file=errors)
        status = ended.code if isinstance(ended.code, int) else 1
    finally:
        os.chdir(before)
    return status or 0, errors.getvalue()


def complaint(errors: str) -> str:
    """The one line that is no progress bar and no warning."""
    lines = [line for line in re.split(r"[\r\n]+", errors) if line.strip() and not BARS.match(line)]
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: "), errors
    return lines[0]


# ---------------------------------------------------------------- killed


def wait_for_work(process: BaseProcess, folder: Path) -> float:
    """Returns the time when the process has printed something, or has ended."""
    while process.is_alive() and not said(folder).stat().st_size:
        time.sleep(0.005)
    return time.perf_counter()


@pytest.mark.parametrize("stage", MAIN)
def test_runs_killed_at_any_moment_end_with_the_same_bytes(stages, stage, tmp_path):
    wanted, draw = stages.wanted(stage), random.Random(KILLS)
    folder = stages.start(stage, tmp_path / "0")
    process = run_alone(stages, stage, folder)
    began = wait_for_work(process, folder)
    assert end(process) == 0, said(folder).read_text()
    length = time.perf_counter() - began
    kills, round_ = 0, 0
    while kills < KILLS:
        round_ += 1
        folder = stages.start(stage, tmp_path / str(round_))
        is_running = True
        while is_running and kills < KILLS:
            process = run_alone(stages, stage, folder)
            wait_for_work(process, folder)
            process.join(draw.uniform(0, length))
            is_running = process.exitcode is None
            if is_running:
                process.kill()
                process.join()
                kills += 1
            check_whole(folder, stage, wanted)
        if is_running:
            assert end(run_alone(stages, stage, folder)) == 0, said(folder).read_text()
        made = files_of(folder)
        assert {name: made[name] for name in wanted} == wanted
        assert set(made) <= {*INPUTS[stage], *files_of(stages.folder)}, "leftovers"


def check_whole(folder: Path, stage: str, wanted: dict[str, bytes]) -> None:
    """After a kill: the earlier output or the whole new one, and no checkpoint that cannot be read."""
    first = OUTPUTS[stage][0]
    assert (folder / first).read_bytes() in (b"earlier", wanted[first])
    for path in folder.glob("checkpoints/*.pth"):
        train_rqvae.load_model(path)


@pytest.mark.parametrize(("stage", "module"), [("embed", embed_items), ("train", train_rqvae)])
def test_a_run_beside_another_leaves_and_disturbs_nothing(stages, stage, module, tmp_path):
    folder = stages.start(stage, tmp_path / "folder")
    before = files_of(folder)
    with module.lock(folder / OUTPUTS[stage][0]):
        status, errors = run_here(stages, stage, folder)
    assert status == 2
    assert "another run is writing it" in complaint(errors)
    assert files_of(folder) == before


# ---------------------------------------------------------------- damaged


@st.composite
def damages(draw, names: list[str]) -> tuple[str, str, float]:
    """A file, what is done to it, and where: a share of its length, from the start or, negative, from the end."""
    place = draw(st.one_of(st.floats(0, 1), st.floats(0, 0.02), st.floats(-0.02, -0.0001)))
    name = draw(st.sampled_from(names))
    if name.endswith(".parquet"):  # polars itself aborts over some flipped bits
        return name, "cut", place
    return name, draw(st.sampled_from(["cut", "bit 0", "bit 6", "zeros", "longer"])), place


def damage(path: Path, how: str, place: float) -> None:
    content = bytearray(path.read_bytes())
    spot = int(len(content) * (place if place >= 0 else 1 + place))
    spot = min(spot, len(content) - 1)
    if how == "cut":
        del content[spot:]
    elif how == "zeros":
        content[spot : spot + 64] = bytes(len(content[spot : spot + 64]))
    elif how == "longer":
        content[spot:spot] = b"more"
    else:
        content[spot] ^= 1 << int(how[-1])
    path.write_bytes(content)


DAMAGED = INPUTS | {
    "embed": [*INPUTS["embed"], "data/.Tiny_items_with_embeddings.parquet.partial/*/vectors-0"],
    "train": [*INPUTS["train"], "checkpoints/checkpoint_step_50.pth", "checkpoints/best_model.pth"],
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(stages, tmp_path_factory) -> dict[str, Path]:
    """For each stage a folder as a stopped run leaves it, with what the next run builds on."""
    folders = {stage: stages.start(stage, tmp_path_factory.mktemp("stopped") / stage) for stage in MAIN}
    keep, kept = embed_items.Store.write, []

    def stopping(store, *arguments):
        keep(store, *arguments)
        kept.append(arguments)
        if len(kept) == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed_items.Store, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_here(stages, "embed", folders["embed"])
    for path in stages.folder.glob("checkpoints/*"):
        (folders["train"] / "checkpoints").mkdir(exist_ok=True)
        if path.name not in ("final_model.pth", "checkpoint_step_60.pth"):
            shutil.copy2(path, folders["train"] / "checkpoints")
    return folders


@pytest.mark.parametrize("stage", MAIN)
def test_damage_is_told_or_harmless(stages, stopped, stage, tmp_path_factory):
    refusals = []

    @settings(max_examples=10 * KILLS, suppress_health_check=list(HealthCheck))
    @given(damages(DAMAGED[stage]), st.sampled_from([[]] if stage == "tokenize" else [[], ["--overwrite"]]))
    def check(harm, more):
        folder = shutil.copytree(stopped[stage], tmp_path_factory.mktemp("damaged") / "copy")
        name, how, place = harm
        (path,) = folder.glob(name)
        damage(path, how, place)
        before = files_of(folder)
        status, errors = run_here(stages, stage, folder, *more)
        if status == 0:
            check_right(stages, stage, folder, name)
        else:
            assert status == 2, errors
            assert re.search(r"(data|checkpoints)/", complaint(errors))
            assert files_of(folder) == before
            refusals.append(harm)
        shutil.rmtree(folder.parent)

    check()
    assert refusals, "damage that nobody minds is not damage"


def check_right(stages: Stages, stage: str, folder: Path, name: str) -> None:
    """The output of a run over damaged files: the same as without, where the damaged file's content is vouched for."""
    if stage == "tokenize":  # a catalogue has no checksum: the tokens are those of what polars reads in it
        found = pl.read_parquet(folder / INPUTS[stage][0])
        with np.load(folder / OUTPUTS[stage][0], allow_pickle=False) as npz:
            assert str(npz["fingerprint"]) == tokenize_items.fingerprint(found)
            assert npz["attention_mask"].sum(1).min() > 0
    elif stage == "embed":
        wanted, made = (pl.read_parquet(place / OUTPUTS[stage][0]) for place in (stages.folder, folder))
        assert made.drop("embedding").equals(wanted.drop("embedding")), "other texts"
        mine, theirs = (np.stack(table["embedding"].to_list()) for table in (made, wanted))
        assert (mine * theirs).sum(axis=1).min() > 0.995, "other vectors"  # a flipped low bit goes unseen
    else:
        columns = pl.selectors.starts_with("semantic_id")
        wanted, made = (pl.read_parquet(place / OUTPUTS[stage][0]).select(columns) for place in (stages.folder, folder))
        assert made.equals(wanted), "other IDs"


@pytest.mark.parametrize(
    ("stage", "name", "kind"),
    [
        ("embed", "data/Tiny_tokenized.npz", "npz"),
        ("embed", "data/Tiny_tokenized.npz", "pickle"),
        ("train", "checkpoints/checkpoint_step_50.pth", "pth"),
        ("train", "checkpoints/best_model.pth", "pickle"),
    ],
)
def test_a_hostile_file_runs_nothing(stages, stopped, stage, name, kind, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/it_ran",)

    folder = shutil.copytree(stopped[stage], tmp_path / "folder")
    with open(folder / name, "wb") as file:
        if kind == "npz":
            np.savez(file, input_ids=np.array([Hostile()], dtype=object), n_items=1)
        elif kind == "pth":
            torch.save({"model_state_dict": Hostile(), "config": {}}, file)
        else:
            pickle.dump(Hostile(), file)
    status, errors = run_here(stages, stage, folder)
    assert status == (2 if stage == "embed" else 0), errors
    assert not (tmp_path / "it_ran").exists()


# ---------------------------------------------------------------- flags

ODD = {
    int: ["-1", "0", "1", "2", "3", "65", "1000", *(str(10**power) for power in (11, 12, 13)), "1.5"],
    float: ["-1", "0", "1e-300", "0.5", "1", "2", "1e12", "1e13", "1e300", "nan", "inf", "-inf"],
    bool: ["True", "False", "maybe", ""],
    str: ["", "é", "a b", "no/such/folder", "日本", "*", "[a]", "-", "--", "None", "\t"],
}  # fmt: skip
ODD_ANYWHERE = ["", "abc", "1,5", "½", "None", "[]"]
FREE = {"num_epochs", "device"}  # would run for ever, or depends on the machine


def flag_sets(stage: str):
    """A flag of the stage with a value that nobody needs, or another flag as well."""

    @st.composite
    def flag(draw) -> list[str]:
        field = draw(st.sampled_from([field for field in fields(CONFIG[stage]) if field.name not in FREE]))
        hint = get_type_hints(CONFIG[stage])[field.name]
        kinds = [kind for kind in (hint, *get_args(hint)) if kind in ODD]
        values = [value for kind in kinds for value in ODD[kind]] + ODD_ANYWHERE
        count = draw(st.integers(0, 3)) if hint == list[int] else 1
        return [f"--{field.name}", *(draw(st.sampled_from(values)) for _ in range(count))]

    return st.lists(flag(), min_size=1, max_size=2).map(lambda flags: list(chain(*flags)))


@pytest.mark.parametrize("stage", MAIN)
def test_flags_are_taken_or_refused_in_one_line(stages, stopped, stage, tmp_path_factory):
    source = stages.start(stage, tmp_path_factory.mktemp("flags") / "source")
    seen = set()

    @settings(max_examples=10 * KILLS, suppress_health_check=list(HealthCheck))
    @given(flag_sets(stage))
    @example(["--nonsense", "1"])
    @example([])
    @example(["--input_mixing", "1e-300"])
    def check(more):
        folder = shutil.copytree(source, tmp_path_factory.mktemp("flags") / "copy")
        if stage == "train":
            more = ["--num_epochs", "4", *more]
        before = files_of(folder)
        status, errors = run_here(stages, stage, folder, *more)
        seen.add(status)
        if status == 2:
            complaint(errors)
            assert {name: content for name, content in files_of(folder).items() if "/." not in name} == before
        elif status == 1:  # only a training whose numbers are none any more
            assert re.search(r"became.*train again with a lower --max_lr", complaint(errors))
            assert (folder / OUTPUTS[stage][0]).read_bytes() == b"earlier"
        shutil.rmtree(folder.parent)

    check()
    assert seen >= {0, 2}


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of some size, and changes it: `small_disk("size=1m")`, `small_disk("remount,ro")`."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("no mount command here")
    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("stage", MAIN)
@pytest.mark.parametrize("share", [0.5] if KILLS < 10 else [0.02, 0.2, 0.5, 0.8, 0.95])
def test_a_full_disk_is_told_and_the_same_command_goes_on(stages, stage, share, small_disk):
    disk = small_disk("size=64m")
    folder = stages.start(stage, disk / "run")
    used = shutil.disk_usage(disk).used
    needed = sum(map(len, stages.wanted(stage).values()))  # at the least
    small_disk(f"remount,size={used + max(4096, int(needed * share))}")
    status, errors = run_here(stages, stage, folder)
    assert status == 2, errors
    assert "cannot be written" in complaint(errors)
    assert (folder / OUTPUTS[stage][0]).read_bytes() == b"earlier"
    small_disk("remount,size=64m")
    assert run_here(stages, stage, folder)[0] == 0
    assert {name: (folder / name).read_bytes() for name in OUTPUTS[stage]} == stages.wanted(stage)


@pytest.mark.parametrize("stage", MAIN)
def test_a_read_only_folder_is_told_before_the_work(stages, stage, small_disk, monkeypatch):
    disk = small_disk("size=64m")
    folder = stages.start(stage, disk / "run")
    small_disk("remount,ro")
    monkeypatch.setattr(tokenize_items, "load_tokenizer", None)  # a call would be a traceback
    monkeypatch.setattr(embed_items, "load_model", None)
    monkeypatch.setattr(train_rqvae, "EmbeddingDataset", None)
    status, errors = run_here(stages, stage, folder)
    assert status == 2
    assert "cannot be written" in complaint(errors)
