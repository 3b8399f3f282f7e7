"""The starter data: the same seed gives the same bytes, held-out means held out, chosen means people rated it higher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_dist.core.errors import DataError
from rlhf_dist.quickstart.lexicon import by_initial, human_ratings, lexicon_path, read_lexicon
from rlhf_dist.quickstart.records import FEELINGS, StarterSizes, feeling, follows_prompt, write_records

SMALL = StarterSizes(
    pretrain=200,
    pretrain_eval=20,
    sft_train=200,
    sft_eval=50,
    pairs_train=200,
    pairs_eval=100,
    prompts_train=200,
    prompts_eval=60,
    ptx=20,
)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_records(tmp_path_factory.mktemp("data"), seed=3, sizes=SMALL)


def test_the_lexicon_is_ten_ratings_a_word():
    lexicon = human_ratings()
    assert len(lexicon) > 7000
    assert all(len(word.ratings) == 10 for word in lexicon.values())
    assert all(abs(word.valence - sum(word.ratings) / 10) < 0.11 for word in lexicon.values())
    assert lexicon["love"].valence > 3 > -3 > lexicon["murder"].valence
    assert all(word.isalpha() and word.islower() for word in lexicon)


def test_a_broken_lexicon_is_rejected_with_its_line(tmp_path: Path):
    path = tmp_path / "lexicon.txt"
    path.write_text("love\t3.2\t0.4\t[3, 3, 3, 3, 3, 3, 3, 4, 4, 3]\nhate\tnone\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"lexicon\.txt:2: 'hate\\tnone'"):
        read_lexicon(path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install vaderSentiment"):
        lexicon_path()


def test_letters_with_few_words_are_skipped():
    groups = by_initial(human_ratings().values(), min_words=100)
    assert "s" in groups
    assert "q" not in groups
    assert all(word.word[0] == letter for letter, words in groups.items() for word in words)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(files: dict[str, Path], tmp_path: Path):
    same = write_records(tmp_path / "same", seed=3, sizes=SMALL)
    other = write_records(tmp_path / "other", seed=4, sizes=SMALL)
    for name, path in files.items():
        assert path.read_bytes() == same[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()


def test_a_record_does_not_depend_on_how_many_there_are(files: dict[str, Path], tmp_path: Path):
    fewer = write_records(
        tmp_path, seed=3, sizes=StarterSizes(**{**SMALL.__dict__, "sft_train": 50, "pairs_train": 50})
    )
    for name in ("sft_train", "pairs_train"):
        assert rows(fewer[name]) == rows(files[name])[:50]


def test_held_out_sets_use_seed_words_of_no_training_prompt(files: dict[str, Path]):
    def seed_words(split: str) -> set[str]:
        prompts = [row["prompt"] for kind in ("pairs", "prompts") for row in rows(files[f"{kind}_{split}"])]
        return {prompt.split("\n\n")[1] for prompt in prompts} | {row["input"] for row in rows(files[f"sft_{split}"])}

    assert seed_words("eval")
    assert not seed_words("train") & seed_words("eval")


def test_the_plain_text_does_not_tell_how_held_out_seed_words_feel(files: dict[str, Path]):
    names = [name for _, name in FEELINGS]
    held_out = {row["input"] for row in rows(files["sft_eval"])}
    telling = [row["text"] for row in rows(files["pretrain"]) if any(f" is {name}" in row["text"] for name in names)]
    telling = [text.split(" is ")[0].split()[-1].strip(",") for text in telling]
    assert telling
    assert not held_out & set(telling)


def test_prompts_are_different(files: dict[str, Path]):
    for split in ("train", "eval"):
        prompts = [row["prompt"] for row in rows(files[f"prompts_{split}"])]
        assert len(set(prompts)) == len(prompts)


def test_people_rated_the_chosen_words_higher(files: dict[str, Path]):
    lexicon = human_ratings()

    def mean(answer: str) -> float:
        words = answer.removesuffix(".").split(", ")
        return sum(lexicon[word].valence for word in words) / len(words)

    for split in ("train", "eval"):
        for row in rows(files[f"pairs_{split}"]):
            assert mean(row["chosen"]) - mean(row["rejected"]) >= SMALL.min_margin - 1e-9


def test_every_answer_does_what_its_prompt_asks(files: dict[str, Path]):
    for row in rows(files["pairs_train"]):
        assert follows_prompt(row["prompt"], row["chosen"])
        assert follows_prompt(row["prompt"], row["rejected"])


@pytest.mark.parametrize(
    ("response", "follows"),
    [
        ("calm, cool, cry.", True),
        ("calm, cool, cry", True),
        ("calm, cool.", False),
        ("calm, cool, dry.", False),
        ("calm, , cool.", False),
        ("", False),
    ],
)
def test_following_a_prompt(response: str, follows: bool):
    assert follows_prompt("Write three words that start like this.\n\ncharm", response) is follows


def test_feelings_are_those_of_the_ratings(files: dict[str, Path]):
    lexicon, names = human_ratings(), {name for _, name in FEELINGS}
    labels = [row for row in rows(files["sft_train"]) if row["output"].removesuffix(".") in names]
    assert 0.1 < len(labels) / SMALL.sft_train < 0.4
    assert all(feeling(lexicon[row["input"]]) == row["output"].removesuffix(".") for row in labels)


def test_more_prompts_than_exist_are_rejected(tmp_path: Path):
    with pytest.raises(DataError, match="prompts_eval: 100000 prompts asked for"):
        write_records(tmp_path, seed=0, sizes=StarterSizes(**{**SMALL.__dict__, "prompts_eval": 100_000}))


def test_an_impossible_margin_is_rejected(tmp_path: Path):
    sizes = StarterSizes(**{**SMALL.__dict__, "min_margin": 9.0, "pairs_train": 2, "pairs_eval": 2})
    with pytest.raises(DataError, match="lower min_margin"):
        write_records(tmp_path, seed=0, sizes=sizes)
