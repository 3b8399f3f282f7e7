"""Starter data: JSONL records of every kind the three trainers read, made from human word ratings.

The task: write three or four words that begin with a letter, of which one word is given. Any lexicon word is a fair answer,
loved or hated, so the SFT model writes words of about neutral valence; people's ratings then say which of two answers
is the better one, and PPO can learn to write words that people like. A second task, naming how a word feels, gives the
instruction set the "labelled words" shape of ordinary NLP data.

Held-out sets use seed words that occur in no training prompt. The files are a function of (lexicon, seed, sizes) alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_dist.core.errors import DataError
from rlhf_dist.core.random import permutation, uniforms
from rlhf_dist.quickstart.lexicon import RatedWord, by_initial, human_ratings

RATED_TEXT_TEMPLATES = (
    "With {letter}; {word} is {feeling}; {words}.",
    "{word} is {feeling}. More words with {letter}; {words}.",
    "{word}, which is {feeling}, is like these; {words}.",
)
UNRATED_TEXT_TEMPLATES = (
    "Words that start with {letter}, like {word}; {words}.",
    "{word} is like these; {words}.",
)
"""Several shapes of plain text, so that what a list has to do with its letter is learned at any distance. How a seed word
of the held-out sets feels is never told."""
LIST_TEMPLATES = (
    "Write {count} words that start with {letter}, like this.",
    "Name {count} words with {letter}, like this.",
    "List {count} more words with {letter}.",
)
FEELING_TEMPLATES = ("How does this feel to people?", "Name the feeling of this word.")
COUNTS = {3: "three", 4: "four"}
FEELINGS = ((-1.75, "awful"), (-0.25, "bad"), (0.25, "neutral"), (1.75, "good"), (4.01, "great"))
"""Upper valence bound of each name of a feeling."""

Record = dict[str, Any]


@dataclass(frozen=True)
class StarterSizes:
    """How many records each file holds, and which words are used."""

    max_letters: int = 6
    """Longest word used. Short words keep the sequences short and can be learned by a tiny model."""
    max_std: float = 0.85
    """Words whose ten ratings scatter more than this are skipped: people do not agree on them."""
    min_words_per_letter: int = 25
    """A first letter with fewer words is skipped: it would have too few different answers."""
    eval_share: float = 0.15
    """Share of words that serve as seed words of held-out prompts only."""
    min_margin: float = 1.0
    """Smallest difference in mean valence between the chosen and the rejected response of a pair."""
    pretrain: int = 24000
    pretrain_eval: int = 256
    sft_train: int = 6000
    sft_eval: int = 256
    pairs_train: int = 8000
    pairs_eval: int = 512
    prompts_train: int = 3000
    prompts_eval: int = 256
    ptx: int = 2000


_DRAWS_PER_RECORD = 32


class _Draws:
    """The random numbers of one record, read one after the other."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = iter(values)

    def below(self, num: int) -> int:
        """An integer in 0..num-1."""
        return int(next(self._values) * num)

    def choose(self, options: Sequence[Any]) -> Any:
        """One of `options`."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[Any], count: int) -> list[Any]:
        """`count` different ones of `options`, in drawn order."""
        picked: list[int] = []
        for _ in range(count):
            index = self.below(len(options) - len(picked))
            # The index-th option that is not picked yet.
            for taken in sorted(picked):
                index += index >= taken
            picked.append(index)
        return [options[i] for i in picked]


def _draws(seed: int, stream: str, num: int, attempt: int = 0) -> list[list[float]]:
    """[num][32] uniforms: row i belongs to record i, whatever `num` is. One call for all, for speed."""
    values = uniforms(seed, stream, attempt, [0], num * _DRAWS_PER_RECORD)
    return values.reshape(num, _DRAWS_PER_RECORD).tolist()


@dataclass(frozen=True)
class _Maker:
    """Makes records from the words, split into seed words of training and of held-out prompts."""

    seed: int
    sizes: StarterSizes
    groups: Mapping[str, tuple[RatedWord, ...]]
    train_seeds: tuple[RatedWord, ...]
    eval_seeds: tuple[RatedWord, ...]

    def texts(self, stream: str, num: int) -> Iterator[Record]:
        """Plain text: a word, its letter and how it feels, then more words with the letter."""
        held_out = {word.word for word in self.eval_seeds}
        seeds = self.train_seeds + self.eval_seeds
        for row in _draws(self.seed, stream, num):
            draws = _Draws(row)
            word = draws.choose(seeds)
            words = [w.word for w in draws.sample(self.groups[word.word[0]], 6)]
            rated = () if word.word in held_out else RATED_TEXT_TEMPLATES
            summary = {"letter": word.word[0], "word": word.word, "feeling": feeling(word), "words": ", ".join(words)}
            yield {"text": draws.choose(rated + UNRATED_TEXT_TEMPLATES).format(**summary)}

    def instructions(self, stream: str, num: int, seeds: Sequence[RatedWord]) -> Iterator[Record]:
        """Instruction records: three of four ask for words, one for a feeling."""
        for row in _draws(self.seed, stream, num):
            draws = _Draws(row)
            word = draws.choose(seeds)
            if draws.below(4) == 0:
                instruction, output = draws.choose(FEELING_TEMPLATES), f"{feeling(word)}."
            else:
                instruction, count = self._list_task(draws, word)
                output, _ = self._answer(draws, word, count)
            yield {"instruction": instruction, "input": word.word, "output": output}

    def pairs(self, stream: str, num: int, seeds: Sequence[RatedWord]) -> Iterator[Record]:
        """Two answers to one prompt, both drawn as the SFT outputs are; people rated the words of `chosen` higher."""
        found: dict[int, Record] = {}
        for attempt in range(100):
            for item, row in enumerate(_draws(self.seed, stream, num, attempt)):
                if item in found:
                    continue
                draws = _Draws(row)
                word = draws.choose(seeds)
                instruction, count = self._list_task(draws, word)
                answers = [self._answer(draws, word, count) for _ in range(2)]
                (rejected, low), (chosen, high) = sorted(answers, key=lambda answer: answer[1])
                if high - low >= self.sizes.min_margin:
                    found[item] = {"prompt": _prompt(instruction, word), "chosen": chosen, "rejected": rejected}
            if len(found) == num:
                return iter([found[item] for item in range(num)])
        raise DataError(
            f"min_margin {self.sizes.min_margin}: 100 draws gave no two answers whose mean valence differs by so much; "
            "lower min_margin (about 1 is the spread between answers)"
        )

    def prompts(self, stream: str, num: int, seeds: Sequence[RatedWord]) -> Iterator[Record]:
        """`num` different prompts."""
        combos = [
            _prompt(template.format(count=count, letter=word.word[0]), word)
            for word in seeds
            for template in LIST_TEMPLATES
            for count in COUNTS.values()
        ]
        if num > len(combos):
            raise DataError(f"{stream}: {num} prompts asked for, {len(combos)} different ones exist; ask for fewer")
        return ({"prompt": combos[i]} for i in permutation(self.seed, stream, 0, len(combos))[:num].tolist())

    def _list_task(self, draws: _Draws, word: RatedWord) -> tuple[str, int]:
        """An instruction that asks for words, and for how many."""
        template, count = draws.choose(LIST_TEMPLATES), draws.choose(tuple(COUNTS))
        return template.format(count=COUNTS[count], letter=word.word[0]), count

    def _answer(self, draws: _Draws, word: RatedWord, count: int) -> tuple[str, float]:
        """An answer and the mean human valence of its words."""
        words = draws.sample(self.groups[word.word[0]], count)
        return ", ".join(w.word for w in words) + ".", sum(w.valence for w in words) / count


def _prompt(instruction: str, word: RatedWord) -> str:
    """The user message that `data/` makes of an instruction record."""
    return f"{instruction}\n\n{word.word}"


def follows_prompt(prompt: str, response: str) -> bool:
    """Does the response to a `prompts_*` or `pairs_*` prompt hold as many words as asked for, each with the asked letter?"""
    instruction, _, seed_word = prompt.rpartition("\n\n")
    words = [word.strip() for word in response.strip().rstrip(".").split(",")]
    asked = next((count for count, name in COUNTS.items() if name in instruction.split()), 0)
    return len(words) == asked and all(word.isalpha() and word[0] == seed_word[0] for word in words)


def feeling(word: RatedWord) -> str:
    """The name of what people feel about a word."""
    return next(name for bound, name in FEELINGS if word.valence < bound)


def _maker(seed: int, sizes: StarterSizes, lexicon: Mapping[str, RatedWord]) -> _Maker:
    usable = [w for w in lexicon.values() if 3 <= len(w.word) <= sizes.max_letters and w.std <= sizes.max_std]
    groups = by_initial(usable, sizes.min_words_per_letter)
    words = [word for group in groups.values() for word in group]
    order = [words[i] for i in permutation(seed, "starter/seeds", 0, len(words)).tolist()]
    num_eval = round(len(order) * sizes.eval_share)
    if num_eval == 0 or num_eval == len(order):
        raise DataError(
            f"{len(order)} usable words split into {num_eval} held-out seed words; raise max_letters or max_std, lower "
            "min_words_per_letter, or choose an eval_share strictly between 0 and 1"
        )
    return _Maker(seed, sizes, groups, tuple(order[num_eval:]), tuple(order[:num_eval]))


def write_records(
    folder: Path, seed: int, sizes: StarterSizes | None = None, lexicon: Mapping[str, RatedWord] | None = None
) -> dict[str, Path]:
    """Write all starter files as UTF-8 JSONL into `folder` (made when absent): file stem → path.

    `pretrain`, `pretrain_eval`, `ptx` hold {text}; `sft_train`, `sft_eval` {instruction, input, output}; `pairs_train`,
    `pairs_eval` {prompt, chosen, rejected}; `prompts_train`, `prompts_eval` {prompt}. Raises DataError when the sizes ask
    for more than the words give.
    """
    sizes = sizes or StarterSizes()
    maker = _maker(seed, sizes, human_ratings() if lexicon is None else lexicon)
    files: dict[str, Iterator[Record]] = {
        name: maker.texts(f"starter/{name}", getattr(sizes, name)) for name in ("pretrain", "pretrain_eval", "ptx")
    }
    for split, seeds in (("train", maker.train_seeds), ("eval", maker.eval_seeds)):
        for kind, make in (("sft", maker.instructions), ("pairs", maker.pairs), ("prompts", maker.prompts)):
            name = f"{kind}_{split}"
            files[name] = make(f"starter/{name}", getattr(sizes, name), seeds)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, records in files.items():
        paths[name] = folder / f"{name}.jsonl"
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        paths[name].write_text(lines, encoding="utf-8", newline="\n")
    return paths
