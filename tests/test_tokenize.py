"""tokenize_items.py: exact tokens, exact files, and one plain line for every wrong input."""

import json
import os
import re
import runpy
import shutil
import sys

import numpy as np
import polars as pl
import pytest
from conftest import END, complaint, files_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer

import tokenize_items
from tokenize_items import main

INSTRUCTION = "Represent this product so that similar products have similar representations"


def flags(data_dir, model, *more: str) -> list[str]:
    return ["--category", "Tiny", "--data_dir", str(data_dir), "--model_name", str(model), *more]


def read_npz(data_dir) -> dict[str, np.ndarray]:
    with np.load(data_dir / "Tiny_tokenized.npz", allow_pickle=False) as npz:
        return dict(npz)


def rows_of(npz) -> list[list[int]]:
    """The real tokens of each item, without padding."""
    pairs = zip(npz["input_ids"], npz["attention_mask"], strict=True)
    return [ids[mask > 0].tolist() for ids, mask in pairs]


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("more", "before"),
    [
        ([], f"Instruct: {INSTRUCTION}\nQuery:"),
        (["--instruction", "Find its like"], "Instruct: Find its like\nQuery:"),
        (["--instruction", ""], ""),
    ],
)
def test_a_row_decodes_to_the_exact_prompt(data_dir, catalogue, tiny_encoder, more, before):
    main(flags(data_dir, tiny_encoder, *more))
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    rows = rows_of(read_npz(data_dir))
    expected = [f"{before}{text}{END}" for text in catalogue["item_context"]]
    assert [tokenizer.decode(row) for row in rows] == expected


@pytest.mark.parametrize("max_length", [2, 40, 2048])
@pytest.mark.parametrize("model", ["tiny_encoder", "tiny_bert"])
def test_a_row_is_what_the_tokenizer_makes_of_that_text_alone(data_dir, catalogue, model, max_length, request):
    model = request.getfixturevalue(model)
    main(flags(data_dir, model, "--instruction", "", "--max_length", str(max_length)))
    tokenizer = AutoTokenizer.from_pretrained(model)
    limit = min(max_length, tokenizer.model_max_length)
    alone = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in catalogue["item_context"]]
    assert rows_of(read_npz(data_dir)) == alone


def test_truncation_keeps_the_closing_token_and_is_counted_right(data_dir, catalogue, tiny_encoder, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    whole = [tokenizer(f"Instruct: {INSTRUCTION}\nQuery:{text}")["input_ids"] for text in catalogue["item_context"]]
    lengths = np.array([len(row) for row in whole])
    max_length = int(np.sort(lengths)[30])  # so at least one item has exactly so many tokens
    assert (lengths > max_length).any()

    main(flags(data_dir, tiny_encoder, "--max_length", str(max_length)))
    npz = read_npz(data_dir)
    for row, full in zip(rows_of(npz), whole, strict=True):
        if len(full) > max_length:
            assert row == [*full[: max_length - 1], tokenizer.convert_tokens_to_ids(END)]
        else:
            assert row == full
    assert npz["input_ids"].shape == (60, max_length)
    captured = capsys.readouterr()
    count = (lengths > max_length).sum()
    assert f"truncated to {max_length} tokens: {count} of 60 items" in captured.out
    assert "warning" not in captured.err


def test_max_length_is_lowered_to_what_the_model_reads(data_dir, tiny_bert, capsys):
    main(flags(data_dir, tiny_bert))
    npz = read_npz(data_dir)
    assert npz["input_ids"].shape[1] == npz["max_length"] == 64
    captured = capsys.readouterr()
    assert "max_length 64; the model declares none and reads at most 64\n" in captured.out
    assert "larger" not in captured.out + captured.err
    assert "warning" not in captured.err


# ---------------------------------------------------------------- what a model declares


@pytest.fixture
def declaring(tiny_bert, tmp_path):
    """A copy of the BERT whose files declare something: declaring({"sentence_bert_config.json": {...}})."""

    def make(files: dict[str, dict], source=tiny_bert):
        folder = tmp_path / "declaring"
        if not folder.exists():
            shutil.copytree(source, folder)
        for name, content in files.items():
            path = folder / name
            earlier = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(earlier | content))
        return folder

    return make


@pytest.mark.parametrize(("more", "length"), [([], 20), (["--max_length", "40"], 40), (["--max_length", "9"], 9)])
def test_the_declared_length_is_the_default(data_dir, catalogue, declaring, capsys, more, length):
    folder = declaring({"sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": False}})
    main(flags(data_dir, folder, "--instruction", "", *more))
    npz, tokenizer = read_npz(data_dir), AutoTokenizer.from_pretrained(folder)
    expected = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in catalogue["item_context"]]
    assert rows_of(npz) == expected
    assert npz["max_length"] == length
    assert f"max_length {length}; the model declares 20 and reads at most 64\n" in capsys.readouterr().out


PASSAGES = {"query": "query: ", "passage": "passage: "}
TASKS = {"query": "Instruct: Find what was asked for\nQuery:", "document": ""}


@pytest.mark.parametrize(
    ("prompts", "instruction", "before", "told"),
    [
        (None, "", "", None),
        (None, "Find its like", "", {}),
        (PASSAGES, "", "", PASSAGES),
        (PASSAGES, "Find its like", "passage: ", PASSAGES),
        ({"passage": "passage: ", "other": None}, "Find its like", "", {"passage": "passage: ", "other": None}),
        ({"query": None}, "", "", None),
        (PASSAGES, "", "passage: ", None),
        ({"query": "query: "}, "", "", None),  # and documents as they are
        (TASKS, "Find its like", "", None),
        (TASKS, "", "", None),
    ],
)
def test_other_prompts_than_the_declared_ones_are_warned_of(
    data_dir, catalogue, declaring, capsys, prompts, instruction, before, told
):
    said = {"__version__": {"sentence_transformers": "2.0.0"}} | ({"prompts": prompts} if prompts else {})
    folder = declaring({"config_sentence_transformers.json": said})
    texts = catalogue.with_columns(item_context=pl.lit(before) + pl.col("item_context"))
    texts.write_parquet(data_dir / "Tiny_items_updated.parquet")
    main(flags(data_dir, folder, "--instruction", instruction))
    error = capsys.readouterr().err
    warning = re.search(r"^warning: texts .* the model declares the prompts (.*); see --instruction", error, flags=re.M)
    assert (warning and warning[1]) == (None if told is None else str(told))


def test_a_declared_length_may_be_text(data_dir, declaring):
    main(flags(data_dir, declaring({"sentence_bert_config.json": {"max_seq_length": "20"}})))
    assert read_npz(data_dir)["max_length"] == 20


@pytest.mark.parametrize("kind", ["cached", "known to be absent", "unknown"])
def test_what_the_hub_cannot_be_asked_for_is_told(data_dir, declaring, tmp_path, monkeypatch, capsys, kind):
    names = ["sentence_bert_config.json", "config_sentence_transformers.json"]
    files = {names[0]: {"max_seq_length": 20}, names[1]: {"prompts": {"document": ""}}}
    folder = declaring(files if kind == "cached" else {})
    cache = tmp_path / "cache" / "models--a--b"
    shutil.copytree(folder, cache / "snapshots" / "c0ffee")
    for path in ("refs/main", *(f".no_exist/c0ffee/{name}" for name in names if kind == "known to be absent")):
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / path).write_text("c0ffee" if path == "refs/main" else "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    main(flags(data_dir, "a/b", "--instruction", ""))
    assert read_npz(data_dir)["max_length"] == (20 if kind == "cached" else 64)
    warnings = re.findall(r"^warning: a/b/(\S+): the hub cannot be asked for it.*", capsys.readouterr().err, flags=re.M)
    assert warnings == (names if kind == "unknown" else [])


def test_num_rows_takes_the_first_rows_and_keeps_the_whole_catalogues_fingerprint(data_dir, tiny_encoder):
    main(flags(data_dir, tiny_encoder))
    whole = read_npz(data_dir)
    main(flags(data_dir, tiny_encoder, "--num_rows", "11"))
    first = read_npz(data_dir)
    assert rows_of(first) == rows_of(whole)[:11]
    assert first["n_items"] == 11
    assert first["input_ids"].shape[1] == max(map(len, rows_of(first)))
    assert first["fingerprint"] == whole["fingerprint"]
    main(flags(data_dir, tiny_encoder, "--num_rows", "1000"))
    assert rows_of(read_npz(data_dir)) == rows_of(whole)


# ---------------------------------------------------------------- the file


def test_a_second_run_replaces_the_output(data_dir, tiny_encoder):
    main(flags(data_dir, tiny_encoder))
    complete = files_of(data_dir)
    (data_dir / "Tiny_tokenized.npz").write_bytes(b"damaged")
    main(flags(data_dir, tiny_encoder))
    assert files_of(data_dir) == complete


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_npz_keeps_the_contract(data_dir, tiny_encoder, tmp_path, side):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder, padding_side=side)
    tokenizer.save_pretrained(tmp_path / side)
    main(flags(data_dir, tmp_path / side, "--max_length", "300"))
    npz = read_npz(data_dir)  # with allow_pickle=False
    scalars = {"max_length", "n_items", "model_name", "instruction", "fingerprint", "tokenizer", "format_version"}
    assert set(npz) == {"input_ids", "attention_mask"} | scalars
    assert all(npz[name].shape == () for name in scalars)
    ids, mask = npz["input_ids"], npz["attention_mask"]
    assert (ids.dtype, mask.dtype) == (np.int32, bool)
    assert ids.shape == mask.shape == (60, mask.sum(axis=1).max())
    assert npz["max_length"] == 300
    assert npz["n_items"] == 60
    assert npz["model_name"] == str(tmp_path / side)
    assert npz["instruction"] == INSTRUCTION
    assert re.fullmatch("[0-9a-f]{64}", str(npz["fingerprint"]))
    assert (np.sort(mask, axis=1)[:, ::-1] == mask).all()  # padding on the right only, whatever the tokenizer's side
    assert (ids[~mask] == tokenizer.pad_token_id).all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_the_npz_is_the_one_that_numpy_writes(tmp_path_factory, lengths):
    folder = tmp_path_factory.mktemp("npz")
    ids = np.full((len(lengths), max(lengths)), -7, dtype=np.int32)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids[mask] = np.arange(1, sum(lengths) + 1)
    settings = {"n_items": 9, "model_name": "naïve/模型"}
    items = np.split(ids[mask], np.cumsum(lengths)[:-1])
    tokenize_items.write(folder / "ours.npz", items, -7, settings)
    np.savez(folder / "numpy.npz", **settings, input_ids=ids, attention_mask=mask)
    assert (folder / "ours.npz").read_bytes() == (folder / "numpy.npz").read_bytes()


def test_the_fingerprint_depends_on_values_and_order_alone(data_dir, catalogue):
    path = data_dir / "Tiny_items_updated.parquet"
    expected = tokenize_items.fingerprint(catalogue)
    catalogue.with_columns(title=pl.lit("other")).write_parquet(path, row_group_size=7, compression="snappy")
    assert tokenize_items.fingerprint(tokenize_items.read_catalogue(path)) == expected
    swapped = catalogue[[1, 0, *range(2, 60)]]
    assert tokenize_items.fingerprint(swapped) != expected
    assert tokenize_items.fingerprint(catalogue.head(59)) != expected


@pytest.mark.parametrize("other", [(["a", "bc"], ["x", "y"]), (["ab", "cx"], ["", "y"]), (["abc", ""], ["x", "y"])])
def test_values_cannot_run_together_in_the_fingerprint(other):
    frame = pl.DataFrame({"parent_asin": ["ab", "c"], "item_context": ["x", "y"]})
    moved = pl.DataFrame(dict(zip(frame.columns, other, strict=True)))
    assert tokenize_items.fingerprint(frame) != tokenize_items.fingerprint(moved)


# ---------------------------------------------------------------- refusals


def set_values(column: str, rows: dict[int, object]):
    """A change of a catalogue: other values in some rows of a column."""

    def change(catalogue: pl.DataFrame) -> pl.DataFrame:
        values = catalogue[column].to_list()
        for row, value in rows.items():
            values[row] = value
        return catalogue.with_columns(pl.Series(column, values))

    return change


BAD_CATALOGUES = {
    "no item_context": (
        lambda c: c.drop("item_context"),
        ['find column "item_context"; valid', '["title", "parent_asin", "price"]', "write your catalogue"],
    ),
    "no parent_asin": (
        lambda c: c.rename({"parent_asin": "asin"}),
        ['find column "parent_asin"; valid', '["title", "asin", "item_context", "price"]'],
    ),
    "null text": (
        set_values("item_context", {7: None, 40: None}),
        ["2 null or blank item_context, the first in row 7", "drop"],
    ),
    "null name": (set_values("parent_asin", {0: None}), ["1 null or blank parent_asin, the first in row 0"]),
    "blank text": (
        set_values("item_context", {59: "", 5: " \t\n", 6: "\u3000\u00a0"}),
        ["3 null or blank item_context, the first in row 5"],
    ),
    "all null": (lambda c: c.with_columns(item_context=pl.lit(None)), ["item_context is Null, not text"]),
    "numbers for names": (
        lambda c: c.with_columns(parent_asin=pl.int_range(60)),
        ["parent_asin is Int64, not text", "cast"],
    ),
    "duplicate names": (
        set_values("parent_asin", {9: "B002", 30: "B002", 31: "B003"}),
        ["3 duplicate parent_asin, the first in row 9", "drop"],
    ),
    "no rows": (lambda c: c.head(0), ["no rows", "at least one item"]),
}


@pytest.mark.parametrize("kind", BAD_CATALOGUES)
def test_a_catalogue_that_breaks_the_contract_is_refused(data_dir, catalogue, tiny_encoder, refused, kind):
    change, expected = BAD_CATALOGUES[kind]
    path = data_dir / "Tiny_items_updated.parquet"
    change(catalogue).write_parquet(path)
    (data_dir / "Tiny_tokenized.npz").write_bytes(b"earlier")
    line = refused(main, flags(data_dir, tiny_encoder), data_dir)
    assert all(part in line for part in [str(path), *expected]), line


@pytest.mark.parametrize("part", [0, 0.9, -1, "garbage"])
def test_a_corrupt_catalogue_is_refused(data_dir, tiny_encoder, refused, part):
    path = data_dir / "Tiny_items_updated.parquet"
    whole = path.read_bytes()
    if part == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    else:
        path.write_bytes(whole[: int(len(whole) * part) if isinstance(part, float) else part])
    (data_dir / "Tiny_tokenized.npz").write_bytes(b"earlier")
    line = refused(main, flags(data_dir, tiny_encoder), data_dir)
    assert f"{path}: cannot be read" in line
    assert "write your catalogue" in line


def test_a_missing_catalogue_is_refused(data_dir, tiny_encoder, refused):
    path = data_dir / "Tiny_items_updated.parquet"
    path.unlink()
    line = refused(main, flags(data_dir, tiny_encoder), data_dir)
    assert f"{path}: cannot be read ([Errno 2] No such file" in line
    assert "with the columns parent_asin and item_context" in line


def test_items_without_a_token_are_refused(data_dir, catalogue, tiny_bert, tmp_path, refused):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(tmp_path / "bare")
    path = data_dir / "Tiny_items_updated.parquet"
    set_values("item_context", {4: "\u200b", 5: "\u200b"})(catalogue).write_parquet(path)  # a space of no width
    line = refused(main, flags(data_dir, tmp_path / "bare", "--instruction", ""), data_dir)
    assert f"{path}: 2 items have no token, the first in row 4" in line


BAD_FLAGS = {
    "unknown": (["--no_such_flag", "1"], "unrecognized arguments: --no_such_flag"),
    "abbreviated": (["--max", "9"], "unrecognized arguments: --max 9"),
    "stray word": (["Sample"], "unrecognized arguments: Sample"),
    "no number": (["--max_length", "many"], "--max_length"),
    "max_length 1": (["--max_length", "1"], "--max_length 1: must be at least 2"),
    "num_rows -3": (["--num_rows", "-3"], "--num_rows -3: must be at least 1"),
}


@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_a_wrong_flag_is_refused(data_dir, tiny_encoder, refused, kind):
    more, expected = BAD_FLAGS[kind]
    (data_dir / "Tiny_tokenized.npz").write_bytes(b"earlier")
    line = refused(main, flags(data_dir, tiny_encoder, *more), data_dir)
    assert "command line" in line
    assert expected in line
    assert "--help lists the flags" in line


def test_a_folder_of_parquet_files_is_named_as_one(data_dir, tiny_encoder, refused):
    path = data_dir / "Tiny_items_updated.parquet"
    path.unlink()
    path.mkdir()  # as Spark writes it
    assert f"{path}: cannot be read ([Errno 21] Is a directory" in refused(
        main, flags(data_dir, tiny_encoder), data_dir
    )


def test_a_tilde_is_the_home_folder(data_dir, tiny_encoder, monkeypatch):
    monkeypatch.setenv("HOME", str(data_dir.parent))
    main(["--category=Tiny", "--data_dir=~/output", f"--model_name=~/{os.path.relpath(tiny_encoder, data_dir.parent)}"])
    assert (data_dir / "Tiny_tokenized.npz").exists()


def test_a_git_lfs_pointer_is_refused_with_a_way_out(data_dir, tiny_encoder, tmp_path, refused):
    folder = shutil.copytree(tiny_encoder, tmp_path / "clone")
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    line = refused(main, flags(data_dir, folder), data_dir)
    assert f"{folder}: no tokenizer can be loaded from there" in line
    assert "git lfs pull" in line


def test_a_model_with_code_of_its_own_is_refused_without_a_question(data_dir, tiny_encoder, tmp_path, run_script):
    folder = shutil.copytree(tiny_encoder, tmp_path / "custom")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.Tokens", None]}}))
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "c.Config"}}))
    done = run_script("tokenize_items.py", *flags(data_dir, folder), cwd=data_dir)
    assert done.returncode == 2
    assert "contains custom code" in complaint(done.stderr)
    assert "choose another model" in complaint(done.stderr)
    assert "[y/N]" not in done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["hub name", "empty folder", "garbage", "slow"])
def test_a_model_without_a_usable_tokenizer_is_refused(data_dir, tiny_encoder, tmp_path, refused, kind):
    folder = tmp_path / "model"
    if kind == "empty folder":
        folder.mkdir()
    elif kind == "garbage":
        shutil.copytree(tiny_encoder, folder)
        (folder / "tokenizer.json").write_text("{ not json")
    elif kind == "slow":
        ByT5Tokenizer().save_pretrained(folder)
    name = "nobody/no-such-model" if kind == "hub name" else str(folder)
    (data_dir / "Tiny_tokenized.npz").write_bytes(b"earlier")
    line = refused(main, flags(data_dir, name), data_dir)
    assert f"--model_name {name}" in line
    assert "tokenizer" in line
    assert "check the name, the network and the files" in line


def test_the_model_is_named_before_the_wait_for_the_hub(data_dir, refused, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *_, **__: said.append(capsys.readouterr().out) or 1 / 0
    )
    refused(main, flags(data_dir, "nobody/no-such-model"), data_dir)
    assert "loading nobody/no-such-model" in said[0]


@pytest.mark.parametrize("model", ["tiny_encoder", "tiny_bert"])
def test_a_folder_of_weights_alone_is_refused(data_dir, tmp_path, refused, model, request):
    # from config.json alone AutoTokenizer makes a tokenizer that knows no word
    folder = tmp_path / "weights"
    shutil.copytree(request.getfixturevalue(model), folder, ignore=shutil.ignore_patterns("tokenizer*"))
    (data_dir / "Tiny_tokenized.npz").write_bytes(b"earlier")
    line = refused(main, flags(data_dir, folder), data_dir)
    assert f"--model_name {folder}" in line
    assert "tokenizer" in line


# ---------------------------------------------------------------- writing


def test_a_full_disk_is_told_and_leaves_the_earlier_output(data_dir, tiny_encoder, refused, full_disk):
    path = data_dir / "Tiny_tokenized.npz"
    path.write_bytes(b"earlier")
    line = full_disk(refused, main, flags(data_dir, tiny_encoder), data_dir)
    assert f"{path}: cannot be written" in line
    assert "free disk space" in line


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_told(data_dir, tiny_encoder, refused):
    data_dir.chmod(0o500)
    try:
        line = refused(main, flags(data_dir, tiny_encoder), data_dir)
    finally:
        data_dir.chmod(0o700)
    assert "cannot be written" in line
    assert "get write access" in line


def test_what_a_killed_run_left_is_removed(data_dir, tiny_encoder):
    (data_dir / ".Tiny_tokenized.npz.tmp").write_bytes(b"half")
    main(flags(data_dir, tiny_encoder))
    assert files_of(data_dir).keys() == {"Tiny_items_updated.parquet", "Tiny_tokenized.npz"}


def test_an_interrupted_write_leaves_the_earlier_output(data_dir, tiny_encoder, monkeypatch):
    def half(*_, **__):  # where the settings are written, and the arrays are not
        raise KeyboardInterrupt

    (data_dir / "Tiny_tokenized.npz").write_bytes(b"earlier")
    before = files_of(data_dir)
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", half)
    monkeypatch.setattr(sys, "argv", ["tokenize_items.py", *flags(data_dir, tiny_encoder)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(tokenize_items.__file__, run_name="__main__")
    assert exit_info.value.code == 130
    assert files_of(data_dir) == before


# ---------------------------------------------------------------- command line


def test_the_command_reads_and_writes_data_output_where_it_runs(data_dir, tiny_encoder, run_script):
    here = data_dir.parents[1]
    done = run_script("tokenize_items.py", "--category", "Tiny", "--model_name", str(tiny_encoder), cwd=here)
    assert done.returncode == 0, done.stderr
    assert "wrote data/output/Tiny_tokenized.npz: 60 x" in done.stdout
    by_command = read_npz(data_dir)
    main(flags(data_dir, tiny_encoder))
    in_process = read_npz(data_dir)
    assert all((by_command[name] == in_process[name]).all() for name in in_process)


def test_the_command_ends_with_status_2_and_one_line(data_dir, run_script):
    done = run_script("tokenize_items.py", "--category", "Nowhere", cwd=data_dir.parents[1])
    assert done.returncode == 2
    assert "data/output/Nowhere_items_updated.parquet: cannot be read ([Errno 2] No such file" in complaint(done.stderr)
