"""Write the sample catalogue: 2,000 items of an invented video-game shop, the same bytes on every run.

    python data/sample/make_catalogue.py      # data/output/Sample_items_updated.parquet

All names of companies, consoles, series and characters are invented. A seed makes one shop with its own names:
seed 0 makes the shipped catalogue, and train_encoder.py learns from other seeds too.

The texts are made from catalogue_templates.txt: a block for each genre of games, for each kind of accessory and
collectible, and for sentences that all items of a kind share. In a template, [a|b] is a choice and {hero} is a slot.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import polars as pl

OUTPUT = Path(__file__).resolve().parents[1] / "output" / "Sample_items_updated.parquet"
QUOTAS = {"game": 1000, "gear": 580, "merch": 310, "console": 80, "credit": 30}
words = str.split


def phrases(text: str) -> list[str]:
    """Split text at its semicolons."""
    return " ".join(text.split()).split("; ")


def parse(text: str) -> dict[str, dict[str, list[str]]]:
    """Parse blocks into {name: {key: [phrases], "sentences": [sentences]}}.

    A block starts with "= name". A line "key: a; b" is a list, any other line is a sentence.
    An indented line continues the line above it.
    """
    blocks = {}
    for line in re.sub(r"\n +", " ", text).strip().splitlines():
        if line.startswith("= "):
            block = blocks[line[2:]] = {"sentences": []}
        elif found := re.match("([a-z]+): ", line):
            block[found[1]] = phrases(line[found.end() :])
        else:
            block["sentences"].append(line)
    return blocks


# ---- Names ----

STARTS = words("""
    Alv Ank Arr Bael Bend Bram Brev Cald Carv Corv Dask Delv Dorm Drev Elg Emb Esk Fal Fend Fostr Gald Garn Gorm
    Grell Halv Hask Hest Ild Inv Jask Jorv Kald Kell Kest Korr Lamb Lask Lind Lorv Mald Mard Merr Mosk Nald Nev
    Norv Obr Ord Ostr Parv Pell Pind Prosk Quell Quor Rald Rask Rend Rosk Sald Selv Skarr Sorv Tald Tavr Tesk
    Thorv Torm Ulv Umb Vald Vesk Vind Vorr Wald Wend Wisk Yald Yend Yorr Zald Zelv Zind
""")
MIDDLES = words("am an el en er im ol or un")
SYLLABLES = {  # style of a name: middles and ends
    "person": (["", "", *MIDDLES], words("a an ara ek el ena essa eth ia ick iko in is o ora ova une wen yn")),
    "place": (
        [""],
        words("""
            aby acre ashore ebeck ecrag edale efell ehaven eholt emarch emere emoor ereach estead evale iwick olake
            opass orock owell umouth
        """),
    ),
    "word": (
        ["", "", "", *MIDDLES],
        words("ando aris avo axi ello endra ero exa idor ilo inax ix onda oro oss ua umbra une ura yx"),
    ),
}
# Real names that these syllables can make.
REAL_NAMES = words("aldi anker lindor merrel ormond tormax walden wendy")

COMPANIES = words("Interactive Games Studio Works Entertainment Digital Workshop Playhouse Collective Arcade")
FACTORIES = words("Electronics Labs Systems Computer Industries")
BRAND_SUFFIXES = ["", "", "", " Gear", " Audio", " Labs", " Supply", " Works", "tek", " & Co."]
LICENSEE_SUFFIXES = [" Collectibles", " & Sons", " Toys", "", " Print"]
FORMS = ["home console", "handheld console", "virtual-reality headset", "home computer"]
PLATFORMS = [  # name, number of the maker, form, medium, years after the first console
    ("{home}", 0, "home console", "cartridge", 0),
    ("{home} 2", 0, "home console", "disc", 7),
    ("{home} 3", 0, "home console", "disc", 14),
    ("{rival}", 1, "home console", "disc", 3),
    ("{rival} [Next|Prime|Max|Ultra]", 1, "home console", "disc", 15),
    ("{pocket} [Pocket|Mini|Go]", 2, "handheld console", "game card", 5),
    ("{pocket} Duo", 2, "handheld console", "game card", 13),
    ("{headset} VR", 1, "virtual-reality headset", "download code", 18),
    ("PC", 3, "home computer", "disc", 0),
]
MODELS = words("""
    Arc Anvil Beacon Brisk Comet Crest Drift Ember Flint Harbour Heron Ivory Kite Lark Marble Nimble Orbit Pike
    Quarry Ridge Rook Slate Swift Tern Vector Willow Zenith
""")
COLOURS = phrases("""
    black; white; graphite; crimson; sea blue; forest green; smoke grey; coral; lilac; mustard; sand;
    clear purple; midnight blue; copper; mint; matte black; pearl white; burnt orange
""")
RELICS = phrases("""
    Amber Bell; Black Lantern; Bone Flute; Broken Crown; Clockwork Heart; Copper Key; Drowned Mirror; Ember Seed;
    Glass Compass; Hollow Star; Ivory Mask; Last Ledger; Moon Anchor; Pale Chalice; Salt Throne; Silver Loom;
    Storm Needle; Ninth Page; Tin Oracle; Winter Seal; Red Abacus; Iron Lullaby; Seventh Thimble; Chalk Horse
""")
EDITIONS = ["Deluxe Edition", "Collector's Edition", "Remastered", "Complete Edition", "Launch Edition"]
ROMAN = ["I", "II", "III", "IV", "V"]
TAGLINES = phrases("""
    Mind the third stair; Nobody owns the tide; We all come home hungry; Keep your lamp low; Even stones listen;
    One good turn; Trust the goat; Not every door is a door; Louder than the rain; Leave only footprints;
    The road remembers; Ask the river; Bring your own thunder; Small hands, big plans; Never bet against the moon;
    There is always a second key; Hold the line, then dance; Dawn is a long way off
""")
EXTRAS = phrases("""
    a cloth map; a steel case; a set of art cards; an enamel pin; a mini soundtrack; a 64-page sketchbook;
    a folded poster; a pewter coin; a patch; a paper model; a deck of playing cards; a small figure of {hero}
""")

# ---- Templates ----

TEMPLATES = Path(__file__).with_name("catalogue_templates.txt").read_text(encoding="utf-8")
GENRES, GEAR, MERCH, SENTENCES = (parse(section) for section in TEMPLATES.split("\n\n"))
SENTENCES = {name: block["sentences"] for name, block in SENTENCES.items()}

# The parts of a description, and how many sentences each gets beside the others.
SHARES = {
    "game": {"openers": 1.2, "own": 4, "lore": 2, "edition": 2, "platform": 1.2, "shop": 1},
    "gear": {"openers": 1.2, "own": 4, "compat": 1, "box": 2},
    "merch": {"openers": 1.5, "own": 3, "box": 2},
    "console": {"openers": 1.2, "bundle": 1.5, "own": 4, "shop": 2},
    "credit": {"own": 2, "any": 3},
}

# ---- From templates to text ----


def fill(rng: random.Random, template: str, slots: dict[str, str]) -> str:
    """Make the choices of a template, fill its slots, and mend "a" before a vowel and capitals."""
    text = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), template)
    text = text.format_map(slots).format_map(slots)  # a slot may hold another slot
    text = re.sub(r"\b([Tt]he|other|first|Official|[Aa]|[Tt]his) The ", r"\1 ", text)
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU8])(?!one\b|uni|use|U[A-Z]|eu)", r"\1n ", text)
    return re.sub(r"(^|[.!?]\"? )([a-z])", lambda match: match[1] + match[2].upper(), text)


def join(rng: random.Random, sentences: list[str]) -> str:
    """Join sentences to paragraphs of three or more."""
    text = sentences[0]
    length = 1
    for sentence in sentences[1:]:
        cut = length >= 3 and rng.random() < 0.3
        text += ("\n" if cut else " ") + sentence
        length = 1 if cut else length + 1
    return text


def describe(rng: random.Random, kind: str, slots: dict[str, str], block: dict, **parts: list[str]) -> str:
    """Write a description of random length: sentences of each part in SHARES, then some features.

    block has the item's own sentences and features. parts are sentences that not all items of this kind share.
    """
    length = min(rng.lognormvariate(4.6, 0.75), 420)  # words
    if length < 22:
        return fill(rng, rng.choice(SENTENCES[f"{kind} in short"]), slots)
    parts["own"] = block["sentences"]
    groups = [(share, parts.get(part) or SENTENCES.get(f"{kind} {part}")) for part, share in SHARES[kind].items()]
    groups = [(share, templates) for share, templates in groups if templates]
    total = sum(share for share, _ in groups)
    sentences, unused = [], []
    for position, (share, templates) in enumerate(groups):
        chance = rng.random()
        # one opening sentence at most
        count = int(length / 15 * share / total + chance) if position > 0 else int(chance < 0.7)
        shuffled = rng.sample(templates, len(templates))
        sentences += [fill(rng, template, slots) for template in shuffled[:count]]
        unused += shuffled[count:]
    if not sentences:
        sentences = [fill(rng, rng.choice(unused), slots)]
    features = block.get("features")
    if not features or length <= 45 or rng.random() >= 0.5:
        return join(rng, sentences)

    chosen = rng.sample(features, min(len(features), 2 + int(length / 45)))
    chosen = [fill(rng, feature, slots) for feature in chosen]
    if len(chosen) > 4:
        heading = rng.choice(["\nFeatures:\n", "\nHighlights:\n", "\n"])
        return join(rng, sentences) + heading + "\n".join(f"- {feature}" for feature in chosen)
    *most, last = [feature[0].lower() + feature[1:] for feature in chosen]
    opening = rng.choice(["With", "Features", "Includes", "Offers", "Expect"])
    sentences.insert(rng.randint(1, len(sentences)), f"{opening} {', '.join(most)} and {last}.")
    return join(rng, sentences)


# ---- A shop ----


@dataclass
class Series:
    """A series of games."""

    name: str
    genre: str
    entries: list[tuple[str, int]]  # title and year of each game
    platforms: list[dict[str, str]]
    slots: dict[str, str]  # names that its texts use
    popularity: float


@dataclass
class Item:
    """A row of the catalogue and its attributes. An attribute that the item lacks is an empty text."""

    kind: str  # game, console, credit, or the kind of accessory or collectible
    category: str
    title: str
    description: str
    platform: str = ""
    genre: str = ""
    series: str = ""
    brand: str = ""
    parent_asin: str = ""
    item_context: str = ""  # the text that is embedded


class Shop:
    """An invented shop: its names are drawn from a seed, each name once."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.taken: set[str] = set()
        self.brands = [self.coin("word") + self.rng.choice(BRAND_SUFFIXES) for _ in range(16)]
        self.models = {}  # five brands make each kind of accessory, in two models
        for kind in GEAR:
            for brand in self.rng.sample(self.brands, 5):
                self.models[kind, brand] = self.rng.sample(MODELS, 2)
        self.licensees = [self.coin("word") + suffix for suffix in LICENSEE_SUFFIXES]
        self.publishers = [f"{self.coin('word')} {self.rng.choice(COMPANIES)}" for _ in range(12)]
        self.studios = [f"{self.coin('word')} {self.rng.choice(COMPANIES)}" for _ in range(30)]
        self.platforms = self.make_platforms()
        genres = list(GENRES) * 3
        self.rng.shuffle(genres)
        self.series = [self.make_series(genre) for genre in [*GENRES, *genres][:78]]

    def coin(self, style: str) -> str:
        """Invent a name of a person, a place, or a word for anything else."""
        middles, ends = SYLLABLES[style]
        while True:
            name = self.rng.choice(STARTS) + self.rng.choice(middles) + self.rng.choice(ends)
            real = any(piece in name.lower() for piece in REAL_NAMES)
            if len(name) <= 12 and name not in self.taken and not real:
                self.taken.add(name)
                return name

    def make_platforms(self) -> list[dict[str, str]]:
        """Each platform is the slots that it fills."""
        makers = [f"{self.coin('word')} {suffix}" for suffix in self.rng.sample(FACTORIES, 3)] + ["PC"]
        names = {role: self.coin("word") for role in ("home", "rival", "pocket", "headset")}
        first = self.rng.randint(1996, 2001)
        platforms = []
        for name, maker, form, medium, years in PLATFORMS:
            slots = {"platform": fill(self.rng, name, names), "maker": makers[maker], "form": form}
            platforms.append({**slots, "medium": medium, "year": str(first + years)})
        return platforms

    def make_series(self, genre: str) -> Series:
        rng, block = self.rng, GENRES[genre]
        hero, place, word = self.coin("person"), self.coin("place"), self.coin("word")
        relic = rng.choice(RELICS)
        name = rng.choice(block["names"]).format(p=hero, q=place, w=word, r=relic)
        entries = self.make_entries(name, block["nouns"])
        oldest = rng.randrange(4)
        slots = {
            "series": name,
            "genre": genre,
            "hero": hero,
            "place": place,
            "friend": self.coin("person"),
            "villain": self.coin("person"),
            "other": self.coin("place"),
            "relic": relic,
            "role": rng.choice(block["role"]),
            "age": rng.choice(block["age"]),
            "writer": f"{self.coin('person')} {self.coin('word')}",
            "actor": f"{self.coin('person')} {self.coin('word')}",
            "composer": f"{self.coin('person')} {self.coin('word')}",
            "tagline": rng.choice(TAGLINES),
            "studio": rng.choice(self.studios),
            "publisher": rng.choice(self.publishers),
        }
        platforms = rng.sample(self.platforms[oldest:], rng.randint(2, 4))
        return Series(name, genre, entries, platforms, slots, rng.uniform(0.5, 2))

    def make_entries(self, name: str, nouns: list[str]) -> list[tuple[str, int]]:
        """Invent titles and years of two to five games of a series."""
        rng = self.rng
        year = rng.randint(1997, 2012)
        style = rng.choice(["number", "roman", "subtitle", "mixed"])
        nouns = list(nouns)
        rng.shuffle(nouns)
        count = rng.randint(3, 6) - 1
        first_has_subtitle = rng.random() < 0.3 and style == "subtitle"
        entries = []
        for index in range(count):
            title = name
            if index > 0 and style != "subtitle":
                title += f" {ROMAN[index] if style == 'roman' else index + 1}"
            if first_has_subtitle if index == 0 else style in ("subtitle", "mixed"):
                title += f": {nouns[index]}"
            entries.append((title, year))
            year += rng.randint(1, 4)
        return entries

    def choose_series(self) -> Series:
        return self.rng.choices(self.series, [series.popularity for series in self.series])[0]

    def game(self) -> Item:
        rng, series = self.rng, self.choose_series()
        entry, year = rng.choice(series.entries)
        platform = rng.choice(series.platforms)
        edition = rng.choice(EDITIONS) if rng.random() < 0.35 else ""
        slots = {
            **series.slots,
            **platform,
            "title": entry,
            "year": str(year),
            "year_before": str(year - rng.randint(6, 12)),
            "label": rng.choice(GENRES[series.genre]["label"]),
        }
        slots["extra"], slots["extra2"] = rng.sample(EXTRAS, 2)
        title = rng.choice(["{0} - {1}", "{0} ({1})", "{0} for {1}", "{0} [{1}]"])
        full_name = rng.choice(["{} - {}", "{} {}", "{}: {}"]).format(entry, edition) if edition else entry
        title = title.format(full_name, platform["platform"])
        openers = SENTENCES["game openers"]
        if entry == series.name:  # it is the first game itself
            openers = [line for line in openers if "the first {series}" not in line]
        edition = [rng.choice(SENTENCES[edition])] if edition else []
        text = describe(rng, "game", slots, GENRES[series.genre], openers=openers, edition=edition)
        category, publisher = f"Games > {series.genre.title()}", slots["publisher"]
        return Item("game", category, title, text, platform["platform"], series.genre, series.name, publisher)

    def gear(self) -> Item:
        rng = self.rng
        kind, brand = rng.choice(list(self.models))
        block, model = GEAR[kind], rng.choice(self.models[kind, brand])
        platform = rng.choice([one for one in self.platforms if one["form"] in block.get("forms", FORMS)])
        colour, other_colour = rng.sample(COLOURS, 2)
        slots = {
            **platform,
            "brand": brand,
            "model": model,
            "kind": kind,
            "noun": rng.choice(block["noun"]),
            "size": rng.choice(block["size"]),
            "colour": colour,
            "colour_cap": colour.capitalize(),
            "other_colour": other_colour,
        }
        title = "{brand} {model} {noun} for {platform}[|, {size}|, {colour}| - {colour}, {size}| ({colour})]"
        title = fill(rng, title, slots)
        compat = SENTENCES["gear for PC"] if platform["platform"] == "PC" else []
        text = describe(rng, "gear", slots, block, compat=compat)
        return Item(kind, f"Accessories > {kind.title()}", title, text, platform["platform"], brand=brand)

    def merch(self) -> Item:
        rng, series = self.rng, self.choose_series()
        kind, brand = rng.choice(list(MERCH)), rng.choice(self.licensees)
        entry, year = rng.choice(series.entries)
        slots = {
            **series.slots,
            **rng.choice(series.platforms),
            "title": entry,
            "year": str(year),
            "brand": brand,
            "kind": kind,
            "noun": rng.choice(MERCH[kind]["noun"]),
            "size": rng.choice(MERCH[kind]["size"]),
            "who": series.slots[rng.choice(["hero", "hero", "friend", "villain"])],
        }
        if slots["noun"] == "The Art of":
            title = "The Art of {title}, {size}"
        elif kind in ("soundtrack", "strategy guide", "art book"):
            title = rng.choice(["{title} {noun}", "{title} {noun} ({size})"])
        else:
            title = "{series} {noun} - {who}" + rng.choice(["", ", {size}"])
            title = rng.choice([title, "{brand} " + title, "{who} {noun}, {series} ({size})"])
        title = fill(rng, title, slots)
        text = describe(rng, "merch", slots, MERCH[kind])
        return Item(kind, f"Collectibles > {kind.title()}", title, text, "", series.genre, series.name, brand)

    def console(self) -> Item:
        rng = self.rng
        platform, colour = rng.choice(self.platforms[:-1]), rng.choice(COLOURS)
        series, series2 = rng.sample(self.series, 2)
        entry, _ = rng.choice(series.entries)
        noun = rng.choice(["Console", "Slim Console", "System", "Refurbished Console"])
        bundle = SENTENCES["bundle"] if rng.random() < 0.35 else []
        slots = {
            **series.slots,
            **platform,
            "title": entry,
            "colour": colour,
            "noun": noun,
            "series2": series2.name,
            "size": rng.choice(["32 GB", "500 GB", "1 TB"]),
            "pads": rng.choice(["one pad", "two pads", "a controller"]),
        }
        ending = rng.choice([f"{entry} Bundle", f"{series.name} Edition"]) if bundle else colour.title()
        text = describe(rng, "console", slots, {"sentences": SENTENCES["console facts"]}, bundle=bundle)
        title, name = f"{platform['platform']} {noun} - {ending}", series.name if bundle else ""
        return Item("console", "Consoles", title, text, platform["platform"], "", name, platform["maker"])

    def credit(self) -> Item:
        rng = self.rng
        platform = rng.choice(self.platforms[:-1])
        size = rng.choice(["10 coins", "20 coins", "25 coins", "50 coins", "3 months", "12 months"])
        name = "Store Credit" if "coins" in size else "Online Membership"
        text = describe(rng, "credit", {**platform, "size": size}, {"sentences": SENTENCES[name]})
        title = f"{platform['platform']} {name}, {size}" + rng.choice(["", " [Digital Code]", " - Gift Card"])
        return Item("credit", "Gift Cards", title, text, platform["platform"], brand=platform["maker"])


# ---- The catalogue ----


def item_context(rng: random.Random, item: Item) -> str:
    """Join the attributes of an item. Some are left out at random, as real catalogues have gaps."""
    lines = [f"Title: {item.title}", f"Description: {item.description}"]
    if item.platform and rng.random() < 0.5:
        lines.append(f"Platform: {item.platform}")
    if rng.random() < 0.6:
        lines.append(f"Category: {item.category}")
    if item.brand and rng.random() < 0.3:
        lines.append(f"Brand: {item.brand}")
    return "\n".join(lines)


def make_items(seed: int = 0) -> list[Item]:
    """Make the items of one shop in random order. Titles and descriptions are unique."""
    shop, items, seen = Shop(seed), [], set()
    for kind, quota in QUOTAS.items():
        wanted = len(items) + quota
        while len(items) < wanted:
            item = getattr(shop, kind)()
            if item.title not in seen and item.description not in seen:
                seen |= {item.title, item.description}
                items.append(item)
    shop.rng.shuffle(items)
    for number, item in enumerate(items, start=1):
        item.parent_asin = f"S{number:04d}"
        item.item_context = item_context(shop.rng, item)
    return items


def main() -> None:
    items = make_items()
    columns = ["parent_asin", "title", "item_context"]
    frame = pl.DataFrame({column: [getattr(item, column) for item in items] for column in columns})
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(OUTPUT)
    print(f"{len(frame):,} items, {OUTPUT.stat().st_size / 1e6:.2f} MB: {OUTPUT}")


if __name__ == "__main__":
    main()
