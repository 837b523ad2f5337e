"""Train the sample's encoder from a seed: a tiny real Qwen3 with its own tokenizer, in minutes on a CPU core.

    python data/sample/train_encoder.py      # data/sample/encoder/, and a table of what its vectors know

The vector of a text is the hidden state of its last token, `<|endoftext|>`, at length one. Training makes
cosines follow a target that is known exactly, because make_catalogue.py knows what it invented: two items of
one series, platform, kind, brand or genre share a given part of their vectors, and the rest follows the words
of their texts. Most batches come from other worlds, whose names the shipped catalogue does not hold, and a
tenth of the shipped catalogue is held out for the table. The docstrings of Python's standard library keep it
useful on plain English (so another version of Python gives slightly other weights).

Two stages, one loss. While attention is uniform the first layer is a mean over tokens, which needs no
transformer to compute: that stage teaches the embeddings, cheaply. Then the whole model is trained.
"""

import ast
import math
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_catalogue import GEAR, MERCH, Item, make_items
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

OUTPUT = Path(__file__).resolve().parent / "encoder"
INSTRUCTION = "Represent this product so that similar products have similar representations"
OTHER_INSTRUCTIONS = [
    "Given a product, find products like it",
    "Retrieve items that a customer may also want",
    "Describe the topic of this text",
    "Represent the item for clustering",
]
END = "<|endoftext|>"
SEED = 0
MEAN_STEPS, STEPS = 600, 420
WORLDS = range(1, 25)  # learned from; world 0 is the shipped catalogue
UNSEEN_WORLD = 1000  # only measured

# ----------------------------------------------------------------------------------------------------------
# Texts
# ----------------------------------------------------------------------------------------------------------


def plain_english() -> list[str]:
    """Paragraphs from the docstrings of Python's standard library: ordinary words, nothing to download."""
    paragraphs = set()
    for path in Path(os.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for part in (ast.get_docstring(node) or "").split("\n\n"):
                    part = " ".join(part.split())
                    if 60 < len(part) < 1500 and part.count(" ") > 8:
                        paragraphs.add(part)
    return sorted(paragraphs)


def wrap(text: str, instruction: str = INSTRUCTION) -> str:
    return f"Instruct: {instruction}\nQuery:{text}" if instruction else text


def vary(rng: random.Random, text: str) -> str:
    """A view of a text: whole, its title, its description or a stretch of it; wrapped or bare."""
    kind, parts = rng.random(), text.split("\nDescription: ")
    if kind < 0.15:
        text = parts[0]
    elif kind < 0.35:
        text = parts[-1]
    elif kind < 0.5:
        pieces = text.split(" ")
        start = rng.randrange(max(1, len(pieces) // 2))
        text = " ".join(pieces[start : start + rng.randint(12, 60)])
    instruction = rng.choices([INSTRUCTION, "", rng.choice(OTHER_INSTRUCTIONS)], [0.7, 0.15, 0.15])[0]
    return wrap(text, instruction)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that ends every row with END, truncated rows too, and pads with END on the left."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4608,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    end = (END, bpe.token_to_id(END))
    bpe.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, padding_side="left", model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# The target: how alike two items are
# ----------------------------------------------------------------------------------------------------------


def shelf(item: Item) -> str:
    return "gear" if item.kind in GEAR else "merch" if item.kind in MERCH else item.kind


# What two items share if the attribute is the same; an item's shares are scaled to a sum of one.
SHARES = [
    (0.38, lambda item: item.series or item.brand),
    (0.13, lambda item: item.kind),
    (0.07, shelf),
    (0.20, lambda item: item.platform),
    (0.10, lambda item: item.genre),
]
WORDS_SHARE = 0.20


class Target:
    """The wanted cosines of a list of items and plain texts (which have words only)."""

    def __init__(self, items: list[Item | str], vectorizer: TfidfVectorizer):
        self.texts = [item if isinstance(item, str) else item.item_context for item in items]
        self.words = vectorizer.transform(self.texts)
        codes: dict = {}
        self.labels = np.full((len(items), len(SHARES)), -1)  # (N, attributes), -1 where there is none
        for row, item in enumerate(items):
            for column, (_, attribute) in enumerate(SHARES if isinstance(item, Item) else []):
                if value := attribute(item):
                    self.labels[row, column] = codes.setdefault((column, value), len(codes))
        shares = np.array([share for share, _ in SHARES]) * (self.labels >= 0)
        self.shares = shares / (shares.sum(1, keepdims=True) + WORDS_SHARE)
        self.words_share = 1 - self.shares.sum(1)

    def gram(self, rows: np.ndarray) -> torch.Tensor:
        labels, shares = self.labels[rows], np.sqrt(self.shares[rows])
        same = (labels[:, None] == labels[None]) * shares[:, None] * shares[None]
        words = (self.words[rows] @ self.words[rows].T).toarray()
        scale = np.sqrt(self.words_share[rows])
        return torch.tensor(same.sum(-1) + words * scale[:, None] * scale[None], dtype=torch.float32)


def draw(rng: random.Random, target: Target, size: int) -> np.ndarray:
    """Rows of a batch: half of them in families, so that near neighbours are not rare, and some twice."""
    chosen = []
    while len(chosen) < size // 2:
        row = rng.randrange(len(target.texts))
        family = np.flatnonzero(target.labels[:, 0] == target.labels[row, 0])
        chosen += [int(rng.choice(family)) for _ in range(4)] if target.labels[row, 0] >= 0 else [row]
    chosen += [rng.randrange(len(target.texts)) for _ in range(size * 3 // 4 - len(chosen))]
    chosen += rng.sample(chosen, size - len(chosen))
    return np.array(chosen)


# ----------------------------------------------------------------------------------------------------------
# The encoder
# ----------------------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], max_length: int):
    return tokenizer(texts, truncation=True, max_length=max_length, padding="longest", return_tensors="pt")


def embed(model: Qwen3Model, tokenizer: PreTrainedTokenizerFast, texts: list[str], max_length: int):
    hidden = model(**encode(tokenizer, texts, max_length)).last_hidden_state  # (B, T, D)
    return F.normalize(hidden[:, -1], dim=1)  # padded on the left, so the last token is END: (B, D)


@torch.inference_mode()
def embed_all(model: Qwen3Model, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    vectors = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(texts), 32):
        rows = order[start : start + 32]
        vectors[rows] = embed(model, tokenizer, [wrap(texts[row]) for row in rows], 2048)
    return vectors


def quiet(model: Qwen3Model) -> None:
    """Start from uniform attention in the first layer and nothing from the rest: a mean over the tokens."""
    for index, layer in enumerate(model.layers):
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        layer.self_attn.q_norm.weight.data.fill_(0.2)
        if index > 0:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)


def embed_mean(model: Qwen3Model, tokenizer: PreTrainedTokenizerFast, texts: list[str], max_length: int):
    """What a quiet model gives, without running it."""
    rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0)[:-1]
    first, table = model.layers[0], model.embed_tokens.weight
    tokens = torch.tensor([token for row in rows for token in row])
    mean = F.embedding_bag(tokens, first.input_layernorm(table), starts, mode="mean")  # (B, D)
    values = first.self_attn.v_proj(mean).view(len(rows), -1, model.config.head_dim)
    values = values.repeat_interleave(first.self_attn.num_key_value_groups, 1).flatten(1)
    return F.normalize(first.self_attn.o_proj(values) + table[tokenizer.eos_token_id], dim=1)


def loss_of(vectors: torch.Tensor, rows: np.ndarray, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines against the target; and two views of one text must find each other in the batch."""
    wanted, found = target.gram(rows), vectors @ vectors.T
    # near pairs are rare but are what a quantizer must keep, so they weigh more
    weights = (0.05 + wanted.clamp(min=0)).fill_diagonal_(0)
    fit = ((found - wanted).square() * weights).sum() / weights.sum()
    logits = (found * 20).fill_diagonal_(-1e4)
    twin = torch.tensor(rows[:, None] == rows[None]).fill_diagonal_(False)
    find = logits.logsumexp(1) - logits.masked_fill(~twin, -1e4).logsumexp(1)
    return fit, find[twin.any(1)].mean()


def train(model, tokenizer, targets: list[Target], shipped: Target, whole: bool) -> None:
    """One stage: the mean over tokens, or the whole model."""
    steps, peak, warmup = (STEPS, 1.5e-3, 20) if whole else (MEAN_STEPS, 1e-2, 20)
    rng = random.Random(SEED + whole)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.02 + (1 + math.cos(math.pi * step / steps)) / 2)
    )
    progress = tqdm(range(steps), desc="whole model" if whole else "mean of tokens", mininterval=5)
    for _ in progress:
        target = shipped if rng.random() < 0.4 else rng.choice(targets)
        # time goes by tokens: mostly short texts, and now and then a long batch so that it reads to the end
        size, max_length = (256, 256) if not whole else (20, 320) if rng.random() < 0.1 else (72, 72)
        rows = draw(rng, target, size)
        texts = [vary(rng, target.texts[row]) for row in rows]
        vectors = (embed if whole else embed_mean)(model, tokenizer, texts, max_length)
        fit, find = loss_of(vectors, rows, target)
        optimizer.zero_grad(set_to_none=True)
        (10 * fit + 0.1 * find).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(fit=f"{fit.item():.4f}", find=f"{find.item():.2f}", refresh=False)


# ----------------------------------------------------------------------------------------------------------
# What the vectors know
# ----------------------------------------------------------------------------------------------------------


def report(name: str, items: list[Item], vectors: torch.Tensor, queries: np.ndarray) -> None:
    """Shares of one series, platform or kind among the ten nearest, and mean cosines by class."""
    cosine = vectors[queries] @ vectors.T  # (Q, N)
    cosine[torch.arange(len(queries)), torch.tensor(queries)] = -2
    nearest = cosine.topk(10).indices.numpy()
    same = {}
    print(f"\n{name}: {len(queries):,} items among {len(items):,}")
    for attribute in ("series", "platform", "kind"):
        values = np.array([getattr(item, attribute) for item in items])
        same[attribute] = (values[queries][:, None] == values[None]) & (values[queries] != "")[:, None]
        has = np.flatnonzero(values[queries] != "")
        near = np.take_along_axis(same[attribute], nearest, 1)[has].mean()
        chance = (same[attribute][has].sum(1) - 1).mean() / (len(items) - 1)
        print(f"  same {attribute:<9} {near:6.1%} of the 10 nearest, {chance:6.1%} by chance")
    series, platform, kind = same["series"], same["platform"], same["kind"]
    classes = {
        "same series and kind": series & kind,
        "same series, other kind": series & ~kind,
        "same kind and platform": ~series & kind & platform,
        "same kind": ~series & kind & ~platform,
        "same platform": ~series & ~kind & platform,
        "unrelated": ~series & ~kind & ~platform,
    }
    others = cosine.numpy() > -1.5
    for label, pairs in classes.items():
        print(f"  cosine, {label:<24} {cosine.numpy()[pairs & others].mean():.3f}")
    spectrum = torch.linalg.svdvals(vectors - vectors.mean(0)).square()
    print(f"  participation ratio {(spectrum.sum() ** 2 / spectrum.square().sum()).item():.1f}")


def main() -> None:
    began = time.time()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums in one order whatever the number of cores
    shipped_items, english = make_items(0), plain_english()
    print(f"{len(english):,} paragraphs of plain English, {len(WORLDS)} worlds besides the shipped one")
    worlds = [make_items(seed) for seed in WORLDS]
    held_out = np.zeros(len(shipped_items), bool)
    held_out[np.random.default_rng(SEED).permutation(len(shipped_items))[: len(shipped_items) // 10]] = True
    learned = [item for item, out in zip(shipped_items, held_out, strict=True) if not out]

    tokenizer = make_tokenizer(
        [wrap(item.item_context) for world in [learned, *worlds[:4]] for item in world]
        + english * 3
        + [wrap("", instruction) for instruction in OTHER_INSTRUCTIONS]
    )
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=1, max_df=0.1, token_pattern=r"[A-Za-z]{3,}")
    vectorizer.fit([item.item_context for world in [learned, *worlds] for item in world] + english)
    rng = random.Random(SEED)
    targets = [Target([*world, *rng.sample(english, 400)], vectorizer) for world in worlds]
    shipped = Target([*learned, *rng.sample(english, 200)], vectorizer)

    model = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=448, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=3, head_dim=32, max_position_embeddings=4096,
            initializer_range=0.05, attention_dropout=0.0, use_cache=False,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")
    quiet(model)
    train(model, tokenizer, targets, shipped, whole=False)
    train(model, tokenizer, targets, shipped, whole=True)

    model.eval()
    partial = OUTPUT.with_name(OUTPUT.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    os.replace(partial, OUTPUT)
    size = sum(path.stat().st_size for path in OUTPUT.iterdir()) / 1e6
    print(f"{size:.2f} MB in {OUTPUT}, after {time.time() - began:.0f} s")

    started = time.time()
    vectors = embed_all(model, tokenizer, [item.item_context for item in shipped_items])
    print(f"shipped catalogue embedded in {time.time() - started:.1f} s")
    everything = np.arange(len(shipped_items))
    report("Shipped catalogue", shipped_items, vectors, everything)
    report("Its held-out items", shipped_items, vectors, everything[held_out])
    unseen = make_items(UNSEEN_WORLD)
    report(
        "A world never seen",
        unseen,
        embed_all(model, tokenizer, [i.item_context for i in unseen]),
        everything,
    )


if __name__ == "__main__":
    main()
