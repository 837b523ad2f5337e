"""train_rqvae.py through its command line: what it writes, resumes, logs and refuses, on a tiny catalogue."""

import json
import math
import os
import pickle
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

import train_rqvae

SCRIPT = Path(__file__).resolve().parents[1] / "train_rqvae.py"
N, DIM, LEVELS = 300, 24, 3
TINY = {
    "category": "Tiny",
    "device": "cpu",
    "encoder_hidden_dims": [32, 16],
    "codebook_embedding_dim": 8,
    "codebook_quantization_levels": LEVELS,
    "codebook_size": 8,
    "batch_size": 64,
    "max_steps": 24,
    "max_lr": 3e-3,
    "warmup_steps": 4,
    "autoencoder_steps": 6,
    "val_split": 0.1,
    "steps_per_codebook_reset": 5,
    "steps_per_train_log": 1,
    "steps_per_val_log": 8,
    "steps_per_checkpoint": 10,
}
KEYS = {"model_state_dict", "config", "step", "epoch", "val_loss"}


@pytest.fixture(scope="module", autouse=True)
def _quiet_and_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_MODE": "disabled", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        yield
    torch.set_num_threads(before)


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


def source(folder: Path) -> Path:
    return folder / "data" / "Tiny_items_with_embeddings.parquet"


def checkpoints(folder: Path) -> Path:
    return folder / "checkpoints"


def new_folder(folder: Path, table: pl.DataFrame | None = None) -> Path:
    source(folder).parent.mkdir(parents=True)
    (catalogue() if table is None else table).write_parquet(source(folder))
    return folder


def command(folder: Path, *switches: str, **changes) -> list[str]:
    argv = []
    flags = TINY | {"data_dir": folder / "data", "checkpoint_dir": checkpoints(folder)} | changes
    for name, value in flags.items():
        argv += [f"--{name}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    return [*argv, *switches]


def run(folder: Path, *switches: str, **changes) -> int:
    return train_rqvae.main(command(folder, *switches, **changes))


def load(folder: Path, name: str = "final_model") -> dict:
    return torch.load(checkpoints(folder) / f"{name}.pth", weights_only=True)


def ids_of(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "data" / "Tiny_semantic_ids.parquet", glob=False)


def codes_of(folder: Path, levels: int = LEVELS) -> np.ndarray:
    return ids_of(folder).select(f"semantic_id_{level}" for level in range(levels)).to_numpy()


def embeddings_of(folder: Path) -> torch.Tensor:
    return torch.from_numpy(np.stack(pl.read_parquet(source(folder))["embedding"].to_list()).astype(np.float32))


def same_tensors(one: dict, other: dict) -> bool:
    one, other = one["model_state_dict"], other["model_state_dict"]
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def outputs(folder: Path) -> dict[str, bytes]:
    """Every file below the folder but W&B's, hidden ones too."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "wandb" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


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
        with pytest.raises(SystemExit) as ended:
            run(folder, *switches, **changes)
        line = complaint(capsys.readouterr().err)
        assert ended.value.code == 2, line
        if files_stay:
            assert outputs(folder) == before
        return line

    return check


class Recorder:
    """Stands where W&B's run stands, and keeps what it is given."""

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
    """Watches a function of the script: `calls(name)` is a list that gets (arguments, result) of every call."""

    def watch(name: str) -> list:
        seen, real = [], getattr(train_rqvae, name)

        def watched(*arguments, **options):
            result = real(*arguments, **options)
            seen.append((arguments, result))
            return result

        monkeypatch.setattr(train_rqvae, name, watched)
        return seen

    return watch


@pytest.fixture
def folder(tmp_path) -> Path:
    return new_folder(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder after one full run; tests only read it."""
    folder = new_folder(tmp_path_factory.mktemp("trained"))
    assert run(folder) == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of that folder, for tests that break something in it."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture
def unfinished(copy) -> Path:
    """A copy of that folder as a run leaves it that is stopped before its end."""
    (checkpoints(copy) / "final_model.pth").unlink()
    return copy


def stop_at(monkeypatch, step: int) -> None:
    """Sends Ctrl-C to this process in the middle of the n-th training step from now."""
    real, count = train_rqvae.train_step, iter(range(1, 10**6))

    def stopping(*arguments):
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(train_rqvae, "train_step", stopping)


# ---------------------------------------------------------------- what a run writes


def test_run_writes_every_checkpoint_and_no_other_file(trained):
    names = {"best_model.pth", "final_model.pth", "checkpoint_step_10.pth", "checkpoint_step_20.pth"}
    assert {path.name for path in checkpoints(trained).iterdir() if path.is_file()} == names
    assert {path.name for path in (trained / "data").iterdir()} == {
        "Tiny_items_with_embeddings.parquet",
        "Tiny_semantic_ids.parquet",
        "Tiny_quality.json",
    }


def test_ids_are_in_input_order_distinct_and_spelled_from_their_codes(trained):
    table, items = ids_of(trained), pl.read_parquet(source(trained))
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


@pytest.mark.parametrize("name", ["best_model", "final_model", "checkpoint_step_10", "checkpoint_step_20"])
def test_checkpoints_are_plain_dicts_of_the_contract(trained, name):
    checkpoint = load(trained, name)  # weights_only=True: nothing but tensors and plain types
    assert checkpoint.keys() >= KEYS
    assert json.loads(json.dumps(checkpoint["config"])) == checkpoint["config"]
    assert checkpoint["config"]["codebook_size"] == 8
    assert checkpoint["config"]["item_embedding_dim"] == DIM
    assert {key.split(".")[0] for key in checkpoint["model_state_dict"]} == {
        *("input_mean", "input_scale", "encoder", "decoder", "quantizers")
    }
    assert type(checkpoint["step"]) is int
    assert checkpoint["epoch"] == checkpoint["step"] // 4  # 270 training rows, four batches of 64
    if name.startswith("checkpoint_step"):
        assert checkpoint["step"] == int(name.rpartition("_")[2])


def test_best_model_is_the_last_of_the_lowest_validation_loss_and_final_model_the_last_step(folder, recorder):
    assert run(folder, steps_per_val_log=3) == 0
    losses = recorder.series("val/total_loss")
    best = load(folder, "best_model")
    lowest, expected = math.inf, None
    for step, loss in losses.items():
        if loss <= 1.01 * lowest:  # as good as the best before: the later one is kept
            expected = step
        lowest = min(lowest, loss)
    assert best["step"] == expected
    assert best["val_loss"] == losses[expected]
    assert load(folder)["step"] == 24


@pytest.mark.parametrize("ema", [False, True])
def test_best_model_reproduces_the_exported_codes(folder, ema):
    assert run(folder, use_ema_vq=ema, collisions="keep") == 0
    model = train_rqvae.load_model(checkpoints(folder) / "best_model.pth", "cpu")
    assert not model.training
    assert np.array_equal(model.encode_to_semantic_ids(embeddings_of(folder)), codes_of(folder))


def test_suffix_adds_one_column_that_makes_ids_distinct(copy):
    assert run(copy, "--export_only", collisions="keep") == 0
    encoded = codes_of(copy)
    assert len(np.unique(encoded, axis=0)) < N  # there are collisions to resolve
    assert run(copy, "--export_only", collisions="suffix") == 0
    table = ids_of(copy)
    assert table.columns[1:-1] == [f"semantic_id_{level}" for level in range(LEVELS + 1)]
    assert np.array_equal(codes_of(copy), encoded)
    assert table["semantic_id"].is_unique().all()
    assert table["semantic_id"].str.count_matches("-").eq(LEVELS).all()


@pytest.mark.parametrize("collisions", ["assign", "suffix", "keep"])
def test_an_item_has_the_same_id_in_whatever_order_the_rows_come(copy, collisions):
    assert run(copy, "--export_only", collisions=collisions) == 0
    first = ids_of(copy)
    shuffled = pl.read_parquet(source(copy)).sample(fraction=1, shuffle=True, seed=1)
    shuffled.write_parquet(source(copy))
    assert run(copy, "--export_only", collisions=collisions) == 0
    second = ids_of(copy)
    assert second["parent_asin"].to_list() == shuffled["parent_asin"].to_list()
    assert not first.equals(second)
    assert first.sort("parent_asin").equals(second.sort("parent_asin"))


def test_items_with_equal_embeddings_get_distinct_ids(tmp_path):
    table = catalogue(200)
    folder = new_folder(tmp_path, table.with_columns(embedding=pl.Series([table["embedding"][0]] * 200)))
    assert run(folder) == 0
    assert ids_of(folder)["semantic_id"].is_unique().all()


def test_as_many_items_as_ids_use_every_id(tmp_path):
    folder = new_folder(tmp_path, catalogue(64))
    assert run(folder, codebook_quantization_levels=2) == 0
    assert {tuple(row) for row in codes_of(folder, 2).tolist()} == {(a, b) for a in range(8) for b in range(8)}


def test_a_catalogue_of_one_item_gets_its_id(tmp_path):
    folder = new_folder(tmp_path, catalogue(1))
    assert run(folder, use_kmeans_init=False) == 0
    assert len(ids_of(folder)) == 1


def test_export_only_writes_the_same_ids_again(copy):
    before = outputs(copy)
    (copy / "data" / "Tiny_semantic_ids.parquet").unlink()
    assert run(copy, "--export_only") == 0
    assert outputs(copy) == before


def test_export_only_takes_the_sizes_from_the_model(copy):
    before, argv = outputs(copy), ["--category", "Tiny", "--data_dir", str(copy / "data"), "--device", "cpu"]
    assert train_rqvae.main([*argv, "--checkpoint_dir", str(checkpoints(copy)), "--export_only"]) == 0
    assert outputs(copy) == before


def quality_of(folder: Path) -> dict:
    return json.loads((folder / "data" / "Tiny_quality.json").read_text())


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
    model = train_rqvae.load_model(checkpoints(copy) / "best_model.pth")
    decoded = model.decode_from_semantic_ids(torch.from_numpy(codes).long())
    unexplained = ((x - decoded) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert quality["as_written"]["unexplained_variance"] == pytest.approx(unexplained.item(), rel=1e-4)

    text = capsys.readouterr().out
    figures = {"distinct IDs": f"{len(counts) / N:.2%}", "unexplained variance": f"{unexplained:.4f}"}
    for title, figure in figures.items():
        assert re.search(rf"^{title} +{figure} +{figure}$", text, flags=re.MULTILINE)
    for level, found in enumerate(quality["levels"]):
        assert re.search(rf"^ +{level} +{found['usage']:.1%} +{found['dead_codes']} ", text, flags=re.MULTILINE)


def test_examples_are_items_below_their_own_prefixes(copy, capsys):
    run(copy, "--export_only")
    tree = capsys.readouterr().out.split("some prefixes and their items:\n")[1].split("\n\n")[0].splitlines()
    ids = ids_of(copy).with_columns(title=pl.read_parquet(source(copy))["title"])
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


@pytest.mark.parametrize("name", ["Tiny_quality.json", "Tiny_semantic_ids.parquet"])
def test_ids_and_their_report_are_written_both_or_not_at_all(copy, refused, name):
    (copy / "data" / name).unlink()
    (copy / "data" / name).mkdir()
    line = refused(copy, "--export_only", collisions="suffix")  # every other file stays
    assert str(copy / "data" / name) in line


def test_a_folder_is_no_pattern(tmp_path):
    folder = new_folder(tmp_path / "[x]*")
    assert run(folder) == 0
    assert len(ids_of(folder)) == N


def test_titles_cannot_steer_the_terminal(copy, capsys):
    odd = "\x1b[31mRED\x07\u202e \n 👩\u200d💻"
    pl.read_parquet(source(copy)).with_columns(title=pl.lit(odd)).write_parquet(source(copy))
    run(copy, "--export_only")
    text = capsys.readouterr().out
    assert "  [31mRED 👩\u200d💻\n" in text
    assert not set(text) & set("\x1b\x07\u202e")


def test_sampled_figures_say_so(copy, capsys, monkeypatch):
    run(copy, "--export_only")
    text = capsys.readouterr().out
    assert f"recall is of {N} items\n" in text
    assert "of a sample of" not in text
    monkeypatch.setattr(train_rqvae, "QUALITY_ROWS", 100)
    run(copy, "--export_only")
    assert "of a sample of 100 items" in capsys.readouterr().out
    assert quality_of(copy)["sampled_items"] == 100


@pytest.mark.parametrize("collisions", ["assign", "suffix", "keep"])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_every_number_of_levels_has_its_report(tmp_path, capsys, levels, collisions):
    folder = new_folder(tmp_path)
    run(folder, codebook_quantization_levels=levels, collisions=collisions, codebook_size=300 if levels == 1 else 20,
        use_kmeans_init=False)  # fmt: skip
    columns = [f"semantic_id_{level}" for level in range(levels + (collisions == "suffix"))]
    assert ids_of(folder).columns == ["parent_asin", *columns, "semantic_id"]
    assert len(quality_of(folder)["levels"]) == levels
    text = capsys.readouterr().out
    assert len(re.findall(r"^ +\d+ +[\d.]+% +\d+ +[\d.]+ +[\d.]+ +\d+ ", text, flags=re.MULTILINE)) == levels
    assert ("another ID than as encoded" in text) == (collisions == "assign")


def test_more_codes_than_bars_share_them_evenly(recorder):
    levels = [{"items_per_code": [1] * 1300}]
    train_rqvae.send_report(recorder, {"codebook_size": 1300, "levels": levels}, [])
    histogram = recorder.report["codes/level_0"].histogram
    assert sum(histogram) == 1300
    assert set(histogram[:-1]) == {3}


def test_report_goes_to_wandb(folder, recorder):
    assert run(folder) == 0
    quality = quality_of(folder)
    for level, found in enumerate(quality["levels"]):
        histogram = recorder.report[f"codes/level_{level}"]
        assert list(histogram.histogram) == found["items_per_code"]
    table = recorder.report["example_prefixes"]
    assert table.columns == ["prefix or ID", "items or title"]
    ids = ids_of(folder).with_columns(title=pl.read_parquet(source(folder))["title"])
    shown = {(name, text) for name, text in table.data if not name.endswith("-")}
    assert shown
    assert shown <= set(ids.select("semantic_id", "title").iter_rows())
    assert recorder.summary["quality"]["as_written"] == quality["as_written"]


# ---------------------------------------------------------------- determinism, stop and resume


def test_a_seed_decides_everything_and_another_seed_differs(trained, tmp_path):
    again, other = new_folder(tmp_path / "again"), new_folder(tmp_path / "other")
    assert run(again) == 0
    assert run(other, seed=7) == 0
    assert same_tensors(load(again, "best_model"), load(trained, "best_model"))
    assert ids_of(again).equals(ids_of(trained))
    assert not same_tensors(load(other, "best_model"), load(trained, "best_model"))
    assert not ids_of(other).equals(ids_of(trained))


@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
@pytest.mark.parametrize("step", [3, 6, 13, 20], ids=["autoencoder", "last autoencoder step", "reset", "late"])
def test_an_interrupted_run_resumed_equals_one_that_never_stopped(tmp_path, monkeypatch, capsys, ema, step):
    whole, stopped = new_folder(tmp_path / "whole"), new_folder(tmp_path / "stopped")
    assert run(whole, use_ema_vq=ema) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run(stopped, use_ema_vq=ema) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (checkpoints(stopped) / "final_model.pth").exists()
    assert load(stopped, f"checkpoint_step_{step}")["step"] == step
    torch.manual_seed(12345)  # whatever ran in between
    assert run(stopped, "--resume", use_ema_vq=ema) == 0
    assert f"going on from {checkpoints(stopped) / f'checkpoint_step_{step}.pth'}" in capsys.readouterr().out
    for name in ("final_model", "best_model"):
        assert same_tensors(load(whole, name), load(stopped, name))
        assert load(whole, name)["val_loss"] == load(stopped, name)["val_loss"]
    assert ids_of(whole).equals(ids_of(stopped))


def test_resuming_passes_over_a_damaged_checkpoint(trained, unfinished, capsys):
    newest = checkpoints(unfinished) / "checkpoint_step_20.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    os.utime(newest)
    assert run(unfinished, "--resume") == 0
    text = capsys.readouterr()
    assert f"warning: {newest} is damaged" in text.err
    assert f"going on from {checkpoints(unfinished) / 'checkpoint_step_10.pth'}" in text.out
    assert same_tensors(load(unfinished), load(trained))


def test_resuming_without_a_checkpoint_says_so_and_starts(folder, trained, capsys):
    assert run(folder, "--resume") == 0
    assert "starting from the beginning" in capsys.readouterr().out
    assert same_tensors(load(folder), load(trained))


@pytest.mark.parametrize("switches", [[], ["--resume"]])
def test_a_complete_run_is_not_repeated_unless_asked(copy, trained, calls, capsys, switches):
    steps, exports = calls("train_step"), calls("export")
    before = outputs(copy)
    assert run(copy, *switches) == 0
    assert "are complete already: nothing to do; --overwrite trains again" in capsys.readouterr().out
    assert outputs(copy) == before
    assert not steps
    assert not exports
    assert run(copy, *switches, "--overwrite") == 0
    assert exports
    assert same_tensors(load(copy), load(trained))
    assert ids_of(copy).equals(ids_of(trained))


def change_ids(path: Path) -> None:
    metadata = {name: pl.read_parquet_metadata(path)[name] for name in ("model", "embeddings", "collisions")}
    pl.read_parquet(path).with_columns(semantic_id_0=pl.col("semantic_id_0") + 1).write_parquet(path, metadata=metadata)


MISSING = {
    "no final model": lambda folder: (checkpoints(folder) / "final_model.pth").unlink(),
    "no best model": lambda folder: (checkpoints(folder) / "best_model.pth").unlink(),
    "a damaged final model": lambda folder: os.truncate(checkpoints(folder) / "final_model.pth", 999),
    "no IDs": lambda folder: (folder / "data" / "Tiny_semantic_ids.parquet").unlink(),
    "damaged IDs": lambda folder: os.truncate(folder / "data" / "Tiny_semantic_ids.parquet", 999),
    "changed IDs": lambda folder: change_ids(folder / "data" / "Tiny_semantic_ids.parquet"),
    "a damaged report": lambda folder: (folder / "data" / "Tiny_quality.json").write_text("[]"),
    "no report": lambda folder: (folder / "data" / "Tiny_quality.json").unlink(),
    "other IDs": lambda folder: run(folder, "--export_only", collisions="suffix"),
    "other names": lambda folder: catalogue().reverse().write_parquet(source(folder)),
    "longer": None,
    "another seed": None,
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_run_that_is_not_complete_is_run(copy, trained, calls, kind):
    exports = calls("export")
    if MISSING[kind]:
        MISSING[kind](copy)
    exports.clear()
    assert run(copy, **{"longer": {"max_steps": 25}, "another seed": {"seed": 1}}.get(kind, {})) == 0
    assert len(exports) == 1
    if kind not in ("other names", "longer", "another seed"):
        assert ids_of(copy).equals(ids_of(trained))
        assert same_tensors(load(copy), load(trained))


def test_starting_over_an_earlier_run_is_warned_of(unfinished, capsys):
    assert run(unfinished) == 0
    text = capsys.readouterr().err
    assert re.search(r"warning: .*checkpoint_step_20.pth and .* will be replaced; --resume would go on from it", text)


@pytest.mark.parametrize("name", ["final_model.pth", "best_model.pth"])
def test_a_run_killed_after_its_last_checkpoint_still_ends_with_every_file(folder, name):
    flags = {"max_steps": 20, "steps_per_val_log": 10}  # a numbered checkpoint at the last step
    assert run(folder, "--resume", **flags) == 0
    before = load(folder)
    (checkpoints(folder) / name).unlink()
    (folder / "data" / "Tiny_semantic_ids.parquet").unlink()
    if name == "best_model.pth":  # it cannot be made again: its step may be long past
        with pytest.raises(SystemExit):
            run(folder, "--resume", **flags)
        return
    assert run(folder, "--resume", **flags) == 0
    assert same_tensors(load(folder), before)
    assert load(folder)["step"] == 20


def test_checkpoints_of_an_earlier_longer_run_do_not_displace_those_of_this_one(folder):
    assert run(folder, max_steps=60, keep_checkpoints=9) == 0
    for path in checkpoints(folder).glob("checkpoint_step_*"):
        os.utime(path, (2**31, 2**31))  # as where a clock was ahead
    mine = checkpoints(folder) / "checkpoint_step_60_mine.pth"
    mine.write_bytes(b"a copy by hand")
    assert run(folder, seed=1, keep_checkpoints=9) == 0
    names = {path.name for path in checkpoints(folder).glob("checkpoint_step_*")}
    assert names == {"checkpoint_step_10.pth", "checkpoint_step_20.pth", mine.name}
    assert run(folder, "--resume", seed=1, max_steps=30, keep_checkpoints=9) == 0


@pytest.mark.parametrize(("keep", "kept"), [(1, [20]), (2, [15, 20]), (9, [5, 10, 15, 20])])
def test_only_the_newest_numbered_checkpoints_stay(folder, keep, kept):
    assert run(folder, steps_per_checkpoint=5, keep_checkpoints=keep) == 0
    names = {f"checkpoint_step_{step}.pth" for step in kept} | {"best_model.pth", "final_model.pth"}
    assert {path.name for path in checkpoints(folder).iterdir()} == names


@pytest.mark.parametrize(("first", "second", "stop"), [(24, 200, 20), (100, 30, 15)], ids=["longer", "shorter"])
def test_resuming_with_another_length_starts_the_codes_exactly_once(folder, monkeypatch, calls, first, second, stop):
    # autoencoder_steps left to its default, which depends on the length
    started = calls("start_quantizing")
    flags = {"autoencoder_steps": "REMOVED", "steps_per_checkpoint": 1000}

    def shorter(*switches, **changes):
        argv = command(folder, *switches, **flags | changes)
        place = argv.index("--autoencoder_steps")
        return train_rqvae.main(argv[:place] + argv[place + 2 :])

    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        assert shorter(max_steps=first) == 130
    assert shorter("--resume", max_steps=second) == 0
    assert len(started) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_the_script_after_its_step(folder, number):
    argv = command(folder, max_steps=1_000_000, steps_per_train_log=1000, steps_per_checkpoint=20)
    process = subprocess.Popen([sys.executable, str(SCRIPT), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = checkpoints(folder) / "checkpoint_step_20.pth"
    limit = time.monotonic() + 60
    while not first.exists() and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    assert b"go on with the same command and --resume" in err
    newest = max(checkpoints(folder).glob("checkpoint_step_*.pth"), key=lambda path: path.stat().st_mtime_ns)
    assert int(newest.stem.rpartition("_")[2]) >= 20
    assert torch.load(newest, weights_only=True).keys() >= KEYS


def test_a_second_ctrl_c_stops_at_once(folder, monkeypatch):
    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still at work")

    monkeypatch.setattr(train_rqvae, "train_step", twice)
    with pytest.raises(KeyboardInterrupt):
        run(folder)


def test_what_a_killed_save_left_is_removed(unfinished):
    stale = checkpoints(unfinished) / ".checkpoint_step_7.pth.tmp"
    stale.write_bytes(b"half")
    assert run(unfinished, "--resume") == 0
    assert not stale.exists()


def test_a_stop_before_the_first_validation_ignores_another_runs_best_model(copy, monkeypatch, recorder):
    # best_model.pth in this folder is of three levels, and is not this run's
    stop_at(monkeypatch, 3)
    assert run(copy, codebook_quantization_levels=4) == 130
    assert recorder.artifacts == []


# ---------------------------------------------------------------- training learns


@pytest.mark.parametrize("rotation", [False, True], ids=["straight", "rotation"])
@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_training_learns_the_clusters(tmp_path, ema, rotation):
    quality = {}
    for steps in (1, 300):
        folder = new_folder(tmp_path / str(steps))
        flags = {"max_steps": steps, "autoencoder_steps": steps // 5, "max_lr": 1e-2, "input_noise": 0.1}
        flags |= {"steps_per_val_log": 100, "codebook_size": 16, "steps_per_checkpoint": 1000}
        assert run(folder, use_ema_vq=ema, use_rotation_trick=rotation, collisions="keep", **flags) == 0
        model, x = train_rqvae.load_model(checkpoints(folder) / "best_model.pth"), embeddings_of(folder)
        codes = torch.from_numpy(codes_of(folder)).long()
        quality[steps] = train_rqvae.reconstruction_quality(x, model.decode_from_semantic_ids(codes))
        statistics = train_rqvae.code_statistics(codes, 16)
    assert quality[1][0] > 0.9
    assert quality[300][0] < 0.3  # the clusters leave about a fifth to noise within them
    assert quality[300][1] > 0.8
    assert min(statistics.usage) >= 0.75
    assert statistics.distinct > 0.2  # thirty clusters alone would be 0.1


# ---------------------------------------------------------------- flags


def shape(name: str, axis: int):
    return lambda folder: load(folder)["model_state_dict"][name].shape[axis]


def files(pattern: str):
    return lambda folder: sorted(path.name for path in folder.glob(pattern))


@pytest.mark.parametrize(
    ("changes", "see", "expected"),
    [
        ({"codebook_size": 12}, shape("quantizers.2.codebook", 0), 12),
        ({"codebook_embedding_dim": 5}, shape("quantizers.0.codebook", 1), 5),
        ({"codebook_quantization_levels": 4}, lambda folder: len(ids_of(folder).columns) - 2, 4),
        ({"encoder_hidden_dims": [20]}, shape("encoder.0.weight", 0), 20),
        ({"item_embedding_dim": DIM}, shape("encoder.0.weight", 1), DIM),
        ({"max_steps": 9}, lambda folder: load(folder)["step"], 9),
        ({"max_steps": -1, "num_epochs": 3}, lambda folder: load(folder)["step"], 12),
        ({"batch_size": 27}, lambda folder: load(folder)["epoch"], 2),
        ({"batch_size": 27, "gradient_accumulation_steps": 5}, lambda folder: load(folder)["epoch"], 12),
        (
            {"steps_per_checkpoint": 7},
            files("checkpoints/checkpoint_step_*"),
            [f"checkpoint_step_{step}.pth" for step in (14, 21, 7)],
        ),
        ({"num_rows": 250}, lambda folder: ids_of(folder)["parent_asin"].to_list(), NAMES[:250]),
        ({"collisions": "suffix"}, lambda folder: len(ids_of(folder).columns) - 2, LEVELS + 1),
        ({"seed": 5}, lambda folder: load(folder)["config"]["seed"], 5),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_flags_show_in_the_files(folder, changes, see, expected):
    assert run(folder, **changes) == 0
    assert see(folder) == expected


def test_folders_and_category_name_the_files(folder):
    target = folder / "elsewhere"
    target.mkdir()
    shutil.copy(source(folder), target / "Other_items_with_embeddings.parquet")
    assert run(folder, category="Other", data_dir=target, checkpoint_dir=folder / "new" / "deep") == 0
    assert (target / "Other_semantic_ids.parquet").is_file()
    assert (folder / "new" / "deep" / "best_model.pth").is_file()
    assert not checkpoints(folder).exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_val_split_holds_out_its_share(folder, calls, share):
    validations, plans = calls("validate"), calls("plan_training")
    assert run(folder, val_split=share) == 0
    plan = plans[0][1]
    held_out = round(share * N) or N
    assert len(plan.val_rows) == held_out
    assert len(plan.train_rows) == (N - held_out or N)
    assert all(torch.equal(arguments[2], plan.val_rows) for arguments, _ in validations)


def test_training_never_sees_the_held_out_rows(folder, calls):
    steps, plans = calls("train_step"), calls("plan_training")
    assert run(folder) == 0
    seen = torch.cat([arguments[3] for arguments, _ in steps]).unique()
    assert not torch.isin(seen, plans[0][1].val_rows).any()
    assert len(seen) > 260  # of 270
    assert all(len(arguments[3]) == 64 for arguments, _ in steps)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 6), ({"autoencoder_steps": 0}, 0), ({"autoencoder_steps": 15}, 15), ({"use_kmeans_init": False}, 0)],
    ids=str,
)
def test_autoencoder_steps_come_before_k_means_and_the_search_last(folder, calls, changes, expected):
    steps, starts = calls("train_step"), calls("start_quantizing")
    assert run(folder, **changes) == 0
    before_search = max(int(24 * train_rqvae.SEARCH_FROM), expected)
    widths = [0] * expected + [1] * (before_search - expected)
    widths += [train_rqvae.TRAINING_SEARCH_WIDTH] * (24 - before_search)
    assert [arguments[-1] for arguments, _ in steps] == widths
    assert len(starts) == (0 if "use_kmeans_init" in changes else 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 2), ({"steps_per_codebook_reset": 3}, 4), ({"reset_unused_codes": False}, 0), ({"autoencoder_steps": 0}, 3)],
    ids=str,
)
def test_unused_codes_are_reset_on_time_and_not_at_the_end(folder, calls, changes, expected):
    resets = calls("reset_codes")
    assert run(folder, **changes) == 0
    assert len(resets) == expected  # multiples of the interval after step 6, up to four fifths of 24


def test_reset_codes_come_into_use(folder, calls):
    resets = calls("reset_codes")
    flags = {"use_kmeans_init": False, "max_steps": 100, "codebook_size": 16, "steps_per_checkpoint": 1000}
    assert run(folder, **flags) == 0
    moved = [count for _, count in resets]
    assert moved[0] > 10  # random codes far away from most items
    assert moved[-1] < moved[0]


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_gradient_norms_are_logged_before_and_after_clipping(folder, recorder, clip):
    assert run(folder, gradient_clip_norm=clip) == 0
    before, after = recorder.series("train/gradient_norm"), recorder.series("train/clipped_gradient_norm")
    assert len(before) == 24
    assert min(before.values()) > 0.05
    assert after == {step: min(norm, clip or norm) for step, norm in before.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_lr": 1e-2, "min_lr": 1e-3},
        {"warmup_steps": 10},
        {"warmup_steps": 0},
        {"scheduler_type": "cosine"},
    ],
    ids=str,
)
def test_learning_rate_follows_its_flags_step_by_step(folder, recorder, calls, changes):
    steps = calls("train_step")
    assert run(folder, **changes) == 0
    config = steps[0][0][0].config
    assert {name: getattr(config, name) for name in changes} == changes
    expected = [train_rqvae.learning_rate(step, 24, config) for step in range(24)]
    assert list(recorder.series("train/learning_rate").values()) == pytest.approx(expected)


@pytest.mark.parametrize("beta", [0.0, 0.25, 3.0])
def test_logged_losses_add_up(folder, recorder, beta):
    assert run(folder, commitment_weight=beta) == 0
    for part in ("train", "val"):
        for step, total in recorder.series(f"{part}/total_loss").items():
            values = next(values for at, values in recorder.logs if at == step and f"{part}/vq_loss" in values)
            levels = range(LEVELS)
            vq = sum(values[f"{part}/codebook_loss_{i}"] + beta * values[f"{part}/commitment_loss_{i}"] for i in levels)
            assert values[f"{part}/vq_loss"] == pytest.approx(vq, rel=1e-4, abs=1e-6)
            assert total == pytest.approx(values[f"{part}/reconstruction_loss"] + vq, rel=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_input_noise_and_mixing_reach_the_training_inputs(folder, calls, noise, mixing):
    augmented = calls("augment")
    assert run(folder, input_noise=noise, input_mixing=mixing) == 0
    assert len(augmented) == 24
    for step, ((x, model, *_), (noisy, target)) in enumerate(augmented):
        assert torch.allclose(model.standardise(x), target, atol=1e-5) == (mixing == 0)
        faded = noise * (1 - step / 24)
        assert (noisy - target).std().item() == pytest.approx(faded, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_that_of_the_mlps_in_training_alone(folder, monkeypatch, capsys, dtype):
    made, walked = {True: set(), False: set()}, set()
    run_layers, quantize = train_rqvae.RQVAE.run, train_rqvae.RQVAE.quantize

    def watched_run(model, layers, x):
        result = run_layers(model, layers, x)
        made[model.training].add(result.dtype)
        return result

    def watched_quantize(model, latents, *rest, **options):
        walked.add(latents.dtype)
        return quantize(model, latents, *rest, **options)

    monkeypatch.setattr(train_rqvae.RQVAE, "run", watched_run)
    monkeypatch.setattr(train_rqvae.RQVAE, "quantize", watched_quantize)
    assert run(folder, dtype=dtype) == 0
    assert f"MLPs trained in {dtype}" in capsys.readouterr().out
    assert made[True] == {getattr(torch, dtype)}
    assert made[False] == {torch.float32}  # validation, and the export
    assert walked == {torch.float32}
    model = train_rqvae.load_model(checkpoints(folder) / "best_model.pth")
    assert {model.mlp_dtype, *(tensor.dtype for tensor in model.state_dict().values())} == {torch.float32}


def test_a_run_goes_on_in_the_number_type_that_it_began_in(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        run(folder, dtype="bfloat16")
    assert load(folder, "checkpoint_step_12")["config"]["dtype"] == "bfloat16"
    monkeypatch.setattr(train_rqvae, "choose_dtype", lambda device, name: "float32")  # as on another machine
    with pytest.raises(SystemExit, match="2"):
        run(folder, "--resume")
    assert "trained with --dtype bfloat16, not float32" in capsys.readouterr().err


def test_a_checkpoint_from_before_a_flag_counts_as_its_default(folder, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        run(folder)
    path = checkpoints(folder) / "checkpoint_step_12.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["config"]["input_noise"]
    torch.save(checkpoint, path)
    assert run(folder, "--resume") == 0


def test_training_in_bfloat16_learns_as_much(folder):
    losses = []
    for dtype in ("float32", "bfloat16"):
        assert run(folder, dtype=dtype) == 0
        losses.append(load(folder)["val_loss"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rotation_trick": True},
        {"use_ema_vq": True},
        {"use_ema_vq": True, "ema_decay": 0.5},
        {"commitment_weight": 2.0},
        {"gradient_accumulation_steps": 2},
        {"use_kmeans_init": False},
    ],
    ids=str,
)
def test_flags_of_the_quantizer_change_the_codes_that_are_learned(folder, trained, changes):
    assert run(folder, **changes) == 0
    config = load(folder)["config"]
    assert {name: config[name] for name in changes} == changes
    learned, usual = (load(each)["model_state_dict"]["quantizers.0.codebook"] for each in (folder, trained))
    assert not torch.equal(learned, usual)


def test_ema_decay_changes_what_ema_learns(tmp_path):
    codebooks = []
    for decay in (0.5, 0.99):
        folder = new_folder(tmp_path / str(decay))
        assert run(folder, use_ema_vq=True, ema_decay=decay) == 0
        codebooks.append(load(folder)["model_state_dict"]["quantizers.0.codebook"])
    assert not torch.allclose(*codebooks, atol=1e-3)


@pytest.mark.parametrize("interval", [5, 12])
def test_losses_are_logged_at_their_intervals(folder, recorder, interval):
    assert run(folder, steps_per_train_log=interval, steps_per_val_log=interval) == 0
    at = sorted({*(step for step in range(1, 25) if step % interval == 0), 24})  # and after the last
    assert list(recorder.series("train/total_loss")) == at
    assert list(recorder.series("val/total_loss")) == [step for step in at if step > 6]


def test_summary_names_device_sizes_steps_and_every_setting(folder, capsys):
    assert run(folder) == 0
    text = capsys.readouterr().out
    assert "device cpu (asked for)" in text
    assert f"{N} items of {DIM} dimensions from {source(folder)}" in text
    assert "270 training and 30 validation items" in text
    assert "24 steps of 64 items, 4 an epoch; the first 6 as a plain autoencoder" in text
    for name in train_rqvae.RQVAEConfig.__dataclass_fields__:
        assert re.search(f"^{name}: ", text, flags=re.MULTILINE), name


# ---------------------------------------------------------------- W&B


def test_everything_that_is_tracked_is_logged(folder, recorder):
    assert run(folder, wandb_project="a project") == 0
    assert [options["project"] for options in recorder.started] == ["a project"]
    assert recorder.started[0]["config"]["codebook_size"] == 8
    each = [f"{name}_{level}" for name in ("codebook_loss", "commitment_loss") for level in range(LEVELS)]
    losses = ["total_loss", "reconstruction_loss", "vq_loss", *each]
    names = {f"{part}/{name}" for part in ("train", "val") for name in losses}
    names |= {"train/gradient_norm", "train/clipped_gradient_norm", "train/learning_rate", "train/items_per_second"}
    names |= {f"catalogue/{name}_{level}" for name in ("usage", "perplexity") for level in range(LEVELS)}
    names |= {"catalogue/distinct", "catalogue/singleton", "catalogue/residual_norm"}
    assert {name for _, values in recorder.logs for name in values} >= names
    steps = [step for step, _ in recorder.logs]
    assert steps == sorted(steps)  # W&B drops what comes with an earlier step
    assert all(np.isfinite(value) for _, values in recorder.logs for value in values.values())
    assert recorder.finished == 1


def test_logged_catalogue_figures_are_those_of_the_model(folder, recorder):
    assert run(folder) == 0
    model = train_rqvae.load_model(checkpoints(folder) / "final_model.pth")
    x = embeddings_of(folder)
    width = train_rqvae.TRAINING_SEARCH_WIDTH
    statistics = train_rqvae.code_statistics(model.encode_to_semantic_ids(x, width), 8)
    assert recorder.series("catalogue/distinct")[24] == pytest.approx(statistics.distinct)
    for level in range(LEVELS):
        assert recorder.series(f"catalogue/usage_{level}")[24] == pytest.approx(statistics.usage[level])
        assert recorder.series(f"catalogue/perplexity_{level}")[24] == pytest.approx(statistics.perplexity[level])
    rows = train_rqvae.plan_training(N, model.config).val_rows
    with torch.no_grad():
        total = model(model.standardise(x[rows])).total.item()
    assert recorder.series("val/total_loss")[24] == pytest.approx(total, rel=1e-4)


def test_best_model_is_handed_over_once_with_what_it_is_worth(folder, recorder):
    assert run(folder) == 0
    (artifact,) = recorder.artifacts
    best = load(folder, "best_model")
    assert artifact.type == "model"
    assert list(artifact.manifest.entries) == ["best_model.pth"]
    metadata = dict(artifact.metadata)
    assert metadata["val_loss"] == best["val_loss"]
    assert metadata["step"] == best["step"]
    assert metadata["config"] == best["config"]
    model = train_rqvae.load_model(checkpoints(folder) / "best_model.pth")
    codes = model.encode_to_semantic_ids(embeddings_of(folder), train_rqvae.TRAINING_SEARCH_WIDTH)
    statistics = train_rqvae.code_statistics(codes, 8)
    assert metadata["unique_proportion"] == pytest.approx(statistics.distinct)
    assert [metadata[f"usage_{level}"] for level in range(LEVELS)] == pytest.approx(statistics.usage)
    assert metadata["residual_norm"] > 0


def test_a_resumed_run_goes_on_in_the_same_wandb_run(folder, recorder, monkeypatch):
    recorder.id = "abc123"
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        run(folder)
    assert run(folder, "--resume") == 0
    assert [options["id"] for options in recorder.started] == [None, "abc123"]
    assert recorder.finished == 2
    assert list(recorder.series("train/total_loss")) == list(range(1, 25))


def test_without_a_key_a_run_is_offline_and_nothing_is_asked_at_a_terminal(folder):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(folder), "COLUMNS": "200"}
    keyboard, terminal = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *command(folder)],
            stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, env=environment, text=True,
        )  # fmt: skip
        out, _ = process.communicate(timeout=120)  # waits for ever where something is asked
    finally:
        os.close(terminal)
        os.close(keyboard)
    assert process.returncode == 0
    lines = [line for line in out.splitlines() if "wandb sync" in line]
    assert len(lines) == 1
    synced = Path(lines[0].split("wandb sync ")[1])
    assert synced.is_dir()
    assert checkpoints(folder) in synced.parents


def test_wandb_disabled_is_respected(folder, capsys, monkeypatch):
    monkeypatch.setattr(train_rqvae.wandb, "login", lambda **_: pytest.fail("W&B was asked for a key"))
    assert run(folder) == 0
    assert "wandb sync" not in capsys.readouterr().out
    assert not (checkpoints(folder) / "wandb").exists()


def test_wandb_mode_of_the_environment_is_what_wandb_gets(folder, recorder, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(folder) == 0
    assert recorder.started[0]["mode"] == "offline"
    assert capsys.readouterr().out.count("wandb sync") == 1


@pytest.mark.parametrize("where", ["login", "init"])
def test_where_wandb_is_out_of_reach_the_run_goes_on_offline(folder, monkeypatch, capsys, where):
    recorder, modes = Recorder(), []

    def login(**_):
        if where == "login":
            raise train_rqvae.wandb.errors.AuthenticationError("no network\nat all")
        return True

    def init(mode, **options):
        modes.append(mode)
        if mode == "online":
            raise train_rqvae.wandb.errors.CommError("no network\nat all")
        return recorder.init(**options)

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(train_rqvae.wandb, "login", login)
    monkeypatch.setattr(train_rqvae.wandb, "init", init)
    assert run(folder) == 0
    text = capsys.readouterr()
    assert modes[-1] == "offline"
    assert len(re.findall("^warning: .*no network", text.err, flags=re.MULTILINE)) == 1
    assert text.out.count("wandb sync") == 1
    assert ids_of(folder)["semantic_id"].is_unique().all()


@pytest.mark.parametrize(
    ("mode", "project", "named"), [("bogus", "fine", "WANDB_MODE"), ("offline", "a/b", "a/b")], ids=["mode", "project"]
)
def test_wandb_settings_that_cannot_be_are_refused(unfinished, refused, monkeypatch, mode, project, named):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert named in refused(unfinished, wandb_project=project)


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--codebook_size", "1"], "--codebook_size 1"),
        (["--codebook_quantization_levels", "0"], "--codebook_quantization_levels 0"),
        (["--codebook_embedding_dim", "0"], "--codebook_embedding_dim 0"),
        (["--encoder_hidden_dims", "32", "0"], "--encoder_hidden_dims"),
        (["--encoder_hidden_dims"], "--encoder_hidden_dims"),
        (["--item_embedding_dim", "0"], "--item_embedding_dim 0"),
        (["--commitment_weight", "-1"], "--commitment_weight -1"),
        (["--commitment_weight", "nan"], "--commitment_weight nan"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--batch_size", "many"], "--batch_size"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0"),
        (["--num_epochs", "0"], "--num_epochs 0"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--max_steps", "-5"], "--max_steps -5"),
        (["--max_lr", "0"], "--max_lr 0"),
        (["--max_lr", "nan"], "--max_lr nan"),
        (["--max_lr", "inf"], "--max_lr inf"),
        (["--min_lr", "-1"], "--min_lr -1"),
        (["--min_lr", "1"], "--min_lr 1"),
        (["--warmup_steps", "-1"], "--warmup_steps -1"),
        (["--scheduler_type", "linear"], "--scheduler_type"),
        (["--gradient_clip_norm", "-1"], "--gradient_clip_norm -1"),
        (["--input_noise", "-0.1"], "--input_noise -0.1"),
        (["--input_noise", "inf"], "--input_noise inf"),
        (["--input_mixing", "-0.1"], "--input_mixing -0.1"),
        (["--ema_decay", "1"], "--ema_decay 1"),
        (["--ema_decay", "-0.1"], "--ema_decay -0.1"),
        (["--autoencoder_steps", "-1"], "--autoencoder_steps -1"),
        (["--autoencoder_steps", "24"], "--autoencoder_steps 24"),
        (["--steps_per_codebook_reset", "0"], "--steps_per_codebook_reset 0"),
        (["--val_split", "1"], "--val_split 1"),
        (["--val_split", "-0.1"], "--val_split -0.1"),
        (["--steps_per_train_log", "0"], "--steps_per_train_log 0"),
        (["--steps_per_val_log", "0"], "--steps_per_val_log 0"),
        (["--steps_per_checkpoint", "0"], "--steps_per_checkpoint 0"),
        (["--num_rows", "0"], "--num_rows 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999"),
        (["--seed", "4294967295"], "--seed 4294967295"),  # scikit-learn's last one, and a level adds to it
        (["--device", "tpu"], "--device"),
        (["--collisions", "merge"], "--collisions"),
        (["--use_ema_vq", "maybe"], "--use_ema_vq"),
        (["--no_such_flag", "1"], "--no_such_flag"),
        (["--codebook", "8"], "--codebook"),  # no abbreviations
        (["stray"], "stray"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_out_of_range_are_refused(trained, refused, flags, named):
    line = refused(trained, *flags)
    assert named in line
    assert ";" in line  # what is wrong; the way out


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("switch", ["--export_only", "--resume"])
def test_a_device_that_is_not_there_is_refused(trained, refused, monkeypatch, device, switch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    line = refused(trained, switch, device=device)
    assert f"--device {device}" in line
    assert "--device auto" in line


# ---------------------------------------------------------------- wrong input


def with_rows(table: pl.DataFrame, kind=None, **changes) -> pl.DataFrame:
    """The table with these rows of its embeddings changed: `r5` is row 5."""
    rows = table["embedding"].to_list()
    for row, value in changes.items():
        rows[int(row[1:])] = value
    return table.with_columns(pl.Series("embedding", rows, dtype=kind or pl.List(pl.Float32)))


def broken(value: float, *rows: int) -> dict:
    return {f"r{row}": [0.0] * 5 + [value] + [0.0] * (DIM - 6) for row in rows}


ARRAY = pl.Array(pl.Float32, DIM)
WRONG_TABLES = {
    "no embedding": (lambda t: t.drop("embedding"), ["embedding", "title, parent_asin, item_context"]),
    "no parent_asin": (lambda t: t.drop("parent_asin"), ["parent_asin", "title, item_context, embedding"]),
    "no rows": (lambda t: t.head(0), ["no rows"]),
    "NaN": (lambda t: with_rows(t, **broken(np.nan, 7, 90)), ["2 NaN or infinite", NAMES[7]]),
    "infinite": (lambda t: with_rows(t, **broken(-np.inf, 299)), ["1 NaN or infinite", NAMES[299]]),
    "null in a vector": (lambda t: with_rows(t, r3=[None] * DIM), ["1 NaN or infinite", NAMES[3]]),
    "too large for float32": (
        lambda t: with_rows(t, pl.List(pl.Float64), **broken(1e300, 11)),
        ["1 NaN or infinite", NAMES[11]],
    ),
    "NaN in an array": (lambda t: with_rows(t, ARRAY, **broken(np.nan, 7)), ["1 NaN or infinite", NAMES[7]]),
    "ragged": (lambda t: with_rows(t, r4=[1.0], r9=[1.0] * 30), ["2 embeddings", "row 4"]),
    "null row": (lambda t: with_rows(t, r6=None), ["1 embeddings", "row 6"]),
    "first row null": (lambda t: with_rows(t, r0=None), ["row 0"]),
    "null row of an array": (lambda t: with_rows(t, ARRAY, r6=None), ["1 embeddings", "row 6"]),
    "all rows null": (lambda t: t.with_columns(embedding=pl.lit(None, pl.List(pl.Float32))), ["300 embeddings"]),
    "empty vectors": (lambda t: with_rows(t, **{f"r{row}": [] for row in range(N)}), ["300 embeddings"]),
    "text as embedding": (lambda t: t.with_columns(embedding=pl.lit("text")), ["embedding is String"]),
    "text in an array": (
        lambda t: t.with_columns(pl.Series("embedding", [["a"] * DIM] * N, dtype=pl.Array(pl.String, DIM))),
        ["embedding is Array(String"],
    ),
    "duplicates": (
        lambda t: t.with_columns(pl.Series("parent_asin", [*NAMES[:297], *NAMES[5:8]])),
        ["3 duplicate parent_asin", NAMES[5], "row 297"],
    ),
    "null parent_asin": (lambda t: t.with_columns(pl.Series("parent_asin", [None, *NAMES[1:]])), ["parent_asin"]),
    "number as parent_asin": (lambda t: t.with_columns(pl.Series("parent_asin", range(N))), ["parent_asin"]),
}  # fmt: skip


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("case", WRONG_TABLES)
@pytest.mark.parametrize("switch", ["--export_only", "--resume"])
def test_wrong_tables_are_refused(copy, refused, case, switch):
    change, words = WRONG_TABLES[case]
    change(catalogue()).write_parquet(source(copy))
    line = refused(copy, switch)
    assert line.startswith(f"error: {source(copy)}: ")
    assert "run" in line.rpartition(";")[2]
    for word in words:
        assert word in line


def test_a_missing_file_is_refused_with_the_script_that_makes_it(copy, refused):
    source(copy).unlink()
    line = refused(copy)
    assert str(source(copy)) in line
    assert "embed_items.py" in line


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"not a parquet file at all" * 50, "half", "all but the end", "hole"]
)
def test_a_corrupt_parquet_file_is_refused(copy, refused, content):
    whole = source(copy).read_bytes()
    pieces = {
        "half": whole[: len(whole) // 2],
        "all but the end": whole[:-1],
        "hole": whole[:-400] + b"\xff" * 200 + whole[-200:],
    }
    source(copy).write_bytes(pieces[content] if isinstance(content, str) else content)
    line = refused(copy)
    assert str(source(copy)) in line
    assert "embed_items.py" in line


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (20, {"codebook_size": 19}, ["18 training items", "19 codes of k-means", "--use_kmeans_init False"]),
        (65, {"codebook_quantization_levels": 2}, ["65 items", "64 IDs", "--collisions suffix"]),
        (N, {"item_embedding_dim": 25}, ["24", "--item_embedding_dim"]),
    ],
    ids=["k-means", "assign", "dimension"],
)  # fmt: skip
def test_items_that_do_not_fit_the_flags_are_refused(copy, refused, rows, changes, words):
    catalogue(rows).write_parquet(source(copy))
    line = refused(copy, **changes)
    assert str(source(copy)) in line
    for word in words:
        assert word in line


def test_more_items_than_ids_are_no_trouble_where_they_may_share(tmp_path):
    folder = new_folder(tmp_path)
    assert run(folder, codebook_quantization_levels=2, collisions="suffix") == 0
    assert ids_of(folder)["semantic_id"].is_unique().all()
    assert run(folder, codebook_quantization_levels=2, collisions="keep") == 0
    assert ids_of(folder)["semantic_id"].n_unique() <= 64


# ---------------------------------------------------------------- damaged and foreign checkpoints


class Malicious:
    """Runs a command where a pickle of it is loaded carelessly."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def damage(path: Path, how: str | float) -> Path:
    """Damages a checkpoint; returns the file that comes to be if loading it runs a program in it."""
    whole, trap = path.read_bytes(), path.parent.parent / "it_ran"
    if isinstance(how, float):
        path.write_bytes(whole[: int(len(whole) * how)])
    elif how == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif how == "bits":  # in the weights, where neither the archive nor the pickle looks broken
        with zipfile.ZipFile(path) as archive:
            tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
            weights = archive.read(max(tensors, key=lambda entry: entry.file_size))
        assert whole.count(weights) == 1
        path.write_bytes(whole.replace(weights, bytes([weights[0] ^ 1]) + weights[1:]))
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"model_state_dict": Malicious(trap)}))
    elif how == "zip pickle":
        torch.save({"model_state_dict": Malicious(trap), "config": {}}, path)
    elif how == "short pickle":
        path.write_bytes(b"\x80\x02K\x01K\x02s.")  # a stack that runs empty
    else:
        torch.save({"tensor": torch.zeros(3), "list": [1], "empty": {}, "odd": dict.fromkeys(KEYS, "x")}[how], path)
    return trap


HOWS = [0.0, 0.01, 0.3, 0.7, 0.99, "garbage", "bits", "pickle", "zip pickle", "short pickle"]
HOWS += ["tensor", "list", "empty", "odd"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_damaged_best_model_is_refused_and_runs_nothing(copy, refused, how):
    path = checkpoints(copy) / "best_model.pth"
    trap = damage(path, how)
    line = refused(copy, "--export_only")
    assert line.startswith(f"error: {path}: ")
    assert "train" in line
    assert not trap.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_damaged_newest_checkpoint_is_passed_over_and_runs_nothing(unfinished, trained, capsys, how):
    path = checkpoints(unfinished) / "checkpoint_step_20.pth"
    trap = damage(path, how)
    os.utime(path)
    assert run(unfinished, "--resume") == 0
    text = capsys.readouterr()
    assert f"warning: {path} " in text.err
    assert not trap.exists()
    assert same_tensors(load(unfinished), load(trained))


@pytest.mark.parametrize("key", ["model_state_dict", "config", "step", "optimizer_states", "random_states", "usage"])
def test_a_checkpoint_without_all_that_a_resume_needs_is_passed_over(unfinished, trained, key):
    path = checkpoints(unfinished) / "checkpoint_step_20.pth"
    torch.save({name: value for name, value in load(unfinished, path.stem).items() if name != key}, path)
    assert run(unfinished, "--resume") == 0
    assert same_tensors(load(unfinished), load(trained))


@pytest.mark.parametrize("key", ["optimizer_states", "scheduler_states", "random_states", "usage"])
def test_a_checkpoint_of_another_training_state_is_refused(unfinished, refused, key):
    path = checkpoints(unfinished) / "checkpoint_step_20.pth"
    other = {"usage": torch.zeros(2, 2), "random_states": {}}.get(key, [])
    torch.save(load(unfinished, path.stem) | {key: other}, path)
    line = refused(unfinished, "--resume")
    assert f"{path}: what it holds of the training does not fit" in line


@pytest.mark.parametrize("change", [{"step": -5}, {"step": "20"}, {"model_state_dict": None}])
def test_a_checkpoint_of_no_sound_model_or_step_is_passed_over(unfinished, trained, capsys, change):
    path = checkpoints(unfinished) / "checkpoint_step_20.pth"
    checkpoint = load(unfinished, path.stem)
    if "model_state_dict" in change:
        change = {"model_state_dict": checkpoint["model_state_dict"] | {"input_scale": torch.tensor(math.nan)}}
    torch.save(checkpoint | change, path)
    assert run(unfinished, "--resume") == 0
    assert f"warning: {path} is damaged" in capsys.readouterr().err
    assert same_tensors(load(unfinished), load(trained))


def test_a_missing_best_model_is_refused(copy, refused):
    path = checkpoints(copy) / "best_model.pth"
    path.unlink()
    line = refused(copy, "--export_only")
    assert str(path) in line
    assert "train first" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"codebook_size": 16},
        {"codebook_quantization_levels": 2},
        {"encoder_hidden_dims": [32]},
        {"max_lr": 1e-2},
        {"seed": 1},
        {"use_ema_vq": True},
        {"val_split": 0.2},
    ],
    ids=str,
)
def test_a_checkpoint_of_other_flags_is_not_resumed(copy, refused, changes):
    line = refused(copy, "--resume", **changes, collisions="keep")
    (name,) = changes
    assert str(checkpoints(copy)) in line
    assert f"--{name}" in line
    assert "--checkpoint_dir" in line


def test_a_checkpoint_of_other_embeddings_is_not_resumed(copy, refused):
    catalogue(seed=1).write_parquet(source(copy))
    assert "other embeddings" in refused(copy, "--resume")


@pytest.mark.parametrize(
    "changes", [{"codebook_size": 16}, {"codebook_embedding_dim": 6}, {"codebook_quantization_levels": 2}], ids=str
)
def test_a_model_of_other_sizes_is_not_exported(copy, refused, changes):
    line = refused(copy, "--export_only", collisions="keep", **changes)
    (name,) = changes
    assert "best_model.pth" in line
    assert f"--{name}" in line


def test_a_model_of_another_dimension_is_not_exported(copy, refused):
    catalogue(dim=20).write_parquet(source(copy))
    line = refused(copy, "--export_only")
    assert "best_model.pth" in line
    assert "24-dimensional" in line
    assert "20" in line


# ---------------------------------------------------------------- disks and numbers that run out


def test_a_full_disk_that_python_sees_is_refused(unfinished, refused, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    line = refused(unfinished)
    assert str(checkpoints(unfinished)) in line
    assert "No space left on device" in line
    assert "make room" in line


@pytest.mark.parametrize("size", [0, 3000, 15_000, 30_000])
def test_a_full_disk_under_a_checkpoint_is_refused(unfinished, refused, full_disk, size):
    # 30,000 is room for best_model.pth, and not for a numbered checkpoint
    line = full_disk(partial(refused, unfinished, files_stay=size < 20_000), limit=size)
    assert str(checkpoints(unfinished)) in line
    assert "make room" in line
    for path in checkpoints(unfinished).glob("*.pth"):
        assert torch.load(path, weights_only=True).keys() >= KEYS
    assert not list(checkpoints(unfinished).glob(".*"))


def test_a_full_disk_under_the_ids_is_refused(copy, refused, full_disk):
    line = full_disk(refused, copy, "--export_only", limit=300)
    assert str(copy / "data" / "Tiny_semantic_ids.parquet") in line
    assert "make room" in line


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/deeper"])
def test_a_file_where_the_folder_should_be_is_refused(folder, refused, place):
    (folder / "checkpoints").write_text("a file")
    assert str(folder / place) in refused(folder, checkpoint_dir=folder / place)


@pytest.mark.parametrize("log", [1, 1000])
@pytest.mark.parametrize("kmeans", [False, True])
def test_a_run_that_diverges_fails_and_exports_nothing(copy, log, kmeans):
    # best_model.pth and the IDs of an earlier run are in this folder, and are not this run's
    before = outputs(copy)
    with pytest.raises(SystemExit, match=r"error: .*; train again with a lower --max_lr"):
        run(copy, max_lr=1e12, gradient_clip_norm=0, warmup_steps=0, use_kmeans_init=kmeans, steps_per_train_log=log)
    kept = ["checkpoints/best_model.pth", "data/Tiny_semantic_ids.parquet"]
    assert {name: outputs(copy)[name] for name in kept} == {name: before[name] for name in kept}


@pytest.mark.parametrize(("term", "place"), [("total_loss", 0), ("commitment_loss_2", 8), ("gradient_norm", None)])
@pytest.mark.parametrize("log", [1, 1000])
def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(folder, monkeypatch, term, place, log):
    """In step 12, between two checkpoints and between two validations."""
    real, count = train_rqvae.train_step, iter(range(1, 10**6))

    def breaking(*arguments):
        result = real(*arguments)
        if next(count) != 12:
            return result
        if place is None:
            return result._replace(gradient_norm=torch.tensor(math.inf))
        result.terms[place] = math.nan
        return result

    monkeypatch.setattr(train_rqvae, "train_step", breaking)
    with pytest.raises(SystemExit, match=rf"error: train/{term} became (nan|inf) in step 12; train again"):
        run(folder, steps_per_checkpoint=5, steps_per_train_log=log)
    assert {path.name for path in checkpoints(folder).iterdir()} == {
        "checkpoint_step_5.pth", "checkpoint_step_10.pth", "best_model.pth"
    }  # fmt: skip
    assert load(folder, "best_model")["step"] == 8


def test_weights_that_are_no_numbers_are_not_saved(folder, monkeypatch):
    real, count = train_rqvae.train_step, iter(range(1, 10**6))

    def breaking(model, *arguments):
        result = real(model, *arguments)
        if next(count) == 15:
            model.encoder[0].weight.data[0, 0] = math.nan
        return result

    monkeypatch.setattr(train_rqvae, "train_step", breaking)
    with pytest.raises(SystemExit, match="error: a weight became NaN or infinite in step 15; train again"):
        run(folder, steps_per_checkpoint=5)
    assert {path.name for path in checkpoints(folder).iterdir()} >= {"checkpoint_step_10.pth", "best_model.pth"}
    assert not (checkpoints(folder) / "checkpoint_step_15.pth").exists()


def test_embeddings_that_are_not_those_written_are_refused(copy, refused):
    """A flipped bit where the file's own structure stays sound."""
    path, table = source(copy), pl.read_parquet(source(copy))
    metadata = {"vectors": train_rqvae.data_digest(embeddings_of(copy).numpy())}
    table.write_parquet(path, compression="uncompressed", metadata=metadata)
    assert run(copy, "--overwrite") == 0
    content, number = path.read_bytes(), table["embedding"][7].to_numpy()[:2].tobytes()
    assert content.count(number) == 1
    path.write_bytes(content.replace(number, bytes([number[0] ^ 1]) + number[1:]))
    for switch in ("--export_only", "--resume"):
        assert f"{path}: damaged" in refused(copy, switch)


def test_names_that_are_not_those_written_are_refused(copy, refused):
    path, table = source(copy), pl.read_parquet(source(copy))
    metadata = {"names": train_rqvae.names_digest(table["parent_asin"])}
    table.write_parquet(path, compression="uncompressed", metadata=metadata)
    assert run(copy, "--export_only") == 0
    path.write_bytes(path.read_bytes().replace(b"B0007", b"X0007", 1))
    assert f"{path}: damaged: its parent_asin are not those" in refused(copy, "--export_only")
    assert run(copy, "--export_only", num_rows=N - 1) == 0  # a trial of some rows: their digests are not known


def test_a_second_run_into_the_same_place_leaves(copy, refused):
    with train_rqvae.alone(checkpoints(copy) / "best_model.pth"):
        assert "another run is writing it" in refused(copy, data_dir=copy / "data")
    with train_rqvae.alone(copy / "data" / "Tiny_semantic_ids.parquet"):
        assert "another run is writing it" in refused(copy, "--export_only")


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
        losses[device] = load(folder, "best_model")["val_loss"]
        assert ids_of(folder)["semantic_id"].is_unique().all()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.1)  # other random numbers, other rounding


# ---------------------------------------------------------------- runs that come after others


def test_resuming_a_finished_run_without_its_best_model_is_refused(copy, refused):
    best = checkpoints(copy) / "best_model.pth"
    best.unlink()
    line = refused(copy, "--resume", max_steps=20)
    assert str(best) in line
    assert "without --resume" in line


def test_resuming_with_fewer_steps_than_are_done_leaves_the_final_model(copy, capsys):
    before = load(copy, "final_model")
    assert run(copy, "--resume", max_steps=20) == 0
    assert "nothing left to train" in capsys.readouterr().out
    assert load(copy, "final_model")["step"] == before["step"]


def test_exporting_more_items_than_the_model_has_ids_is_refused(tmp_path, refused):
    flags = {"codebook_size": 4, "codebook_quantization_levels": 2, "steps_per_codebook_reset": 4}
    assert run(new_folder(tmp_path, catalogue(16)), **flags) == 0
    catalogue(17).write_parquet(source(tmp_path))
    line = refused(tmp_path, "--export_only", codebook_size=256, codebook_quantization_levels=3)
    assert "17 items, but only 16 IDs" in line


def test_a_model_of_another_category_is_used_with_a_warning(copy, capsys):
    shutil.copy(source(copy), copy / "data" / "Other_items_with_embeddings.parquet")
    assert run(copy, "--export_only", category="Other") == 0
    assert "was trained on Tiny" in capsys.readouterr().err
    assert pl.read_parquet(copy / "data" / "Other_semantic_ids.parquet").equals(ids_of(copy))
