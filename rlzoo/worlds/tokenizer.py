"""The embedded worlds' tokenizer: digits and signs one by one, words whole, made-up names by syllable."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rlzoo.worlds import facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def _words() -> list[str]:
    phrasings = [p for ps in facts.RELATIONS.values() for p in ps]
    words = {w for p in phrasings for w in re.findall(r"[A-Za-z]+ ?", p)}
    words |= {w.strip() for w in words}
    return sorted(words | {" plus ", " minus ", " makes ", "start "}, key=lambda w: (-len(w), w))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of about 200 entries that restores any text of the two worlds exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = _words()
    syllables = [c + v for c in facts.CONSONANTS for v in facts.VOWELS]
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
