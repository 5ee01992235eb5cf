"""The tokenizer of the built-in tasks: digits and signs one by one, whole words, and invented names by syllable."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rlzoo.worlds import facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def _words() -> list[str]:
    phrasings = [phrasing for some in facts.RELATIONS.values() for phrasing in some]
    words = {word for phrasing in phrasings for word in re.findall(r"[A-Za-z]+ ?", phrasing)}
    words |= {word.strip() for word in words}
    return sorted(words | {" plus ", " minus ", " makes ", "start "}, key=lambda word: (-len(word), word))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with about 200 entries that reproduces any text of the two tasks exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = _words()
    syllables = [consonant + vowel for consonant in facts.CONSONANTS for vowel in facts.VOWELS]
    pieces = ["#### ", *words, *syllables, *(s.capitalize() for s in syllables), *"0123456789+-=?;#,.: \n"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([PAD, EOS, UNKNOWN, *pieces]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    spaced = "|".join(w for w in words if w.endswith(" "))
    bare = "|".join(w for w in words if not w.endswith(" "))
    pattern = rf"#### |{spaced}|(?:{bare})(?![a-z])|[A-Za-z][{facts.VOWELS}]|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
