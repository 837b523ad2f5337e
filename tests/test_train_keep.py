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
    "codebook_size": SIZE,
    "batch_size": 64,
    "max_steps": 200,
    "max_lr": 3e-3,
    "warmup_steps": 4,
    "val_split": 0.2,
    "steps_per_val_log": 50,
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
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert train_rqvae.main([*argv, *switches]) == 0
    return dict(pl.read_parquet(ids_path(folder)).select("parent_asin", "semantic_id").iter_rows())


def export(folder: Path, *switches: str, **changes) -> dict[str, str]:
    """The IDs by item, with those of the last export kept."""
    return run(folder, "--export_only", *switches, **{"keep_ids": ids_path(folder)} | changes)


def keeping(folder: Path) -> dict:
    return json.loads((folder / "data" / "Tiny_quality.json").read_text())["keep_ids"]


def load_model(folder: Path) -> train_rqvae.RQVAE:
    return train_rqvae.load_model(folder / "checkpoints" / "best_model.pth")


def embeddings_of(table: pl.DataFrame) -> torch.Tensor:
    return torch.from_numpy(np.stack(table["embedding"].to_list()).astype(np.float32))


@pytest.fixture(scope="module", autouse=True)
def _no_wandb():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    write(folder, first_items())
    run(folder)
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "folder")


@pytest.fixture(scope="module")
def trained_roomy(trained, tmp_path_factory) -> Path:
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("roomy") / "folder")
    run(folder, "--overwrite", codebook_size=32)
    return folder


@pytest.fixture
def roomy(trained_roomy, tmp_path) -> Path:
    """The same with a model of 32,768 IDs, most of which are free."""
    return shutil.copytree(trained_roomy, tmp_path / "roomy")


# ---------------------------------------------------------------- what stays


def test_an_unchanged_catalogue_gets_the_same_file_bit_for_bit(folder):
    before = ids_path(folder).read_bytes()
    export(folder)
    assert ids_path(folder).read_bytes() == before
    assert keeping(folder)["kept"] == N


@pytest.mark.parametrize("collisions", ["assign", "suffix"])
def test_items_keep_their_ids_whatever_comes_goes_and_moves_in_the_file(folder, collisions):
    before = run(folder, "--export_only", collisions=collisions)
    gone = set(first_items()["parent_asin"][:30])
    table = pl.concat([first_items()[30:], new_items(100)]).sample(fraction=1, shuffle=True, seed=0)
    write(folder, table)
    after = export(folder, collisions=collisions)
    assert list(after) == table["parent_asin"].to_list()
    assert all(after[name] == id for name, id in before.items() if name not in gone)
    assert len(set(after.values())) == len(after)
    assert not {before[name] for name in gone} & set(after.values())
    found = keeping(folder)
    counts = {"kept": 270, "moved": 0, "new": 100, "vanished": 30, "retired_ids": 30}
    assert {name: found[name] for name in counts} == counts


def test_the_earlier_export_may_lie_anywhere_and_stays_as_it_is(folder, tmp_path):
    before = run(folder, "--export_only")
    elsewhere = shutil.copy(ids_path(folder), tmp_path / "monday.parquet")
    content = elsewhere.read_bytes()
    write(folder, pl.concat([first_items(), new_items(50)]))
    ids_path(folder).unlink()
    after = export(folder, keep_ids=elsewhere)
    assert before.items() <= after.items()
    assert elsewhere.read_bytes() == content


def test_new_items_get_the_ids_that_they_are_encoded_to_where_those_are_free(roomy):
    before = run(roomy, "--export_only")
    table = new_items(100)
    write(roomy, pl.concat([first_items(), table]))
    after = export(roomy)
    encoded = load_model(roomy).encode_to_semantic_ids(embeddings_of(table))
    encoded = dict(zip(table["parent_asin"], ("-".join(map(str, codes)) for codes in encoded.tolist()), strict=True))
    wanted = [*encoded.values(), *before.values()]
    crowded = {id.rsplit("-", 1)[0] for id in wanted if wanted.count(id) > 1}
    undisturbed = [name for name, id in encoded.items() if id.rsplit("-", 1)[0] not in crowded]
    assert 10 < len(undisturbed) < 100
    assert all(after[name] == encoded[name] for name in undisturbed)
    # where the best ID is taken, there is room below the same prefix
    assert all(after[name].rsplit("-", 1)[0] == id.rsplit("-", 1)[0] for name, id in encoded.items())


def test_ids_of_vanished_items_stay_retired_over_many_exports(folder):
    given = {id: name for name, id in run(folder, "--export_only").items()}  # every ID that was ever given
    table = first_items()
    for day in range(1, 5):  # 40 of 300 items change every day; 512 IDs suffice for 4 days and 40 items
        table = pl.concat([table[40:], new_items(40, seed=day)])
        write(folder, table)
        after = export(folder)
        for name, id in after.items():
            assert given.setdefault(id, name) == name
    assert keeping(folder)["retired_ids"] == 160


def test_recycled_ids_may_be_given_again(folder):
    before = run(folder, "--export_only")
    gone = first_items()[:150]
    came = gone.with_columns(pl.concat_str(pl.lit("A"), "parent_asin").alias("parent_asin"))  # the same vectors
    write(folder, pl.concat([first_items()[150:], came]))
    after = export(folder, "--recycle_ids")
    assert keeping(folder)["retired_ids"] == 0
    again = [after[f"A{name}"] == before[name] for name in gone["parent_asin"]]
    assert np.mean(again) > 0.9
    assert all(after[name] == before[name] for name in first_items()["parent_asin"][150:])


@pytest.mark.parametrize("switches", [[], ["--recycle_ids"]], ids=str)
def test_where_no_id_is_free_changed_items_stay(folder, switches):
    table = pl.concat([first_items(), new_items(SIZE**LEVELS - N)])  # every ID is in use
    write(folder, table)
    before = run(folder, "--export_only")
    x = embeddings_of(table).numpy()
    x[:100] = x[:100][::-1]
    write(folder, items(table["parent_asin"].to_list(), x))
    assert export(folder, *switches) == before


def test_where_the_ids_run_out_one_line_says_so_and_recycling_helps(folder, refused_export):
    run(folder, "--export_only")
    table = pl.concat([first_items()[200:], new_items(300)])  # 100 + 300 items and 200 retired IDs of 512
    write(folder, table)
    line = refused_export(folder)
    assert "300 new items, and only 212 IDs are left" in line
    assert "--recycle_ids" in line
    after = export(folder, "--recycle_ids")
    assert len(set(after.values())) == 400


def test_every_last_id_can_be_given(folder):
    before = run(folder, "--export_only")
    write(folder, pl.concat([first_items(), new_items(SIZE**LEVELS - N)]))
    after = export(folder)
    assert before.items() <= after.items()
    assert len(set(after.values())) == SIZE**LEVELS


# ---------------------------------------------------------------- what changes


def test_a_changed_item_moves_once_another_id_fits_it_better(roomy):
    before = run(roomy, "--export_only")
    x = embeddings_of(first_items()).numpy()
    swapped = x.copy()
    swapped[:20] = vectors(20, seed=9)
    names = first_items()["parent_asin"].to_list()
    write(roomy, items(names, swapped))
    after = export(roomy)
    model = load_model(roomy)
    best = model.decode_from_semantic_ids(model.encode_to_semantic_ids(torch.from_numpy(swapped[:20])))
    codes = torch.tensor([list(map(int, before[name].split("-"))) for name in names[:20]])
    off = (model.decode_from_semantic_ids(codes) - torch.from_numpy(swapped[:20])).square().sum(1)
    worse = (off > 1.2 * (best - torch.from_numpy(swapped[:20])).square().sum(1)).tolist()
    assert sum(worse) > 15
    moved = [after[name] != before[name] for name in names]
    assert all(moved[row] for row in range(20) if worse[row])
    assert not any(moved[20:])
    assert not set(before.values()) & {after[name] for name, is_moved in zip(names, moved, strict=True) if is_moved}
    assert keeping(roomy)["moved"] == keeping(roomy)["retired_ids"] == sum(moved)


def errors(folder: Path, table: pl.DataFrame, ids: dict[str, str]) -> np.ndarray:
    """Squared distance of each item to what its ID decodes to."""
    codes = torch.tensor([list(map(int, ids[name].split("-"))) for name in table["parent_asin"]])
    off = load_model(folder).decode_from_semantic_ids(codes) - embeddings_of(table)
    return off.square().sum(1).numpy()


@pytest.mark.parametrize("switches", [[], ["--recycle_ids"]], ids=str)
def test_no_item_moves_to_an_id_that_fits_it_no_better(folder, switches):
    write(folder, pl.concat([first_items(), new_items(150)]))  # 450 of 512 IDs: the best ones are often taken
    before = run(folder, "--export_only")
    x = embeddings_of(first_items()).numpy()
    x[:100] += 0.2 * np.random.default_rng(1).normal(size=(100, DIM)).astype(np.float32)
    table = pl.concat([items(first_items()["parent_asin"].to_list(), x), new_items(150)])
    write(folder, table)
    after = export(folder, *switches)
    moved = np.array([after[name] != before[name] for name in table["parent_asin"]])
    assert 3 < moved.sum() < 100
    assert (errors(folder, table, before)[moved] > 1.04 * errors(folder, table, after)[moved]).all()
    if not switches:  # what stayed for want of a better ID stays when one becomes free
        write(folder, pl.concat([table[:N], new_items(20, seed=3)]))
        later = export(folder, "--recycle_ids")
        assert all(later[name] == after[name] for name in table["parent_asin"][:N])


def test_an_item_that_drifts_is_judged_by_what_its_id_was_given_for(roomy):
    before = run(roomy, "--export_only")
    names, x = first_items()["parent_asin"].to_list(), embeddings_of(first_items()).numpy()
    goal, moved = x[:20][::-1].copy(), set()
    for step in range(1, 21):  # each day a twentieth of the way to another item
        now = x.copy()
        now[:20] += (goal - x[:20]) * step / 20
        write(roomy, items(names, now))
        after = export(roomy)
        moved |= {name for name in names if after[name] != before[name]}
        assert set(names[20:]).isdisjoint(moved)
    assert len(moved) > 12
    table, fresh = items(names, now), run(roomy, "--export_only")
    assert (errors(roomy, table, after)[:20] < 1.5 * errors(roomy, table, fresh)[:20] + 1e-3).mean() > 0.8


def test_errors_too_small_to_matter_move_nothing(roomy, monkeypatch):
    before = run(roomy, "--export_only")
    noise = 0.05 * np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)
    write(roomy, items(first_items()["parent_asin"].to_list(), embeddings_of(first_items()).numpy() + noise))
    monkeypatch.setattr(train_rqvae, "NO_ERROR", 10.0)
    assert export(roomy) == before
    monkeypatch.undo()
    assert export(roomy) != before


def test_vectors_that_differ_by_rounding_move_nothing_not_even_items_that_had_collided(folder):
    table = pl.concat([first_items(), items([f"C{i}" for i in range(40)], np.repeat(vectors(1, seed=3), 40, axis=0))])
    write(folder, table)
    before = run(folder, "--export_only")
    encoded = load_model(folder).encode_to_semantic_ids(embeddings_of(table))
    displaced = sum(
        before[name] != "-".join(map(str, codes))
        for name, codes in zip(table["parent_asin"], encoded.tolist(), strict=True)
    )
    assert displaced > 35
    noise = 1e-3 * np.random.default_rng(0).normal(size=(len(table), DIM)) / np.sqrt(DIM)
    write(folder, items(table["parent_asin"].to_list(), embeddings_of(table).numpy() + noise.astype(np.float32)))
    assert export(folder) == before


def test_an_item_that_comes_back_gets_a_new_id(folder):
    before = run(folder, "--export_only")
    write(folder, first_items()[1:])
    export(folder)
    write(folder, first_items())
    after = export(folder)
    name = first_items()["parent_asin"][0]
    assert after[name] not in before.values()
    assert {**after, name: None} == {**before, name: None}


# ---------------------------------------------------------------- what is told


def test_figures_are_those_of_the_ids_that_were_written(folder, capsys):
    run(folder, "--export_only")
    table = pl.concat([first_items(), new_items(200)])
    write(folder, table)
    after = export(folder)
    model, x = load_model(folder), embeddings_of(table)
    scale = DIM * model.input_scale.item() ** 2
    best = (model.decode_from_semantic_ids(model.encode_to_semantic_ids(x)) - x).square().sum(1).numpy() / scale
    off = errors(folder, table, after) / scale
    assert keeping(folder)["unexplained_of_training_variance"] == {
        "new": pytest.approx(off[N:].mean(), rel=1e-4),
        "new_as_encoded": pytest.approx(best[N:].mean(), rel=1e-4),
        "rest": pytest.approx(off[:N].mean(), rel=1e-4),
    }
    out = capsys.readouterr()
    assert "300 items keep their ID, 0 moved to another, 200 are new and 0 have vanished" in out.out
    assert off[N:].mean() > 1.1 * best[N:].mean()  # for 200 new items of 212 free IDs
    assert "no longer fits" not in out.err  # they come from the centres that the model has learned


def test_without_held_out_items_nothing_is_said_of_the_fit(folder, capsys):
    run(folder, "--overwrite", val_split=0)
    write(folder, pl.concat([first_items(), strange_items(60)]))
    export(folder)
    assert "no longer fits" not in capsys.readouterr().err


@pytest.mark.parametrize("n", [20, 60])
def test_a_model_that_no_longer_fits_is_warned_of_once_there_are_items_enough_to_tell(folder, capsys, n):
    run(folder, "--export_only")
    write(folder, pl.concat([first_items(), strange_items(n)]))
    export(folder)
    assert ("no longer fits this catalogue" in capsys.readouterr().err) == (n == 60)


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def refused_export(capsys):
    """Runs an export that has to end with status 2 and one line, and to leave every file as it was."""

    def check(folder: Path, *switches: str, **changes) -> str:
        before = files_of(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            export(folder, *switches, **changes)
        assert ended.value.code == 2
        assert files_of(folder) == before
        return complaint(capsys.readouterr().err)

    return check


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_ids": "nowhere.parquet"}, "--keep_ids nowhere.parquet: not found"),
        ({"keep_ids": ""}, "not found"),
        ({"num_rows": 100}, "leave --num_rows out"),
        ({"collisions": "keep"}, "--collisions keep"),
        ({"collisions": "suffix"}, "not made with --collisions suffix"),
    ],
)
def test_flags_that_cannot_go_with_it_are_refused(folder, refused_export, changes, words):
    assert words in refused_export(folder, **changes)


@pytest.mark.parametrize(
    ("flags", "word"), [({"keep_ids": "x"}, "--export_only"), ({"recycle_ids": True}, "--keep_ids")]
)
def test_switches_that_lack_another_are_refused(folder, capsys, flags, word):
    with pytest.raises(SystemExit) as ended:
        run(folder, **flags)
    assert ended.value.code == 2
    assert f"give {word} too" in complaint(capsys.readouterr().err)


def test_an_export_of_another_model_is_refused(folder, refused_export, tmp_path):
    earlier = shutil.copy(ids_path(folder), tmp_path / "earlier.parquet")
    run(folder, "--overwrite", seed=1)
    assert "not made with this model" in refused_export(folder, keep_ids=earlier)


DAMAGE = {
    "an ID": lambda table: table.with_columns(pl.col("semantic_id_0").shift(1, fill_value=0)),
    "a name": lambda table: table.with_columns(pl.col("parent_asin").str.to_lowercase()),
    "a row": lambda table: table[1:],
    "a column": lambda table: table.drop("semantic_id_1"),
    "no rows": lambda table: table.clear(),
}


@pytest.mark.parametrize("kind", [*DAMAGE, *("ids", "displaced", "retired")])
def test_a_damaged_export_is_refused(folder, refused_export, kind):
    metadata, table = pl.read_parquet_metadata(ids_path(folder)), pl.read_parquet(ids_path(folder))
    metadata.pop("ARROW:schema", None)
    if kind in DAMAGE:
        table = DAMAGE[kind](table)
    else:
        metadata[kind] = metadata[kind][:-1]
    table.write_parquet(ids_path(folder), metadata=metadata)
    assert "damaged" in refused_export(folder)


CRAFTED = {  # by somebody who knows the digest
    "a row that is not there": {"displaced": [[N, 1, 1, 1]]},
    "a negative row": {"displaced": [[-1, 1, 1, 1]]},
    "no code": {"displaced": [[0, 1, SIZE, 1]]},
    "a negative code": {"displaced": [[0, 1, -1, 1]]},
    "a retired ID of no code": {"retired": [[1, 1, 99]]},
    "a retired ID that is in use": {"retired": "used"},
    "two items of one name": {"names": "equal"},
    "two items of one ID": {"ids": "equal"},
    "no rows": {"rows": 0},
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_an_export_that_cannot_be_is_refused(folder, refused_export, kind):
    table, found, change = pl.read_parquet(ids_path(folder)), pl.read_parquet_metadata(ids_path(folder)), CRAFTED[kind]
    columns = [f"semantic_id_{level}" for level in range(LEVELS)]
    if "names" in change:
        table = table.with_columns(pl.col("parent_asin").first())
    if "ids" in change:
        table = table.with_columns(pl.col(columns).first())
    table = table.head(change.get("rows", len(table)))
    if change.get("retired") == "used":
        change = {"retired": table.select(columns).head(1).to_numpy()}
    found.pop("ARROW:schema", None)
    found |= {name: train_rqvae.packed(np.array(change[name])) for name in change.keys() & {"displaced", "retired"}}
    ids = table.select(columns).to_numpy().astype(np.int64)
    found["ids"] = train_rqvae.ids_digest(table["parent_asin"], ids, found["displaced"], found["retired"])
    table.write_parquet(ids_path(folder), metadata=found)
    assert "damaged" in refused_export(folder)


def test_an_export_of_an_earlier_version_can_be_made_anew(folder, refused_export):
    table, found = pl.read_parquet(ids_path(folder)), pl.read_parquet_metadata(ids_path(folder))
    old = {name: found[name] for name in ("model", "embeddings", "collisions")}
    table.write_parquet(ids_path(folder), metadata=old)
    assert "written by an earlier version" in refused_export(folder)
    before = run(folder, "--export_only")
    assert before == dict(table.select("parent_asin", "semantic_id").iter_rows())
    assert export(folder) == before


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet" * 100])
def test_a_file_that_is_no_parquet_is_refused(folder, refused_export, content):
    ids_path(folder).write_bytes(content)
    assert "damaged" in refused_export(folder)
