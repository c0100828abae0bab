"""Makes small models and data for the shipped recipes: same architectures, same columns.

A grammar writes the data sets, so that the right answer can be learnt, and held-out examples are
new. Columns and splits are those of the hub's data sets that the recipes name.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from builders import write_rows
from hpcft.config.recipe_types import FullRecipe
from hpcft.tasks.data.examples import split_sources

Rows = list[dict[str, Any]]

NAMES = ("Anna", "Bob", "Carla", "David", "Emma", "Frank", "Gina", "Hugo", "Iris", "Jonas")
PLACES = ("Paris", "Rome", "Oslo", "Vienna", "Lisbon", "Prague", "Dublin", "Athens")
THINGS = ("dog", "cat", "boat", "house", "garden", "bridge", "train", "book", "lamp", "chair")
VERBS = ("sees", "paints", "likes", "finds", "repairs", "buys", "cleans", "sells")
GOOD = ("wonderful", "brilliant", "moving", "charming", "superb", "delightful", "clever", "funny")
BAD = ("dreadful", "boring", "clumsy", "tedious", "awful", "lifeless", "stupid", "annoying")
PARTS = ("plot", "cast", "music", "ending", "dialogue", "camera work", "first half", "pacing")


def _opinion(rng: random.Random, good: bool, sentences: int) -> str:
    words = GOOD if good else BAD
    return " ".join(
        f"{rng.choice(('The', 'I found the', 'Sadly or not, the'))} {rng.choice(PARTS)} "
        f"{rng.choice(('was', 'is', 'seemed'))} {rng.choice(words)}."
        for _ in range(sentences)
    )


def imdb(rng: random.Random, count: int) -> Rows:
    """Writes reviews of a few sentences; `label` 0 is negative, 1 positive."""
    return [{"text": _opinion(rng, bool(i % 2), rng.randint(2, 6)), "label": i % 2}
            for i in range(count)]  # fmt: skip


def sst2(rng: random.Random, count: int) -> Rows:
    """Writes reviews of one sentence."""
    return [{"sentence": _opinion(rng, bool(i % 2), 1), "label": i % 2, "idx": i}
            for i in range(count)]  # fmt: skip


def mnli(rng: random.Random, count: int) -> Rows:
    """Writes pairs: the hypothesis follows (0), is neutral (1) or contradicts (2)."""
    rows: Rows = []
    for i in range(count):
        name, verb, thing = (rng.choice(words) for words in (NAMES, VERBS, THINGS))
        hypotheses = (
            f"{name} {verb} a {thing}.",
            f"{name} {verb} a {thing} because of {rng.choice(NAMES)}.",
            f"Nobody {verb} a {thing}.",
        )
        premise = f"{name} {verb} a {thing} in {rng.choice(PLACES)}."
        rows.append({"premise": premise, "hypothesis": hypotheses[i % 3], "label": i % 3, "idx": i})
    return rows


def squad(rng: random.Random, count: int, *, unanswerable: bool = False) -> Rows:
    """Writes questions about who lives where.

    Args:
        rng: source of random numbers.
        count: number of rows.
        unanswerable: whether every third question is about a person whom the text does not name.
    """
    rows: Rows = []
    for i in range(count):
        *people, stranger = rng.sample(NAMES, 4)
        homes = rng.sample(PLACES, 3)
        context = " ".join(
            f"{person} lives in {home}." for person, home in zip(people, homes, strict=True)
        )
        at = rng.randrange(3)
        answers = {"text": [homes[at]], "answer_start": [context.index(homes[at])]}
        person = people[at]
        if unanswerable and i % 3 == 0:
            person, answers = stranger, {"text": [], "answer_start": []}
        question = f"Where does {person} live?"
        rows.append({"id": f"q{i}", "title": "Homes", "context": context, "question": question,
                     "answers": answers})  # fmt: skip
    return rows


def winogrande(rng: random.Random, count: int) -> Rows:
    """Writes sentences about who lends a thing: the person who has it."""
    rows: Rows = []
    for i in range(count):
        first, second = rng.sample(NAMES, 2)
        thing = rng.choice(THINGS)
        owner = (first, second)[i % 2]
        sentence = f"{first} met {second}. {owner} has a {thing}, so the {thing} was lent by _ ."
        rows.append({"sentence": sentence, "option1": first, "option2": second,
                     "answer": str(i % 2 + 1)})  # fmt: skip
    return rows


def wikitext(rng: random.Random, count: int) -> Rows:
    """Writes articles as lines: a title, then paragraphs, with empty lines between them."""
    lines = []
    for _ in range(count // 4):
        thing = rng.choice(THINGS)
        lines += [f" = The {thing} = \n", ""]
        for _ in range(2):
            sentences = (f"{rng.choice(NAMES)} {rng.choice(VERBS)} the {thing} in "
                    f"{rng.choice(PLACES)} ." for _ in range(rng.randint(3, 6)))  # fmt: skip
            lines.append(" " + " ".join(sentences) + " \n")
    return [{"text": line} for line in lines]


DATA: dict[str, Callable[[random.Random, int], Rows]] = {
    "stanfordnlp/imdb": imdb,
    "nyu-mll/glue sst2": sst2,
    "nyu-mll/glue mnli": mnli,
    "rajpurkar/squad": squad,
    "rajpurkar/squad_v2": lambda rng, count: squad(rng, count, unanswerable=True),
    "allenai/winogrande winogrande_l": winogrande,
    "Salesforce/wikitext wikitext-2-raw-v1": wikitext,
}


def source_of(recipe: FullRecipe) -> str:
    """Returns the name of a recipe's hub data set, with its configuration."""
    data = recipe.task.data
    return " ".join(part for part in (data.path, data.name) if part)


def data_files(recipe: FullRecipe, folder: Path) -> dict[str, Path]:
    """Writes a local file for each split, with the columns of the recipe's data set."""
    name = source_of(recipe)
    target = folder / "".join(letter if letter.isalnum() else "-" for letter in name)
    target.mkdir(parents=True, exist_ok=True)
    return {
        split: write_rows(
            target / f"{split}.jsonl",
            DATA[name](random.Random(f"{name} {split}"), 480 if split == "train" else 120),
        )
        for split in split_sources(recipe.task.data)
    }


# ---------------------------------------------------------------- models

SMALL = {"hidden_size": 64, "dim": 64, "intermediate_size": 128, "hidden_dim": 128,
         "num_hidden_layers": 2, "n_layers": 2, "num_attention_heads": 4, "n_heads": 4,
         "head_dim": 16}  # fmt: skip
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


def model_folder(recipe: FullRecipe, folder: Path, texts: Iterator[str]) -> Path:
    """Writes a small random model of the recipe's architecture, with a tokenizer of its family."""
    import transformers

    spec = recipe.model.config
    assert spec is not None
    model_type = str(spec["model_type"])
    target = folder / str(recipe.model.path or recipe.model.tokenizer).replace("/", "--")
    if (target / "config.json").is_file():
        return target
    tokenizer = FAMILIES[model_type](texts)
    fields = {key: SMALL.get(key, value) for key, value in spec.items()}
    if "num_key_value_heads" in fields:
        shared = int(spec["num_attention_heads"]) // int(spec["num_key_value_heads"])
        fields["num_key_value_heads"] = max(1, 4 // shared)
    fields["vocab_size"] = len(tokenizer)
    fields["pad_token_id"] = tokenizer.pad_token_id
    # Such a small model learns within a few steps only without dropout.
    config = transformers.AutoConfig.for_model(**fields)
    for name in DROPOUTS:
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    transformers.set_seed(0)
    is_encoder = model_type in ENCODERS
    auto = transformers.AutoModelForMaskedLM if is_encoder else transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _word_piece(texts: Iterator[str]) -> Any:
    """Trains a tokenizer like BERT's: lower case, WordPiece, [CLS] and [SEP]."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    core = BertWordPieceTokenizer(lowercase=True)
    core.train_from_iterator(texts, vocab_size=600, show_progress=False)
    return BertTokenizerFast(tokenizer_object=core._tokenizer)


def _byte_level(texts: Iterator[str], special: list[str]) -> Any:
    from tokenizers import ByteLevelBPETokenizer

    core = ByteLevelBPETokenizer()
    core.train_from_iterator(texts, vocab_size=600, special_tokens=special, show_progress=False)
    return core._tokenizer


def _roberta(texts: Iterator[str]) -> Any:
    """Trains a tokenizer like RoBERTa's: byte-level BPE, `<s>` and `</s>`."""
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast

    core = _byte_level(texts, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    core.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
    )  # fmt: skip


def _llama3(texts: Iterator[str]) -> Any:
    """Trains a tokenizer like Llama 3's: byte-level BPE, a start token, no padding token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    core = _byte_level(texts, [begin, end])
    core.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=begin, eos_token=end)


def _sentence_piece(texts: Iterator[str]) -> Any:
    """Trains a tokenizer like Gemma's and Mistral's: BPE with `▁` for spaces, byte fallback."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "</s>", "<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    core.train_from_iterator(texts, trainer)
    core.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 2)]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip


ENCODERS = ("bert", "distilbert", "roberta")
FAMILIES: dict[str, Callable[[Iterator[str]], Any]] = {
    "bert": _word_piece, "distilbert": _word_piece, "roberta": _roberta, "llama": _llama3,
    "gemma": _sentence_piece, "mistral": _sentence_piece,
}  # fmt: skip
