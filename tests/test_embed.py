"""embed_items.py: vectors against a plain float64 reference, the file's contract, one line for every wrong input."""

import os
import re
import runpy
import shutil
import sys
import zipfile

import numpy as np
import polars as pl
import pytest
import torch
from conftest import complaint, files_of, make_texts, save_qwen3
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoModel, AutoTokenizer, Lfm2Config, Lfm2Model, OPTConfig, RobertaConfig, T5Config, ViTConfig

import embed_items
import tokenize_items
import train_rqvae
from embed_items import main

INSTRUCTION = "Represent this product so that similar products have similar representations"
PROMPT = f"Instruct: {INSTRUCTION}\nQuery:{{}}"
MAX_LENGTH = 150
SEVERAL_LENGTHS = [1, 700, 16384]  # tokens_per_batch: every item alone, some together, all in a few batches


def flags(data_dir, *more: str) -> list[str]:
    return ["--category", "Tiny", "--data_dir", str(data_dir), "--device", "cpu", *more]


PARTIAL = ".Tiny_items_with_embeddings.parquet.partial"


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
    assert "target_dim 65 is more than the model has: all 64 dimensions are kept" in capsys.readouterr().out


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
    assert "warning: below 0.999: padding changes the vectors" in captured.err


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
    # a trial, the prefix, both alone, and the prefix again for the work
    assert plain == [lengths.max(), int(said[1]), lengths.min(), lengths.max(), int(said[1])]
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
    main(flags(qwen3_dir, "--model_name", str(tmp_path / "lfm2")))
    assert "are read once" not in capsys.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "lfm2", dtype=torch.float64)
    npz, vectors = read_npz(qwen3_dir), read_vectors(qwen3_dir)
    for row in (0, 59):
        ids = torch.from_numpy(npz["input_ids"][row][npz["attention_mask"][row] > 0]).long()
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(model(input_ids=ids[None]).last_hidden_state[0, -1], dim=0)
        assert np.abs(vectors[row] - expected.numpy()).max() < 1e-5


def test_equal_texts_are_embedded_once(qwen3_dir, catalogue, tiny_encoder, reference, monkeypatch, capsys):
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
    assert f"{120 - distinct} items repeat the tokens of another: they are embedded once" in capsys.readouterr().out
    count = min(embed_items.ITEMS_CHECKED, 120)
    assert sum(map(len, batches)) == distinct + 1 + 2 * count  # a trial; those that were checked, alone and together
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
        "format_version": "2",
        "model_name": str(tiny_encoder),
        "instruction": INSTRUCTION,
        "pooling": "last",
        "dtype": "float32",
        "n_items": "60",
        "fingerprint": tokenize_items.fingerprint(catalogue),
    }
    assert {name: metadata.get(name) for name in expected} == expected
    assert set(files_of(qwen3_dir)) == {path.name, "Tiny_items_updated.parquet", "Tiny_tokenized.npz"}


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


def test_a_catalogue_of_many_pieces_is_put_together_as_one(qwen3_dir, tiny_encoder, monkeypatch, reference, catalogue):
    for name, rows in {"ROWS_READ": 7, "SLICE_ROWS": 32, "ROWS_PER_GROUP": 16, "FINGERPRINT_ROWS": 16}.items():
        monkeypatch.setattr(embed_items, name, rows)
    monkeypatch.setattr(tokenize_items, "FINGERPRINT_ROWS", 16)
    for module in (embed_items, train_rqvae):
        monkeypatch.setattr(module, "DIGEST_ROWS", 8)
    argv = ["--category", "Tiny", "--data_dir", str(qwen3_dir), "--model_name", str(tiny_encoder), "--max_length"]
    tokenize_items.main([*argv, str(MAX_LENGTH)])
    main(flags(qwen3_dir))
    path = qwen3_dir / "Tiny_items_with_embeddings.parquet"
    assert pl.read_parquet(path).drop("embedding").equals(catalogue)
    assert np.abs(read_vectors(qwen3_dir) - reference("qwen3", "last")).max() < 1e-5
    told = pl.read_parquet_metadata(path)["vectors"]
    assert told == train_rqvae.data_digest(train_rqvae.EmbeddingDataset(path).embeddings.numpy())


def test_both_scripts_take_the_same_fingerprint(catalogue):
    long = pl.concat([catalogue] * (1 + tokenize_items.FINGERPRINT_ROWS // 60))  # more than one slice
    for frame in (catalogue, catalogue.head(1), catalogue.reverse(), long):
        pieces = frame.iter_slices(embed_items.FINGERPRINT_ROWS)
        assert embed_items.fingerprint(pieces) == tokenize_items.fingerprint(frame)


# ---------------------------------------------------------------- batches


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 2000))
def test_batches_cover_each_row_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths)
    batches = embed_items.batches_by_length(lengths, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) * lengths[rows].max() <= budget or len(rows) == 1
    longest = [lengths[rows].max() for rows in batches]
    assert longest == sorted(longest, reverse=True)


def test_batches_hold_little_padding():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 20_000).astype(int).clip(1, 2048)
    batches = embed_items.batches_by_length(lengths, 16384)
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert padded / lengths.sum() < 1.02
    assert padded / len(batches) > 0.9 * 16384  # and the budget is used


# ---------------------------------------------------------------- which model


@pytest.mark.parametrize("left_out", ["", "tokenizer*"])
def test_a_copy_of_the_model_gives_the_same_vectors(qwen3_dir, tiny_encoder, tmp_path, left_out):
    main(flags(qwen3_dir))
    expected = read_vectors(qwen3_dir)
    copy = copy_encoder(tiny_encoder, tmp_path / "copy", left_out)
    main(flags(qwen3_dir, "--model_name", copy))
    assert np.abs(read_vectors(qwen3_dir) - expected).max() < 1e-6
    assert pl.read_parquet_metadata(qwen3_dir / "Tiny_items_with_embeddings.parquet")["model_name"] == copy


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, "cuts the same text into other tokens"),
        ({"vocab_size": 100}, "knows 0 to 99"),
        ({"max_position_embeddings": 32}, "reads only 32"),
    ],
)
def test_another_models_folder_is_refused(with_earlier, tmp_path, refused, overrides, expected):
    other = str(save_qwen3(tmp_path / "other", make_texts(60, seed=9), **({"vocab_size": 500} | overrides)))
    line = refused(main, flags(with_earlier, "--model_name", other), with_earlier)
    assert str(with_earlier / "Tiny_tokenized.npz") in line
    assert other in line
    assert expected in line
    assert f"run tokenize_items.py with --model_name {other}" in line


@pytest.mark.parametrize("kind", ["hub name", "no folder", "empty folder", "half the weights", "garbage config"])
def test_a_model_that_cannot_be_loaded_is_refused(with_earlier, tiny_encoder, tmp_path, refused, kind):
    folder = tmp_path / "model"
    name = "nobody/no-such-model" if kind == "hub name" else str(folder)
    if kind == "empty folder":
        folder.mkdir()
    elif kind == "half the weights":
        copy_encoder(tiny_encoder, folder)
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif kind == "garbage config":
        copy_encoder(tiny_encoder, folder)
        (folder / "config.json").write_text("{ not json")
    line = refused(main, flags(with_earlier, "--model_name", name), with_earlier)
    assert f"--model_name {name}: no model can be loaded from there" in line
    assert "give a local folder" in line


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "trouble"),
    [
        (T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), "cannot embed an item of 150 tokens"),
        (RobertaConfig(max_position_embeddings=150, **TINY), "cannot embed an item of 150 tokens"),
        (ViTConfig(**TINY), "a model that reads no tokens"),
    ],
    ids=["an encoder and decoder", "positions that start at 2", "an image encoder"],
)
def test_a_model_that_cannot_embed_these_items_is_refused(
    with_earlier, tiny_encoder, tmp_path, refused, config, trouble
):
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "model")
    line = refused(main, flags(with_earlier, "--model_name", str(tmp_path / "model")), with_earlier)
    assert f"--model_name {tmp_path / 'model'}: {trouble}" in line


def test_vectors_may_be_narrower_than_the_hidden_states(qwen3_dir, tmp_path):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "max_position_embeddings": 160}
    config = OPTConfig(vocab_size=50_000, hidden_size=32, word_embed_proj_dim=16, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    main(flags(qwen3_dir, "--model_name", str(tmp_path / "model")))
    assert read_vectors(qwen3_dir).shape == (60, 16)


def test_vectors_that_are_not_numbers_are_counted(with_earlier, catalogue, tiny_encoder, tmp_path, refused):
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
    line = refused(main, flags(with_earlier, "--model_name", broken, "--tokens_per_batch", "900"), with_earlier)
    assert f"{len(hit)} items became NaN, infinite or zero" in line
    assert f"the first is {catalogue['parent_asin'][hit[0]]!r}" in line
    assert "--dtype float32" in line


# ---------------------------------------------------------------- another catalogue


OTHER_CATALOGUES = {
    "another order": lambda c: c.reverse(),
    "a changed text": lambda c: c.with_columns(item_context=pl.col("item_context").str.replace("^Lamp$", "Lamps")),
    "a changed name": lambda c: c.with_columns(parent_asin=pl.col("parent_asin").str.replace("B059", "B060")),
    "a null text": lambda c: c.with_columns(item_context=pl.col("item_context").replace("Lamp", None)),
    "a row less": lambda c: c.head(59),
    "a row more": lambda c: pl.concat([c, c.head(1).with_columns(parent_asin=pl.lit("new"))]),
    "no rows": lambda c: c.head(0),
    "no item_context": lambda c: c.drop("item_context"),
    "numbers for names": lambda c: c.with_columns(parent_asin=pl.int_range(pl.len())),
}


@pytest.mark.parametrize("kind", OTHER_CATALOGUES)
def test_tokens_of_another_catalogue_are_refused(with_earlier, catalogue, refused, kind):
    path = with_earlier / "Tiny_items_updated.parquet"
    OTHER_CATALOGUES[kind](catalogue).write_parquet(path)
    line = refused(main, flags(with_earlier), with_earlier)
    assert f"{with_earlier / 'Tiny_tokenized.npz'}: made from another catalogue" in line
    assert str(path) in line
    assert "run tokenize_items.py again" in line


def test_a_missing_catalogue_is_refused(with_earlier, refused):
    path = with_earlier / "Tiny_items_updated.parquet"
    path.unlink()
    line = refused(main, flags(with_earlier), with_earlier)
    assert f"{path}: not found" in line
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
    assert f"{path}: not found; run tokenize_items.py first" in line


@pytest.mark.parametrize("part", [0, 1, 4, 100, 0.25, 0.5, 0.75, 0.98, -100, -22, -1, "garbage", "npy", "pickle"])
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
    assert f"{path}: damaged, or not an npz of tokenize_items.py" in line
    assert "run tokenize_items.py again" in line


def read_or_refuse(path):
    """The tokens, or the exit status of a refusal, or what else was raised."""
    try:
        return embed_items.read_tokens(path)
    except SystemExit as error:
        return error.code
    except Exception as error:
        return repr(error)


def told(tokens) -> tuple:
    """Everything in them but where they are."""
    return tokens.digest, tokens.lengths.tolist(), tokens.of(np.arange(60))[0].tolist(), *tokens[5:]


def test_a_flipped_byte_never_passes_for_other_tokens(with_earlier, capsys):
    path = with_earlier / "Tiny_tokenized.npz"
    whole, sound = path.read_bytes(), told(embed_items.read_tokens(path))
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    header = whole.index(b"\x93NUMPY")
    spots = [(spot, 1 << bit) for spot in range(header, header + 80) for bit in range(8)]
    spots += [(spot, 0x41) for spot in (*range(header + 80, directory, 997), *range(directory, len(whole), 3))]
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
        elif told(result) != sound:
            surprises[spot] = "other tokens"
    assert not surprises
    assert refusals > len(spots) / 2


SCALARS = ["max_length", "n_items", "model_name", "instruction", "fingerprint", "tokenizer", "format_version"]


@pytest.mark.parametrize("key", ["input_ids", "attention_mask", *SCALARS])
def test_an_npz_without_a_key_is_refused(with_earlier, refused, key):
    change_npz(with_earlier, **{key: None})
    line = refused(main, flags(with_earlier), with_earlier)
    assert str(with_earlier / "Tiny_tokenized.npz") in line
    assert "run tokenize_items.py again" in line


CONTRADICTIONS = {
    "another format": lambda n: {"format_version": 1},
    "n_items too high": lambda n: {"n_items": 61},
    "n_items too low": lambda n: {"n_items": 59},
    "n_items infinite": lambda n: {"n_items": float("inf")},
    "more items than the catalogue": lambda n: {
        "n_items": 120,
        "input_ids": np.vstack([n["input_ids"]] * 2),
        "attention_mask": np.vstack([n["attention_mask"]] * 2),
    },
    "a narrower mask": lambda n: {"attention_mask": n["attention_mask"][:, 1:]},
    "a shorter mask": lambda n: {"attention_mask": n["attention_mask"][1:]},
    "a flat mask": lambda n: {"attention_mask": n["attention_mask"].ravel()},
    "a mask of text": lambda n: {"attention_mask": n["attention_mask"].astype(str)},
    "a mask of other values": lambda n: {"attention_mask": n["attention_mask"] * 3},
    "flat ids": lambda n: {"input_ids": n["input_ids"].ravel()},
    "ids of another type": lambda n: {"input_ids": n["input_ids"].astype(np.float32)},
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
    if kind == "an item without tokens":
        assert "1 items have no token, the first in row 5" in line


# ---------------------------------------------------------------- flags, writing, command line


def test_a_device_that_is_not_there_is_refused(with_earlier, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(main, [*flags(with_earlier), "--device", "cuda"], with_earlier)
    assert "--device cuda: there is none here; use --device auto" in line


BAD_FLAGS = {
    "unknown": (["--no_such_flag", "1"], "'--no_such_flag'"),
    "abbreviated": (["--pool", "mean"], "'--pool'"),
    "stray word": (["Tiny"], "'Tiny'"),
    "no number": (["--target_dim", "many"], "--target_dim"),
    "no such pooling": (["--pooling", "max"], "--pooling"),
    "no such dtype": (["--dtype", "int8"], "--dtype"),
    "no such device": (["--device", "tpu"], "--device"),
    "target_dim 0": (["--target_dim", "0"], "--target_dim 0: must be at least 1"),
    "tokens_per_batch 0": (["--tokens_per_batch", "0"], "--tokens_per_batch 0: must be at least 1"),
    "num_rows -1": (["--num_rows", "-1"], "--num_rows -1: must be at least 1"),
    "overwrite and reuse": (["--overwrite", "--reuse"], "--overwrite embeds every item again, --reuse does not"),
}


@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_a_wrong_flag_is_refused(with_earlier, refused, kind):
    more, expected = BAD_FLAGS[kind]
    line = refused(main, flags(with_earlier, *more), with_earlier)
    assert "command line" in line
    assert expected in line
    assert "--help lists the flags" in line


@pytest.mark.parametrize("limit", [100, 1024, 17_000])
def test_a_full_disk_is_told_and_leaves_the_earlier_output(with_earlier, capsys, full_disk, reference, limit):
    """Too little for the settings, for the finished vectors, and for the output."""
    place = {100: "partial/settings.json", 1024: "partial/vectors-0", 17_000: "with_embeddings.parquet"}[limit]
    before = files_of(with_earlier)
    with pytest.raises(SystemExit) as exit_info:
        full_disk(main, flags(with_earlier), limit=limit)
    assert exit_info.value.code == 2
    line = complaint(capsys.readouterr().err)
    assert f"{place}: cannot be written" in line
    assert "make room" in line
    assert {name: content for name, content in files_of(with_earlier).items() if PARTIAL not in name} == before
    main(flags(with_earlier))
    assert np.abs(read_vectors(with_earlier) - reference("qwen3", "last")).max() < 1e-5


def test_an_output_that_cannot_be_replaced_is_told(qwen3_dir, refused):
    path = qwen3_dir / "Tiny_items_with_embeddings.parquet"
    path.mkdir()
    line = refused(main, flags(qwen3_dir), qwen3_dir)
    assert f"{path}: cannot be written" in line


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
    assert "60 items were finished by an earlier run, 0 are left" in capsys.readouterr().out
    assert set(files_of(with_earlier)) == set(before)  # the finished vectors are gone


# ---------------------------------------------------------------- stopped and started again


def stop_after(monkeypatch, batches: int) -> None:
    """Ctrl-C in the middle of keeping the vectors of a batch: half of them are written, and a part of one."""
    keep, kept = embed_items.FinishedVectors.keep, []

    def stopping(finished, rows, vectors):
        keep(finished, rows, vectors)
        kept.append(rows)
        if len(kept) == batches:
            size = finished.own.stat().st_size
            os.truncate(finished.own, size - int(finished.record.itemsize * (len(rows) / 2 + 0.3)))
            raise KeyboardInterrupt

    monkeypatch.setattr(embed_items.FinishedVectors, "keep", stopping)


@pytest.mark.parametrize("batches", [2, 3, 5])
def test_the_same_command_goes_on_to_the_same_bytes(qwen3_dir, tmp_path, monkeypatch, capsys, batches):
    few = ["--tokens_per_batch", "600"]
    other = shutil.copytree(qwen3_dir, tmp_path / "never stopped")
    main(flags(other, *few))
    with monkeypatch.context() as patch:
        stop_after(patch, batches)
        with pytest.raises(KeyboardInterrupt):
            main(flags(qwen3_dir, *few))
    capsys.readouterr()
    main(flags(qwen3_dir, *few))
    assert "were finished by an earlier run" in capsys.readouterr().out
    assert files_of(qwen3_dir) == files_of(other)


def test_another_batch_size_goes_on_from_the_same_vectors(qwen3_dir, monkeypatch, reference, calls_of_embed):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            main(flags(qwen3_dir, "--tokens_per_batch", "600"))
    first = calls_of_embed.copy()
    calls_of_embed.clear()
    main(flags(qwen3_dir, "--tokens_per_batch", "1500"))
    again = set(first) & set(calls_of_embed)
    assert len(first) + len(calls_of_embed) - len(again) == 60
    assert len(again) < len(first)  # the batch that was cut, and what shares one with it
    assert np.abs(read_vectors(qwen3_dir) - reference("qwen3", "last")).max() < 1e-5


@pytest.fixture
def calls_of_embed(monkeypatch) -> list[int]:
    """The rows that embed_all embeds."""
    rows, keep = [], embed_items.FinishedVectors.keep

    def noting(finished, which, vectors):
        rows.extend(which.tolist())
        keep(finished, which, vectors)

    monkeypatch.setattr(embed_items.FinishedVectors, "keep", noting)
    return rows


@pytest.fixture
def stopped(with_earlier, monkeypatch):
    """A folder with an earlier output and the vectors of a run that was stopped."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            main(flags(with_earlier, "--tokens_per_batch", "600"))
    return with_earlier


@pytest.mark.parametrize("other", ["model_name", "weights", "instruction", "pooling", "dtype", "target_dim", "tokens",
                                   "fingerprint"])  # fmt: skip
def test_vectors_made_in_another_way_are_not_mixed(
    stopped, catalogue, tiny_encoder, tmp_path, monkeypatch, refused, other
):
    more = {"pooling": ["--pooling", "mean"], "dtype": ["--dtype", "bfloat16"], "target_dim": ["--target_dim", "16"]}
    argv = more.get(other, [])
    tokenize = ["--category", "Tiny", "--data_dir", str(stopped), "--model_name", str(tiny_encoder), "--max_length"]
    if other == "model_name":
        argv = ["--model_name", copy_encoder(tiny_encoder, tmp_path / "copy")]
    elif other == "weights":
        load = embed_items.load_model
        monkeypatch.setattr(embed_items, "load_model", lambda *arguments: load(*arguments).apply(retrained))
    elif other == "instruction":
        tokenize_items.main([*tokenize, str(MAX_LENGTH), "--instruction", "Another"])
    elif other == "tokens":
        tokenize_items.main([*tokenize, "30"])
    elif other == "fingerprint":
        catalogue.reverse().write_parquet(stopped / "Tiny_items_updated.parquet")
        tokenize_items.main([*tokenize, str(MAX_LENGTH)])
    line = refused(main, flags(stopped, *argv), stopped)
    assert f"{stopped / PARTIAL}: holds the vectors of a stopped run with another " in line
    assert other in line
    assert "or delete the folder" in line


def retrained(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        module.weight.data += 1e-3


def test_damaged_vectors_are_embedded_again(stopped, reference):
    """Bytes flipped, and bytes cut off: whatever the checksums do not vouch for."""
    path = stopped / PARTIAL / "vectors-0"
    content = bytearray(path.read_bytes())
    for place in range(3, len(content), 41):
        content[place] ^= 1 << place % 8
    path.write_bytes(content[:-5])
    main(flags(stopped, "--tokens_per_batch", "600"))
    assert np.abs(read_vectors(stopped) - reference("qwen3", "last")).max() < 1e-5


def test_a_vector_under_another_row_is_embedded_again(stopped, reference):
    path = stopped / PARTIAL / "vectors-0"
    records = np.fromfile(path, embed_items.FinishedVectors(stopped, 64).record)
    records["row"][[3, 5]] = records["row"][[5, 3]]
    records.tofile(path)
    main(flags(stopped, "--tokens_per_batch", "600"))
    assert np.abs(read_vectors(stopped) - reference("qwen3", "last")).max() < 1e-5


def test_half_a_record_of_a_process_that_is_no_more_does_no_harm(stopped, reference):
    (stopped / PARTIAL / "vectors-0").rename(stopped / PARTIAL / "vectors-7")
    with open(stopped / PARTIAL / "vectors-7", "ab") as file:
        file.write(b"half a record")
    main(flags(stopped, "--tokens_per_batch", "600"))
    assert np.abs(read_vectors(stopped) - reference("qwen3", "last")).max() < 1e-5


def test_vectors_without_settings_are_nobodys(stopped, reference):
    (stopped / PARTIAL / "settings.json").unlink()
    main(flags(stopped, "--pooling", "mean"))
    assert np.abs(read_vectors(stopped) - reference("qwen3", "mean")).max() < 1e-5


def test_a_complete_output_leaves_the_vectors_of_another_run(qwen3_dir, monkeypatch, capsys):
    main(flags(qwen3_dir))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            main(flags(qwen3_dir, "--pooling", "mean", "--tokens_per_batch", "600"))
    before = files_of(qwen3_dir)
    main(flags(qwen3_dir))
    assert "is complete already" in capsys.readouterr().out
    assert files_of(qwen3_dir) == before


def test_a_trial_leaves_the_vectors_of_a_stopped_run(stopped, refused):
    assert "another n_items" in refused(main, flags(stopped, "--num_rows", "9"), stopped)


@pytest.mark.parametrize("name", ["Tiny_items_updated.parquet", "Tiny_tokenized.npz"])
def test_a_file_that_is_replaced_meanwhile_is_told(with_earlier, catalogue, monkeypatch, capsys, name):
    keep = embed_items.FinishedVectors.keep

    def replacing(finished, rows, vectors):
        keep(finished, rows, vectors)
        path = with_earlier / name
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, (1, 1))

    monkeypatch.setattr(embed_items.FinishedVectors, "keep", replacing)
    with pytest.raises(SystemExit) as exit_info:
        main(flags(with_earlier, "--tokens_per_batch", "600"))
    assert exit_info.value.code == 2
    assert f"{with_earlier / name}: replaced while this run was reading it" in complaint(capsys.readouterr().err)
    assert (with_earlier / "Tiny_items_with_embeddings.parquet").read_bytes() == b"earlier"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"7", b"\xff"])
def test_damaged_settings_are_refused(stopped, refused, content):
    path = stopped / PARTIAL / "settings.json"
    path.write_bytes(content)
    line = refused(main, flags(stopped), stopped)
    assert "delete the folder" in line


def test_a_complete_output_is_not_made_again_unless_asked(qwen3_dir, catalogue, calls_of_embed, capsys):
    main(flags(qwen3_dir))
    complete = files_of(qwen3_dir)
    calls_of_embed.clear()
    main(flags(qwen3_dir))
    assert "is complete already: nothing to do; --overwrite embeds again" in capsys.readouterr().out
    assert not calls_of_embed
    main(flags(qwen3_dir, "--overwrite"))
    assert len(calls_of_embed) == 60
    assert files_of(qwen3_dir) == complete
    path = qwen3_dir / "Tiny_items_with_embeddings.parquet"
    number = read_vectors(qwen3_dir)[7, :4].astype(np.float32).tobytes()
    assert complete[path.name].count(number) == 1
    for damaged in (b"", complete[path.name][:-9], complete[path.name].replace(number, number[::-1])):
        path.write_bytes(damaged)
        main(flags(qwen3_dir))
        assert files_of(qwen3_dir) == complete
    for more in (["--pooling", "mean"], ["--num_rows", "50"], ["--target_dim", "8"]):
        calls_of_embed.clear()
        main(flags(qwen3_dir, *more))
        assert calls_of_embed, more
    catalogue.with_columns(price=pl.lit(1)).write_parquet(qwen3_dir / "Tiny_items_updated.parquet")
    calls_of_embed.clear()
    main(flags(qwen3_dir, "--target_dim", "8"))
    assert calls_of_embed
    assert set(pl.read_parquet(qwen3_dir / "Tiny_items_with_embeddings.parquet")["price"]) == {1}


def test_a_second_run_into_the_same_place_leaves(stopped, refused):
    with embed_items.alone(stopped / "Tiny_items_with_embeddings.parquet"):
        line = refused(main, flags(stopped), stopped)
    assert "another run is writing it" in line
    assert not (stopped / ".Tiny_items_with_embeddings.parquet.lock").exists()


# ---------------------------------------------------------------- vectors of an earlier output

OUTPUT = "Tiny_items_with_embeddings.parquet"
FEW = ["--tokens_per_batch", "600"]
DISTINCT = 55  # texts of the next day


def tokenize(data_dir, catalogue, model, *more: str) -> None:
    """Puts this catalogue in the place of the one that is there."""
    catalogue.write_parquet(data_dir / "Tiny_items_updated.parquet")
    argv = ["--category", "Tiny", "--data_dir", str(data_dir), "--model_name", str(model)]
    tokenize_items.main([*argv, "--max_length", str(MAX_LENGTH), *more])


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


def worst_cosine(one: dict[str, bytes], other: dict[str, bytes]) -> float:
    assert one.keys() == other.keys()
    pairs = [[np.frombuffer(vectors[text], np.float32).astype(float) for vectors in (one, other)] for text in one]
    return min(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs)


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """The texts that the model is given, once the trials before the long work are over."""
    texts, working = [], []
    embed, embed_all = embed_items.embed, embed_items.embed_all

    def noting(model, tokens, rows, *more):
        if working:
            catalogue = pl.read_parquet(tokens.input_ids.path.parent / "Tiny_items_updated.parquet")
            texts.extend(catalogue["item_context"][rows.tolist()])
        return embed(model, tokens, rows, *more)

    def at_work(*arguments):
        working.append(True)
        try:
            embed_all(*arguments)
        finally:
            working.clear()

    monkeypatch.setattr(embed_items, "embed", noting)
    monkeypatch.setattr(embed_items, "embed_all", at_work)
    return texts


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
def in_slices(qwen3_dir, catalogue, tiny_encoder, monkeypatch):
    """The same, made and read in pieces of a few rows."""
    pieces = {"ROWS_READ": 7, "SLICE_ROWS": 16, "ROWS_PER_GROUP": 8, "FINGERPRINT_ROWS": 8, "DIGEST_ROWS": 4}
    for name, rows in pieces.items():
        monkeypatch.setattr(embed_items, name, rows)
    monkeypatch.setattr(tokenize_items, "FINGERPRINT_ROWS", 8)
    tokenize(qwen3_dir, catalogue, tiny_encoder)
    main(flags(qwen3_dir, *FEW))
    tokenize(qwen3_dir, next_day(catalogue), tiny_encoder)
    return qwen3_dir


@pytest.fixture
def from_nothing(tmp_path):
    """The folder after a run of the same tokens where nothing was: from_nothing(folder, *flags)."""

    def run(folder, *more):
        other = shutil.copytree(folder, tmp_path / "from nothing")
        (other / OUTPUT).unlink()
        main(flags(other, *more))
        return other

    return run


def test_reuse_embeds_new_and_edited_texts_alone(daily, catalogue, embedded, from_nothing, capsys):
    full = from_nothing(daily, *FEW)
    embedded.clear()
    before = by_text(daily)
    capsys.readouterr()
    main(flags(daily, *FEW, "--reuse"))
    today = next_day(catalogue)
    changed = set(today["item_context"]) - set(catalogue["item_context"])
    assert sorted(embedded) == sorted(changed)  # each of them once
    assert len(changed) == 5 + 4
    # 59 rows: 5 edited ones, 8 new ones of which 2 are of known texts
    assert "48 of 59 items keep the vector of an earlier run, 11 are embedded\n" in capsys.readouterr().out
    after = by_text(daily)
    assert {text: after[text] for text in after.keys() - changed} == {
        text: before[text] for text in after.keys() - changed
    }
    assert worst_cosine(after, by_text(full)) > 1 - 1e-5
    assert pl.read_parquet(daily / OUTPUT).drop("embedding").equals(today)
    ours, theirs = (pl.read_parquet_metadata(folder / OUTPUT) for folder in (daily, full))
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} <= {"vectors", "ARROW:schema"}
    complete = files_of(daily)
    assert complete.keys() == {OUTPUT, "Tiny_items_updated.parquet", "Tiny_tokenized.npz"}
    embedded.clear()
    for more in ([], ["--reuse"]):
        main(flags(daily, *more))
        assert "is complete already" in capsys.readouterr().out
    assert files_of(daily) == complete
    assert not embedded


def test_reuse_writes_the_bytes_of_a_full_run_where_batches_alter_nothing(qwen3_dir, catalogue, tiny_encoder, tmp_path):
    """Every item alone, and without a shared start, which other items may make shorter or longer."""
    alone, other = ["--tokens_per_batch", "1", "--pooling", "mean"], shutil.copytree(qwen3_dir, tmp_path / "other")
    main(flags(qwen3_dir, *alone))
    for folder in (qwen3_dir, other):
        tokenize(folder, next_day(catalogue), tiny_encoder)
    main(flags(qwen3_dir, *alone, "--reuse"))
    main(flags(other, *alone))
    assert files_of(qwen3_dir) == files_of(other)


def test_reuse_over_many_days_changes_no_kept_vector(in_slices, catalogue, tiny_encoder, embedded):
    main(flags(in_slices, "--reuse"))
    embedded.clear()
    today, before = next_day(catalogue), by_text(in_slices)
    for day in range(3):
        text = pl.when(pl.int_range(pl.len()) == day).then(pl.lit(f"of day {day}")).otherwise("item_context")
        today = today.with_columns(item_context=text).reverse()
        tokenize(in_slices, today, tiny_encoder)
        main(flags(in_slices, "--reuse"))
        after = by_text(in_slices)
        assert len(after.keys() & before.keys()) > 50
        assert all(after[text] == before[text] for text in after.keys() & before.keys())
        before = after
    assert embedded == ["of day 0", "of day 1", "of day 2"]


def test_reuse_embeds_nothing_where_only_other_columns_and_names_change(
    daily, catalogue, tiny_encoder, embedded, capsys
):
    renamed = catalogue.with_columns(parent_asin=pl.col("parent_asin").str.replace("B", "E"), price=pl.lit(1)).tail(50)
    tokenize(daily, renamed, tiny_encoder)
    before = by_text(daily)
    main(flags(daily, "--reuse"))
    assert not embedded
    assert "50 of 50 items keep the vector of an earlier run, 0 are embedded" in capsys.readouterr().out
    assert by_text(daily).items() <= before.items()
    assert pl.read_parquet(daily / OUTPUT).drop("embedding").equals(renamed)


def test_reuse_with_nothing_in_common_embeds_all(daily, catalogue, tiny_encoder, embedded, capsys):
    tokenize(daily, catalogue.with_columns(item_context=pl.lit("anew ") + pl.col("item_context")), tiny_encoder)
    main(flags(daily, "--reuse"))
    assert len(embedded) == 60
    assert "0 of 60 items keep the vector of an earlier run, 60 are embedded" in capsys.readouterr().out


def test_reuse_finds_a_vector_by_any_text_of_the_same_tokens(daily, catalogue, tiny_encoder, embedded):
    """The tokenizer composes letters: the first row has other letters than the earlier catalogue, but its tokens."""
    composed, apart = "caf\u00e9 au lait", "cafe\u0301 au lait"
    for texts in ([composed], [apart, composed, "x"]):
        rows = pl.DataFrame({"parent_asin": [str(i) for i in range(len(texts))], "item_context": texts})
        tokenize(daily, rows, tiny_encoder)
        main(flags(daily, "--reuse"))
    assert embedded == [composed, "x"]
    vectors = by_text(daily)
    assert vectors[apart] == vectors[composed]


def test_reuse_goes_by_the_rows_that_there_are(daily, catalogue, tiny_encoder, embedded):
    """A trial takes from the whole, and the whole from a trial."""
    texts = next_day(catalogue)["item_context"]
    known = set(catalogue["item_context"])
    main(flags(daily, "--reuse", "--num_rows", "30"))
    assert sorted(embedded) == sorted(set(texts[:30]) - known)
    assert pl.read_parquet_metadata(daily / OUTPUT)["n_items"] == "30"
    embedded.clear()
    main(flags(daily, "--reuse"))
    assert sorted(embedded) == sorted(set(texts) - set(texts[:30]))


OTHER_WAYS = ["model_name", "weights", "instruction", "pooling", "dtype", "target_dim", "max_length", "tokenizer"]


@pytest.mark.parametrize("other", [*OTHER_WAYS, "the model"])
def test_reuse_takes_nothing_that_was_made_in_another_way(
    daily, catalogue, tiny_encoder, tmp_path, monkeypatch, embedded, from_nothing, capsys, other
):
    argv = {"pooling": ["--pooling", "mean"], "dtype": ["--dtype", "bfloat16"], "target_dim": ["--target_dim", "16"]}
    argv = [*FEW, *argv.get(other, [])]
    today, reason = next_day(catalogue), f"made with another or an unknown {other}"
    load = embed_items.load_model
    if other == "model_name":
        argv += ["--model_name", copy_encoder(tiny_encoder, tmp_path / "copy")]
    elif other == "weights":
        monkeypatch.setattr(embed_items, "load_model", lambda *arguments: load(*arguments).apply(retrained))
    elif other == "instruction":
        tokenize(daily, today, tiny_encoder, "--instruction", "Another")
    elif other == "max_length":
        tokenize(daily, today, tiny_encoder, "--max_length", "30")
    elif other == "dtype":
        reason = reason.replace("dtype", "weights, dtype")  # whose bytes are others too
    elif other == "tokenizer":  # under the same name
        tokenizer_of = tokenize_items.load_tokenizer

        def changed(name):
            tokenizer = tokenizer_of(name)
            tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
            return tokenizer

        monkeypatch.setattr(tokenize_items, "load_tokenizer", changed)
        tokenize(daily, today, tiny_encoder)
    elif other == "the model":  # of the same name and weights, but computing otherwise with them
        reason = "its vectors are not those that the model gives for the same texts now"

        def load_changed(*arguments):
            model = load(*arguments)
            model.rotary_emb.inv_freq *= 0.5
            return model

        monkeypatch.setattr(embed_items, "load_model", load_changed)
    expected = from_nothing(daily, *argv)
    embedded.clear()
    capsys.readouterr()
    main(flags(daily, *argv, "--reuse"))
    captured = capsys.readouterr()
    line = f"no vector of {daily / OUTPUT} is kept ({reason}): all items are embedded\n"
    assert line in captured.out
    assert "keep the vector" not in captured.out
    assert sorted(embedded) == sorted(set(today["item_context"]))
    assert files_of(daily) == files_of(expected)


def test_reuse_takes_nothing_from_an_output_that_does_not_tell_how_it_was_made(daily, embedded, from_nothing, capsys):
    expected = files_of(from_nothing(daily))
    path = daily / OUTPUT
    written, told = pl.read_parquet(path), pl.read_parquet_metadata(path)
    without = {name: value for name, value in told.items() if name not in ("max_length", "tokenizer", "ARROW:schema")}
    for metadata, names in ((without, "max_length, tokenizer"), ({}, "format_version, model_name, weights")):
        written.write_parquet(path, metadata=metadata)
        embedded.clear()
        main(flags(daily, "--reuse"))
        assert f"(made with another or an unknown {names}" in capsys.readouterr().out
        assert len(embedded) == DISTINCT
        assert files_of(daily) == expected


def test_reuse_without_an_earlier_output_says_so(daily, embedded, from_nothing, capsys):
    expected = files_of(from_nothing(daily))
    (daily / OUTPUT).unlink()
    embedded.clear()
    main(flags(daily, "--reuse"))
    assert f"no vector of {daily / OUTPUT} is kept (not found): all items are embedded" in capsys.readouterr().out
    assert len(embedded) == DISTINCT
    assert files_of(daily) == expected


@pytest.mark.parametrize("kind", ["kept vector", "dropped vector", "text", "half", "tail", "empty", "garbage"])
def test_reuse_takes_nothing_from_a_damaged_output(daily, embedded, from_nothing, capsys, kind):
    expected = files_of(from_nothing(daily))
    path = daily / OUTPUT
    whole = path.read_bytes()

    def flipped(part: bytes) -> bytes:
        assert part in whole
        return whole.replace(part, part[:-1] + bytes([part[-1] ^ 1]))

    vectors = read_vectors(daily).astype(np.float32)
    damaged = {
        "kept vector": flipped(vectors[50, :9].tobytes()),
        "dropped vector": flipped(vectors[2, :9].tobytes()),
        "text": flipped(pl.read_parquet(path)["item_context"][45].encode()),
        "half": whole[: len(whole) // 2],
        "tail": whole[:-1],
        "empty": b"",
        "garbage": np.random.default_rng(0).bytes(5000),
    }
    path.write_bytes(damaged[kind])
    embedded.clear()
    capsys.readouterr()
    main(flags(daily, "--reuse"))
    out = capsys.readouterr().out
    reason = {"text": "damaged: its texts", "kept vector": "damaged: its vectors", "dropped vector": "damaged: its v"}
    assert out.count(f"no vector of {path} is kept ({reason.get(kind, '')}") == 1
    assert "keep the vector" not in out
    assert len(embedded) == DISTINCT
    assert files_of(daily) == expected


def test_reuse_goes_by_the_catalogue_that_was_checked(daily, catalogue, monkeypatch, capsys):
    """Another one, put there meanwhile, must not tell whose vectors these are."""
    keys, read = embed_items.text_keys, []

    def replacing(piece):
        if not read:
            next_day(catalogue).reverse().write_parquet(daily / "Tiny_items_updated.parquet")
        read.append(len(piece))
        return keys(piece)

    monkeypatch.setattr(embed_items, "text_keys", replacing)
    with pytest.raises(SystemExit) as exit_info:
        main(flags(daily, "--reuse"))
    assert exit_info.value.code == 2
    assert "Tiny_items_updated.parquet: replaced while this run was reading it" in complaint(capsys.readouterr().err)
    assert not list((daily / PARTIAL).glob("vectors-*"))


@pytest.mark.parametrize("calls", [2, 5, 8, 9, 10])  # of keep: 8 pieces of the earlier output, and then batches
def test_a_stopped_reuse_goes_on_to_the_same_bytes(in_slices, tmp_path, monkeypatch, embedded, capsys, calls):
    few = ["--tokens_per_batch", "300", "--reuse"]
    other = shutil.copytree(in_slices, tmp_path / "never stopped")
    main(flags(other, *few))
    whole, before = embedded.copy(), (in_slices / OUTPUT).read_bytes()
    embedded.clear()
    with monkeypatch.context() as patch:
        stop_after(patch, calls)
        with pytest.raises(KeyboardInterrupt):
            main(flags(in_slices, *few))
    assert (in_slices / OUTPUT).read_bytes() == before
    assert (in_slices / PARTIAL / "vectors-reused").exists() == (calls > 8)
    if calls <= 8:
        assert not embedded
        (in_slices / PARTIAL / "reused").write_bytes(b"what a run leaves that is killed and cannot tidy up")
    main(flags(in_slices, *few))
    assert set(embedded) == set(whole)
    assert len(embedded) < 2 * len(whole)
    assert "48 of 59 items keep the vector of an earlier run, 11 are embedded" in capsys.readouterr().out
    assert files_of(in_slices) == files_of(other)


def test_reused_vectors_that_are_damaged_after_a_stop_are_taken_again(in_slices, tmp_path, monkeypatch, embedded):
    other = shutil.copytree(in_slices, tmp_path / "never stopped")
    main(flags(other, *FEW, "--reuse"))
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            main(flags(in_slices, *FEW, "--reuse"))
    path = in_slices / PARTIAL / "vectors-reused"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content[:-7])
    main(flags(in_slices, *FEW, "--reuse"))
    assert files_of(in_slices) == files_of(other)


def test_a_stopped_reuse_may_go_on_without(in_slices, monkeypatch, embedded, from_nothing):
    expected = by_text(from_nothing(in_slices, *FEW))
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            main(flags(in_slices, *FEW, "--reuse"))
    main(flags(in_slices, *FEW))
    assert worst_cosine(by_text(in_slices), expected) > 1 - 1e-5


@pytest.mark.parametrize("why", ["gone", "the model"])
def test_what_a_stopped_reuse_had_kept_goes_where_nothing_is_kept_any_more(
    in_slices, monkeypatch, embedded, capsys, why
):
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            main(flags(in_slices, *FEW, "--reuse"))
    assert (in_slices / PARTIAL / "vectors-reused").exists()
    if why == "gone":
        (in_slices / OUTPUT).unlink()
    else:
        monkeypatch.setattr(embed_items, "still_agrees", lambda *_: False)
    finished = set(embedded)
    embedded.clear()
    main(flags(in_slices, *FEW, "--reuse"))
    assert "all items are embedded" in capsys.readouterr().out
    texts = set(pl.read_parquet(in_slices / "Tiny_items_updated.parquet")["item_context"])
    assert texts <= finished | set(embedded)


def test_a_disk_that_is_full_of_reused_vectors_is_told(in_slices, capsys, full_disk, from_nothing):
    expected = from_nothing(in_slices, *FEW)
    before = files_of(in_slices)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        full_disk(main, flags(in_slices, *FEW, "--reuse"), limit=5000)
    assert exit_info.value.code == 2
    assert f"{PARTIAL}/reused: cannot be written" in complaint(capsys.readouterr().err)
    assert {name: content for name, content in files_of(in_slices).items() if PARTIAL not in name} == before
    main(flags(in_slices, *FEW, "--reuse"))
    assert worst_cosine(by_text(in_slices), by_text(expected)) > 1 - 1e-5


def test_the_command_reads_and_writes_data_output_where_it_runs(data_dir, tiny_encoder, run_script):
    here = data_dir.parents[1]
    tokenize_items.main(["--category", "Tiny", "--data_dir", str(data_dir), "--model_name", str(tiny_encoder)])
    done = run_script("embed_items.py", "--category", "Tiny", "--device", "cpu", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "wrote data/output/Tiny_items_with_embeddings.parquet: 60 x 64" in done.stdout
    by_command = read_vectors(data_dir)
    main(flags(data_dir))
    assert np.abs(read_vectors(data_dir) - by_command).max() < 1e-6
