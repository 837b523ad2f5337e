"""The three scripts as a user chains them, the README's commands and snippets, and the sample that ships."""

import itertools
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import MISSING, asdict, fields

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT, WORDS, files_of
from transformers import AutoTokenizer, Qwen3ForCausalLM

import embed_items
import tokenize_items
import train_rqvae

SAMPLE = ROOT / "data" / "sample"
SCRIPTS = ["tokenize_items.py", "embed_items.py", "train_rqvae.py"]
TINY_TRAINING = (
    "--codebook_size 16 --codebook_embedding_dim 8 --encoder_hidden_dims 32 --batch_size 32 --max_steps 20 "
    "--warmup_steps 5 --steps_per_val_log 10"
)


def chain(model: str, cwd) -> subprocess.CompletedProcess:
    """One shell line, as in the README."""
    python = sys.executable
    line = (
        f"{python} {ROOT}/tokenize_items.py --category Tiny --model_name {model} && "
        f"{python} {ROOT}/embed_items.py --category Tiny --device cpu && "
        f"{python} {ROOT}/train_rqvae.py --category Tiny --device cpu {TINY_TRAINING}"
    )
    return subprocess.run(line, shell=True, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_the_chain_gives_every_item_one_distinct_id(tmp_path, data_dir, catalogue, tiny_encoder):
    done = chain(str(tiny_encoder), tmp_path)
    assert done.returncode == 0, done.stderr
    ids = pl.read_parquet(data_dir / "Tiny_semantic_ids.parquet")
    assert ids["parent_asin"].equals(catalogue["parent_asin"])
    assert ids["semantic_id"].n_unique() == len(catalogue)
    codes = ids.select(pl.exclude("parent_asin", "semantic_id"))
    assert codes.columns == ["semantic_id_0", "semantic_id_1", "semantic_id_2"]
    assert ids["semantic_id"].to_list() == ["-".join(map(str, row)) for row in codes.rows()]
    titles = [" ".join(title.split()) for title in catalogue["title"]]
    shown = re.findall(r"^ {4}(\d+-\d+-\d+) +(.*)$", done.stdout, flags=re.M)
    of_id = dict(zip(ids["semantic_id"], titles, strict=True))
    assert len(shown) >= 8
    assert all(of_id[shown_id] == label for shown_id, label in shown)
    made = {path.name for path in (tmp_path / "checkpoints" / "rqvae").glob("*.pth")}
    assert made == {"best_model.pth", "final_model.pth", "checkpoint_step_20.pth"}
    assert {path.name for path in tmp_path.iterdir()} == {"data", "checkpoints"}, "something was left beside them"


def test_a_catalogue_that_changes_for_five_rounds_keeps_its_ids(tmp_path, data_dir, tiny_encoder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw, word = random.Random(0), itertools.count()
    invent = lambda: f"lamp {next(word)} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))  # noqa: E731
    items = {f"B{number:03}": invent() for number in range(120)}
    embedded, embed, check = set(), embed_items.embed, embed_items.check_vectors

    def watched(model, tokens, rows, *rest):
        embedded.update(list(items.values())[row] for row in rows)
        return embed(model, tokens, rows, *rest)

    def forgotten(*arguments):  # the few that the script embeds before the work, as a check
        result = check(*arguments)
        embedded.clear()
        return result

    monkeypatch.setattr(embed_items, "embed", watched)
    monkeypatch.setattr(embed_items, "check_vectors", forgotten)
    given, texts, before = {}, {}, {}  # who was ever given an ID; the texts and the IDs of the round before
    export = ["--export_only", "--keep_ids", "data/output/Tiny_semantic_ids.parquet"]
    for number in range(6):
        if number:
            names = list(items)
            for name in draw.sample(names, 8):
                del items[name]
            for name in draw.sample(list(items), 8):
                items[name] = invent()
            items |= {f"N{number}{new:02}": invent() for new in range(20)}
            items = dict(draw.sample(list(items.items()), len(items)))
        table = pl.DataFrame({"parent_asin": list(items), "item_context": list(items.values())})
        table.write_parquet(data_dir / "Tiny_items_updated.parquet")
        embedded.clear()
        tokenize_items.main(["--category", "Tiny", "--model_name", str(tiny_encoder)])
        embed_items.main(["--category", "Tiny", "--device", "cpu", "--reuse"])
        training = TINY_TRAINING.replace("--max_steps 20", "--max_steps 300").split()
        train_rqvae.main(["--category", "Tiny", "--device", "cpu", *(export if number else training)])

        ids = pl.read_parquet(data_dir / "Tiny_semantic_ids.parquet")
        assert ids["parent_asin"].to_list() == list(items)
        after = dict(zip(ids["parent_asin"], ids["semantic_id"], strict=True))
        assert len(set(after.values())) == len(items)
        assert embedded == {text for name, text in items.items() if texts.get(name) != text}
        for name, text in items.items():
            assert texts.get(name) != text or after[name] == before[name], "an unchanged item has another ID"
            assert given.setdefault(after[name], name) == name, "an ID is given a second time"
        kept = sum(before.get(name) == id for name, id in after.items())
        told = json.loads((data_dir / "Tiny_quality.json").read_text()).get("keep_ids")
        if number:
            new = sum(name not in before for name in after)
            assert (told["kept"], told["new"], told["moved"]) == (kept, new, len(items) - kept - new)
            assert told["vanished"] == 8
            assert told["moved"] > 0
        texts, before = dict(items), after


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # equal items
def test_odd_texts_go_through_all_three_scripts(tmp_path, data_dir, tiny_encoder, monkeypatch):
    texts = ["x", "lamp " * 200_000, "🎮" * 50, "\x01\x02\x7f\x1b[2J", "\u200b", *["the same"] * 40]
    items = pl.DataFrame({"parent_asin": [f"B{i}" for i in range(len(texts))], "item_context": texts})
    items.write_parquet(data_dir / "Tiny_items_updated.parquet")
    monkeypatch.chdir(tmp_path)
    tokenize_items.main(["--category", "Tiny", "--model_name", str(tiny_encoder)])
    embed_items.main(["--category", "Tiny", "--device", "cpu"])
    train_rqvae.main(["--category", "Tiny", "--device", "cpu", *TINY_TRAINING.split()])
    assert pl.read_parquet(data_dir / "Tiny_semantic_ids.parquet")["semantic_id"].n_unique() == len(texts)


def test_the_chain_stops_at_the_first_failure(tmp_path, data_dir):
    before = files_of(tmp_path)
    done = chain(str(tmp_path / "nowhere"), tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model_name")
    assert len(done.stderr.splitlines()) == 1
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("main", "config"),
    [
        (tokenize_items.main, tokenize_items.TokenizeConfig()),
        (embed_items.main, embed_items.EmbedConfig()),
        (train_rqvae.main, train_rqvae.RQVAEConfig()),
    ],
    ids=SCRIPTS,
)
def test_help_tells_a_sentence_and_the_default_of_every_flag(main, config, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = re.sub(r"\s", "", capsys.readouterr().out)
    for field in fields(config):
        sentence = field.metadata["help"]
        assert sentence.endswith(".")
        assert f"--{field.name}" in text
        default = field.default if field.default_factory is MISSING else field.default_factory()
        assert re.sub(r"\s", "", f"{sentence} (default: {default})") in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    source = (ROOT / script).read_text()
    others = "|".join(name.removesuffix(".py") for name in SCRIPTS)
    assert not re.search(rf"^\s*(from|import)\s+({others})\b", source, flags=re.M)


def test_other_c_libraries_keep_memory_as_they_do(monkeypatch):
    monkeypatch.setattr(train_rqvae.ctypes, "CDLL", lambda _: object())  # has no mallopt
    train_rqvae.keep_freed_memory()


# ---------------------------------------------------------------- README


def readme_blocks() -> list[str]:
    """The fenced blocks of the README."""
    return re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)


def readme_snippet(words: str) -> str:
    """The Python snippet that contains these words."""
    (snippet,) = (block for block in readme_blocks() if words in block and "import polars" in block)
    return snippet


def test_readme_commands_have_flags_that_the_scripts_take(capsys):
    parsers = {"tokenize_items": tokenize_items, "embed_items": embed_items, "train_rqvae": train_rqvae}
    commands = "\n".join(readme_blocks()).replace("&&\n", "&& ").replace("\\\n", " ")
    found = re.findall(r"\b(tokenize_items|embed_items|train_rqvae)\.py([^&|;#\n]*)", commands)
    assert {script for script, _ in found} == parsers.keys()
    for script, flags in found:
        parsers[script].parse_config(shlex.split(flags))
    assert capsys.readouterr().err == ""


def test_readme_snippet_turns_amazon_metadata_into_a_catalogue(tmp_path, monkeypatch, tiny_encoder):
    rows = [
        {
            "parent_asin": "A1",
            "title": "Pad",
            "features": ["Red", "Light"],
            "description": ["Two", "lines"],
            "price": 5,
        },
        {
            "parent_asin": "A2",
            "title": "Cable",
            "features": [],
            "description": [],
            "price": "from 3",
            "details": {"a": 1},
        },
        {"parent_asin": "A1", "title": "Pad again", "features": [], "description": []},
        {"parent_asin": "A3", "title": None, "features": ["no title"], "description": None},
        {"parent_asin": "A4", "title": "Stand", "features": None, "description": None, "details": {"b": "c"}},
    ]
    (tmp_path / "meta_Video_Games.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "output").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    exec(readme_snippet("meta_Video_Games.jsonl"), {})
    written = pl.read_parquet("data/output/Video_Games_items_updated.parquet")
    assert written["parent_asin"].to_list() == ["A1", "A2", "A4"]
    assert written["item_context"].to_list() == [
        "Title: Pad\nFeatures: Red. Light\nDescription: Two lines",
        "Title: Cable\nFeatures: \nDescription: ",
        "Title: Stand\nFeatures: \nDescription: ",
    ]
    tokenize_items.main(["--model_name", str(tiny_encoder)])


def test_readme_snippets_turn_ids_into_tokens_that_a_language_model_writes(tmp_path, monkeypatch, tiny_encoder):
    codes = {(12, 201, 77), (12, 201, 78), (120, 3, 0), (0, 255, 255)}
    codes = sorted(codes | set(zip(*np.random.default_rng(0).integers(0, 256, (3, 40)).tolist(), strict=True)))
    names = [f"B{i}" for i in range(len(codes))]
    columns = {
        f"semantic_id_{i}": pl.Series(column, dtype=pl.Int32) for i, column in enumerate(zip(*codes, strict=True))
    }
    ids = pl.DataFrame({"parent_asin": names, **columns, "semantic_id": ["-".join(map(str, row)) for row in codes]})
    (tmp_path / "data" / "output").mkdir(parents=True)
    (tmp_path / "checkpoints" / "rqvae").mkdir(parents=True)
    ids.write_parquet(tmp_path / "data" / "output" / "Sample_semantic_ids.parquet")
    (tmp_path / "data" / "output" / "Sample_quality.json").write_text('{"codebook_size": [256, 256, 256]}')
    rqvae = train_rqvae.RQVAE(train_rqvae.RQVAEConfig(item_embedding_dim=16))
    checkpoint = {"model_state_dict": rqvae.state_dict(), "config": asdict(rqvae.config)}
    checkpoint |= {"step": 1, "metrics": {}, "data": 0}
    torch.save(checkpoint, tmp_path / "checkpoints" / "rqvae" / "best_model.pth")
    monkeypatch.chdir(tmp_path)

    blocks = [block for block in readme_blocks() if "vocabulary" in block or "tokenizer" in block]
    tokenizer, model = (kind.from_pretrained(tiny_encoder) for kind in (AutoTokenizer, Qwen3ForCausalLM))
    made = {"tokenizer": tokenizer, "model": model}
    exec(blocks[0], made)
    assert made["texts"][codes.index((12, 201, 77))] == "<|sid_start|><|sid_12|><|sid_457|><|sid_589|><|sid_end|>"
    assert made["index"]["B0"] == [f"<{letter}_{code}>" for letter, code in zip("abc", codes[0], strict=True)]
    vocabulary = made["vocabulary"]
    assert len(vocabulary) == len(set(vocabulary)) == 2 + 768
    assert {token for row in made["tokens"] for token in row} <= set(vocabulary)

    before = model.get_input_embeddings().weight.detach().clone()
    made["prompt"] = tokenizer("lamp, then", add_special_tokens=False, return_tensors="pt").input_ids
    exec(blocks[1], made)
    after = model.get_input_embeddings().weight.detach()
    assert len(after) == len(before) + len(vocabulary) == len(tokenizer)
    assert torch.equal(after[: len(before)], before)
    rows = after[tokenizer.convert_tokens_to_ids(vocabulary[2:])]  # (768, H)
    assert rows.std().item() == pytest.approx(before.std().item(), rel=1e-3)
    books = torch.cat([quantizer.codebook.detach() for quantizer in rqvae.quantizers])
    alike = [
        torch.nn.functional.normalize(each)[:256] @ torch.nn.functional.normalize(each)[:256].T
        for each in (books, rows)
    ]
    assert np.corrcoef(*(each.flatten() for each in alike))[0, 1] > 0.7, "similar codes do not start alike"

    assert len(set(made["items"])) == 10
    assert set(made["items"]) <= set(names)


# ---------------------------------------------------------------- sample


def test_sample_catalogue_is_what_its_script_writes(tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "data" / "sample", ignore=shutil.ignore_patterns("encoder"))
    (tmp_path / "data" / "output").mkdir()
    subprocess.run([sys.executable, "data/sample/make_catalogue.py"], cwd=tmp_path, check=True, capture_output=True)
    name = "data/output/Sample_items_updated.parquet"
    written, shipped = pl.read_parquet(tmp_path / name), pl.read_parquet(ROOT / name)
    assert written.equals(shipped)
    assert len(shipped) == 2000
    assert shipped["item_context"].n_unique() == 2000


def test_sample_encoder_is_small_and_knows_series(tmp_path, monkeypatch):
    size = sum(path.stat().st_size for path in (SAMPLE / "encoder").iterdir())
    assert size <= 10_000_000
    name = "Sample_items_updated.parquet"
    shutil.copytree(ROOT / "data" / "output", tmp_path / "data" / "output", ignore=lambda _, names: {*names} - {name})
    monkeypatch.chdir(tmp_path)
    tokenize_items.main(["--category", "Sample", "--num_rows", "400", "--model_name", str(SAMPLE / "encoder")])
    embed_items.main(["--category", "Sample"])
    items = pl.read_parquet(tmp_path / "data" / "output" / "Sample_items_with_embeddings.parquet")
    vectors = items["embedding"].list.to_array(len(items["embedding"][0])).to_numpy()
    series = items["title"].str.split(" ").list.head(2).list.join(" ").to_numpy()  # names open with their series
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -1)
    same = series[:, None] == series  # (N, N)
    np.fill_diagonal(same, False)
    known = same.any(1)
    nearest_agrees = (series[cosine.argmax(1)] == series)[known].mean()
    assert nearest_agrees > 10 * same[known].mean()
    assert nearest_agrees > 0.5
