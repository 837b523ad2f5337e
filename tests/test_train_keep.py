"""train_rqvae.py --export_only --keep_ids: a catalogue that changes while its IDs are in use."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import complaint, files_of

import train_rqvae

N, DIM, LEVELS, SIZE = 300, 24, 3, 8  # 512 IDs
FLAGS = {
    "category": "Tiny",
    "device": "cpu",
    "encoder_hidden_dims": 32,
    "codebook_embedding_dim": 8,
    "codebook_quantization_levels": LEVELS,
    "codebook_size": [SIZE],
    "batch_size": 64,
    "max_steps": 200,
    "max_lr": 3e-3,
    "warmup_steps": 4,
    "val_split": 0.2,
    "steps_per_val_log": 100,
}

# ---------------------------------------------------------------- helpers


def vectors(n: int, seed: int, centres: int = 30) -> np.ndarray:
    """Unit vectors around thirty centres, which are the same for every seed."""
    generator = np.random.default_rng(seed)
    middle = np.random.default_rng(0).normal(size=(centres, DIM))
    x = middle[generator.integers(centres, size=n)] + 0.2 * generator.normal(size=(n, DIM))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def items(names: list[str], x: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame({"parent_asin": names, "embedding": pl.Series(x.tolist(), dtype=pl.List(pl.Float32))})


def first_items() -> pl.DataFrame:
    names = np.random.default_rng(5).permutation(N)  # rows are not in the order of names
    return items([f"B{name:04}" for name in names], vectors(N, seed=1))


def new_items(n: int, seed: int = 2) -> pl.DataFrame:
    return items([f"A{seed}{name:04}" for name in range(n)], vectors(n, seed))


def strange_items(n: int) -> pl.DataFrame:
    """Items in any direction."""
    x = np.random.default_rng(8).normal(size=(n, DIM))
    return items([f"A{i}" for i in range(n)], (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


def ids_path(folder: Path) -> Path:
    return folder / "data" / "Tiny_semantic_ids.parquet"


def write(folder: Path, table: pl.DataFrame) -> None:
    table.write_parquet(folder / "data" / "Tiny_items_with_embeddings.parquet")


def run(folder: Path, *switches: str, **changes) -> dict[str, str]:
    """The IDs by item."""
    flags = {"category": "Tiny", "device": "cpu"} if "--export_only" in switches else FLAGS
    flags = flags | {"data_dir": folder / "data", "checkpoint_dir": folder / "checkpoints"} | changes
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    assert train_rqvae.main([*argv, *switches]) == 0
    return dict(pl.read_parquet(ids_path(folder)).select("parent_asin", "semantic_id").iter_rows())


def export(folder: Path, **changes) -> dict[str, str]:
    """The IDs by item, with those of the last export kept."""
    return run(folder, "--export_only", **{"keep_ids": ids_path(folder)} | changes)


def keeping(folder: Path) -> dict:
    return json.loads((folder / "data" / "Tiny_quality.json").read_text())["keep_ids"]


def retired(folder: Path) -> set[str]:
    """The IDs that the export's metadata keep from being given again."""
    numbers = np.frombuffer(bytes.fromhex(pl.read_parquet_metadata(ids_path(folder))["retired"]), "<i4")
    return {"-".join(map(str, id)) for id in numbers.reshape(-1, LEVELS).tolist()}


def load_model(folder: Path) -> train_rqvae.RQVAE:
    return train_rqvae.load_model(folder / "checkpoints" / "best_model.pth")


def embeddings_of(table: pl.DataFrame) -> torch.Tensor:
    return torch.from_numpy(np.stack(table["embedding"].to_list()).astype(np.float32))


def encoded_ids(folder: Path, table: pl.DataFrame) -> list[str]:
    codes = load_model(folder).encode_to_semantic_ids(embeddings_of(table))
    return ["-".join(map(str, row)) for row in codes.tolist()]


def errors(model: train_rqvae.RQVAE, x: torch.Tensor, ids: list[str]) -> np.ndarray:
    """Squared distance of each row of x (N, D) to what its ID decodes to: (N)."""
    codes = torch.tensor([list(map(int, id.split("-"))) for id in ids])
    return (model.decode_from_semantic_ids(codes) - x).square().sum(1).numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    write(folder, first_items())
    run(folder)
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A model of 512 IDs, and the export of 300 items."""
    return shutil.copytree(trained, tmp_path / "folder")


@pytest.fixture(scope="module")
def trained_roomy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("roomy")
    (folder / "data").mkdir()
    write(folder, first_items())
    run(folder, codebook_size=[48, 32, 24])
    return folder


@pytest.fixture
def roomy(trained_roomy, tmp_path) -> Path:
    """The same with a model of 36,864 IDs, most of which are free, and codebooks of three sizes."""
    return shutil.copytree(trained_roomy, tmp_path / "roomy")


def exported(folder: Path) -> dict[str, str]:
    return dict(pl.read_parquet(ids_path(folder)).select("parent_asin", "semantic_id").iter_rows())


# ---------------------------------------------------------------- the IDs that stay


def test_an_unchanged_catalogue_gets_the_same_file_bit_for_bit(folder):
    before = ids_path(folder).read_bytes()
    export(folder)
    assert ids_path(folder).read_bytes() == before
    assert keeping(folder)["kept"] == N


@pytest.mark.parametrize("collisions", ["assign", "suffix"])
def test_items_keep_their_ids_whatever_comes_goes_and_moves_in_the_file(folder, tmp_path, collisions):
    before = run(folder, "--export_only", collisions=collisions)
    elsewhere = shutil.move(ids_path(folder), tmp_path / "monday.parquet")
    content = elsewhere.read_bytes()
    gone = set(first_items()["parent_asin"][:30])
    table = pl.concat([first_items()[30:], new_items(100)]).sample(fraction=1, shuffle=True, seed=0)
    write(folder, table)
    after = export(folder, collisions=collisions, keep_ids=elsewhere)
    assert list(after) == table["parent_asin"].to_list()
    assert all(after[name] == id for name, id in before.items() if name not in gone)
    assert len(set(after.values())) == len(after)
    assert not {before[name] for name in gone} & set(after.values())
    counts = {"kept": 270, "moved": 0, "new": 100, "vanished": 30}
    assert {name: keeping(folder)[name] for name in counts} == counts
    assert elsewhere.read_bytes() == content


def test_new_items_get_the_ids_that_they_are_encoded_to_where_those_are_free(roomy):
    before, table = exported(roomy), new_items(100)
    write(roomy, pl.concat([first_items(), table]))
    after = export(roomy)
    encoded = dict(zip(table["parent_asin"], encoded_ids(roomy, table), strict=True))
    wanted = [*encoded.values(), *before.values()]
    crowded = {id.rsplit("-", 1)[0] for id in wanted if wanted.count(id) > 1}
    undisturbed = [name for name, id in encoded.items() if id.rsplit("-", 1)[0] not in crowded]
    assert 10 < len(undisturbed) < 100
    assert all(after[name] == encoded[name] for name in undisturbed)
    # where the encoded ID is taken, there is room below the same prefix
    assert all(after[name].rsplit("-", 1)[0] == id.rsplit("-", 1)[0] for name, id in encoded.items())


def test_an_id_belongs_to_one_item_for_ever(folder):
    owners = {id: name for name, id in exported(folder).items()}  # of every ID that was ever given
    table = first_items()
    for day in range(1, 4):  # 40 of 300 items change every day; 512 IDs suffice
        table = pl.concat([table[40:], new_items(40, seed=day)])
        write(folder, table)
        after = export(folder)
        for name, id in after.items():
            assert owners.setdefault(id, name) == name
        assert retired(folder) == set(owners) - set(after.values())
        assert len(retired(folder)) == 40 * day
    write(folder, pl.concat([table, first_items()[:1]]))  # an item comes back, and gets a new ID
    assert export(folder)[first_items()["parent_asin"][0]] not in owners


def test_every_last_id_can_be_given_and_then_changed_items_stay(folder):
    first = exported(folder)
    table = pl.concat([first_items(), new_items(SIZE**LEVELS - N)])
    write(folder, table)
    before = export(folder)
    assert first.items() <= before.items()
    assert len(set(before.values())) == SIZE**LEVELS
    x = embeddings_of(table).numpy()
    x[:100] = x[:100][::-1]
    write(folder, items(table["parent_asin"].to_list(), x))
    assert export(folder) == before


def test_where_the_ids_run_out_one_line_says_so(folder, refused_export):
    write(folder, pl.concat([first_items()[200:], new_items(300)]))  # 100 + 300 items and 200 retired IDs of 512
    assert "300 new items, and only 212 IDs are left" in refused_export(folder)


# ---------------------------------------------------------------- the IDs that change


def check_rule(folder: Path, table: pl.DataFrame, before: dict[str, str], after: dict[str, str]) -> int:
    """An item keeps its ID unless a free ID below its encoded prefix decodes more than 5% better; how many moved.

    It stays too if its ID is the encoded one, or if another item got the ID that it would have moved to.
    """
    names, model, x = table["parent_asin"].to_list(), load_model(folder), embeddings_of(table)
    size = model.config.codebook_size[-1]
    old, new = (errors(model, x, [ids[name] for name in names]) for ids in (before, after))
    moved = np.array([after[name] != before[name] for name in names])
    given = {after[name] for name, has_moved in zip(names, moved, strict=True) if has_moved}
    assert not given & set(before.values())
    assert (1.04 * new < old)[moved].all()
    for row, id in enumerate(encoded_ids(folder, table)):
        below = [f"{id.rpartition('-')[0]}-{code}" for code in range(size)]
        free = [other for other in below if other not in before.values()]
        offers = errors(model, x[row].expand(len(free), -1), free) if free else np.array([np.inf])
        if moved[row]:
            assert 1.04 * offers.min() < old[row]
        elif free and id != before[names[row]] and free[offers.argmin()] not in given:
            assert 1.06 * offers.min() > old[row]
    assert keeping(folder)["moved"] == moved.sum()
    assert retired(folder) == {before[name] for name, has_moved in zip(names, moved, strict=True) if has_moved}
    return moved.sum()


def test_an_item_moves_only_where_a_free_id_decodes_clearly_better(roomy):
    before, x = exported(roomy), embeddings_of(first_items()).numpy()
    x[:20] = vectors(20, seed=9)  # other texts
    x[20:60] += 0.03 * np.random.default_rng(1).normal(size=(40, DIM)).astype(np.float32)  # edited ones
    table = items(first_items()["parent_asin"].to_list(), x)
    write(roomy, table)
    after = export(roomy)
    assert 15 < check_rule(roomy, table, before, after) < 60
    assert all(after[name] == before[name] for name in table["parent_asin"][60:])


def test_the_same_where_the_best_ids_are_often_taken(folder):
    before, x = exported(folder), embeddings_of(first_items()).numpy()
    x[:150] = x[:150][::-1].copy()
    table = items(first_items()["parent_asin"].to_list(), x)
    write(folder, table)
    assert 0 < check_rule(folder, table, before, export(folder)) < 100


def test_an_item_that_drifts_moves_in_the_end(roomy):
    names, x = first_items()["parent_asin"].to_list(), embeddings_of(first_items()).numpy()
    goal, moved, before = x[:20][::-1].copy(), set(), exported(roomy)
    for step in range(1, 7):  # each day a sixth of the way to another item
        now = x.copy()
        now[:20] += (goal - x[:20]) * step / 6
        write(roomy, items(names, now))
        after = export(roomy)
        moved |= {name for name in names if after[name] != before[name]}
    assert set(names[20:]).isdisjoint(moved)
    assert len(moved) > 12
    table, model, fresh = items(names, now), load_model(roomy), run(roomy, "--export_only")
    off, best = (errors(model, embeddings_of(table), [ids[name] for name in names])[:20] for ids in (after, fresh))
    assert (off < 1.5 * best + 1e-3).mean() > 0.8


def test_errors_too_small_to_matter_move_nothing(roomy, monkeypatch):
    before = exported(roomy)
    noise = 0.05 * np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)
    write(roomy, items(first_items()["parent_asin"].to_list(), embeddings_of(first_items()).numpy() + noise))
    monkeypatch.setattr(train_rqvae, "MIN_ERROR", 10.0)
    assert export(roomy) == before
    monkeypatch.undo()
    assert export(roomy) != before


def test_vectors_that_differ_by_rounding_move_nothing_not_even_items_that_had_collided(folder):
    equal = items([f"C{i}" for i in range(40)], np.repeat(vectors(1, seed=3), 40, axis=0))
    table = pl.concat([first_items(), equal])
    write(folder, table)
    before = run(folder, "--export_only")
    displaced = sum(
        before[name] != id for name, id in zip(table["parent_asin"], encoded_ids(folder, table), strict=True)
    )
    assert displaced > 35
    noise = 1e-3 * np.random.default_rng(0).normal(size=(len(table), DIM)) / np.sqrt(DIM)
    write(folder, items(table["parent_asin"].to_list(), embeddings_of(table).numpy() + noise.astype(np.float32)))
    assert export(folder) == before


# ---------------------------------------------------------------- the report


def test_figures_are_those_of_the_ids_that_were_written(folder, capsys):
    table = pl.concat([first_items(), new_items(200)])
    write(folder, table)
    export(folder)
    model, new = load_model(folder), embeddings_of(table[N:])
    codes = model.encode_to_semantic_ids(new, train_rqvae.TRAINING_SEARCH_WIDTH)  # as for the held-out items
    off = (model.decode_from_semantic_ids(codes) - new).square().sum(1) / (DIM * model.input_scale**2)
    loss = train_rqvae.robust_loss(off).item()
    held_out = model.metrics["val/reconstruction_loss"]
    figures = {"kept": N, "moved": 0, "new": 200, "vanished": 0, "held_out_loss": held_out}
    assert keeping(folder) == figures | {"loss_of_new_and_moved": pytest.approx(loss, rel=1e-3)}
    out = capsys.readouterr()
    assert "300 items keep their ID, 0 moved to another, 200 are new, 0 have vanished" in out.out
    assert "no longer fits" not in out.err  # they come from the centres that the model has learned


@pytest.mark.parametrize("n", [20, 60])
def test_a_model_that_no_longer_fits_is_warned_of_once_there_are_items_enough_to_tell(folder, capsys, n):
    write(folder, pl.concat([first_items(), strange_items(n)]))
    export(folder)
    assert ("no longer fits this catalogue" in capsys.readouterr().err) == (n == 60)
    assert ("loss_of_new_and_moved" in keeping(folder)) == ("held_out_loss" in keeping(folder)) == (n == 60)


@pytest.mark.parametrize("swapped", [100, 280])
def test_vectors_that_went_to_other_items_are_warned_of(roomy, capsys, swapped):
    exported(roomy)
    x = embeddings_of(first_items()).numpy()
    x[:swapped] = np.roll(x[:swapped], 1, axis=0)
    write(roomy, items(first_items()["parent_asin"].to_list(), x))
    export(roomy)
    assert 0.8 * swapped < keeping(roomy)["moved"] <= swapped
    assert ("has each name still its own vector?" in capsys.readouterr().err) == (swapped == 280)


def test_an_earlier_export_of_other_items_is_warned_of(roomy, capsys):
    write(roomy, new_items(N))
    export(roomy)
    assert "has each name still its own vector?" in capsys.readouterr().err


def test_an_export_that_changes_ids_of_the_same_model_says_so(folder, capsys):
    run(folder, "--export_only")
    write(folder, pl.concat([first_items(), new_items(100)]))
    export(folder)
    before = exported(folder)
    assert "another ID" not in capsys.readouterr().err
    table = pl.concat([first_items()[2:], new_items(120)])
    write(folder, table)
    after = run(folder, "--export_only")  # without --keep_ids
    changed = sum(after[name] != before[name] for name in before.keys() & after.keys())
    assert changed > 10
    assert f"warning: {changed} of 398 items get another ID" in capsys.readouterr().err
    backup = shutil.copy(ids_path(folder), folder / "backup.parquet")
    write(folder, pl.concat([table, new_items(10, seed=7)]))
    export(folder)
    write(folder, pl.concat([new_items(30, seed=8), table, new_items(10, seed=7)]))
    export(folder, keep_ids=backup)  # and not the newest IDs
    assert "of 428 items get another ID" in capsys.readouterr().err


def test_without_held_out_items_nothing_is_said_of_the_fit(folder, capsys):
    run(folder, "--overwrite", val_split=0, max_steps=20)
    write(folder, pl.concat([first_items(), strange_items(60)]))
    export(folder)
    assert "no longer fits" not in capsys.readouterr().err


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def refused_export(capsys):
    """Runs an export that has to end with status 2 and one line, and to leave every file as it was."""

    def check(folder: Path, **changes) -> str:
        before = files_of(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            export(folder, **changes)
        assert ended.value.code == 2
        assert files_of(folder) == before
        return complaint(capsys.readouterr().err)

    return check


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_ids": "nowhere.parquet"}, "nowhere.parquet: no such file"),
        ({"keep_ids": ""}, "no such file for --keep_ids"),
        ({"num_rows": 100}, "all rows"),
        ({"collisions": "keep"}, "distinct IDs"),
        ({"collisions": "suffix"}, "made with --collisions assign"),
    ],
    ids=str,
)
def test_flags_that_cannot_go_with_it_are_refused(folder, refused_export, changes, words):
    assert words in refused_export(folder, **changes)


def test_a_model_trained_to_keep_equal_ids_is_refused(folder, refused_export):
    run(folder, "--overwrite", collisions="keep")
    assert "made with --collisions keep" in refused_export(folder)


def test_it_is_no_flag_of_training(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        run(folder, keep_ids=ids_path(folder))
    assert ended.value.code == 2
    assert "needs --export_only" in complaint(capsys.readouterr().err)


def test_an_export_of_another_model_is_refused(folder, trained_roomy, refused_export):
    assert "made with another model" in refused_export(folder, keep_ids=ids_path(trained_roomy))


KINDS = "lost column", "one name", "negative code", "null code", "retired cut", "no metadata", "no parquet", "empty"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_export_is_refused(folder, refused_export, kind):
    path = ids_path(folder)
    metadata, table = pl.read_parquet_metadata(path), pl.read_parquet(path)
    metadata.pop("ARROW:schema", None)
    if kind == "retired cut":
        metadata["retired"] = "000000"
    if kind == "no metadata":  # as after another program has saved the table
        metadata = {}
    if kind == "lost column":
        table = table.drop("semantic_id_1")
    if kind == "negative code":
        table = table.with_columns(pl.col("semantic_id_2") - SIZE)
    if kind == "null code":
        table = table.with_columns(pl.col("semantic_id_0").replace(0, None))
    if kind == "one name":
        table = table.with_columns(pl.col("parent_asin").first())
    table.write_parquet(path, metadata=metadata)
    if kind in ("no parquet", "empty"):
        path.write_bytes(b"no parquet" * 100 * (kind != "empty"))
    assert "damaged" in refused_export(folder)


def test_an_export_with_two_items_of_one_id_gives_no_ids(folder):
    path = ids_path(folder)
    metadata = pl.read_parquet_metadata(path)
    metadata.pop("ARROW:schema", None)
    pl.read_parquet(path).with_columns(pl.col("^semantic_id_.$").first()).write_parquet(path, metadata=metadata)
    before = files_of(folder)
    with pytest.raises(AssertionError, match="two items have one ID"):
        export(folder)
    assert files_of(folder) == before
