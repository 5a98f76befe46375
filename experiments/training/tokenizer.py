"""The scene language's tokenizer: whole words and set phrases, saved as an ordinary fast tokenizer.

Articles, quotes and prepositions carry no meaning here and become no token; "top left" or "with stripes" is one token,
a capital inside a quoted word one token each. That keeps captions of four objects below 32 tokens, which leaves the
last eight of the 40 positions to the text encoder as scratch space (`experiments.training.text`).
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from relay.scenes.vocabulary import (
    COLOURS,
    COUNTS,
    LETTERS,
    PLACE_WORDS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZE_WORDS,
    TEXTURE_WORDS,
)

MAX_LENGTH = 40
# CLIP reads eos_token_id 2 as "pool at the highest id" (a legacy rule), so the end token must not be 2.
SPECIAL = ("<pad>", "<start>", "<unknown>", "<end>")


def vocabulary() -> list[str]:
    words = [w for table in (SIZE_WORDS, TEXTURE_WORDS, PLACE_WORDS) for said in table.values() for w in said]
    words += [*SHAPES, *PLURALS.values(), *COLOURS, *COUNTS[1:], *RELATIONS, "on", "and", "background", ","]
    words += ["word", "letter", "letters"]
    capitalised = [w[0].upper() + w[1:] for w in words if w[0].isalpha()]
    return list(dict.fromkeys([*SPECIAL, *words, *capitalised, *LETTERS]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    words = vocabulary()
    ids = {word: i for i, word in enumerate(words)}
    phrases = sorted((w for w in words if " " in w), key=len, reverse=True)
    # A lone capital is a letter to draw, except the article that opens a caption.
    pattern = "|".join(
        [
            *(rf"\b{phrase}\b" for phrase in phrases),
            r"\b(?!(?:an|the|at|in|to|of|picture|image|drawing|An|The|At|In|To)\b)[A-Za-z]?[a-z]+[a-z]\b",
            r"(?<=\w)[A-Z](?![a-z])",
            r"(?<=\")[A-Z](?![a-z])",
            ",",
        ]
    )
    core = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", ids["<start>"]), ("<end>", ids["<end>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=MAX_LENGTH,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        clean_up_tokenization_spaces=False,
    )
