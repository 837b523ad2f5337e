"""train_rqvae.py through its command line: the files that it writes, resumes, logs and refuses, on a tiny catalogue."""

import contextlib
import io
import itertools
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from processes import end, start

import train_rqvae

SCRIPT = Path(__file__).resolve().parents[1] / "train_rqvae.py"
N, DIM, LEVELS = 300, 24, 3
# every run starts in its own folder and gets relative paths, so that checkpoints of two folders can be equal
SOURCE, IDS = "data/Tiny_items_with_embeddings.parquet", "data/Tiny_semantic_ids.parquet"
QUALITY, BEST, FINAL = "data/Tiny_quality.json", "checkpoints/best_model.pth", "checkpoints/final_model.pth"
TEN, TWENTY, LAST = (f"checkpoints/checkpoint_step_{step}.pth" for step in (10, 20, 24))
TINY = {
    "category": "Tiny", "data_dir": "data", "checkpoint_dir": "checkpoints", "device": "cpu", "dtype": "float32",
    "encoder_hidden_dims": [32, 16], "codebook_embedding_dim": 8, "codebook_quantization_levels": LEVELS,
    "codebook_size": 8, "batch_size": 64, "max_steps": 24, "max_lr": 3e-3, "warmup_steps": 4, "autoencoder_steps": 6,
    "val_split": 0.1, "steps_per_codebook_reset": 5, "steps_per_train_log": 1, "steps_per_val_log": 8,
    "steps_per_checkpoint": 10,
}  # fmt: skip


# ---------------------------------------------------------------- helpers


def catalogue(n: int = N, dim: int = DIM, seed: int = 0) -> pl.DataFrame:
    """Items around thirty centres, of unit length, in an order that is not that of their names."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(30, dim))[generator.integers(30, size=n)] + 0.2 * generator.normal(size=(n, dim))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return pl.DataFrame(
        {
            "title": [f"Item {row}" for row in range(n)],
            "parent_asin": [f"B{name:04}" for name in generator.permutation(n)],
            "item_context": ["text"] * n,
            "embedding": pl.Series(x.tolist(), dtype=pl.List(pl.Float32)),
        }
    )


NAMES = catalogue()["parent_asin"].to_list()


def new_folder(folder: Path, table: pl.DataFrame | None = None) -> Path:
    (folder / "data").mkdir(parents=True)
    (catalogue() if table is None else table).write_parquet(folder / SOURCE)
    return folder


def command(*switches: str, **changes) -> list[str]:
    argv = []
    for name, value in (TINY | changes).items():
        if value is not None:
            argv += [f"--{name}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    return [*argv, *switches]


def run(folder: Path, *switches: str, **changes) -> int:
    """Run the script in `folder`. A change to None leaves that flag out."""
    with contextlib.chdir(folder):
        return train_rqvae.main(command(*switches, **changes))


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def ids_of(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / IDS, glob=False)


def codes_of(folder: Path, levels: int = LEVELS) -> np.ndarray:
    return ids_of(folder).select(f"semantic_id_{level}" for level in range(levels)).to_numpy()


def embeddings_of(folder: Path) -> torch.Tensor:
    return torch.from_numpy(np.stack(pl.read_parquet(folder / SOURCE)["embedding"].to_list()).astype(np.float32))


def quality_of(folder: Path) -> dict:
    return json.loads((folder / QUALITY).read_text())


def same_files(one: Path, other: Path, *names: str) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names or (BEST, FINAL, IDS))


def outputs(folder: Path) -> dict[str, bytes]:
    """Every file below the folder but W&B's and empty lock files."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "wandb" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.suffix != ".lock"}


def complaint(stderr: str) -> str:
    """The one error line; beside it there may only be progress and warnings, each on lines of their own."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    rest = [line for line in lines if not re.match(r"error: |warning: |train: |step \d+: ", line)]
    assert not rest, rest
    return errors[0]


@pytest.fixture
def refused(capsys):
    """Runs a command that has to end with status 2 and one line, and to leave every file as it was."""

    def check(folder: Path, *switches: str, files_stay: bool = True, **changes) -> str:
        before = outputs(folder)
        capsys.readouterr()
        status = None
        try:
            run(folder, *switches, **changes)
        except SystemExit as ended:  # pytest.raises would keep its frames, and so the locks of this run
            status = ended.code
        line = complaint(capsys.readouterr().err)
        assert status == 2, line
        if files_stay:
            assert outputs(folder) == before
        return line

    return check


class Recorder:
    """Stands in for the run of W&B and keeps all that it is given."""

    def __init__(self):
        self.id, self.url, self.settings = "run", None, SimpleNamespace(sync_dir="folder")
        self.logs, self.artifacts, self.started, self.finished = [], [], [], 0
        self.summary, self.report = {}, {}

    def init(self, **options) -> "Recorder":
        self.started.append(options)
        return self

    def log(self, values: dict, step: int | None = None) -> None:
        if step is None:
            self.report |= values
        else:
            self.logs.append((step, values))

    def log_artifact(self, artifact) -> None:
        self.artifacts.append(artifact)

    def finish(self) -> None:
        self.finished += 1

    def series(self, name: str) -> dict[int, float]:
        return {step: values[name] for step, values in self.logs if name in values}


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(train_rqvae.wandb, "init", recorder.init)
    return recorder


@pytest.fixture
def calls(monkeypatch):
    return partial(watch, monkeypatch)


def watch(patch: pytest.MonkeyPatch, name: str) -> list:
    """Watches a function of the script: the returned list gets (arguments, result) of every call."""
    seen, real = [], getattr(train_rqvae, name)

    def watched(*arguments):
        seen.append((arguments, real(*arguments)))
        return seen[-1][1]

    patch.setattr(train_rqvae, name, watched)
    return seen


def before_step(patch: pytest.MonkeyPatch, step: int, act) -> None:
    """Calls `act` with the model before the n-th training step from now."""
    real, count = train_rqvae.train_step, itertools.count(1)

    def watched(model, *arguments):
        if next(count) == step:
            act(model)
        return real(model, *arguments)

    patch.setattr(train_rqvae, "train_step", watched)


def interrupt(_) -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Killed(Exception):
    """Ends a run without any save, as SIGKILL does."""


def kill(*_) -> None:
    raise Killed


@pytest.fixture
def folder(tmp_path) -> Path:
    return new_folder(tmp_path / "folder")


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> SimpleNamespace:
    """One undisturbed run: its folder, W&B's recorder, its calls of train_step, its plan, and its standard output."""
    folder, recorder, text = new_folder(tmp_path_factory.mktemp("watched") / "run"), Recorder(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.setattr(train_rqvae.wandb, "init", recorder.init)
        steps, plans = watch(patch, "train_step"), watch(patch, "make_plan")
        assert run(folder) == 0
    return SimpleNamespace(folder=folder, recorder=recorder, steps=steps, plan=plans[0][1], text=text.getvalue())


@pytest.fixture(scope="module")
def trained(watched) -> Path:
    """The folder of that run; tests only read it."""
    return watched.folder


@pytest.fixture(scope="module", params=[(False, 60), (True, [60, 40, 50])], ids=["gradient", "ema"])
def undisturbed(request, tmp_path_factory) -> SimpleNamespace:
    """Another such folder for each quantizer, and its flags: of so many codes, some are unused at each reset."""
    flags = dict(zip(("use_ema_vq", "codebook_size"), request.param, strict=True))
    folder = new_folder(tmp_path_factory.mktemp("undisturbed") / "run")
    assert run(folder, **flags) == 0
    return SimpleNamespace(folder=folder, flags=flags)


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of that folder, for tests that break something in it."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture
def unfinished(copy) -> Path:
    """A copy of that folder as a run leaves it that is stopped before its end."""
    (copy / FINAL).unlink()
    (copy / LAST).unlink()
    return copy


# ---------------------------------------------------------------- files of a run


def test_run_writes_every_checkpoint_and_no_other_file(trained):
    assert set(outputs(trained)) == {SOURCE, IDS, QUALITY, BEST, FINAL, TEN, TWENTY, LAST}


def test_ids_are_in_input_order_distinct_and_spelled_from_their_codes(trained):
    table, items = ids_of(trained), pl.read_parquet(trained / SOURCE)
    names = [f"semantic_id_{level}" for level in range(LEVELS)]
    assert table.columns == ["parent_asin", *names, "semantic_id"]
    assert [table[name].dtype.is_integer() for name in names] == [True] * LEVELS
    assert table["semantic_id"].dtype == pl.String
    assert table["parent_asin"].to_list() == items["parent_asin"].to_list()
    codes = table.select(names).to_numpy()
    assert table["semantic_id"].to_list() == ["-".join(map(str, row)) for row in codes.tolist()]
    assert table["semantic_id"].is_unique().all()
    assert codes.min() >= 0
    assert codes.max() < TINY["codebook_size"]
    assert table.null_count().sum_horizontal().item() == 0


@pytest.mark.parametrize(("name", "step"), [(BEST, None), (FINAL, 24), (TEN, 10)])
def test_checkpoints_are_plain_dicts_of_the_contract(trained, name, step):
    checkpoint = load(trained / name)  # weights_only=True: nothing but tensors and plain types
    assert checkpoint.keys() >= {"model_state_dict", "config", "step", "epoch", "val_loss"}
    assert json.loads(json.dumps(checkpoint["config"])) == checkpoint["config"]
    assert checkpoint["config"]["item_embedding_dim"] == DIM
    parts = {key.split(".")[0] for key in checkpoint["model_state_dict"]}
    assert parts == {"input_mean", "input_scale", "encoder", "decoder", "quantizers"}
    assert checkpoint["step"] == step or name == BEST
    assert checkpoint["epoch"] == checkpoint["step"] // 4  # 270 training rows, four batches of 64


def test_best_model_is_the_last_of_the_lowest_validation_loss(folder, recorder):
    assert run(folder, steps_per_val_log=3) == 0
    losses = recorder.series("val/total_loss")
    lowest, expected = math.inf, None
    for step, loss in losses.items():
        if loss <= (1 + train_rqvae.TIE_TOLERANCE) * lowest:
            expected = step
        lowest = min(lowest, loss)
    best = load(folder / BEST)
    assert best["step"] == expected
    assert best["val_loss"] == losses[expected]


def test_a_best_model_far_from_the_end_is_told(folder, monkeypatch, capsys):
    losses, validate = iter((1.0, 2.0, 3.0)), train_rqvae.validate
    monkeypatch.setattr(train_rqvae, "validate", lambda *data: validate(*data) | {"val/total_loss": next(losses)})
    run(folder)
    assert "warning: the best model is of step 8 of 24" in capsys.readouterr().err


def test_exported_codes_are_those_of_the_best_model_and_a_suffix_makes_them_distinct(undisturbed, tmp_path, capsys):
    folder = shutil.copytree(undisturbed.folder, tmp_path / "copy")
    assert run(folder, "--export_only", collisions="keep", **undisturbed.flags) == 0
    model, encoded = train_rqvae.load_model(folder / BEST, "cpu"), codes_of(folder)
    assert not model.training
    assert np.array_equal(model.encode_to_semantic_ids(embeddings_of(folder)), encoded)
    assert len(np.unique(encoded, axis=0)) < N  # there are collisions to resolve
    assert run(folder, "--export_only", collisions="suffix", **undisturbed.flags) == 0
    assert f"{N} of {N} items get another ID" in capsys.readouterr().err
    table = ids_of(folder)
    assert table.columns[1:-1] == [f"semantic_id_{level}" for level in range(LEVELS + 1)]
    assert np.array_equal(codes_of(folder), encoded)
    assert table["semantic_id"].is_unique().all()
    assert table["semantic_id"].str.count_matches("-").eq(LEVELS).all()


@pytest.mark.parametrize("collisions", ["assign", "keep"])  # a suffix counts in the order of the rows
def test_an_item_has_the_same_id_in_whatever_order_the_rows_come(copy, collisions):
    assert run(copy, "--export_only", collisions=collisions) == 0
    first = ids_of(copy)
    shuffled = pl.read_parquet(copy / SOURCE).sample(fraction=1, shuffle=True, seed=1)
    shuffled.write_parquet(copy / SOURCE)
    assert run(copy, "--export_only", collisions=collisions) == 0
    second = ids_of(copy)
    assert second["parent_asin"].to_list() == shuffled["parent_asin"].to_list()
    assert not first.equals(second)
    assert first.sort("parent_asin").equals(second.sort("parent_asin"))


def test_codebooks_of_two_sizes_go_the_whole_way(tmp_path, recorder, capsys, refused):
    sizes, flags = [12, 5], {"codebook_quantization_levels": None, "codebook_size": [12, 5]}
    folder = new_folder(tmp_path / "run", catalogue(50))  # and 60 IDs
    assert run(folder, **flags) == 0
    model, quality, before = train_rqvae.load_model(folder / BEST), quality_of(folder), ids_of(folder)
    assert model.config.codebook_size == quality["codebook_size"] == sizes
    assert [tuple(quantizer.codebook.shape) for quantizer in model.quantizers] == [(12, 8), (5, 8)]
    assert "50 items, codebooks of 12 × 5 codes" in capsys.readouterr().out
    for level, size in enumerate(sizes):
        counts = quality["levels"][level]["items_per_code"]
        assert (len(counts), sum(counts)) == (size, 50)
        assert list(recorder.report[f"codes/level_{level}"].histogram) == counts
    assert run(folder, "--export_only", collisions="suffix", codebook_quantization_levels=None, codebook_size=None) == 0
    assert np.array_equal(codes_of(folder, 2), model.encode_to_semantic_ids(embeddings_of(folder)))
    assert ids_of(folder)["semantic_id"].is_unique().all()

    before.write_parquet(folder / "saved.parquet")  # without its metadata
    assert "saved again by another program" in refused(folder, "--export_only", keep_ids="saved.parquet", **flags)
    assert run(folder, "--export_only", **flags) == 0
    assert ids_of(folder).equals(before)
    ten = catalogue(60).filter(pl.col("parent_asin") >= "B0050")
    pl.concat([catalogue(50), ten]).write_parquet(folder / SOURCE)
    assert run(folder, "--export_only", keep_ids=IDS, **flags) == 0
    assert ids_of(folder)[:50].equals(before)
    assert {tuple(row) for row in codes_of(folder, 2).tolist()} == set(itertools.product(range(12), range(5)))


@pytest.mark.parametrize(("few", "levels", "told"), [(range(301), 3, 1), (range(300), 3, 0), (range(301), 2, 0)])
def test_the_report_names_the_shape_that_suits_few_items(copy, monkeypatch, capsys, few, levels, told):
    monkeypatch.setattr(train_rqvae, "FEW_ITEMS", few)
    quality = quality_of(copy)
    train_rqvae.print_report(quality | {"codebook_size": quality["codebook_size"][:levels]}, "tree")
    assert capsys.readouterr().out.count("a recommender does better with --codebook_size 1024 1024") == told


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # equal items
def test_as_many_items_as_ids_use_every_id_even_where_all_embeddings_are_equal(tmp_path):
    table = catalogue(64)
    folder = new_folder(tmp_path / "full", table.with_columns(embedding=pl.Series([table["embedding"][0]] * 64)))
    assert run(folder, codebook_quantization_levels=2) == 0
    assert {tuple(row) for row in codes_of(folder, 2).tolist()} == {(a, b) for a in range(8) for b in range(8)}


def test_a_catalogue_of_one_item_gets_its_id(tmp_path):
    folder = new_folder(tmp_path / "one", catalogue(1))
    assert run(folder, use_kmeans_init=False) == 0
    assert len(ids_of(folder)) == 1


def test_export_only_takes_the_sizes_from_the_model_and_writes_the_same_bytes(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "[x]*")  # no pattern
    (folder / IDS).unlink()
    argv = ["--category", "Tiny", "--data_dir", str(folder / "data"), "--checkpoint_dir", str(folder / "checkpoints")]
    assert train_rqvae.main([*argv, "--device", "cpu", "--export_only"]) == 0
    assert outputs(folder) == outputs(trained)


# ---------------------------------------------------------------- report


def figures_in(text: str, first: str) -> list[str]:
    """The figures of the line of a printed table that begins with `first`."""
    (line,) = re.findall(rf"^ *{first}  +(.*)$", text.split("some prefixes")[0], flags=re.MULTILINE)
    return line.split()


def test_report_is_of_the_ids_that_were_written(copy, capsys):
    run(copy, "--export_only", collisions="keep")
    codes = codes_of(copy)
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    quality = quality_of(copy)
    assert quality["collisions"] == "keep"
    assert quality["displaced"] == 0
    assert quality["as_encoded"] == quality["as_written"]
    assert quality["as_written"]["distinct"] == pytest.approx(len(counts) / N)
    assert quality["as_written"]["largest_collision"] == counts.max()
    x = embeddings_of(copy)
    model = train_rqvae.load_model(copy / BEST)
    decoded = model.decode_from_semantic_ids(torch.from_numpy(codes).long())
    unexplained = ((x - decoded) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert quality["as_written"]["unexplained_variance"] == pytest.approx(unexplained.item(), rel=1e-4)

    text = capsys.readouterr().out
    for name in ("as encoded", "as written: keep"):
        shown = figures_in(text, name)
        assert shown[0] == f"{len(counts) / N:.4f}"
        assert f"{unexplained:.4f}" in shown
    for level, found in enumerate(quality["levels"]):
        assert figures_in(text, str(level))[:2] == [f"{found[name]:.4f}" for name in ("usage", "perplexity")]
        assert found["items_per_code"] == np.bincount(codes[:, level], minlength=8).tolist()
    run(copy, "--export_only")
    displaced = (codes_of(copy) != codes).any(1).mean()
    assert quality_of(copy)["displaced"] == pytest.approx(displaced)
    assert f"{displaced:.2%} of the items" in capsys.readouterr().out


def test_examples_are_items_below_their_own_prefixes(trained, watched):
    tree = watched.text.split("some prefixes and their items:\n")[1].split("\n\n")[0].splitlines()
    ids = ids_of(trained).with_columns(title=pl.read_parquet(trained / SOURCE)["title"])
    title_of = dict(ids.select("semantic_id", "title").iter_rows())
    shown, above = 0, ["", "", ""]
    for line in tree:
        depth = (len(line) - len(line.lstrip())) // 2
        name, text = line.split(maxsplit=1)
        assert depth == 0 or name.startswith(above[depth - 1])
        above[depth] = name
        if name.endswith("-"):
            count = ids["semantic_id"].str.starts_with(name).sum()
            assert text == f"{count} item{'s' * (count > 1)}"
        else:
            assert title_of[name] == text
            shown += 1
    assert shown >= 10


def test_titles_cannot_steer_the_terminal(copy, capsys):
    odd = "\x1b[31mRED\x07\u202e \n 日本語"
    pl.read_parquet(copy / SOURCE).with_columns(title=pl.lit(odd)).write_parquet(copy / SOURCE)
    run(copy, "--export_only")
    text = capsys.readouterr().out
    assert "  [31mRED 日本語\n" in text
    assert not set(text) & set("\x1b\x07\u202e")


def test_sampled_figures_say_so(copy, capsys, monkeypatch):
    assert quality_of(copy)["sampled_items"] == N
    monkeypatch.setattr(train_rqvae, "QUALITY_ROWS", 100)
    run(copy, "--export_only")
    assert "unexplained variance and coherence of 100" in capsys.readouterr().out
    assert quality_of(copy)["sampled_items"] == 100


@pytest.mark.parametrize(("levels", "collisions"), [(1, "assign"), (2, "suffix"), (4, "assign")])
def test_every_number_of_levels_has_its_report(folder, capsys, levels, collisions):
    size = 300 if levels == 1 else 20
    run(folder, codebook_quantization_levels=levels, collisions=collisions, codebook_size=size, use_kmeans_init=False)
    columns = [f"semantic_id_{level}" for level in range(levels + (collisions == "suffix"))]
    assert ids_of(folder).columns == ["parent_asin", *columns, "semantic_id"]
    assert len(quality_of(folder)["levels"]) == levels
    text = capsys.readouterr().out
    assert all(figures_in(text, str(level)) for level in range(levels))


def test_report_goes_to_wandb(watched):
    quality = quality_of(watched.folder)
    for level, found in enumerate(quality["levels"]):
        assert list(watched.recorder.report[f"codes/level_{level}"].histogram) == found["items_per_code"]
    assert watched.recorder.summary["quality"]["as_written"] == quality["as_written"]
    # more codes than W&B takes bars: neighbouring codes share one
    recorder = Recorder()
    model = train_rqvae.load_model(watched.folder / BEST)
    config = train_rqvae.RQVAEConfig(checkpoint_dir=str(watched.folder / "checkpoints"))
    train_rqvae.finish_wandb(recorder, model, {"levels": [{"items_per_code": [1] * 1300}]}, config)
    histogram = recorder.report["codes/level_0"].histogram
    assert sum(histogram) == 1300
    assert set(histogram) == {2, 3}


# ---------------------------------------------------------------- determinism, stop and resume


@pytest.mark.parametrize(
    "end", ["interrupted 3", "interrupted 6", "interrupted 13", "killed 4", "killed 18", "killed in export"]
)
def test_a_stopped_run_ends_with_the_bytes_of_an_undisturbed_one(undisturbed, folder, monkeypatch, capsys, end):
    """Ctrl-C before k-means, at it, between resets; a kill before a checkpoint, after a new best model, at the end."""
    flags, step = undisturbed.flags, end.split()[-1]
    with monkeypatch.context() as patch:
        if step == "export":
            patch.setattr(train_rqvae, "export", kill)
        else:
            before_step(patch, int(step), kill if "killed" in end else interrupt)
        if "killed" in end:
            with pytest.raises(Killed):
                run(folder, **flags)
        else:
            assert run(folder, **flags) == 130
            assert "--resume" in capsys.readouterr().out
    assert (folder / FINAL).exists() == (step == "export")
    torch.manual_seed(12345)  # whatever ran in between
    assert run(folder, "--resume", **flags) == 0
    found = {"4": None, "18": "10", "export": None}.get(step, step)  # nothing is left to train after "export"
    assert (f"going on from checkpoints/checkpoint_step_{found}.pth" in capsys.readouterr().out) == bool(found)
    assert same_files(folder, undisturbed.folder, BEST, FINAL, IDS, QUALITY)


def test_a_resumed_run_remembers_its_lowest_validation_loss(folder, monkeypatch):
    monkeypatch.setattr(train_rqvae, "TIE_TOLERANCE", -0.9)  # no later model is as good as the first
    with monkeypatch.context() as patch:
        before_step(patch, 13, interrupt)
        assert run(folder) == 130
    assert run(folder, "--resume") == 0
    assert load(folder / BEST)["step"] == 8


@pytest.mark.parametrize("flag", ["category", "data_dir"])
def test_a_model_of_another_catalogue_is_replaced_only_when_asked(copy, refused, flag):
    shutil.copytree(copy / "data", copy / "more")
    shutil.copy(copy / SOURCE, copy / SOURCE.replace("Tiny", "Other"))
    other, was = {"category": ("Other", "Tiny"), "data_dir": ("more", "data")}[flag]
    line = refused(copy, seed=1, **{flag: other})
    there = SOURCE.replace(was, other)
    assert line.startswith(f"error: {BEST}: trained on {SOURCE}, not on {there}; give --overwrite"), line
    assert run(copy, seed=1, data_dir=str(copy / "data")) == 0  # another name of the same folder
    assert run(copy, "--overwrite", seed=1, **{flag: other}) == 0
    assert load(copy / BEST)["config"][flag] == other


def test_the_ids_of_a_stopped_run_come_with_a_warning(unfinished, capsys):
    assert run(unfinished, "--export_only") == 0
    step = load(unfinished / BEST)["step"]
    assert f"no {FINAL}: if training was stopped, these are the IDs of its step {step}" in capsys.readouterr().err


def test_a_stopped_run_is_replaced_only_when_asked(unfinished, trained, refused):
    for flags in ({}, {"max_lr": 1e-2}):  # whatever flags are given now
        assert "has checkpoints of a run that was stopped; --resume goes on" in refused(unfinished, **flags)
    (unfinished / TWENTY).write_bytes(b"damaged")
    assert "has checkpoints of a run that was stopped" in refused(unfinished)
    (unfinished / BEST).unlink(missing_ok=True)
    shutil.copy(unfinished / SOURCE, unfinished / SOURCE.replace("Tiny", "Other"))
    assert "a run that was stopped" in refused(unfinished, category="Other")
    assert run(unfinished, "--overwrite") == 0
    assert same_files(unfinished, trained)


def test_a_new_run_leaves_no_checkpoint_of_another_to_resume_from(copy):
    assert run(copy, seed=7, steps_per_checkpoint=1000) == 0
    assert [path.name for path in copy.glob("checkpoints/checkpoint_step_*")] == [Path(LAST).name]
    assert load(copy / LAST)["config"]["seed"] == 7


def test_a_finished_run_can_be_trained_longer(copy, capsys, monkeypatch, refused):
    first, ids = load(copy / LAST), (copy / IDS).read_bytes()
    with monkeypatch.context() as patch:
        before_step(patch, 21, interrupt)
        assert run(copy, "--resume", max_steps=60) == 130
    assert f"going on from {LAST}" in capsys.readouterr().out
    assert first["step"] < load(copy / BEST)["step"] < 60
    assert "a run that was stopped" in refused(copy)  # nor is its half-trained model exported as that of the first run
    assert (copy / IDS).read_bytes() == ids
    assert run(copy, "--resume", max_steps=60) == 0
    assert load(copy / FINAL)["step"] == 60


def test_a_longer_run_that_was_stopped_is_neither_exported_nor_started_over(copy, monkeypatch, refused):
    longer = {"max_steps": 60, "steps_per_checkpoint": 1000}
    with monkeypatch.context() as patch:  # before its first validation: the best model is still that of the first run
        before_step(patch, 2, interrupt)
        assert run(copy, "--resume", **longer) == 130
    assert not (copy / FINAL).exists()
    assert "a run that was stopped" in refused(copy, collisions="suffix")
    assert "a run that was stopped" in refused(copy, **longer)
    (copy / LAST.replace("24", "26")).unlink()
    with monkeypatch.context() as patch:  # after it
        before_step(patch, 21, kill)
        with pytest.raises(Killed):
            run(copy, "--resume", **longer)
    assert load(copy / BEST)["step"] > 24
    assert f"{BEST}: missing, damaged or of a longer run" in refused(copy, "--resume")


def test_results_of_more_rows_are_replaced_by_a_trial_only_when_asked(copy, refused):
    trial = {"num_rows": 200, "checkpoint_dir": "trial"}
    assert f"{IDS}: has 300 items, and this trial 200" in refused(copy, num_rows=200)
    for switches in ([], ["--resume"]):
        assert f"{IDS}: has 300 items, and this trial 200" in refused(copy, *switches, **trial)
    assert f"{IDS}: has 300 items" in refused(copy, "--export_only", num_rows=200)
    (copy / IDS).rename(copy / "whole.parquet")
    assert run(copy, **trial) == 0  # nothing to lose
    (copy / "whole.parquet").rename(copy / IDS)
    assert f"{IDS}: has 300 items" in refused(copy, **trial)  # its model is complete
    (copy / "trial" / "final_model.pth").unlink()
    assert f"{IDS}: has 300 items" in refused(copy, "--resume", **trial)
    assert run(copy, "--export_only", "--overwrite", **trial) == 0
    assert len(ids_of(copy)) == 200
    assert run(copy, "--overwrite", num_rows=250) == 0
    assert len(ids_of(copy)) == 250
    assert run(copy) == 0  # more rows may replace fewer
    assert len(ids_of(copy)) == N


@pytest.mark.parametrize("finished", [True, False])
def test_resume_without_numbered_checkpoints_starts_over(copy, trained, capsys, finished):
    for path in (TEN, TWENTY, LAST):
        (copy / path).unlink()
    if not finished:
        (copy / FINAL).unlink()  # as after a kill in the first steps of the run with another seed
    assert run(copy, "--resume", seed=1) == 0
    assert "no sound checkpoint in checkpoints: starting from the beginning" in capsys.readouterr().out
    assert load(copy / BEST)["config"]["seed"] == 1
    assert run(copy, "--overwrite") == 0
    assert same_files(copy, trained)


def test_a_run_killed_after_its_last_checkpoint_still_ends_with_every_file(folder, refused):
    flags = {"max_steps": 20, "steps_per_val_log": 10}  # a numbered checkpoint at the last step
    assert run(folder, **flags) == 0
    before = outputs(folder)
    (folder / FINAL).unlink()
    (folder / IDS).unlink()
    assert run(folder, "--resume", **flags) == 0
    assert outputs(folder) == before
    (folder / BEST).unlink()  # it cannot be made again: its step may be long past
    line = refused(folder, "--resume", **flags)
    assert BEST in line
    assert "--overwrite instead of --resume" in line


def test_resuming_with_fewer_steps_than_are_done_is_refused(copy, refused):
    line = refused(copy, "--resume", max_steps=15)
    assert LAST in line
    assert "--max_steps" in line


def test_a_complete_run_is_not_repeated_unless_asked(copy, trained, calls, capsys):
    steps, exports = calls("train_step"), calls("export")
    before = outputs(copy)
    for switches in ([], ["--resume"]):
        assert run(copy, *switches) == 0
        assert "--overwrite trains again" in capsys.readouterr().out
    assert outputs(copy) == before
    assert not steps
    assert not exports
    assert run(copy, "--overwrite") == 0
    assert len(steps) == 24
    assert same_files(copy, trained)


@pytest.mark.parametrize(
    ("change", "flags", "trains"),
    [
        (lambda folder: (folder / BEST).unlink(), {}, True),
        (lambda folder: (folder / IDS).unlink(), {}, False),
        (lambda folder: os.truncate(folder / IDS, 999), {}, False),
        (lambda folder: (folder / QUALITY).unlink(), {}, False),
        (lambda folder: run(folder, "--export_only", collisions="suffix"), {}, False),
        (lambda folder: catalogue(seed=1).write_parquet(folder / SOURCE), {}, True),
        (None, {"max_steps": 25}, True),
        (None, {"seed": 1}, True),
    ],
    ids=["no best", "no IDs", "damaged IDs", "no report", "other collisions", "other data",
         "longer", "another seed"],
)  # fmt: skip
def test_a_run_that_is_not_complete_does_all_that_is_missing(copy, trained, calls, change, flags, trains):
    if change:
        change(copy)
    steps, exports = calls("train_step"), calls("export")
    assert run(copy, **flags) == 0
    assert bool(steps) == trains
    assert len(exports) == 1
    if not flags and (copy / SOURCE).read_bytes() == (trained / SOURCE).read_bytes():
        assert same_files(copy, trained, BEST, FINAL, IDS, QUALITY)


def test_a_reordered_catalogue_is_not_complete(copy):
    table = catalogue().reverse()
    table.write_parquet(copy / SOURCE)
    assert run(copy) == 0
    assert ids_of(copy)["parent_asin"].to_list() == table["parent_asin"].to_list()


def test_the_newest_checkpoints_of_this_run_stay_and_those_of_an_earlier_longer_one_go(folder):
    assert run(folder, max_steps=30) == 0
    for path in folder.glob("checkpoints/checkpoint_step_*"):
        os.utime(path, (2**31, 2**31))  # as if a clock was ahead
    mine = "checkpoints/checkpoint_step_30_mine.pth"
    (folder / mine).write_bytes(b"a copy by hand")
    assert run(folder, seed=1, steps_per_checkpoint=5, keep_checkpoints=2) == 0
    assert set(outputs(folder)) == {SOURCE, IDS, QUALITY, BEST, FINAL, TWENTY, LAST, mine}
    assert run(folder, "--resume", seed=1, max_steps=26) == 0


@pytest.mark.parametrize(("first", "second", "stop"), [(24, 60, 10), (60, 24, 10)], ids=["longer", "shorter"])
def test_resuming_with_another_length_starts_the_codes_exactly_once(folder, monkeypatch, calls, first, second, stop):
    # autoencoder_steps is left to its default, which depends on the length: 4 of 24, 12 of 60
    started = calls("start_quantizing")
    flags = {"autoencoder_steps": None, "steps_per_checkpoint": 1000}
    with monkeypatch.context() as patch:
        before_step(patch, stop, interrupt)
        assert run(folder, max_steps=first, **flags) == 130
    assert run(folder, "--resume", max_steps=second, **flags) == 0
    assert len(started) == 1


def test_a_script_at_a_terminal_asks_nothing_and_stops_after_its_step_on_sigterm(folder):
    """Without a W&B key the run is offline."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    argv = command(max_steps=1_000_000, steps_per_train_log=1000, steps_per_checkpoint=20)
    keyboard, terminal = pty.openpty()
    os.set_blocking(keyboard, False)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *argv], cwd=folder, env=environment | {"HOME": str(folder), "COLUMNS": "200"},
        stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, text=True,
    )  # fmt: skip
    err, limit, told = b"", time.monotonic() + 120, False
    try:
        while process.poll() is None and time.monotonic() < limit:
            with contextlib.suppress(BlockingIOError):
                err += os.read(keyboard, 2**16)  # a full terminal would stop the process
            if not told and (folder / TWENTY).exists():
                process.send_signal(signal.SIGTERM)
                told = True
            time.sleep(0.02)
    finally:
        process.kill()
        os.close(terminal)
        os.close(keyboard)
    out = process.communicate()[0]
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err
    assert "--resume" in out
    newest = max(int(path.stem.rpartition("_")[2]) for path in folder.glob("checkpoints/checkpoint_step_*.pth"))
    assert load(folder / f"checkpoints/checkpoint_step_{newest}.pth")["step"] == newest >= 20
    (synced,) = re.findall("wandb sync (.+)$", out, flags=re.MULTILINE)
    assert (folder / synced).is_dir()
    assert synced.startswith("checkpoints/")


def test_a_second_ctrl_c_stops_at_once(folder, monkeypatch):
    def twice(_):
        interrupt(_)
        interrupt(_)
        pytest.fail("still at work")

    before_step(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        run(folder)


def test_a_stop_before_the_first_validation_leaves_an_earlier_run(copy, trained, monkeypatch, recorder):
    before_step(monkeypatch, 3, interrupt)
    assert run(copy, codebook_quantization_levels=4) == 130
    assert recorder.artifacts == []
    assert same_files(copy, trained, BEST, IDS, QUALITY)


# ---------------------------------------------------------------- training learns


@pytest.mark.parametrize("rotation", [False, True], ids=["straight", "rotation"])
@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_training_learns_the_clusters(folder, ema, rotation):
    flags = {"max_steps": 200, "autoencoder_steps": 40, "max_lr": 1e-2, "codebook_size": 16}
    flags |= {"steps_per_val_log": 100, "steps_per_checkpoint": 1000, "collisions": "keep"}
    assert run(folder, use_ema_vq=ema, use_rotation_trick=rotation, **flags) == 0
    quality = quality_of(folder)
    assert quality["as_written"]["unexplained_variance"] < 0.35  # the clusters leave about a fifth to noise in them
    assert quality["as_written"]["distinct"] > 0.2  # thirty clusters alone would be 0.1
    assert min(level["usage"] for level in quality["levels"]) >= 0.75


# ---------------------------------------------------------------- flags


def test_flags_show_in_the_files(tmp_path):
    folder = new_folder(tmp_path / "flags")
    (folder / "data").rename(folder / "elsewhere")
    source = folder / "elsewhere" / "Other_items_with_embeddings.parquet"
    (folder / "elsewhere" / Path(SOURCE).name).rename(source)
    flags = {"category": "Other", "data_dir": "elsewhere", "checkpoint_dir": "new/deep", "collisions": "suffix"}
    flags |= {"codebook_size": 12, "codebook_embedding_dim": 5, "codebook_quantization_levels": 4, "seed": 5}
    flags |= {"encoder_hidden_dims": [20], "item_embedding_dim": DIM, "max_steps": 9, "num_rows": 250}
    assert run(folder, steps_per_checkpoint=4, **flags) == 0
    ids = pl.read_parquet(folder / "elsewhere" / "Other_semantic_ids.parquet")
    assert ids["parent_asin"].to_list() == NAMES[:250]
    assert ids.columns[-2] == "semantic_id_4"
    assert {path.name for path in (folder / "new" / "deep").glob("*.pth")} == {
        *("best_model.pth", "final_model.pth", "checkpoint_step_4.pth", "checkpoint_step_8.pth"),
        "checkpoint_step_9.pth",
    }
    checkpoint = load(folder / "new" / "deep" / "final_model.pth")
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint["model_state_dict"].items()}
    assert shapes["quantizers.3.codebook"] == (12, 5)
    assert shapes["encoder.0.weight"] == (20, DIM)
    assert checkpoint["step"] == 9
    assert checkpoint["config"]["seed"] == 5
    assert not (folder / "checkpoints").exists()


def test_a_tilde_is_the_home_folder(folder, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("HOME", str(folder))
    away = {"data_dir": "~/data", "checkpoint_dir": "~/checkpoints"}
    with contextlib.chdir(tmp_path):
        assert train_rqvae.main(command(**away)) == 0
        assert train_rqvae.main(command("--export_only", keep_ids=f"~/{IDS}", **away)) == 0
    files = (SOURCE, IDS, QUALITY, BEST, FINAL, TEN, TWENTY, LAST)
    assert set(outputs(tmp_path)) == {f"folder/{name}" for name in files}
    assert quality_of(folder)["keep_ids"]["kept"] == N
    for flag in ("data_dir", "keep_ids"):
        assert "error: ~no-user/" in refused(folder, "--export_only", **{flag: "~no-user/data"})


def test_without_a_limit_the_epochs_give_the_steps(folder):
    assert run(folder, max_steps=-1, num_epochs=3) == 0
    assert load(folder / FINAL)["step"] == 3 * 4


def test_training_never_sees_the_held_out_rows(watched):
    rows = torch.cat([arguments[3] for arguments, _ in watched.steps])
    assert len(watched.plan.val_rows) == 30
    assert not torch.isin(rows, watched.plan.val_rows).any()
    assert len(rows) == 24 * 64
    assert len(rows.unique()) > 260  # of 270


@pytest.mark.parametrize(
    ("changes", "plain", "starts", "resets"),
    [
        ({}, 6, 1, 2),
        ({"autoencoder_steps": 0, "steps_per_codebook_reset": 3}, 0, 1, 6),
        ({"autoencoder_steps": 15}, 15, 1, 0),
        ({"use_kmeans_init": False, "reset_unused_codes": False, "autoencoder_steps": None}, 0, 0, 0),
        ({"use_kmeans_init": False, "reset_unused_codes": False}, 6, 0, 0),
    ],
    ids=str,
)
def test_autoencoder_k_means_resets_and_search_in_turn(folder, calls, changes, plain, starts, resets):
    steps, started, reset = calls("train_step"), calls("start_quantizing"), calls("reset_codes")
    assert run(folder, **changes) == 0
    before_search = max(int(24 * train_rqvae.SEARCH_FROM), plain)
    widths = [0] * plain + [1] * (before_search - plain) + [train_rqvae.TRAINING_SEARCH_WIDTH] * (24 - before_search)
    assert [arguments[-1] for arguments, _ in steps] == widths
    assert len(started) == starts
    assert len(reset) == resets  # every so many steps after the plain ones, up to four fifths of 24


def test_reset_codes_come_into_use(tmp_path):
    usage = {}
    flags = {"use_kmeans_init": False, "max_steps": 60, "codebook_size": 32, "steps_per_checkpoint": 1000}
    for resets in (False, True):  # random codes are far away from most items
        folder = new_folder(tmp_path / str(resets))
        assert run(folder, reset_unused_codes=resets, **flags) == 0
        usage[resets] = np.mean([level["usage"] for level in quality_of(folder)["levels"]])
    assert usage[True] > usage[False] + 0.1


RATES = {"gradient_clip_norm": 0.0, "max_lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 10}


@pytest.mark.parametrize("changes", [{}, RATES, {"gradient_clip_norm": 0.05, "scheduler_type": "cosine"}], ids=str)
def test_learning_rates_and_gradient_norms_follow_their_flags_step_by_step(watched, tmp_path, recorder, calls, changes):
    steps = calls("train_step")
    if changes:
        assert run(new_folder(tmp_path / "run"), **changes) == 0
    else:
        steps, recorder = watched.steps, watched.recorder
    config = steps[0][0][0].config
    assert {name: getattr(config, name) for name in changes} == changes
    expected = [train_rqvae.learning_rate(step, 24, config) for step in range(24)]
    assert list(recorder.series("train/learning_rate").values()) == pytest.approx(expected)
    before, after = recorder.series("train/gradient_norm"), recorder.series("train/clipped_gradient_norm")
    assert len(before) == 24
    assert min(before.values()) > 0.05
    assert after == {step: min(norm, config.gradient_clip_norm or norm) for step, norm in before.items()}


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_input_mixing_reaches_the_training_inputs(folder, calls, mixing):
    mixed = calls("augment")
    assert run(folder, input_mixing=mixing) == 0
    assert len(mixed) == 24
    for (x, model), inputs in mixed:
        assert torch.allclose(model.standardise(x), inputs, atol=1e-5) == (mixing == 0)


def test_bfloat16_is_the_type_of_the_mlps_in_training_alone_and_learns_as_much(folder, trained, monkeypatch):
    made, decode = {True: set(), False: set()}, train_rqvae.RQVAE.decode

    def watched_decode(model, latents):
        result = decode(model, latents)
        made[model.training].add(result.dtype)
        return result

    monkeypatch.setattr(train_rqvae.RQVAE, "decode", watched_decode)
    assert run(folder, dtype="bfloat16") == 0
    assert made == {True: {torch.bfloat16}, False: {torch.float32}}  # False: validation, and the export
    state = load(folder / BEST)["model_state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    losses = [load(each / FINAL)["val_loss"] for each in (folder, trained)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


CHANGES = [{"use_rotation_trick": True}, {"commitment_weight": 2.0}, {"gradient_accumulation_steps": 2}, {"seed": 7}]


@pytest.mark.parametrize("changes", [*CHANGES, {"use_ema_vq": True, "ema_decay": 0.5}], ids=str)
def test_flags_change_the_codes_that_are_learned(folder, trained, changes):
    assert run(folder, **changes) == 0
    config = load(folder / FINAL)["config"]
    assert {name: config[name] for name in changes} == changes
    codebooks = [load(each / FINAL)["model_state_dict"]["quantizers.0.codebook"] for each in (folder, trained)]
    assert not torch.equal(*codebooks)


def test_losses_are_logged_at_their_intervals(folder, recorder):
    assert run(folder, steps_per_train_log=5, steps_per_val_log=12, steps_per_checkpoint=1000) == 0
    assert list(recorder.series("val/total_loss")) == [12, 24]
    assert list(recorder.series("train/total_loss")) == [5, 10, 12, 15, 20, 24]  # and before each validation


def test_summary_names_device_sizes_steps_and_every_setting(watched):
    assert "device cpu (--device cpu), processes: 1" in watched.text
    assert "wandb sync" not in watched.text  # that is for offline runs
    assert f"{N} items of {DIM} dimensions from {SOURCE}" in watched.text
    assert re.search(r"^30 items to validate on, 64 items a step$", watched.text, flags=re.MULTILINE)
    assert re.search(r"^24 steps, 4 an epoch, first 6 without quant", watched.text, flags=re.MULTILINE)
    for name in train_rqvae.RQVAEConfig.__dataclass_fields__:
        assert re.search(f"^{name}: ", watched.text, flags=re.MULTILINE), name
    assert [int(step) for step in re.findall(r"^step (\d+): ", watched.text, flags=re.MULTILINE)] == [8, 16, 24]


# ---------------------------------------------------------------- W&B


def test_everything_that_is_tracked_is_logged(watched):
    recorder = watched.recorder
    assert [(options["project"], options["mode"]) for options in recorder.started] == [("semantic-ids", "disabled")]
    assert recorder.started[0]["config"]["codebook_size"] == [8] * LEVELS
    losses = ["total_loss", "reconstruction_loss", "vq_loss"]
    names = {f"{part}/{name}" for part in ("train", "val") for name in losses}
    names |= {"train/gradient_norm", "train/clipped_gradient_norm", "train/learning_rate"}
    names |= {f"catalogue/{name}_{level}" for name in ("usage", "perplexity") for level in range(LEVELS)}
    names |= {"catalogue/distinct", "catalogue/residual_norm"}
    assert {name for _, values in recorder.logs for name in values} == names
    steps = [step for step, _ in recorder.logs]
    assert steps == sorted(steps)  # W&B drops values that come with an earlier step
    assert all(np.isfinite(value) for _, values in recorder.logs for value in values.values())
    assert recorder.finished == 1
    for part in ("train", "val"):
        total, reconstruction, vq = (recorder.series(f"{part}/{name}") for name in losses)
        assert len(total) == {"train": 24, "val": 3}[part]
        assert total == pytest.approx({step: reconstruction[step] + vq[step] for step in total}, rel=1e-4)
        assert all((vq[step] > 0) == (step > 6) for step in total)


def test_logged_figures_are_those_of_the_model(watched):
    """The last validation, and the artifact of the best model."""
    folder, recorder = watched.folder, watched.recorder
    table = pl.read_parquet(folder / SOURCE)
    x = torch.from_numpy(np.stack(table["embedding"].to_list())).float()
    models = {name: train_rqvae.load_model(folder / name) for name in (FINAL, BEST)}
    codes = {name: model.encode_to_semantic_ids(x, 4).numpy() for name, model in models.items()}
    distinct = {name: len(np.unique(found, axis=0)) / N for name, found in codes.items()}
    assert recorder.series("catalogue/distinct")[24] == pytest.approx(distinct[FINAL])
    for level in range(LEVELS):
        shares = np.unique(codes[FINAL][:, level], return_counts=True)[1] / N
        assert recorder.series(f"catalogue/usage_{level}")[24] == pytest.approx(len(shares) / 8)
        perplexity = np.exp(-(shares * np.log(shares)).sum())
        assert recorder.series(f"catalogue/perplexity_{level}")[24] == pytest.approx(perplexity)
    with torch.no_grad():
        held_out = models[FINAL].standardise(x[watched.plan.val_rows])
        total = models[FINAL](held_out, train_rqvae.TRAINING_SEARCH_WIDTH)[0][0].item()
    assert recorder.series("val/total_loss")[24] == pytest.approx(total, rel=1e-4)

    (artifact,) = recorder.artifacts
    best = load(folder / BEST)
    assert artifact.type == "model"
    assert list(artifact.manifest.entries) == ["best_model.pth"]
    assert artifact.metadata["config"].items() >= best["config"].items()
    assert artifact.metadata["val/total_loss"] == best["val_loss"]
    assert artifact.metadata["unique_proportion"] == pytest.approx(distinct[BEST])


def test_a_resumed_run_goes_on_in_the_same_wandb_run(folder, recorder, monkeypatch):
    recorder.id = "abc123"
    with monkeypatch.context() as patch:
        before_step(patch, 12, interrupt)
        run(folder)
    assert run(folder, "--resume") == 0
    assert [options["id"] for options in recorder.started] == [None, "abc123"]
    assert list(recorder.series("train/total_loss")) == list(range(1, 25))


def test_without_a_network_a_run_goes_on_offline(recorder, monkeypatch, capsys):
    def init(mode, **options):
        if mode == "online":
            raise train_rqvae.wandb.errors.CommError("no network\nat all")  # after some 30 s of trying
        return recorder.init(mode=mode, **options)

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(train_rqvae.wandb, "login", lambda **_: True)
    monkeypatch.setattr(train_rqvae.wandb, "init", init)
    assert train_rqvae.start_wandb(train_rqvae.RQVAEConfig(), None) is recorder
    text = capsys.readouterr()
    assert [options["mode"] for options in recorder.started] == ["offline"]
    assert len(re.findall("^warning: .*no network", text.err, flags=re.MULTILINE)) == 1
    assert text.out.count("wandb sync") == 1


@pytest.mark.parametrize(
    ("mode", "project", "words"), [("bogus", "fine", "mode Input should be"), ("offline", "a/b", "project name 'a/b'")]
)
def test_wandb_settings_that_cannot_be_are_refused(unfinished, refused, monkeypatch, mode, project, words):
    monkeypatch.setenv("WANDB_MODE", mode)
    line = refused(unfinished, "--resume", wandb_project=project)
    assert all(each in line for each in ("--wandb_project", "WANDB_", words)), line


WRONG_WANDB = {
    "No API key configured": {"WANDB_MODE": "online"},
    "WANDB_API_KEY invalid": {"WANDB_MODE": "online", "WANDB_API_KEY": "short"},
    "Run ID cannot contain": {"WANDB_RUN_ID": "a/b"},
    "resume Input should be": {"WANDB_RESUME": "bogus"},
    "base_url Input should be a valid URL": {"WANDB_BASE_URL": "nowhere"},
}


def test_the_same_for_settings_that_wandb_reads_once_a_process(unfinished):
    before, runs = outputs(unfinished), {}
    for place, (words, settings) in enumerate(WRONG_WANDB.items()):
        folder = shutil.copytree(unfinished, unfinished.with_name(f"wandb-{place}"))
        settings = {"WANDB_MODE": "offline", "HOME": str(folder)} | settings
        log = folder.with_suffix(".log")
        runs[words] = folder, log, start(SCRIPT, *command("--resume"), folder=folder, log=log, **settings)
    for words, (folder, log, process) in runs.items():
        assert end(process) == 2, log.read_text()
        (line,) = re.findall("^error: .*|^Traceback", log.read_text(), flags=re.MULTILINE)
        assert line.startswith("error: W&B: ")
        assert words in line
        assert outputs(folder) == before


# ---------------------------------------------------------------- wrong use


WRONG_FLAGS = """
--codebook_size 1; --codebook_quantization_levels 0; --encoder_hidden_dims 32 0; --encoder_hidden_dims;
--codebook_quantization_levels 1000000000000; --codebook_size 8 8; --codebook_size 8 1 8;
--commitment_weight nan; --batch_size many; --max_steps -5; --max_lr inf; --min_lr 1;
--scheduler_type linear; --input_mixing -0.1; --ema_decay 1; --autoencoder_steps 24; --val_split 1;
--num_rows 0; --seed 99999999999999999999; --seed 4294967295; --device tpu; --use_ema_vq maybe; --no_such_flag 1;
--codebook 8; stray
"""  # 4294967295 is the last seed of scikit-learn, and a level adds to it; --codebook is an abbreviation


@pytest.mark.parametrize("flags", [" ".join(flags.split()) for flags in WRONG_FLAGS.split(";")])
def test_flags_out_of_range_are_refused(copy, refused, flags):
    line = refused(copy, *flags.split())
    assert flags.split()[0] in line
    assert ";" in line  # the trouble; the way out


@pytest.mark.parametrize(("device", "switch"), [("cuda", "--export_only"), ("mps", "--resume")])
def test_a_device_that_is_not_there_is_refused(trained, refused, monkeypatch, device, switch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    line = refused(trained, switch, device=device)
    assert f"--device {device}" in line
    assert "--device auto" in line


# ---------------------------------------------------------------- wrong input


def with_rows(table: pl.DataFrame, kind=pl.Float32, **changes) -> pl.DataFrame:
    """The table with these rows of its embeddings changed: `r5` is row 5."""
    rows = table["embedding"].to_list()
    for row, value in changes.items():
        rows[int(row[1:])] = value
    return table.with_columns(pl.Series("embedding", rows, dtype=pl.List(kind)))


def broken(value: float, *rows: int) -> dict:
    return {f"r{row}": [0.0] * 5 + [value] + [0.0] * (DIM - 6) for row in rows}


WRONG_TABLES = {
    "no embedding": (lambda t: t.drop("embedding"), ["embedding", "title, parent_asin, item_context"]),
    "no parent_asin": (lambda t: t.drop("parent_asin"), ["parent_asin", "title, item_context, embedding"]),
    "no rows": (lambda t: t.head(0), ["no rows"]),
    "NaN": (lambda t: with_rows(t, **broken(np.nan, 7, 90)), ["2 embeddings are null", "NaN", "row 7"]),
    "too large for float32": (
        lambda t: with_rows(t, pl.Float64, **broken(1e300, 11)),
        ["1 embeddings are", "row 11"],
    ),
    "ragged": (lambda t: with_rows(t, r4=[1.0], r9=[1.0] * 30), ["2 embeddings are", "row 4"]),
    "null row": (lambda t: with_rows(t, r6=None), ["1 embeddings are", "row 6"]),
    "first row null": (lambda t: with_rows(t, r0=None), ["the first embedding is null or empty"]),
    "empty vectors": (lambda t: t.with_columns(embedding=pl.lit([], pl.List(pl.Float32))), ["the first embedding is"]),
    "text as embedding": (lambda t: t.with_columns(embedding=pl.lit("text")), ["embedding is String"]),
    "duplicates": (
        lambda t: t.with_columns(pl.Series("parent_asin", [*NAMES[:297], *NAMES[5:8]])),
        ["3 null, blank or duplicate parent_asin", NAMES[5], "row 297"],
    ),
    "later rows null": (lambda t: with_rows(t, r7=None, r9=None), ["2 embeddings are", "row 7"]),
    "null parent_asin": (lambda t: t.with_columns(pl.Series("parent_asin", [None, *NAMES[1:]])), ["parent_asin"]),
}  # fmt: skip


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("case", WRONG_TABLES)
def test_wrong_tables_are_refused(copy, refused, case):
    change, words = WRONG_TABLES[case]
    change(catalogue()).write_parquet(copy / SOURCE)
    for switch in ("--export_only", "--resume"):
        line = refused(copy, switch)
        assert line.startswith(f"error: {SOURCE}: ")
        assert all(word in line for word in words), line


@pytest.mark.parametrize("kind", [pl.List(pl.Float64), pl.Array(pl.Float32, DIM)], ids=str)
def test_embeddings_may_be_of_another_kind_of_float_lists(copy, trained, kind):
    catalogue().with_columns(pl.col("embedding").cast(kind)).write_parquet(copy / SOURCE)
    assert run(copy, "--export_only") == 0
    assert same_files(copy, trained)


def test_a_missing_or_corrupt_parquet_file_is_refused_with_the_script_that_makes_it(copy, refused):
    whole = (copy / SOURCE).read_bytes()
    hole = whole[:-400] + b"\xff" * 200 + whole[-200:]
    (copy / SOURCE).unlink()
    for content in (None, b"", b"PAR1", b"no parquet file at all" * 50, whole[: len(whole) // 2], whole[:-1], hole):
        if content is not None:
            (copy / SOURCE).write_bytes(content)
        line = refused(copy)
        assert SOURCE in line
        assert "embed_items.py" in line


@pytest.mark.parametrize(
    ("rows", "flag", "value", "words"),
    [
        (20, "codebook_size", 19, ["18 training items", "19 codes of k-means", "--use_kmeans_init False"]),
        (65, "codebook_quantization_levels", 2, ["65 items", "64 IDs", "--collisions suffix"]),
        (N, "item_embedding_dim", 25, ["24", "--item_embedding_dim"]),
    ],
)
def test_items_that_do_not_fit_the_flags_are_refused(copy, refused, rows, flag, value, words):
    catalogue(rows).write_parquet(copy / SOURCE)
    line = refused(copy, **{flag: value})
    assert all(word in line for word in [SOURCE, *words]), line


def test_more_items_than_ids_are_no_trouble_where_they_may_share(folder, refused):
    assert run(folder, codebook_quantization_levels=2, collisions="suffix") == 0
    assert ids_of(folder)["semantic_id"].is_unique().all()
    assert run(folder, "--export_only", codebook_quantization_levels=2, collisions="keep") == 0
    assert ids_of(folder)["semantic_id"].n_unique() <= 64
    for sizes in (8, 2), (None, None):  # where they are left out, the model decides
        flags = dict(zip(("codebook_size", "codebook_quantization_levels"), sizes, strict=True))
        assert "300 items, but only 64 IDs" in refused(folder, "--export_only", collisions="assign", **flags)


# ---------------------------------------------------------------- damaged and foreign checkpoints


def damage(path: Path, how: str | float) -> None:
    """Cuts a checkpoint to a share, flips a bit of its weights, or saves another object in its place."""
    whole = path.read_bytes()
    if isinstance(how, float):
        path.write_bytes(whole[: int(len(whole) * how)])
    elif how == "bit":  # neither the archive nor the pickle looks broken
        with zipfile.ZipFile(path) as archive:
            tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
            weights = archive.read(max(tensors, key=lambda entry: entry.file_size))
        assert whole.count(weights) == 1
        path.write_bytes(whole.replace(weights, bytes([weights[0] ^ 1]) + weights[1:]))
    else:
        torch.save({"tensor": torch.zeros(3), "empty": {}}[how], path)


@pytest.mark.parametrize("how", [None, 0.0, 0.7, "bit", "tensor", "empty"], ids=str)
def test_a_missing_or_damaged_best_model_is_refused(copy, refused, how):
    damage(copy / BEST, how) if how is not None else (copy / BEST).unlink()
    line = refused(copy, "--export_only")
    assert line.startswith(f"error: {BEST}: ")
    assert "train" in line.split(";")[1]


@pytest.mark.parametrize("how", [0.7, "bit", "empty"], ids=str)
def test_a_damaged_newest_checkpoint_is_passed_over(unfinished, trained, capsys, how):
    damage(unfinished / TWENTY, how)
    assert run(unfinished, "--resume") == 0
    text = capsys.readouterr()
    assert f"warning: {TWENTY} is damaged" in text.err
    assert f"going on from {TEN}" in text.out
    assert same_files(unfinished, trained)


@pytest.mark.parametrize(("name", "value"), [("encoder_hidden_dims", [32]), ("max_lr", 1e-2), ("use_ema_vq", True)])
def test_a_checkpoint_of_other_flags_is_not_resumed(copy, refused, name, value):
    line = refused(copy, "--resume", **{name: value})
    assert all(word in line for word in (LAST, f"--{name}", "--overwrite instead of --resume")), line


def test_a_checkpoint_of_other_embeddings_is_not_resumed(copy, refused):
    catalogue(seed=1).write_parquet(copy / SOURCE)
    assert "other embeddings" in refused(copy, "--resume")


def test_a_model_of_other_flags_is_not_exported(copy, refused):
    others = {"codebook_size": 16, "codebook_quantization_levels": 2, "encoder_hidden_dims": [16, 32], "seed": 1}
    for flag, value in (others | {"max_lr": 1e-2, "use_ema_vq": True}).items():
        line = refused(copy, "--export_only", collisions="keep", **{flag: value})
        assert all(word in line for word in (BEST, f"--{flag}")), line
    line = refused(copy, "--export_only", codebook_size=[8, 8])
    assert "not one size for each of 3 levels" in line
    catalogue(dim=20).write_parquet(copy / SOURCE)
    line = refused(copy, "--export_only")
    assert all(word in line for word in (BEST, "--item_embedding_dim 24, not 20")), line


def test_a_model_of_another_category_is_used_with_a_warning(copy, capsys):
    shutil.copy(copy / SOURCE, copy / SOURCE.replace("Tiny", "Other"))
    assert run(copy, "--export_only", category="Other") == 0
    assert "was trained with --category 'Tiny', and this is 'Other'" in capsys.readouterr().err
    assert pl.read_parquet(copy / IDS.replace("Tiny", "Other")).equals(ids_of(copy))


def test_embeddings_made_in_another_way_than_those_of_training_are_warned_of(folder, capsys):
    table, recipe = pl.read_parquet(folder / SOURCE), {"model_name": "E5", "instruction": "", "pooling": "last"}
    table.write_parquet(folder / SOURCE, metadata=recipe)
    assert run(folder) == 0
    for changes in {}, {"pooling": "mean"}, {"model_name": "BGE", "instruction": "Find"}:
        table.write_parquet(folder / SOURCE, metadata=recipe | changes)
        capsys.readouterr()
        assert run(folder, "--export_only") == 0
        lines = re.findall("^warning: .* was trained with .*", capsys.readouterr().err, re.MULTILINE)
        assert len(lines) == len(changes)
        for name, value in changes.items():
            assert f"with {name} {recipe[name]!r}, and this is {value!r}" in "".join(lines)
    table.write_parquet(folder / SOURCE)  # saved again by another program
    assert run(folder, "--export_only") == 0
    assert "was trained with" not in capsys.readouterr().err


def test_a_model_of_an_older_script_with_another_flag_is_used(copy):
    checkpoint = load(copy / BEST)
    checkpoint["config"]["input_noise"] = 0.5
    del checkpoint["recipe"]
    torch.save(checkpoint, copy / BEST)
    before = ids_of(copy)
    assert run(copy, "--export_only") == 0
    assert ids_of(copy).equals(before)


def test_an_export_makes_ids_distinct_as_in_training_unless_asked(folder):
    assert run(folder, collisions="suffix") == 0
    before = ids_of(folder)
    assert run(folder, "--export_only") == 0
    assert run(folder, "--export_only", keep_ids=IDS) == 0
    assert ids_of(folder).equals(before)
    assert run(folder, "--export_only", collisions="assign") == 0
    assert ids_of(folder).width == before.width - 1


def test_a_model_of_a_trial_is_used_with_a_warning(copy, capsys):
    assert run(copy, "--overwrite", num_rows=200, checkpoint_dir="trial") == 0
    assert "trained with --num_rows" not in capsys.readouterr().err
    assert run(copy, "--export_only", checkpoint_dir="trial") == 0
    assert "trained with --num_rows 200" in capsys.readouterr().err


# ---------------------------------------------------------------- disks, folders and numbers


@pytest.mark.parametrize("size", [0, 15_000, 30_000])
def test_a_full_disk_under_a_checkpoint_is_refused(unfinished, refused, full_disk, size):
    # 30,000 is room for best_model.pth, and not for a numbered checkpoint
    line = full_disk(partial(refused, unfinished, "--overwrite", files_stay=False), limit=size)
    assert "error: checkpoints/" in line
    assert "make room" in line
    assert all(train_rqvae.load_model(path) for path in unfinished.glob("checkpoints/*.pth"))
    assert not list(unfinished.rglob("*.tmp"))


@pytest.mark.parametrize("size", [300, 2500])
def test_a_full_disk_under_the_ids_leaves_ids_and_report(copy, refused, full_disk, size):
    # 2,500 is room for the report, and not for the IDs
    line = full_disk(refused, copy, "--export_only", "--collisions", "suffix", limit=size)
    assert "error: data/Tiny_" in line
    assert "make room" in line


def test_files_and_folders_in_each_others_place_are_refused(copy, refused):
    (copy / "file").write_text("a file")
    for place in ("file", "file/deeper"):
        assert place in refused(copy, checkpoint_dir=place)
    for path, flags in ((BEST, {}), (IDS, {"keep_ids": IDS}), (IDS, {}), (SOURCE, {})):
        (copy / path).rename(copy / "away")
        (copy / path).mkdir()
        trouble = "no such file" if flags or path != IDS else "is a folder"
        assert f"{path}: {trouble}" in refused(copy, "--export_only", **flags)
        (copy / path).rmdir()
        (copy / "away").rename(copy / path)


def test_a_second_run_into_the_same_place_leaves(copy, refused):
    with train_rqvae.lock(copy / BEST):
        assert "another run is writing it" in refused(copy)
    with train_rqvae.lock(copy / IDS):
        assert "another run is writing it" in refused(copy, "--export_only")


@pytest.mark.parametrize(("log", "kmeans"), [(1, True), (1000, False)])
def test_a_run_that_diverges_fails_and_exports_nothing(copy, trained, log, kmeans):
    # best_model.pth and the IDs in this folder are of an earlier run
    with pytest.raises(SystemExit, match=r"error: .*; train again with a lower --max_lr"):  # a text: status 1
        run(copy, max_lr=1e12, gradient_clip_norm=0, warmup_steps=0, use_kmeans_init=kmeans, steps_per_train_log=log)
    assert same_files(copy, trained, BEST, IDS, QUALITY)


@pytest.mark.parametrize("log", [1, 1000])
@pytest.mark.parametrize("trouble", [math.nan, 3e38])
def test_weights_that_break_stop_the_run_before_it_is_saved(folder, monkeypatch, log, trouble):
    """Before step 12, between two checkpoints and between two validations; 3e38 overflows."""

    def break_weights(model):
        model.encoder[0].weight.data.fill_(trouble)

    before_step(monkeypatch, 12, break_weights)
    with pytest.raises(SystemExit, match=r"error: .*(nan|inf).*; train again with a lower --max_lr"):
        run(folder, steps_per_checkpoint=5, steps_per_train_log=log)
    assert set(outputs(folder)) == {SOURCE, BEST, TEN, TEN.replace("10", "5")}
    assert load(folder / BEST)["step"] == 8


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_training_on_a_gpu_ends_where_training_on_a_cpu_does(tmp_path, ema):
    losses = {}
    for device in ("cpu", "cuda"):
        folder = new_folder(tmp_path / device)
        flags = {"max_steps": 200, "autoencoder_steps": 40, "steps_per_checkpoint": 1000}
        assert run(folder, device=device, use_ema_vq=ema, **flags) == 0
        losses[device] = load(folder / BEST)["val_loss"]
        assert ids_of(folder)["semantic_id"].is_unique().all()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.1)  # other random numbers, other rounding
