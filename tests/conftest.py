"""What the tests share: tiny real encoders made on the spot, a tiny catalogue, a check of refusals. No network."""
# ruff: noqa: E402  the environment has to be set before the imports that read it

import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"WANDB_MODE": "disabled", "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import polars as pl
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

END = "<|endoftext|>"
PROGRESS = re.compile(r"(tokenize|embed|Loading weights): ")  # bars on standard error, which are no complaint

torch.set_num_threads(1)  # tiny tensors: threads would only wait for one another
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=50)
settings.load_profile("repeatable")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device, and is skipped where there is none")


# ---------------------------------------------------------------- catalogue

WORDS = ["brass", "oak", "lamp", "cable", "usb-c", "65W", "café", "naïve", "große", "日本語", "чай", "gift", "of", "12"]
ODD_TEXTS = [
    "Lamp",
    "x",
    "🎮",
    "👩‍👩‍👧 family 🏳️‍🌈 flag and 7️⃣ keycaps",
    "日本語の説明、改行なし。",
    "line one\n\nline two\ttabbed  two spaces ",
    f"a text that holds {END} in its middle",  # the pad token, where it is no padding
    "quotes \"double\" and 'single', {braces} and 100%",
]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Invented texts of very different lengths, the odd ones first and the longest last."""
    draw = random.Random(seed)
    plain = [" ".join(draw.choices(WORDS, k=int(draw.lognormvariate(2.5, 1)) + 1)) for _ in range(count)]
    return [*ODD_TEXTS, *plain[len(ODD_TEXTS) : -1], " ".join(draw.choices(WORDS, k=500))]


@pytest.fixture(scope="session")
def catalogue() -> pl.DataFrame:
    """Sixty items, with a text column and an integer column that no script asks for."""
    texts = make_texts(60)
    return pl.DataFrame(
        {
            "title": [text[:10] for text in texts],
            "parent_asin": [f"B{i:03}" for i in range(60)],
            "item_context": texts,
            "price": [i * 37 % 101 if i % 7 else None for i in range(60)],
        }
    )


@pytest.fixture
def data_dir(tmp_path, catalogue) -> Path:
    """A folder data/output that holds the catalogue under the name Tiny."""
    folder = tmp_path / "data" / "output"
    folder.mkdir(parents=True)
    catalogue.write_parquet(folder / "Tiny_items_updated.parquet")
    return folder


# ---------------------------------------------------------------- encoders


def save_qwen3(folder: Path, texts: list[str], bpe_size: int = 500, **overrides) -> Path:
    """A Qwen3 of random weights, and a byte-level BPE that closes every text with its pad token."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=bpe_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    end_id = bpe.token_to_id(END)
    bpe.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end_id)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, padding_side="left", model_max_length=4096
    )
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,  # large enough that every token of an item moves its vector
    } | overrides
    torch.manual_seed(0)
    model = Qwen3Model(Qwen3Config(bos_token_id=None, eos_token_id=end_id, pad_token_id=end_id, **sizes)).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """The folder of a tiny Qwen3-Embedding: causal, padded on the left, last token <|endoftext|>."""
    instruction = "Instruct: Represent this product so that similar products have similar representations\nQuery:"
    return save_qwen3(tmp_path_factory.mktemp("qwen3"), [instruction + text for text in make_texts(200, seed=1)])


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """The folder of a tiny BERT: [CLS] and [SEP], padded on the right, 64 absolute positions."""
    folder = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    wordpiece.train_from_iterator(make_texts(200, seed=1), trainer)
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=wordpiece,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    ).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- running the scripts


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file in the folder, hidden ones too, but for the empty lock files."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def complaint(stderr: str) -> str:
    """The one line on standard error that is not a progress bar."""
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not PROGRESS.match(line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    return lines[0]


@pytest.fixture
def refused(capsys):
    """Runs `main`, which has to end with status 2 and one line of complaint, and to leave `folder` as it was."""

    def check(main, argv: list[str], folder: Path) -> str:
        before = files_of(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main(argv)
        line = complaint(capsys.readouterr().err)
        assert exit_info.value.code == 2, line
        assert files_of(folder) == before, line
        return line

    return check


@pytest.fixture
def full_disk():
    """Runs a call while no file may grow past a few bytes: writing fails midway, as on a full disk."""
    resource = pytest.importorskip("resource", reason="file size limits are a POSIX matter")

    def run(call, *arguments, limit: int = 1024):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return call(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return run


@pytest.fixture
def run_script():
    """Runs a script of the repository as a user does, from the folder that holds data/."""

    def run(name: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / name), *argv]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)

    return run
