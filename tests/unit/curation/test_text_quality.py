"""Odd characters, scripts, and what is shown of the unseen."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.curation.text_quality import MEANINGS, SPELLED_OUT, count_oddities, oddities, printable, scripts, visible

ODD = {
    "replacement character": "lost \ufffd here",
    "control characters": "red \x1b[31m",
    "zero-width characters": "zero\u200bwidth",
    "bidirectional controls": "\u202edrow\u202c",
    "invisible tag characters": "hi \U000e0041\U000e0042",
    "mixed line ends": "a\r\nb\nc",
    "carriage returns": "a\r\nb\r\n",
    "unusual line separators": "a\u2028b",
    "private-use characters": "\ue000 bullet",
    "words of mixed scripts": "p\u0430ypal",
    "HTML left in": "fish &amp; chips",
    "very long words": "A" * 130,
    "mojibake": "l’Ã©tÃ© Ã  la plage",
    "not in composed form": "cafe\u0301",
}
FINE = [
    "An ordinary sentence, with a tab\tand\nlines. 3 < 4 & 5 > 4, x<y",
    "L'été à la plage, « voilà »",
    "Xin chào các bạn, Tiếng Việt rất đẹp",
    "می\u200cخواهم",  # Persian is spelt with zero-width non-joiners
    "क्\u200dष",  # and Hindi with joiners
    "👩\u200d👩\u200d👧 family",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f the flag of England is spelt with tags",
    "日本語の長い文章は空白なしで続く" * 20,
    "Дом is Russian, and α is Greek",
]


@pytest.mark.parametrize("name", ODD)
def test_each_oddity_is_found_and_nothing_else(name: str):
    assert set(ODD) == set(MEANINGS) - {SPELLED_OUT}
    assert set(oddities(ODD[name])) == {name}


@pytest.mark.parametrize("text", FINE)
def test_what_languages_are_spelt_with_is_not_odd(text: str):
    assert oddities(text) == {}


def test_texts_are_counted_and_the_first_places_kept_with_what_stands_around():
    counts, of_texts = count_oddities(
        [(f"f:{i}", "x" * 50 + "\ufffd" + "y" * 50 if i % 2 else "fine") for i in range(20)]
    )
    assert counts["replacement character"].num_texts == 10
    assert [place for place, _ in counts["replacement character"].places] == ["f:1", "f:3", "f:5", "f:7", "f:9"]
    assert counts["replacement character"].places[0][1] == "…" + "x" * 24 + "\ufffd" + "y" * 24 + "…"
    assert of_texts == [(), ("replacement character",)] * 10


def test_letters_are_counted_by_script():
    assert scripts("Hello мир 東京 ひらがな 123 !") == {"Latin": 5, "Cyrillic": 3, "Han": 2, "Hiragana": 4}
    assert scripts("مرحبا") == {"Arabic": 5}
    assert scripts("1 + 1 = 2") == {}


@given(st.text())
def test_nothing_that_is_shown_acts_on_the_display(text: str):
    parts = list(visible(text))
    acting = {c for part, _ in parts for c in part if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")}
    assert acting <= {"\n", "\u200c", "\u200d"}
    assert "\n" not in printable(text)
    # What stands for nothing is the text itself, in its order.
    plain = "".join(part for part, is_mark in parts if not is_mark)
    left = iter(text)
    assert all(character in left for character in plain)


def test_the_unseen_is_named_by_its_code_point():
    assert printable("a\u200bb\x1b\r\n\t\u00a0c") == "a⟨U+200B⟩b⟨U+001B⟩⟨CR⟩↵⇥⟨U+00A0⟩c"


def test_what_spells_a_special_token_is_counted():
    special = re.compile("</s>|<s>")
    texts = [("a:1", "ends</s> here"), ("a:2", "plain"), ("a:3", "<s>")]
    counts, of_texts = count_oddities(texts, special)
    assert counts[SPELLED_OUT].num_texts == 2
    assert counts[SPELLED_OUT].places[0][0] == "a:1"
    assert of_texts == [(SPELLED_OUT,), (), (SPELLED_OUT,)]
    assert count_oddities(texts)[0] == {}
