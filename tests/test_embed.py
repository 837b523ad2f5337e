"""embed_items.py: vectors against a plain float64 reference, the file's contract, one line for every wrong input."""

import json
import re
import runpy
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import complaint, files_of, make_texts, save_qwen3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModel, AutoTokenizer, Lfm2Config, Lfm2Model, OPTConfig, RobertaConfig, T5Config, ViTConfig

import embed_items
import tokenize_items
from embed_items import main

INSTRUCTION = "Represent this product so that similar products have similar representations"
PROMPT = f"Instruct: {INSTRUCTION}\nQuery:{{}}"
MAX_LENGTH = 150
SEVERAL_LENGTHS = [1, 700, 16384]  # tokens_per_batch: every item alone, some together, all in a few batches


def flags(data_dir, *more: str) -> list[str]:
    return ["--category", "Tiny", "--data_dir", str(data_dir), "--device", "cpu", *more]


OUTPUT = "Tiny_items_with_embeddings.parquet"
PARTIAL = f".{OUTPUT}.partial"
FEW = ["--tokens_per_batch", "600"]
DISTINCT = 55  # texts of the next day


def tokenize(data_dir, catalogue, model, *more: str) -> None:
    """Puts this catalogue in the place of the one that is there."""
    catalogue.write_parquet(data_dir / "Tiny_items_updated.parquet")
    argv = ["--category", "Tiny", "--data_dir", str(data_dir), "--model_name", str(model)]
    tokenize_items.main([*argv, "--max_length", str(MAX_LENGTH), *more])


def read_vectors(data_dir) -> np.ndarray:
    column = pl.read_parquet(data_dir / "Tiny_items_with_embeddings.parquet")["embedding"]
    return np.array(column.to_list())


def change_npz(data_dir, **changes) -> None:
    """Writes other arrays under some of the npz's keys; None leaves a key out."""
    path = data_dir / "Tiny_tokenized.npz"
    with np.load(path, allow_pickle=False) as npz:
        arrays = dict(npz) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def read_npz(data_dir) -> dict[str, np.ndarray]:
    with np.load(data_dir / "Tiny_tokenized.npz", allow_pickle=False) as npz:
        return dict(npz)


def copy_encoder(source, folder, pattern: str = "") -> str:
    """A copy of the encoder without the files that the pattern matches."""
    ignore = shutil.ignore_patterns(pattern) if pattern else None
    return str(shutil.copytree(source, folder, ignore=ignore))


@pytest.fixture(scope="module")
def tokenized(catalogue, tiny_encoder, tiny_bert, tmp_path_factory):
    """Folders of the catalogue and its tokens, by encoder."""
    folders = {}
    for name, model, more in (("qwen3", tiny_encoder, []), ("bert", tiny_bert, ["--instruction", ""])):
        folders[name] = tmp_path_factory.mktemp(name)
        catalogue.write_parquet(folders[name] / "Tiny_items_updated.parquet")
        argv = ["--category", "Tiny", "--data_dir", str(folders[name]), "--model_name", str(model)]
        tokenize_items.main([*argv, *more, "--max_length", str(MAX_LENGTH)])
    return folders


@pytest.fixture
def qwen3_dir(tokenized, tmp_path):
    return shutil.copytree(tokenized["qwen3"], tmp_path / "output")


@pytest.fixture
def bert_dir(tokenized, tmp_path):
    return shutil.copytree(tokenized["bert"], tmp_path / "output")


@pytest.fixture
def with_earlier(qwen3_dir):
    """The folder with an earlier output in it, which no refusal may touch."""
    (qwen3_dir / "Tiny_items_with_embeddings.parquet").write_bytes(b"earlier")
    return qwen3_dir


@pytest.fixture(scope="module")
def reference(catalogue, tiny_encoder, tiny_bert):
    """Plain float64: one item at a time, no padding, from the text on; (encoder, pooling) to hidden states."""

    @torch.inference_mode()
    def hidden_states(folder, prompt) -> list[torch.Tensor]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
        limit = min(MAX_LENGTH, tokenizer.model_max_length)
        rows = [
            tokenizer(prompt.format(text), truncation=True, max_length=limit)["input_ids"]
            for text in catalogue["item_context"]
        ]
        return [model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows]

    hidden = {"qwen3": hidden_states(tiny_encoder, PROMPT), "bert": hidden_states(tiny_bert, "{}")}
    pick = {"last": lambda h: h[-1], "cls": lambda h: h[0], "mean": lambda h: h.mean(0)}

    def vectors(encoder: str, pooling: str, target_dim: int = 1024) -> np.ndarray:
        cut = [pick[pooling](states)[:target_dim] for states in hidden[encoder]]
        return torch.stack([vector / vector.norm() for vector in cut]).numpy()

    return vectors


def lay_out(data_dir, side: str) -> None:
    """Moves the padding of the npz to the left, to the right, or to both sides with columns that none needs."""
    npz = read_npz(data_dir)
    rows = [ids[mask > 0] for ids, mask in zip(npz["input_ids"], npz["attention_mask"], strict=True)]
    width = max(map(len, rows)) + (9 if side == "both" else 0)
    ids = np.zeros((len(rows), width), dtype=np.int32)
    mask = np.zeros((len(rows), width), dtype=bool)  # the contract allows bool beside uint8
    for i, row in enumerate(rows):
        start = {"left": width - len(row), "right": 0, "both": min(4, width - len(row))}[side]
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = True
    change_npz(data_dir, input_ids=ids, attention_mask=mask)


# ---------------------------------------------------------------- vectors


@pytest.mark.parametrize("tokens_per_batch", SEVERAL_LENGTHS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_vectors_equal_the_reference_however_padded_and_batched(qwen3_dir, reference, side, tokens_per_batch):
    lay_out(qwen3_dir, side)
    main(flags(qwen3_dir, "--tokens_per_batch", str(tokens_per_batch)))
    assert np.abs(read_vectors(qwen3_dir) - reference("qwen3", "last")).max() < 1e-5


@pytest.mark.parametrize("tokens_per_batch", SEVERAL_LENGTHS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_every_pooling_equals_the_reference_with_a_bert(bert_dir, reference, pooling, tokens_per_batch):
    main(flags(bert_dir, "--pooling", pooling, "--tokens_per_batch", str(tokens_per_batch)))
    assert np.abs(read_vectors(bert_dir) - reference("bert", pooling)).max() < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_poolings_ignore_padding_on_either_side(qwen3_dir, reference, pooling):
    for side in ("left", "both"):
        lay_out(qwen3_dir, side)
        main(flags(qwen3_dir, "--pooling", pooling))
        assert np.abs(read_vectors(qwen3_dir) - reference("qwen3", pooling)).max() < 1e-5


@pytest.mark.parametrize("target_dim", [1, 16, 63, 64])
def test_vectors_are_cut_first_and_normalised_after(qwen3_dir, reference, target_dim):
    main(flags(qwen3_dir, "--target_dim", str(target_dim)))
    vectors = read_vectors(qwen3_dir)
    assert vectors.shape == (60, target_dim)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    assert np.abs(vectors - reference("qwen3", "last", target_dim)).max() < 1e-5


def test_more_dimensions_than_the_model_has_keeps_all_and_says_so(qwen3_dir, capsys):
    main(flags(qwen3_dir, "--target_dim", "65"))
    assert read_vectors(qwen3_dir).shape == (60, 64)
    assert "64 dimensions kept" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_with_the_reference_and_is_recorded(qwen3_dir, reference, dtype):
    main(flags(qwen3_dir, "--dtype", dtype))
    vectors = read_vectors(qwen3_dir)
    assert ((vectors * reference("qwen3", "last")).sum(axis=1) > 0.99).all()
    assert np.abs(vectors - reference("qwen3", "last")).max() > 1e-4  # it was used, not only recorded
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6  # normalised in float32
    metadata = pl.read_parquet_metadata(qwen3_dir / "Tiny_items_with_embeddings.parquet")
    assert metadata["dtype"] == dtype


def test_items_alone_and_together_are_compared(qwen3_dir, capsys):
    main(flags(qwen3_dir))
    captured = capsys.readouterr()
    agreement = re.search(r"alone and inside a batch agree to a cosine of ([\d.]+) at the worst", captured.out)
    assert float(agreement[1]) > 0.99999
    assert "warning" not in captured.err


def test_padding_in_front_does_not_move_absolute_positions(bert_dir, reference):
    lay_out(bert_dir, "left")
    main(flags(bert_dir, "--pooling", "mean"))
    assert np.abs(read_vectors(bert_dir) - reference("bert", "mean")).max() < 1e-5


@pytest.fixture
def change_forward(monkeypatch):
    """Puts a function of the model's own forward in its place: change_forward(lambda forward, **inputs: ...)."""

    def change(instead):
        load = embed_items.load_model

        def load_changed(*args):
            model = load(*args)
            forward = model.forward
            monkeypatch.setattr(model, "forward", lambda **inputs: instead(forward, **inputs))
            return model

        monkeypatch.setattr(embed_items, "load_model", load_changed)

    return change


def test_a_padding_that_changes_the_vectors_is_warned_of(bert_dir, change_forward, capsys):
    change_forward(lambda forward, input_ids, **_: forward(input_ids=input_ids))  # deaf to the mask
    main(flags(bert_dir, "--pooling", "mean"))
    captured = capsys.readouterr()
    agreement = re.search(r"alone and inside a batch agree to a cosine of ([\d.]+) at the worst", captured.out)
    assert float(agreement[1]) < 0.999
    assert "warning: padding changes the vectors" in captured.err


def test_the_instruction_is_read_once(qwen3_dir, change_forward, reference, capsys):
    shared, plain = [], []

    def count(forward, **inputs):
        past = inputs.get("past_key_values")
        (plain if past is None else shared).append(inputs["input_ids"].numel())
        return forward(**inputs)

    change_forward(count)
    main(flags(qwen3_dir, "--tokens_per_batch", "1"))
    said = re.search(r"the (\d+) tokens that all items start with are read once", capsys.readouterr().out)
    prefix = AutoTokenizer.from_pretrained(str(read_npz(qwen3_dir)["model_name"]))
    prefix = len(prefix(PROMPT.split("{}")[0], add_special_tokens=False)["input_ids"])
    assert abs(int(said[1]) - prefix) <= 1  # its last letter may make one token with the text's first
    own = read_npz(qwen3_dir)["attention_mask"].sum(axis=1, dtype=int) - int(said[1])
    assert sum(shared) == own.sum() + 2 * own.max()  # the shortest and the longest were also checked, together
    lengths = own + int(said[1])
    assert plain == [lengths.max(), lengths.min(), int(said[1])]  # both alone, the prefix
    assert np.abs(read_vectors(qwen3_dir) - reference("qwen3", "last")).max() < 1e-5


def test_a_model_that_cannot_share_the_instruction_reads_it_each_time(qwen3_dir, change_forward, reference, capsys):
    change_forward(lambda forward, past_key_values=None, **inputs: forward(**inputs))  # forgets what it has read
    main(flags(qwen3_dir))
    captured = capsys.readouterr()
    assert "are read once" not in captured.out
    assert "warning" not in captured.err
    assert np.abs(read_vectors(qwen3_dir) - reference("qwen3", "last")).max() < 1e-5


@pytest.mark.parametrize("layers", [["conv", "full_attention"], ["full_attention", "conv"]])
def test_a_model_not_of_attention_alone_shares_no_instruction(qwen3_dir, tiny_encoder, tmp_path, capsys, layers):
    torch.manual_seed(0)
    vocabulary = AutoModel.from_pretrained(tiny_encoder).config.vocab_size
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Lfm2Config(vocab_size=vocabulary, num_hidden_layers=2, layer_types=layers, **sizes)
    Lfm2Model(config).save_pretrained(tmp_path / "lfm2")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "lfm2")
    main(flags(qwen3_dir, "--model_name", str(tmp_path / "lfm2")))
    assert "are read once" not in capsys.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "lfm2", dtype=torch.float64)
    npz, vectors = read_npz(qwen3_dir), read_vectors(qwen3_dir)
    for row in (0, 59):
        ids = torch.from_numpy(npz["input_ids"][row][npz["attention_mask"][row] > 0]).long()
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(model(input_ids=ids[None]).last_hidden_state[0, -1], dim=0)
        assert np.abs(vectors[row] - expected.numpy()).max() < 1e-5


def test_equal_texts_are_embedded_once(qwen3_dir, catalogue, tiny_encoder, reference, monkeypatch):
    twice = pl.concat([catalogue, catalogue.with_columns(pl.col("parent_asin") + "-again")]).sample(
        fraction=1.0, shuffle=True, seed=0
    )
    twice.write_parquet(qwen3_dir / "Tiny_items_updated.parquet")
    argv = ["--category", "Tiny", "--data_dir", str(qwen3_dir), "--model_name", str(tiny_encoder)]
    tokenize_items.main([*argv, "--max_length", str(MAX_LENGTH)])
    batches = []
    embed_batch = embed_items.embed
    monkeypatch.setattr(embed_items, "embed", lambda *args: batches.append(args[2]) or embed_batch(*args))
    main(flags(qwen3_dir))
    distinct = catalogue["item_context"].n_unique()
    assert sum(map(len, batches)) == distinct + 4  # the longest and the shortest were checked, alone and together
    rows = dict(zip(catalogue["item_context"], range(60), strict=True))
    expected = reference("qwen3", "last")[[rows[text] for text in twice["item_context"]]]
    assert np.abs(read_vectors(qwen3_dir) - expected).max() < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_in_bfloat16_agrees_with_the_reference(qwen3_dir, reference, capsys):
    main(flags(qwen3_dir, "--device", "cuda"))
    assert "dtype bfloat16" in capsys.readouterr().out
    vectors = read_vectors(qwen3_dir)
    assert ((vectors * reference("qwen3", "last")).sum(axis=1) > 0.99).all()


# ---------------------------------------------------------------- the file


def test_the_output_keeps_every_column_and_the_order(qwen3_dir, catalogue, tiny_encoder):
    main(flags(qwen3_dir))
    path = qwen3_dir / "Tiny_items_with_embeddings.parquet"
    written = pl.read_parquet(path)
    assert written.columns == [*catalogue.columns, "embedding"]
    assert written.drop("embedding").equals(catalogue)
    assert written.drop("embedding").schema == catalogue.schema
    assert written.schema["embedding"] == pl.List(pl.Float32)
    assert written["embedding"].null_count() == 0
    metadata = pl.read_parquet_metadata(path)
    expected = {
        "model_name": str(tiny_encoder),
        "instruction": INSTRUCTION,
        "pooling": "last",
        "dtype": "float32",
        "n_items": "60",
        "fingerprint": tokenize_items.fingerprint(catalogue),
    }
    assert {name: metadata.get(name) for name in expected} == expected
    assert set(files_of(qwen3_dir)) == {path.name, "Tiny_items_updated.parquet", "Tiny_tokenized.npz"}
    assert not (qwen3_dir / PARTIAL).exists()


def test_num_rows_takes_the_first_rows(qwen3_dir, catalogue, reference):
    main(flags(qwen3_dir, "--num_rows", "7"))
    path = qwen3_dir / "Tiny_items_with_embeddings.parquet"
    assert pl.read_parquet(path).drop("embedding").equals(catalogue.head(7))
    assert np.abs(read_vectors(qwen3_dir) - reference("qwen3", "last")[:7]).max() < 1e-5
    assert pl.read_parquet_metadata(path)["n_items"] == "7"


def test_tokens_of_the_first_rows_alone_are_embedded(qwen3_dir, catalogue, reference, tiny_encoder):
    argv = ["--category", "Tiny", "--data_dir", str(qwen3_dir), "--model_name", str(tiny_encoder)]
    tokenize_items.main([*argv, "--max_length", str(MAX_LENGTH), "--num_rows", "11"])
    main(flags(qwen3_dir, "--num_rows", "50"))
    path = qwen3_dir / "Tiny_items_with_embeddings.parquet"
    assert pl.read_parquet(path).drop("embedding").equals(catalogue.head(11))
    assert np.abs(read_vectors(qwen3_dir) - reference("qwen3", "last")[:11]).max() < 1e-5


def test_other_columns_may_change_between_the_stages(qwen3_dir, catalogue):
    changed = catalogue.with_columns(title=pl.lit("new"), stock=pl.int_range(60))
    changed.write_parquet(qwen3_dir / "Tiny_items_updated.parquet", row_group_size=13)
    main(flags(qwen3_dir))
    written = pl.read_parquet(qwen3_dir / "Tiny_items_with_embeddings.parquet")
    assert written.drop("embedding").equals(changed)


@pytest.fixture
def in_pieces(monkeypatch):
    """Files are read and written some rows at a time."""
    monkeypatch.setattr(embed_items, "ROWS_PER_GROUP", 16)
    monkeypatch.setattr(embed_items.read_rows, "__defaults__", (7,))


def test_a_catalogue_of_many_pieces_is_put_together_as_one(qwen3_dir, in_pieces, tiny_encoder, reference, catalogue):
    tokenize(qwen3_dir, catalogue, tiny_encoder)
    main(flags(qwen3_dir))
    path = qwen3_dir / OUTPUT
    assert pl.read_parquet(path).drop("embedding").equals(catalogue)
    assert np.abs(read_vectors(qwen3_dir) - reference("qwen3", "last")).max() < 1e-5


# ---------------------------------------------------------------- batches


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 2000))
def test_batches_cover_each_row_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths)
    rows = np.flatnonzero(lengths % 3)  # some of them
    batches = embed_items.batches_by_length(rows, lengths, budget)
    if not len(rows):
        assert batches == []
        return
    assert sorted(np.concatenate(batches).tolist()) == rows.tolist()
    for rows in batches:
        assert len(rows) * lengths[rows].max() <= budget or len(rows) == 1
    longest = [lengths[rows].max() for rows in batches]
    assert longest == sorted(longest, reverse=True)


def test_batches_hold_little_padding():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 20_000).astype(int).clip(1, 2048)
    batches = embed_items.batches_by_length(np.arange(20_000), lengths, 16384)
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert padded / lengths.sum() < 1.02
    assert padded / len(batches) > 0.9 * 16384  # and the budget is used


# ---------------------------------------------------------------- which model


def test_a_copy_of_the_model_gives_the_same_vectors(qwen3_dir, tiny_encoder, tmp_path, capsys):
    copy = copy_encoder(tiny_encoder, tmp_path / "copy")
    main(flags(qwen3_dir, "--model_name", copy))
    assert pl.read_parquet_metadata(qwen3_dir / OUTPUT)["model_name"] == copy
    expected = read_vectors(qwen3_dir)
    main(flags(qwen3_dir, "--model_name", copy + "/"))
    assert "is complete already" in capsys.readouterr().out  # the weights decide, not the name
    main(flags(qwen3_dir, "--overwrite"))
    assert np.abs(read_vectors(qwen3_dir) - expected).max() < 1e-6


def test_a_copy_of_the_model_without_a_tokenizer_is_refused(with_earlier, tiny_encoder, tmp_path, refused):
    copy = copy_encoder(tiny_encoder, tmp_path / "copy", "tokenizer*")
    line = refused(main, flags(with_earlier, "--model_name", copy), with_earlier)
    assert copy in line  # AutoTokenizer makes a tokenizer without words of a config.json
    assert "cuts the same text into other tokens" in line


def test_another_tokenizer_under_the_same_name_is_refused(qwen3_dir, catalogue, tiny_encoder, tmp_path, refused):
    model = copy_encoder(tiny_encoder, tmp_path / "model")
    tokenize(qwen3_dir, catalogue, model)
    other = save_qwen3(tmp_path / "other", make_texts(60, seed=9), vocab_size=500)
    shutil.copy(other / "tokenizer.json", model)
    assert "now cuts the same text into other tokens" in refused(main, flags(qwen3_dir), qwen3_dir)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, "cuts the same text into other tokens"),
        ({"vocab_size": 100}, "the model knows 100 tokens"),
        ({"max_position_embeddings": 32}, "the model reads only 32"),
    ],
)
def test_another_models_folder_is_refused(with_earlier, tmp_path, refused, overrides, expected):
    other = str(save_qwen3(tmp_path / "other", make_texts(60, seed=9), **({"vocab_size": 500} | overrides)))
    line = refused(main, flags(with_earlier, "--model_name", other), with_earlier)
    assert str(with_earlier / "Tiny_tokenized.npz") in line
    assert other in line
    assert expected in line
    assert f"run tokenize_items.py with --model_name {other}" in line


@pytest.mark.parametrize("kind", ["hub name", "empty folder", "half the weights"])
def test_a_model_that_cannot_be_loaded_is_refused(with_earlier, tiny_encoder, tmp_path, refused, kind):
    folder = tmp_path / "model"
    name = "nobody/no-such-model" if kind == "hub name" else str(folder)
    if kind == "empty folder":
        folder.mkdir()
    elif kind == "half the weights":
        copy_encoder(tiny_encoder, folder)
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    line = refused(main, flags(with_earlier, "--model_name", name), with_earlier)
    assert f"--model_name {name}: no model can be loaded from there" in line
    assert "check the name, the network and the files" in line


def rename(prefix: str):
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def without(part: str):
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


UNFIT = {
    "a prefix of data-parallel training": (rename("module."), "37 weights are not in its files"),
    "a prefix of a wrapper": (rename("encoder.model."), "37 weights are not in its files"),
    "a layer less": (without("layer.1."), "16 weights are not in its files"),
    "no positions": (without("position_embeddings"), "1 weights are not in its files"),
    "another shape": (
        lambda weights: {name: x[:, :32].clone() if "word_emb" in name else x for name, x in weights.items()},
        "no model can be loaded from there",
    ),
}


def change_weights(source, folder, change) -> str:
    """A copy of the encoder with other weights in its file."""
    path = Path(copy_encoder(source, folder)) / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("kind", UNFIT)
def test_weights_that_do_not_fit_the_model_are_refused(bert_dir, tiny_bert, tmp_path, refused, kind):
    change, trouble = UNFIT[kind]
    unfit = change_weights(tiny_bert, tmp_path / "unfit", change)
    line = refused(main, flags(bert_dir, "--model_name", unfit, "--pooling", "mean"), bert_dir)
    assert f"--model_name {unfit}: {trouble}" in line


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_pooler_that_no_vector_needs_may_be_missing(bert_dir, tiny_bert, tmp_path, reference, run_script, pooling):
    headless = change_weights(tiny_bert, tmp_path / "headless", without("pooler"))
    more = flags(bert_dir, "--model_name", headless, "--pooling", pooling)
    done = run_script("embed_items.py", *more, cwd=bert_dir)
    assert done.returncode == 0, done.stderr
    assert "MISSING" not in done.stdout + done.stderr
    assert np.abs(read_vectors(bert_dir) - reference("bert", pooling)).max() < 1e-5
    assert "is complete already" in run_script("embed_items.py", *more, cwd=bert_dir).stdout  # the digest is the same


def test_a_git_lfs_pointer_is_refused_with_a_way_out(with_earlier, tiny_encoder, tmp_path, refused):
    folder = copy_encoder(tiny_encoder, tmp_path / "clone")
    Path(folder, "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    line = refused(main, flags(with_earlier, "--model_name", folder), with_earlier)
    assert f"{folder}: no model can be loaded from there" in line
    assert "git lfs pull" in line


def test_a_model_with_code_of_its_own_is_refused_without_a_question(qwen3_dir, tiny_encoder, tmp_path, run_script):
    folder = copy_encoder(tiny_encoder, tmp_path / "custom")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "c.Config", "AutoModel": "m.Model"}}
    Path(folder, "config.json").write_text(json.dumps(own))
    done = run_script("embed_items.py", *flags(qwen3_dir, "--model_name", folder), cwd=qwen3_dir)
    assert done.returncode == 2
    assert "contains custom code" in complaint(done.stderr)
    assert "choose another model" in complaint(done.stderr)
    assert "[y/N]" not in done.stdout


def test_code_of_its_own_that_is_not_used_is_told(qwen3_dir, tiny_encoder, tmp_path, capsys):
    folder = copy_encoder(tiny_encoder, tmp_path / "custom")
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "m.Model"}}))
    main(flags(qwen3_dir, "--model_name", folder))
    assert f"warning: {folder} brings code of its own, which is not used" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder(qwen3_dir, tiny_encoder, monkeypatch):
    monkeypatch.setenv("HOME", str(qwen3_dir.parent))
    copy_encoder(tiny_encoder, qwen3_dir.parent / "model")
    main(["--category=Tiny", "--device=cpu", f"--data_dir=~/{qwen3_dir.name}", "--model_name=~/model"])
    assert (qwen3_dir / OUTPUT).exists()


# ---------------------------------------------------------------- what the model's folder declares

NEW_TYPE, OLD_TYPE = "sentence_transformers.base.modules.{}", "sentence_transformers.models.{}"
MODES = {
    "mean": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False},
    "cls": {"word_embedding_dimension": 48, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    "last": {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False},
}
NEW_MODES = {"mean": "mean", "cls": ["cls"], "last": "lasttoken", "max": "max", "mean+cls": ["mean", "cls"]}


def declare(folder, settings: dict, *modules: str, of: str = OLD_TYPE) -> str:
    """Declares a pooling and modules, as sentence-transformers writes them."""
    kinds = ["Transformer", "Pooling", *modules]
    listed = [{"idx": i, "path": f"{i}_{kind}" if i else "", "type": of.format(kind)} for i, kind in enumerate(kinds)]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    (folder / "modules.json").write_text(json.dumps(listed))
    return str(folder)


@pytest.fixture
def bert_copy(tiny_bert, tmp_path):
    return Path(copy_encoder(tiny_bert, tmp_path / "declaring"))


@pytest.mark.parametrize("form", ["old", "new"])
@pytest.mark.parametrize("pooling", MODES)
def test_pooling_is_the_declared_one(bert_dir, bert_copy, reference, capsys, pooling, form):
    settings = MODES[pooling] if form == "old" else {"pooling_mode": NEW_MODES[pooling], "include_prompt": True}
    model = declare(bert_copy, settings, "Normalize", of=OLD_TYPE if form == "old" else NEW_TYPE)
    main(flags(bert_dir, "--model_name", model))
    captured = capsys.readouterr()
    assert f"pooling {pooling} (declared by the model)" in captured.out
    assert "warning" not in captured.err
    assert np.abs(read_vectors(bert_dir) - reference("bert", pooling)).max() < 1e-5
    assert pl.read_parquet_metadata(bert_dir / OUTPUT)["pooling"] == pooling


def test_pooling_is_last_where_none_is_declared(bert_dir, bert_copy, reference, capsys):
    main(flags(bert_dir, "--model_name", str(bert_copy)))
    assert "pooling last (the model declares none)" in capsys.readouterr().out
    assert np.abs(read_vectors(bert_dir) - reference("bert", "last")).max() < 1e-5


@pytest.mark.parametrize("declared", NEW_MODES)
def test_a_pooling_against_the_declared_one_is_warned_of(bert_dir, bert_copy, reference, capsys, declared):
    model = declare(bert_copy, {"pooling_mode": NEW_MODES[declared]})
    main(flags(bert_dir, "--model_name", model, "--pooling", "mean"))
    captured = capsys.readouterr()
    assert "pooling mean (asked for)" in captured.out
    warning = f"warning: --pooling mean, but the model declares {declared}\n"
    assert (warning in captured.err) == (declared != "mean")
    assert np.abs(read_vectors(bert_dir) - reference("bert", "mean")).max() < 1e-5


@pytest.mark.parametrize("declared", ["max", "mean+cls"])
def test_a_declared_pooling_that_is_not_there_is_refused(bert_dir, bert_copy, refused, declared):
    model = declare(bert_copy, {"pooling_mode": NEW_MODES[declared]})
    line = refused(main, flags(bert_dir, "--model_name", model), bert_dir)
    assert f"--model_name {model}: it declares pooling {declared}, which this script cannot do" in line


def test_a_prompt_that_the_pooling_leaves_out_is_not_ignored(bert_dir, bert_copy, refused, capsys):
    model = declare(bert_copy, {"pooling_mode": "mean", "include_prompt": False})
    line = refused(main, flags(bert_dir, "--model_name", model), bert_dir)
    assert "it declares pooling mean without the prompt, which this script cannot do" in line
    main(flags(bert_dir, "--model_name", model, "--pooling", "mean"))
    assert "--pooling mean, but the model declares mean without the prompt" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["declared", "known to be absent", "unknown", "asked for"])
def test_a_pooling_that_the_hub_cannot_be_asked_for_is_told(
    bert_dir, bert_copy, reference, tmp_path, monkeypatch, capsys, refused, kind
):
    if kind == "declared":
        declare(bert_copy, MODES["cls"])
    cache = tmp_path / "cache" / "models--a--b"
    shutil.copytree(bert_copy, cache / "snapshots" / "c0ffee")
    absent = ["modules.json", "1_Pooling/config.json"] if kind == "known to be absent" else []
    for path in ("refs/main", *(f".no_exist/c0ffee/{name}" for name in absent)):
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / path).write_text("c0ffee" if path == "refs/main" else "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    argv = flags(bert_dir, "--model_name", "a/b", *(["--pooling", "mean"] if kind == "asked for" else []))
    if kind == "unknown":
        line = refused(main, argv, bert_dir)
        assert "a/b/modules.json: the hub cannot be asked for it" in line
        assert "or give --pooling" in line
        return
    main(argv)
    assert ("warning: a/b/modules.json: the hub cannot be asked" in capsys.readouterr().err) == (kind == "asked for")
    pooling = {"declared": "cls", "known to be absent": "last", "asked for": "mean"}[kind]
    assert np.abs(read_vectors(bert_dir) - reference("bert", pooling)).max() < 1e-5


@pytest.mark.parametrize("kind", ["Dense", "WeightedLayerPooling", "LSTM"])
def test_modules_that_would_be_left_out_are_refused(bert_dir, bert_copy, refused, kind):
    model = declare(bert_copy, MODES["mean"], kind)
    line = refused(main, flags(bert_dir, "--model_name", model, "--pooling", "mean"), bert_dir)
    assert f"--model_name {model}: its modules.json asks for {kind}" in line


@pytest.mark.parametrize(("encoder", "mode"), [("bert", "mean"), ("bert", "cls"), ("qwen3", "lasttoken")])
def test_vectors_are_those_of_sentence_transformers(
    tmp_path, catalogue, tiny_bert, tiny_encoder, encoder, mode, monkeypatch, capsys
):
    st = pytest.importorskip("sentence_transformers", reason="it is in tests/bench/requirements.txt")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    transformer = modules.Transformer(str({"bert": tiny_bert, "qwen3": tiny_encoder}[encoder]))
    transformer.max_seq_length = 40
    pooling = modules.Pooling(transformer.get_embedding_dimension(), mode)
    model = st.SentenceTransformer(modules=[transformer, pooling, modules.Normalize()], device="cpu")
    model.save(str(tmp_path / "model"))
    catalogue.write_parquet(tmp_path / "Tiny_items_updated.parquet")
    instruction = "" if encoder == "bert" else INSTRUCTION
    argv = ["--category", "Tiny", "--data_dir", str(tmp_path), "--model_name", str(tmp_path / "model")]
    tokenize_items.main([*argv, "--instruction", instruction])
    main(flags(tmp_path))
    prompt = PROMPT.format("") if instruction else None
    model = st.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    expected = model.encode(catalogue["item_context"].to_list(), prompt=prompt, show_progress_bar=False)
    assert np.abs(read_vectors(tmp_path) - expected).max() < 1e-5


@pytest.mark.parametrize("end", ["", " Sold here"])
def test_items_without_an_end_token_are_warned_of(qwen3_dir, catalogue, tiny_encoder, tmp_path, capsys, end):
    tokenizer = AutoTokenizer.from_pretrained(copy_encoder(tiny_encoder, tmp_path / "open"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(tmp_path / "open")
    tokenize(qwen3_dir, catalogue.with_columns(pl.col("item_context") + end), tmp_path / "open")
    capsys.readouterr()
    for pooling in ("last", "mean"):
        main(flags(qwen3_dir, "--pooling", pooling))
        assert ("warning: --pooling last expects one end token" in capsys.readouterr().err) == (pooling == "last")

    tokenizer.add_eos_token = True  # the advice
    tokenizer.save_pretrained(tmp_path / "open")
    tokenize(qwen3_dir, catalogue, tmp_path / "open")
    main(flags(qwen3_dir))
    assert "warning" not in capsys.readouterr().err


# ---------------------------------------------------------------- models that fit no item

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "trouble"),
    [
        (T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), "cannot embed an item of 150 tokens"),
        (RobertaConfig(max_position_embeddings=150, **TINY), "cannot embed an item of 150 tokens"),
        (ViTConfig(**TINY), "the model knows 0 tokens"),
    ],
    ids=["an encoder and decoder", "positions that start at 2", "an image encoder"],
)
def test_a_model_that_cannot_embed_these_items_is_refused(
    with_earlier, tiny_encoder, tmp_path, refused, config, trouble
):
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "model")
    line = refused(main, flags(with_earlier, "--model_name", str(tmp_path / "model")), with_earlier)
    assert str(tmp_path / "model") in line
    assert trouble in line


def test_vectors_may_be_narrower_than_the_hidden_states(qwen3_dir, tiny_encoder, tmp_path):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "max_position_embeddings": 160}
    config = OPTConfig(vocab_size=50_000, hidden_size=32, word_embed_proj_dim=16, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "model")
    main(flags(qwen3_dir, "--model_name", str(tmp_path / "model")))
    assert read_vectors(qwen3_dir).shape == (60, 16)


def test_a_vector_that_is_no_number_ends_the_run(with_earlier, tiny_encoder, tmp_path, capsys):
    npz = read_npz(with_earlier)
    held = [set(ids[mask > 0].tolist()) for ids, mask in zip(npz["input_ids"], npz["attention_mask"], strict=True)]
    in_row_0 = held[0]
    token = min(t for t in set().union(*held) - in_row_0 if 2 <= sum(t in row for row in held) <= 20)
    hit = [row for row, tokens in enumerate(held) if token in tokens]
    broken = copy_encoder(tiny_encoder, tmp_path / "broken")
    model = AutoModel.from_pretrained(broken)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(broken)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(flags(with_earlier, "--model_name", broken, "--tokens_per_batch", "1"))
    assert exit_info.value.code == 2
    line = complaint(capsys.readouterr().err)
    assert re.search(rf"row ({'|'.join(map(str, hit))}) becomes NaN, infinite or zero in float32", line)
    assert "get the model's weights again" in line
    assert (with_earlier / OUTPUT).read_bytes() == b"earlier"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_is_told_before_the_work(with_earlier, tiny_encoder, tmp_path, refused, embedded, dtype):
    """NaN in the weights, or numbers too large for float16."""

    def spoil(weights):
        weights["norm.weight"] *= float("nan") if dtype == "float32" else 1e6
        return weights

    spoilt = change_weights(tiny_encoder, tmp_path / "spoilt", spoil)
    line = refused(main, flags(with_earlier, "--model_name", spoilt, "--dtype", dtype), with_earlier)
    assert f"becomes NaN, infinite or zero in {dtype}" in line
    assert f"in {dtype}; use --dtype float32, or get the model's weights again" in line
    assert not embedded
    if dtype == "float16":  # the advice
        main(flags(with_earlier, "--model_name", spoilt, "--dtype", "float32"))
        assert len(read_vectors(with_earlier)) == 60


def test_a_pooler_that_is_missing_is_not_blamed_for_large_numbers(bert_dir, tiny_bert, tmp_path, refused):
    def spoil(weights):
        weights["encoder.layer.1.output.LayerNorm.weight"] *= 1e6
        return without("pooler")(weights)

    spoilt = change_weights(tiny_bert, tmp_path / "spoilt", spoil)
    line = refused(main, flags(bert_dir, "--model_name", spoilt, "--dtype", "float16"), bert_dir)
    assert "becomes NaN, infinite or zero in float16; use --dtype float32" in line


# ---------------------------------------------------------------- another catalogue


OTHER_CATALOGUES = {
    "another order": lambda c: c.reverse(),
    "a changed text": lambda c: c.with_columns(item_context=pl.col("item_context").str.replace("^Lamp$", "Lamps")),
    "a changed name": lambda c: c.with_columns(parent_asin=pl.col("parent_asin").str.replace("B059", "B060")),
    "a row less": lambda c: c.head(59),
    "a row more": lambda c: pl.concat([c, c.head(1).with_columns(parent_asin=pl.lit("new"))]),
    "no rows": lambda c: c.head(0),
    "numbers for names": lambda c: c.with_columns(parent_asin=pl.int_range(pl.len())),
}


@pytest.mark.parametrize("kind", OTHER_CATALOGUES)
def test_tokens_of_another_catalogue_are_refused(with_earlier, catalogue, refused, kind):
    path = with_earlier / "Tiny_items_updated.parquet"
    OTHER_CATALOGUES[kind](catalogue).write_parquet(path)
    line = refused(main, flags(with_earlier), with_earlier)
    assert f"{with_earlier / 'Tiny_tokenized.npz'}: does not fit {path}" in line
    assert "run tokenize_items.py again" in line


def test_a_folder_in_place_of_the_catalogue_is_refused(with_earlier, catalogue, refused):
    path = with_earlier / "Tiny_items_updated.parquet"
    path.unlink()
    path.mkdir()
    catalogue.write_parquet(path / "part-0.parquet")
    assert f"{path}: not a readable parquet file ([Errno 21] Is a directory" in refused(
        main, flags(with_earlier), with_earlier
    )


def test_a_missing_catalogue_is_refused(with_earlier, refused):
    path = with_earlier / "Tiny_items_updated.parquet"
    path.unlink()
    line = refused(main, flags(with_earlier), with_earlier)
    assert f"{path}: not a readable parquet file ([Errno 2] No such file" in line
    assert "put the catalogue back" in line


@pytest.mark.parametrize("part", [0, 0.5, -1])
def test_a_corrupt_catalogue_is_refused(with_earlier, refused, part):
    path = with_earlier / "Tiny_items_updated.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part) if part >= 0 else part])
    line = refused(main, flags(with_earlier), with_earlier)
    assert f"{path}: not a readable parquet file" in line


# ---------------------------------------------------------------- a damaged npz


def test_a_missing_npz_is_refused(with_earlier, refused):
    path = with_earlier / "Tiny_tokenized.npz"
    path.unlink()
    line = refused(main, flags(with_earlier), with_earlier)
    assert f"{path}: not a readable npz of tokenize_items.py ([Errno 2] No such file" in line
    assert "run tokenize_items.py" in line


@pytest.mark.parametrize("part", [0, 100, 0.5, -100, -1, "garbage", "npy", "pickle"])
def test_a_file_that_is_no_whole_npz_is_refused(with_earlier, refused, part):
    path = with_earlier / "Tiny_tokenized.npz"
    whole = path.read_bytes()
    if part == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif part == "npy":
        with open(path, "wb") as file:
            np.save(file, np.arange(6))
    elif part == "pickle":
        change_npz(with_earlier, model_name=np.array({"a": 1}, dtype=object))
    else:
        path.write_bytes(whole[: int(len(whole) * part) if isinstance(part, float) else part])
    line = refused(main, flags(with_earlier), with_earlier)
    assert f"{path}: not a readable npz of tokenize_items.py" in line
    assert "; run tokenize_items.py" in line


def read_or_refuse(path):
    """The tokens, or the exit status of a refusal, or what else was raised."""
    try:
        return embed_items.read_tokens(path, None)
    except SystemExit as error:
        return error.code
    except Exception as error:
        return repr(error)


def as_lists(tokens) -> list:
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in tokens]


def test_a_flipped_byte_never_passes_for_other_tokens(with_earlier, capsys):
    path = with_earlier / "Tiny_tokenized.npz"
    whole, sound = path.read_bytes(), as_lists(embed_items.read_tokens(path, None))
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    header = whole.index(b"\x93NUMPY")
    spots = [(spot, 1 << spot % 8) for spot in range(header, header + 128)]
    spots += [(spot, 0x41) for spot in (*range(header + 128, directory, 997), *range(directory, len(whole), 7))]
    refusals, surprises = 0, {}
    for spot, bits in spots:
        damaged = bytearray(whole)
        damaged[spot] ^= bits
        path.write_bytes(damaged)
        result = read_or_refuse(path)
        if result == 2:
            assert f"{path}: " in complaint(capsys.readouterr().err)
            refusals += 1
        elif not isinstance(result, embed_items.Tokens):
            surprises[spot] = result
        elif as_lists(result) != sound:
            surprises[spot] = "other tokens"
    assert not surprises
    assert refusals > len(spots) / 2


@pytest.mark.parametrize("key", ["input_ids", "attention_mask", "max_length", "fingerprint", "format_version"])
def test_an_npz_without_a_key_is_refused(with_earlier, refused, key):
    change_npz(with_earlier, **{key: None})
    line = refused(main, flags(with_earlier), with_earlier)
    assert str(with_earlier / "Tiny_tokenized.npz") in line
    assert "; run tokenize_items.py" in line


CONTRADICTIONS = {
    "another format": lambda n: {"format_version": 1},
    "more items than the catalogue": lambda n: {
        "n_items": 120,
        "input_ids": np.vstack([n["input_ids"]] * 2),
        "attention_mask": np.vstack([n["attention_mask"]] * 2),
    },
    "a narrower mask": lambda n: {"attention_mask": n["attention_mask"][:, 1:]},
    "a shorter mask": lambda n: {"attention_mask": n["attention_mask"][1:]},
    "a flat mask": lambda n: {"attention_mask": n["attention_mask"].ravel()},
    "negative ids": lambda n: {"input_ids": -n["input_ids"] - 1},
    "ids past the vocabulary": lambda n: {"input_ids": n["input_ids"] + 10_000},
    "no rows": lambda n: {"n_items": 0, "input_ids": n["input_ids"][:0], "attention_mask": n["attention_mask"][:0]},
    "an item without tokens": lambda n: {"attention_mask": n["attention_mask"] * (np.arange(60) != 5)[:, None]},
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_an_npz_that_contradicts_itself_is_refused(with_earlier, refused, kind):
    change_npz(with_earlier, **CONTRADICTIONS[kind](read_npz(with_earlier)))
    line = refused(main, flags(with_earlier), with_earlier)
    assert str(with_earlier / "Tiny_tokenized.npz") in line
    assert "run tokenize_items.py" in line


# ---------------------------------------------------------------- flags, writing, command line


def test_a_device_that_is_not_there_is_refused(with_earlier, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(main, [*flags(with_earlier), "--device", "cuda"], with_earlier)
    assert "--device cuda: there is none here; use --device auto" in line


BAD_FLAGS = {
    "unknown": (["--no_such_flag", "1"], "unrecognized arguments: --no_such_flag"),
    "abbreviated": (["--pool", "mean"], "unrecognized arguments: --pool mean"),
    "stray word": (["Tiny"], "unrecognized arguments: Tiny"),
    "no number": (["--target_dim", "many"], "--target_dim"),
    "no such pooling": (["--pooling", "max"], "--pooling"),
    "target_dim 0": (["--target_dim", "0"], "--target_dim 0: must be at least 1"),
    "tokens_per_batch 0": (["--tokens_per_batch", "0"], "--tokens_per_batch 0: must be at least 1"),
    "num_rows -1": (["--num_rows", "-1"], "--num_rows -1: must be at least 1"),
}


@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_a_wrong_flag_is_refused(with_earlier, refused, kind):
    more, expected = BAD_FLAGS[kind]
    line = refused(main, flags(with_earlier, *more), with_earlier)
    assert "command line" in line
    assert expected in line
    assert "--help lists the flags" in line


@pytest.mark.parametrize("limit", [1024, 17_000])
def test_a_full_disk_is_told_and_leaves_the_earlier_output(with_earlier, capsys, full_disk, reference, limit):
    """Too little for the finished vectors, and for the output."""
    place = {1024: "vectors-0", 17_000: "with_embeddings.parquet"}[limit]
    before = files_of(with_earlier)
    with pytest.raises(SystemExit) as exit_info:
        full_disk(main, flags(with_earlier), limit=limit)
    assert exit_info.value.code == 2
    line = complaint(capsys.readouterr().err)
    assert f"{place}: cannot be written" in line
    assert "free disk space" in line
    assert {name: content for name, content in files_of(with_earlier).items() if PARTIAL not in name} == before
    main(flags(with_earlier))
    assert np.abs(read_vectors(with_earlier) - reference("qwen3", "last")).max() < 1e-5


def test_an_interrupted_write_leaves_the_earlier_output(with_earlier, monkeypatch, capsys):
    def half(frame, path, **options):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    before = files_of(with_earlier)
    monkeypatch.setattr(pl.LazyFrame, "sink_parquet", half)
    monkeypatch.setattr(sys, "argv", ["embed_items.py", *flags(with_earlier)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(embed_items.__file__, run_name="__main__")
    assert exit_info.value.code == 130
    assert "the same command goes on from the vectors finished so far" in capsys.readouterr().err
    assert {name: content for name, content in files_of(with_earlier).items() if PARTIAL not in name} == before
    monkeypatch.undo()
    main(flags(with_earlier))
    assert "0 texts to embed; 60 were finished by an earlier run" in capsys.readouterr().out
    assert set(files_of(with_earlier)) == set(before)  # the finished vectors are gone


# ---------------------------------------------------------------- stopped and started again


def stop_after(monkeypatch, batches: int) -> None:
    """Ctrl-C in the middle of keeping the vectors of a batch: half of them are written, and a part of one."""
    write, written = embed_items.Store.write, []

    def stopping(store, rows, vectors):
        written.append(rows)
        if len(written) == batches:
            half = len(rows) // 2
            write(store, rows[:half], vectors[:half])
            torn = np.where(np.arange(vectors.shape[1]) < 30, vectors[half], 0)[None]
            write(store, rows[half : half + 1], torn)
            raise KeyboardInterrupt
        write(store, rows, vectors)

    monkeypatch.setattr(embed_items.Store, "write", stopping)


@pytest.mark.parametrize("batches", [2, 5])
def test_the_same_command_goes_on_to_the_same_bytes(qwen3_dir, tmp_path, monkeypatch, capsys, batches):
    other = shutil.copytree(qwen3_dir, tmp_path / "never stopped")
    main(flags(other, *FEW))
    with monkeypatch.context() as patch:
        stop_after(patch, batches)
        with pytest.raises(KeyboardInterrupt):
            main(flags(qwen3_dir, *FEW))
    capsys.readouterr()
    main(flags(qwen3_dir, *FEW))
    assert "were finished by an earlier run" in capsys.readouterr().out
    assert files_of(qwen3_dir) == files_of(other)


@pytest.fixture
def embedded(monkeypatch) -> list[int]:
    """The rows that are embedded, but for the few of check_vectors."""
    rows, embed, check = [], embed_items.embed, embed_items.check_vectors

    def noting(model, tokens, batch, *rest):
        rows.extend(batch.tolist())
        return embed(model, tokens, batch, *rest)

    def forgetting(*arguments):
        before = len(rows)
        try:
            return check(*arguments)
        finally:
            del rows[before:]

    monkeypatch.setattr(embed_items, "embed", noting)
    monkeypatch.setattr(embed_items, "check_vectors", forgetting)
    return rows


@pytest.fixture
def stopped(with_earlier, monkeypatch):
    """A folder with an earlier output and the vectors of a run that was stopped."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            main(flags(with_earlier, *FEW))
    return with_earlier


def test_another_batch_size_goes_on_from_the_same_vectors(stopped, reference, embedded):
    main(flags(stopped, "--tokens_per_batch", "300"))
    assert 0 < len(embedded) < 60
    assert np.abs(read_vectors(stopped) - reference("qwen3", "last")).max() < 1e-5


OTHER_RECIPES = ["weights", "instruction", "pooling", "dtype", "max_length"]


def other_flags(folder, catalogue, model, monkeypatch, other: str) -> list[str]:
    """Changes one part of the recipe, and returns the flags for it."""
    if other == "weights":
        load = embed_items.load_model
        monkeypatch.setattr(embed_items, "load_model", lambda *arguments: load(*arguments).apply(retrained))
    elif other == "instruction":
        tokenize(folder, catalogue, model, "--instruction", "Another")
    elif other == "max_length":
        tokenize(folder, catalogue, model, "--max_length", "30")
    return {"pooling": ["--pooling", "mean"], "dtype": ["--dtype", "bfloat16"]}.get(other, [])


def retrained(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        module.weight.data += 1e-3


@pytest.mark.parametrize("other", OTHER_RECIPES)
def test_vectors_of_another_recipe_are_not_mixed(
    stopped, catalogue, tiny_encoder, monkeypatch, from_nothing, embedded, other
):
    more = other_flags(stopped, catalogue, tiny_encoder, monkeypatch, other)
    main(flags(stopped, *FEW, *more))
    assert len(embedded) == 60
    assert files_of(stopped) == files_of(from_nothing(stopped, *FEW, *more))


@pytest.mark.parametrize("harm", ["zeros", "torn vectors", "no size"])
def test_damaged_vectors_are_embedded_again(stopped, reference, harm):
    (path,) = (stopped / PARTIAL).glob("*/vectors-0")
    content = np.fromfile(path, np.float32).reshape(60, 64)
    content[:, 0 if harm == "zeros" else 32 :] = 0
    path.write_bytes(b"" if harm == "no size" else content.tobytes())
    main(flags(stopped, *FEW))
    assert np.abs(read_vectors(stopped) - reference("qwen3", "last")).max() < 1e-5


@pytest.mark.parametrize("by", ["embed", "tokenize"])
def test_a_trial_does_not_replace_more_rows(qwen3_dir, catalogue, tiny_encoder, refused, capsys, by):
    main(flags(qwen3_dir))
    complete, trial = (qwen3_dir / OUTPUT).read_bytes(), ["--num_rows", "9"]
    if by == "tokenize":
        tokenize(qwen3_dir, catalogue, tiny_encoder, "--num_rows", "9")
        trial = []
    line = refused(main, flags(qwen3_dir, *trial), qwen3_dir)
    assert f"{qwen3_dir / OUTPUT}: holds 60 items, more than the 9 of this trial; --overwrite replaces it" in line
    refused(main, flags(qwen3_dir, *trial, "--reuse"), qwen3_dir)
    main(flags(qwen3_dir, *trial, "--overwrite"))
    assert len(read_vectors(qwen3_dir)) == 9
    main(flags(qwen3_dir, "--num_rows", "8", "--overwrite"))
    main(flags(qwen3_dir, *trial))  # more rows than before
    assert len(read_vectors(qwen3_dir)) == 9
    tokenize(qwen3_dir, catalogue, tiny_encoder)
    main(flags(qwen3_dir))
    assert (qwen3_dir / OUTPUT).read_bytes() == complete


@pytest.mark.parametrize("more", [[], ["--reuse"], ["--num_rows", "9"]])
def test_embeddings_of_another_make_are_replaced_only_when_asked(qwen3_dir, refused, more):
    main(flags(qwen3_dir))
    path, complete = qwen3_dir / OUTPUT, (qwen3_dir / OUTPUT).read_bytes()
    pl.read_parquet(path).write_parquet(path)  # without our metadata
    line = refused(main, flags(qwen3_dir, *more), qwen3_dir)
    assert f"{path}: holds embeddings that this script has not made" in line
    main(flags(qwen3_dir, "--overwrite"))
    assert path.read_bytes() == complete


def test_a_smaller_catalogue_needs_no_flag(qwen3_dir, catalogue, tiny_encoder, reference):
    main(flags(qwen3_dir))
    tokenize(qwen3_dir, catalogue.tail(20), tiny_encoder)
    main(flags(qwen3_dir))
    assert np.abs(read_vectors(qwen3_dir) - reference("qwen3", "last")[40:]).max() < 1e-5


def test_a_complete_run_leaves_the_vectors_of_another(qwen3_dir, monkeypatch):
    main(flags(qwen3_dir))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            main(flags(qwen3_dir, *FEW, "--pooling", "mean"))
    before = files_of(qwen3_dir)
    main(flags(qwen3_dir))  # nothing to do
    assert files_of(qwen3_dir) == before


def test_the_vectors_of_a_run_stopped_on_an_earlier_catalogue_do_not_block_the_next(
    stopped, catalogue, tiny_encoder, from_nothing
):
    tokenize(stopped, next_day(catalogue), tiny_encoder)
    main(flags(stopped, *FEW))
    assert files_of(stopped) == files_of(from_nothing(stopped, *FEW))


@pytest.mark.parametrize("change", ["reversed", "shorter", "gone"])
def test_a_catalogue_that_is_replaced_meanwhile_is_told(qwen3_dir, catalogue, monkeypatch, capsys, change):
    path, write = qwen3_dir / "Tiny_items_updated.parquet", embed_items.write

    def replacing(*arguments):
        path.unlink() if change == "gone" else catalogue.reverse().head(60 - 9 * (change == "shorter")).write_parquet(
            path
        )
        write(*arguments)

    monkeypatch.setattr(embed_items, "write", replacing)
    with pytest.raises(SystemExit, match="2"):
        main(flags(qwen3_dir))
    assert f"error: {path}: another file than when this run began" in capsys.readouterr().err
    assert not (qwen3_dir / OUTPUT).exists()
    assert (qwen3_dir / PARTIAL).exists()


def test_a_trial_leaves_the_vectors_of_a_stopped_run(stopped, embedded):
    before = files_of(stopped / PARTIAL)
    main(flags(stopped, "--num_rows", "9", "--overwrite"))
    assert files_of(stopped / PARTIAL) == before
    embedded.clear()
    main(flags(stopped, *FEW))
    assert 0 < len(embedded) < 60
    assert not (stopped / PARTIAL).exists()


def test_a_complete_output_is_not_made_again_unless_asked(qwen3_dir, embedded, capsys):
    main(flags(qwen3_dir))
    complete = files_of(qwen3_dir)
    embedded.clear()
    main(flags(qwen3_dir))
    assert "is complete already: nothing to do; --overwrite embeds again" in capsys.readouterr().out
    assert not embedded
    main(flags(qwen3_dir, "--overwrite"))
    assert len(embedded) == 60
    assert files_of(qwen3_dir) == complete
    for damaged in (b"", complete[OUTPUT][:-9]):
        (qwen3_dir / OUTPUT).write_bytes(damaged)
        main(flags(qwen3_dir))
        assert files_of(qwen3_dir) == complete
    for more in (["--pooling", "mean"], ["--target_dim", "8"]):
        embedded.clear()
        main(flags(qwen3_dir, *more))
        assert embedded, more


def test_other_columns_are_written_anew_without_embedding_again(qwen3_dir, embedded):
    main(flags(qwen3_dir))
    vectors = read_vectors(qwen3_dir)
    embedded.clear()
    path = qwen3_dir / "Tiny_items_updated.parquet"
    pl.read_parquet(path).with_columns(price=pl.lit(9)).write_parquet(path)
    main(flags(qwen3_dir))
    assert not embedded
    assert pl.read_parquet(qwen3_dir / OUTPUT)["price"].to_list() == [9] * 60
    assert (read_vectors(qwen3_dir) == vectors).all()


@pytest.mark.parametrize("then", ["the same command", "the next day"])
def test_a_kill_at_the_very_end_leaves_nothing_that_counts(
    qwen3_dir, catalogue, tiny_encoder, embedded, monkeypatch, then
):
    def kill(*_, **__):
        if (qwen3_dir / OUTPUT).exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            main(flags(qwen3_dir))
    assert (qwen3_dir / PARTIAL).exists()
    embedded.clear()
    if then == "the next day":
        tokenize(qwen3_dir, catalogue.tail(20), tiny_encoder)
    main(flags(qwen3_dir))
    assert len(embedded) == {"the same command": 0, "the next day": 20}[then]
    assert not list((qwen3_dir / PARTIAL).rglob("vectors-*"))


def test_a_second_run_into_the_same_place_leaves(stopped, refused, reference):
    with embed_items.lock(stopped / OUTPUT):
        assert "another run is writing it" in refused(main, flags(stopped), stopped)
    main(flags(stopped))
    assert np.abs(read_vectors(stopped) - reference("qwen3", "last")).max() < 1e-5


def test_a_file_system_without_locks_is_no_trouble(qwen3_dir, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(embed_items.fcntl, "flock", no_locks)
    main(flags(qwen3_dir))
    assert (qwen3_dir / OUTPUT).exists()


# ---------------------------------------------------------------- vectors of an earlier output


def next_day(catalogue) -> pl.DataFrame:
    """In another order, without the first 9 items; 5 have other texts, 4 other names, all other prices; 8 are new.

    Of the new, 2 repeat texts that stay, 2 repeat each other, and 1 repeats an edited one.
    """
    texts = catalogue["item_context"].to_list()
    edited = [f"{text} anew" if i in range(20, 25) else text for i, text in enumerate(texts)]
    names = [f"C{i}" if i in range(30, 34) else f"B{i:03}" for i in range(60)]
    new = [texts[40], texts[41], "a new lamp", "a new lamp", edited[20], "cable 12", "oak", "gift of чай"]
    return pl.DataFrame(
        {
            "title": "none",
            "parent_asin": names[9:] + [f"D{i}" for i in range(8)],
            "item_context": edited[9:] + new,
            "price": list(range(59)),
        }
    ).sample(fraction=1.0, shuffle=True, seed=3)


def by_text(data_dir) -> dict[str, bytes]:
    """The vector of every text, the same in all rows that hold it."""
    written = pl.read_parquet(data_dir / OUTPUT)
    vectors = {}
    for text, vector in zip(written["item_context"], read_vectors(data_dir).astype(np.float32), strict=True):
        assert vectors.setdefault(text, vector.tobytes()) == vector.tobytes()
    return vectors


@pytest.fixture(scope="module")
def day_one(tokenized, catalogue, tiny_encoder, tmp_path_factory):
    """A folder with the output of one day, and the catalogue and the tokens of the next."""
    folder = shutil.copytree(tokenized["qwen3"], tmp_path_factory.mktemp("days") / "output")
    main(flags(folder, *FEW))
    tokenize(folder, next_day(catalogue), tiny_encoder)
    return folder


@pytest.fixture
def daily(day_one, tmp_path):
    return shutil.copytree(day_one, tmp_path / "daily")


@pytest.fixture
def from_nothing(tmp_path):
    """The folder after a run of the same tokens where nothing was: from_nothing(folder, *flags)."""

    def run(folder, *more):
        other = shutil.copytree(folder, tmp_path / "from nothing")
        (other / OUTPUT).unlink(missing_ok=True)
        main(flags(other, *more))
        return other

    return run


def test_reuse_embeds_new_and_edited_texts_alone(daily, catalogue, embedded, from_nothing, capsys):
    full, before = by_text(from_nothing(daily, *FEW)), by_text(daily)
    embedded.clear()
    main(flags(daily, *FEW, "--reuse"))
    today = next_day(catalogue)
    changed = set(today["item_context"]) - set(catalogue["item_context"])
    assert sorted(today["item_context"][embedded]) == sorted(changed)  # each of them once
    assert len(changed) == 5 + 4
    told = "46 of 55 texts keep the vector of an earlier run, 9 are new\n"  # 59 rows, 4 of them repeat a text
    assert told in capsys.readouterr().out
    after = by_text(daily)
    assert all(after[text] == before[text] for text in after.keys() - changed)
    pairs = [[np.frombuffer(vectors[text], np.float32) for vectors in (after, full)] for text in full]
    assert min(np.dot(*pair) for pair in pairs) > 1 - 1e-5
    assert pl.read_parquet(daily / OUTPUT).drop("embedding").equals(today)
    assert not (daily / PARTIAL).exists()
    embedded.clear()
    for more in ([], ["--reuse"]):
        main(flags(daily, *more))
        assert "is complete already" in capsys.readouterr().out
    assert not embedded


def test_reuse_over_many_days_changes_no_kept_vector(qwen3_dir, in_pieces, catalogue, tiny_encoder, embedded):
    tokenize(qwen3_dir, catalogue, tiny_encoder)
    main(flags(qwen3_dir))
    embedded.clear()
    today, before = catalogue, by_text(qwen3_dir)
    for day in range(3):
        text = pl.when(pl.int_range(pl.len()) == day).then(pl.lit(f"of day {day}")).otherwise("item_context")
        today = today.with_columns(item_context=text).reverse()
        tokenize(qwen3_dir, today, tiny_encoder)
        main(flags(qwen3_dir, "--reuse"))
        after = by_text(qwen3_dir)
        assert len(after.keys() & before.keys()) > 50
        assert all(after[text] == before[text] for text in after.keys() & before.keys())
        before = after
    assert len(embedded) == 3


def test_reuse_can_write_new_columns_without_embedding(daily, catalogue, embedded, tiny_encoder):
    tokenize(daily, catalogue, tiny_encoder)
    catalogue.with_columns(price=pl.lit(1)).write_parquet(daily / "Tiny_items_updated.parquet")
    main(flags(daily, "--reuse", "--overwrite"))
    assert not embedded
    assert set(pl.read_parquet(daily / OUTPUT)["price"]) == {1}


@pytest.mark.parametrize("other", OTHER_RECIPES)
def test_reuse_takes_nothing_of_another_recipe(
    daily, catalogue, tiny_encoder, monkeypatch, embedded, from_nothing, capsys, other
):
    more = [*FEW, *other_flags(daily, next_day(catalogue), tiny_encoder, monkeypatch, other)]
    expected = files_of(from_nothing(daily, *more))
    embedded.clear()
    capsys.readouterr()
    main(flags(daily, *more, "--reuse"))
    out, err = capsys.readouterr()
    assert re.search(rf"no vector of {daily / OUTPUT} is kept: .*other settings \(.*{other}", err)
    assert "keep the vector" not in out
    assert len(embedded) == DISTINCT
    assert files_of(daily) == expected


@pytest.mark.parametrize("kind", ["none", "empty", "half", "garbage"])
def test_reuse_without_a_sound_output_embeds_all(daily, embedded, from_nothing, capsys, kind):
    expected, path = files_of(from_nothing(daily)), daily / OUTPUT
    whole = path.read_bytes()
    if kind == "none":
        path.unlink()
    else:
        damaged = {"empty": b"", "half": whole[: len(whole) // 2], "garbage": bytes(range(256)) * 20}
        path.write_bytes(damaged[kind])
    embedded.clear()
    main(flags(daily, "--reuse"))
    assert f"no vector of {path} is kept: not found, damaged, or made with other settings (" in capsys.readouterr().err
    assert len(embedded) == DISTINCT
    assert files_of(daily) == expected


@pytest.mark.parametrize("writes", [1, 3])  # the first copies vectors of the earlier output
def test_a_stopped_reuse_goes_on_to_the_same_bytes(daily, tmp_path, monkeypatch, writes):
    few = ["--tokens_per_batch", "300", "--reuse"]
    other = shutil.copytree(daily, tmp_path / "never stopped")
    main(flags(other, *few))
    before = (daily / OUTPUT).read_bytes()
    with monkeypatch.context() as patch:
        stop_after(patch, writes)
        with pytest.raises(KeyboardInterrupt):
            main(flags(daily, *few))
    assert (daily / OUTPUT).read_bytes() == before
    main(flags(daily, *few))
    assert files_of(daily) == files_of(other)
