"""Descriptions without people in them: only words of a closed vocabulary stay, so no name, number or date can."""

from __future__ import annotations

import importlib.resources
import re
from functools import cache


@cache
def vocabulary() -> frozenset[str]:
    """Returns the words of vocabulary.txt."""
    text = importlib.resources.files("edge.imaging").joinpath("vocabulary.txt").read_text("utf-8")
    return frozenset(word for line in text.splitlines() if not line.startswith("#") for word in line.split())


_WORD = re.compile(r"[^\s,;:_^=\\/()\[\]{}<>|\"'+&#@!?]+")
_THICKNESS = re.compile(r"\d{1,2}([.,]\d{1,2})?mm")


def clean_text(text: str) -> str:
    """Returns the words of `text` that the vocabulary or a slice thickness knows, in order, one space between."""
    words = (word.strip(".-") if word != "t2*" else word for word in _WORD.findall(text))
    return " ".join(word for word in words if known_word(word) or _THICKNESS.fullmatch(word.casefold()))


def known_word(word: str) -> bool:
    """Tells whether a word is one of the vocabulary, whatever its case."""
    return word.casefold() in vocabulary()
