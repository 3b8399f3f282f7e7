from __future__ import annotations

import json

import pytest
import torch
from data_support import SHARED_DATA

from rlhf_dist.config.data import DataSettings, DataSource, RewardData, SFTData
from rlhf_dist.core.errors import DataError
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.files import read_rows
from rlhf_dist.data.loading import load_pairs, load_preferences, load_prompts, load_sequences, load_sft
from rlhf_dist.run.run_summary import describe_data

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data is not beside this checkout")


def instructions(num: int) -> list[dict[str, str]]:
    return [{"instruction": f"câu {i}", "output": f"đáp {i}" * (i % 3 + 1)} for i in range(num)]


def decoded(tokenizer, batch) -> list[str]:
    return [tokenizer.decode(row[:length]) for row, length in zip(batch.tokens, batch.lengths, strict=True)]


def test_batches_are_padded_on_the_right_in_the_order_asked(source, tokenizer):
    data = load_sequences([source("instruction", instructions(5))], DataSettings(), tokenizer)
    batch = data.batch([4, 0])
    assert batch.lengths.tolist() == [data.lengths[4], data.lengths[0]]
    assert batch.tokens.shape == batch.loss_mask.shape == (2, max(batch.lengths.tolist()))
    assert batch.tokens.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.bool
    assert [text.partition("Response:\n")[2] for text in decoded(tokenizer, batch)] == [
        "đáp 4" * 2 + "</s>",
        "đáp 0</s>",
    ]
    for row, mask, length in zip(batch.tokens, batch.loss_mask, batch.lengths, strict=True):
        assert not mask[length:].any()
        assert not row[length:].any()
        assert tokenizer.decode(row[mask]).startswith("đáp")
    assert torch.equal(data.batch(torch.tensor([4, 0])).tokens, batch.tokens)
    assert data.report.num_tokens == sum(data.lengths)


def test_eval_fraction_is_disjoint_and_drawn_by_the_seed(source, tokenizer):
    data = SFTData(train=(source("instruction", instructions(20)),), eval_fraction=0.25)

    def texts(part):
        return set(decoded(tokenizer, part.batch(range(len(part)))))

    split = load_sft(data, tokenizer, seed=0)
    assert split.eval is not None
    train, held_out = texts(split.train), texts(split.eval)
    assert (len(train), len(held_out)) == (15, 5)
    assert not train & held_out
    again, other = load_sft(data, tokenizer, seed=0).eval, load_sft(data, tokenizer, seed=1).eval
    assert texts(again) == held_out != texts(other)


def test_eval_sets_replace_the_fraction(source, write, tokenizer):
    held_out = DataSource(path=write("eval.jsonl", instructions(2)), kind="instruction")
    data = SFTData(train=(source("instruction", instructions(4)),), eval=(held_out,), eval_fraction=0.5)
    split = load_sft(data, tokenizer, seed=0)
    assert split.eval is not None
    assert (len(split.train), len(split.eval)) == (4, 2)
    assert load_sft(data.model_copy(update={"eval": (), "eval_fraction": 0.0}), tokenizer, 0).eval is None


@pytest.mark.parametrize("fraction", [0.05, 1.0])
def test_split_that_leaves_nothing(source, tokenizer, fraction):
    data = SFTData(train=(source("instruction", instructions(4)),), eval_fraction=fraction)
    with pytest.raises(DataError, match=r"of 4 records holds out .*both must be at least 1: change eval_fraction"):
        load_sft(data, tokenizer, seed=0)


def test_truncation_cuts_the_response_only(source, tokenizer):
    rows = [{"instruction": "q", "output": "x y z " * 20}, {"instruction": "q", "output": "x"}]
    whole = load_sequences([source("instruction", rows)], DataSettings(), tokenizer)
    limit = int(whole.lengths[0]) - 5
    cut = load_sequences([source("instruction", rows)], DataSettings(max_length_tokens=limit), tokenizer)
    assert (cut.report.num_truncated, cut.report.num_used) == (1, 2)
    assert torch.equal(cut.batch([0]).tokens, whole.batch([0]).tokens[:, :limit])
    assert tokenizer.eos_token_id not in cut.batch([0]).tokens
    assert torch.equal(cut.batch([1]).tokens, whole.batch([1]).tokens)


def test_truncation_drops_what_no_target_needs(source, tokenizer):
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "quvw", strict=True)]
    record = {"messages": [*turns[:2], {"role": "user", "content": "long " * 30}, turns[3]]}
    cut = load_sequences([source("messages", [record])], DataSettings(max_length_tokens=60), tokenizer)
    assert decoded(tokenizer, cut.batch([0])) == ["### Instruction:\nq\n\n### Response:\nu</s>"]


def test_too_long_under_each_policy(source, tokenizer):
    rows = [{"instruction": "q", "output": "x y z " * 30}, {"instruction": "q", "output": "x"}]

    def load(policy, limit=60):
        settings = DataSettings(max_length_tokens=limit, on_too_long=policy)
        return load_sequences([source("instruction", rows)], settings, tokenizer)

    skipped = load("skip")
    assert (len(skipped), skipped.report.num_skipped, skipped.report.num_used) == (1, 1, 1)
    assert skipped.report.skipped[0].endswith("data.jsonl:1")
    with pytest.raises(
        DataError, match=r"data\.jsonl:1: the record has \d+ tokens, more than max_length_tokens 60; raise it"
    ):
        load("error")
    with pytest.raises(
        DataError, match=r":1: the prompt alone has \d+ tokens, .* max_length_tokens 5, .*on_too_long to skip"
    ):
        load("truncate", limit=5)
    with pytest.raises(DataError, match=r"none of 2 records .*2 skipped under max_length_tokens 5"):
        load("skip", limit=5)


def test_long_text_is_chunked_without_loss(source, tokenizer):
    text = "một hai ba bốn năm sáu bảy tám chín mười " * 5
    [ids] = load_sequences([source("text", [{"text": text}])], DataSettings(), tokenizer).batch([0]).tokens
    data = load_sequences([source("text", [{"text": text}])], DataSettings(max_length_tokens=16), tokenizer)
    batch = data.batch(range(len(data)))
    # The targets of the chunks, put together, are the targets of the whole: each exactly once.
    assert torch.equal(batch.tokens[batch.loss_mask], ids[1:])
    assert batch.tokens[0, 0] == ids[0]
    assert data.report.num_truncated == 0
    assert (data.report.num_records, data.report.num_used) == (1, 1)


def test_errors_of_encoding_name_the_row(source, tokenizer):
    rows = [{"messages": [{"role": "user", "content": "u"}]}]
    with pytest.raises(DataError, match=r"data\.jsonl:1: the conversation has no assistant turn"):
        load_sequences([source("messages", rows)], DataSettings(), tokenizer)


def test_pairs(source, tokenizer):
    rows = [{"prompt": f"p{i}", "chosen": f"tốt {i}", "rejected": "xấu"} for i in range(6)]
    split = load_preferences(RewardData(train=(source("preference", rows),), eval_fraction=0.5), tokenizer, 0)
    assert split.eval is not None
    assert (len(split.train), len(split.eval)) == (3, 3)
    pairs = load_pairs([source("preference", rows)], DataSettings(), tokenizer, 0)
    batch = pairs.batch([1])
    assert decoded(tokenizer, batch.sequences) == [
        "### Instruction:\np1\n\n### Response:\ntốt 1</s>",
        "### Instruction:\np1\n\n### Response:\nxấu</s>",
    ]
    assert pairs.lengths[1] == batch.lengths.sum()
    assert (pairs.num_with_margins, pairs.most_responses) == (0, 2)


def test_rankings_and_pairs_in_one_set(source, tokenizer):
    rows = [
        {"prompt": "p", "responses": ["tốt", "tạm", "xấu"], "ratings": [3, 1, 1]},
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2},
        {"prompt": "r", "responses": ["c", "d"]},
    ]
    data = load_pairs([source("preference", rows)], DataSettings(), tokenizer, 0)
    batch = data.batch([2, 0, 1])
    texts = [text.partition("Response:\n")[2] for text in decoded(tokenizer, batch.sequences)]
    assert texts == [f"{text}</s>" for text in ("c", "d", "tốt", "tạm", "xấu", "a", "b")]
    assert batch.num_responses.tolist() == [2, 3, 2]
    assert batch.ratings.tolist() == [[0, 0, 0], [3, 1, 1], [2, 0, 0]]
    assert batch.ranks[1].tolist() == [0, 1, 1]
    assert data.lengths.tolist() == [int(data.batch([i]).lengths.sum()) for i in range(3)]
    assert (data.num_with_margins, data.most_responses) == (2, 3)
    assert data.report.num_tokens == sum(data.lengths)


LONG = "a b c d " * 10


def responses_of(data, index: int, tokenizer) -> list[str]:
    sequences = data.batch([index]).sequences
    return [text.partition("Response:\n")[2].removesuffix("</s>") for text in decoded(tokenizer, sequences)]


def test_responses_that_cutting_makes_equal_are_one_with_the_better_rank(source, tokenizer):
    rows = [
        {"prompt": "p", "responses": ["x", LONG + "x", "y", LONG + "y", "z"], "ratings": [5, 4, 3, 2, 1]},
        {"prompt": "p", "responses": ["x", "y", "z"]},
    ]
    data = load_pairs([source("preference", rows)], DataSettings(max_length_tokens=45), tokenizer, 0)
    report = data.report
    assert (report.num_used, report.num_skipped, report.num_truncated, report.num_dropped) == (2, 0, 1, 1)
    assert [place.endswith(":1") for place in report.dropped] == [True]
    batch = data.batch([0])
    assert batch.num_responses.tolist() == [4]
    assert batch.ratings.tolist() == [[5, 4, 3, 1]]
    assert batch.ranks.tolist() == [[0, 1, 2, 3]]
    assert batch.lengths[0].amax() == batch.lengths[0, 1] == 45
    assert responses_of(data, 0, tokenizer)[2:] == ["y", "z"]
    assert report.num_tokens == sum(data.lengths)


def test_under_skip_a_ranking_keeps_the_responses_that_fit(source, tokenizer):
    rows = [
        {"prompt": "p", "responses": [LONG, "x", "y", "y2", LONG + "y", "z"], "ratings": [6, 5, 4, 4, 3, 1]},
        {"prompt": "p", "responses": [LONG, "x", LONG + "y"]},  # one left: out
        {"prompt": "p", "responses": [LONG, "x", "y"], "ratings": [6, 1, 1]},  # a tie left: out
        {"prompt": "p", "chosen": LONG, "rejected": "x"},
    ]
    settings = DataSettings(max_length_tokens=45, on_too_long="skip")
    data = load_pairs([source("preference", rows)], settings, tokenizer, 0)
    assert responses_of(data, 0, tokenizer) == ["x", "y", "y2", "z"]
    batch = data.batch([0])
    assert batch.ranks.tolist() == [[0, 1, 1, 3]]
    assert batch.ratings.tolist() == [[5, 4, 4, 1]]
    assert (data.report.num_used, data.report.num_skipped, data.report.num_dropped) == (1, 3, 2)
    assert (data.report.num_truncated, data.most_responses) == (0, 4)


def test_repeated_responses_are_counted(source, tokenizer):
    rows = [{"prompt": "p", "responses": ["x", "y", "x", "x"]}, {"prompt": "p", "responses": ["x", "y"]}]
    report = load_pairs([source("preference", rows)], DataSettings(), tokenizer, 0).report
    assert (report.num_used, report.num_dropped, len(report.dropped)) == (2, 2, 1)


def test_only_the_training_records_need_usable_margins(source, write, tokenizer):
    bad = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}
    good = bad | {"margin": 1}
    held_out = DataSource(path=write("eval.jsonl", [bad]), kind="preference")

    def load(row, use_margins):
        data = RewardData(train=(source("preference", [row]),), eval=(held_out,))
        return load_preferences(data, tokenizer, 0, use_margins).train.num_with_margins

    assert load(bad, use_margins=False) == 0
    assert load(good, use_margins=True) == 1
    with pytest.raises(DataError, match=r"data\.jsonl:1: field 'margin' is -1, less than 0"):
        load(bad, use_margins=True)


def test_pairs_that_truncation_makes_equal_are_skipped(source, tokenizer):
    same = "a b c d " * 10
    rows = [
        {"prompt": "p", "chosen": same + "x", "rejected": same + "y"},
        {"prompt": "p", "chosen": "u " + same, "rejected": "v"},
    ]
    pairs = load_pairs([source("preference", rows)], DataSettings(max_length_tokens=45), tokenizer, 0)
    assert (len(pairs), pairs.report.num_skipped, pairs.report.num_truncated) == (1, 1, 1)
    batch = pairs.batch([0])
    assert batch.lengths[0, 0] == 45
    assert batch.tokens[0, 1, batch.lengths[0, 1] - 1] == tokenizer.eos_token_id


def test_ratings_without_prompt_are_plain_texts(source, tokenizer):
    rows = [{"response": "hay", "rating": 3}, {"response": "dở", "rating": 1}]
    batch = load_pairs([source("ratings", rows)], DataSettings(), tokenizer, 0).batch([0])
    assert decoded(tokenizer, batch.sequences) == ["hay</s>", "dở</s>"]
    assert batch.ratings.tolist() == [[3, 1]]


def test_prompts(source, tokenizer):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    data = load_prompts([source("prompt", [{"prompt": "chào"}, {"prompt": turns}])], tokenizer, 100, DataSettings())
    batch = data.batch([1, 0])
    assert decoded(tokenizer, batch) == [
        "### System:\ns\n\n### Instruction:\nu\n\n### Response:\n",
        "### Instruction:\nchào\n\n### Response:\n",
    ]
    assert batch.sample_ids.tolist() == [1, 0]
    assert data.batch([0, 0], sample_ids=[7, 8]).sample_ids.tolist() == [7, 8]
    assert (data.text(0), data.text(1)) == ("chào", "system: s\nuser: u")
    with pytest.raises(ValueError, match="unique sample ids"):
        data.batch([0, 0])


def test_prompts_are_never_cut(source, tokenizer):
    rows = source("prompt", [{"prompt": "ngắn"}, {"prompt": "dài " * 50}])
    for policy in ("error", "truncate"):
        with pytest.raises(DataError, match=r"data\.jsonl:2: the prompt has \d+ tokens, more than the 60 .*to skip"):
            load_prompts([rows], tokenizer, 60, DataSettings(on_too_long=policy))
    kept = load_prompts([rows], tokenizer, 60, DataSettings(on_too_long="skip"))
    assert (len(kept), kept.report.num_skipped) == (1, 1)


def test_rows_found_unusable_when_encoded_are_skipped_under_skip(source, tokenizer):
    long, held = "dài " * 50, []
    settings = DataSettings(max_length_tokens=60)
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ừ"}]}
        for text in ("chào", long, "hỏi")
    ] + [{"messages": [{"role": "user", "content": "không ai đáp"}]}]
    pairs = [{"prompt": text, "chosen": "tốt", "rejected": "xấu"} for text in ("chào", long, "hỏi")]
    prompts = [{"prompt": text} for text in ("chào", long, "hỏi")]
    for kind, rows, load in (
        ("messages", chats, lambda of: load_sequences([of], settings, tokenizer)),
        ("preference", pairs, lambda of: load_pairs([of], settings, tokenizer, 0)),
        ("prompt", prompts, lambda of: load_prompts([of], tokenizer, 60, DataSettings(on_too_long="truncate"))),
    ):
        with pytest.raises(DataError, match=r"data\.jsonl:2: the prompt"):
            load(source(kind, rows))
        data = load(source(kind, rows, on_bad_row="skip"))
        report = data.report
        assert (len(data), report.num_records, report.num_used, report.num_skipped) == (2, 2, 2, 0)
        assert [bad.reason.split(": ")[0].rpartition(":")[2] for bad in report.bad] == ["2", "4"][: len(rows) - 2]
        assert report.num_tokens == sum(data.lengths)
        held.append(json.loads(next(BadRows(list(report.bad)).lines()))["row"])
    assert [long in json.dumps(row, ensure_ascii=False) for row in held] == [True] * 3


def test_groups_stay_with_their_records_where_one_is_skipped(source, write, tokenizer):
    first = source("instruction", [{"instruction": "dài " * 50, "output": "a"}, *instructions(2)], on_bad_row="skip")
    second = DataSource(path=write("second.jsonl", [{"instruction": "q", "output": "b"}]), kind="instruction")
    train = load_sft(SFTData(train=(first, second), max_length_tokens=60), tokenizer, 0).train
    assert {name: items.tolist() for name, items in train.groups.items()} == {"data": [0, 1], "second": [2]}


def test_on_too_long_error_stops_also_where_bad_rows_are_skipped(source, tokenizer):
    settings = DataSettings(max_length_tokens=60, on_too_long="error")
    rows = source("instruction", [{"instruction": "q", "output": "dài " * 50}, *instructions(1)], on_bad_row="skip")
    with pytest.raises(DataError, match=r"data\.jsonl:1: the record has \d+ tokens"):
        load_sequences([rows], settings, tokenizer)
    asked = source("prompt", [{"prompt": "dài " * 50}, {"prompt": "q"}], on_bad_row="skip")
    with pytest.raises(DataError, match=r"data\.jsonl:1: the prompt has \d+ tokens"):
        load_prompts([asked], tokenizer, 60, DataSettings(on_too_long="error"))


def test_a_set_of_which_all_is_skipped_is_invalid(source, tokenizer):
    rows = source("instruction", [{"instruction": "dài " * 50, "output": "a"}], on_bad_row="skip")
    with pytest.raises(DataError, match=r"none of 1 records .*1 bad, .*:1: the prompt alone"):
        load_sequences([rows], DataSettings(max_length_tokens=60), tokenizer)


@needs_shared_data
def test_gsm8k(tokenizer):
    fields = {"instruction": "question", "output": "answer"}
    source = DataSource(path=str(SHARED_DATA / "gsm8k_test_200.jsonl"), kind="instruction", fields=fields)
    data = load_sequences([source], DataSettings(max_length_tokens=4096), tokenizer)
    assert data.report.num_used == 200
    batch = data.batch([0])
    trained = tokenizer.decode(batch.tokens[batch.loss_mask])
    assert trained.startswith("Janet sells 16 - 3 - 4")
    assert trained.endswith("#### 18</s>")


@needs_shared_data
def test_rated_film_reviews(tokenizer):
    path = str(SHARED_DATA / "movieReviewSnippets_GroundTruth.txt")
    source = DataSource(path=path, kind="ratings", columns=("id", "rating", "response"), limit=500)
    pairs = load_pairs([source], DataSettings(), tokenizer, 0)
    assert pairs.report.num_records > 200
    everything = DataSource(path=path, kind="ratings", columns=("id", "rating", "response"))
    assert sum(1 for _ in read_rows(everything)) == 10605


def dialogue(turns: int, words: int = 1) -> list[dict[str, str]]:
    """System message, then `turns` exchanges."""
    said = [{"role": "system", "content": "sys"}]
    for i in range(turns):
        said += [{"role": "user", "content": f"question{i} " * words}, {"role": "assistant", "content": f"answer{i}"}]
    return said


@pytest.mark.parametrize("limit", [45, 60, 90])
def test_the_oldest_turns_are_dropped_first_and_then_the_beginning_is_cut(source, tokenizer, limit):
    settings = DataSettings(max_length_tokens=limit, on_too_long="truncate_left")
    prompts = load_prompts([source("prompt", [{"prompt": dialogue(6)[:-1]}])], tokenizer, limit, settings)
    batch = prompts.batch([0])
    text = tokenizer.decode(batch.tokens[0])
    assert batch.lengths.tolist() <= [limit]
    assert "question5" in text
    assert "question0" not in text
    assert prompts.report.num_truncated == 1
    if limit > 45:  # more than the last exchange fits: whole turns, with the system message
        assert text.startswith(
            tokenizer.decode(
                load_prompts([source("prompt", [{"prompt": dialogue(1)[:-1]}])], tokenizer, 90, settings)
                .batch([0])
                .tokens[0]
            ).split("question")[0]
        )
    chats = load_sequences([source("messages", [{"messages": dialogue(6)}])], settings, tokenizer).batch(
        torch.tensor([0])
    )
    assert int(chats.lengths[0]) <= limit
    assert tokenizer.decode(chats.tokens[0][chats.loss_mask[0]]).endswith("answer5</s>")
    pairs = load_pairs(
        [source("preference", [{"prompt": dialogue(6)[:-1], "chosen": "good answer", "rejected": "bad"}])],
        settings,
        tokenizer,
        0,
    )
    assert pairs.report.num_truncated == 1
    batch = pairs.batch(torch.tensor([0]))
    rows = [
        tokenizer.decode(row[row != tokenizer.pad_token_id]) for row in batch.tokens.reshape(-1, batch.tokens.shape[-1])
    ]
    assert all(len(tokenizer(row, add_special_tokens=False)["input_ids"]) <= limit for row in rows)
    starts = [row.rpartition("question5")[0] for row in rows]
    assert starts[0] == starts[1]


def test_what_was_recognized_is_in_the_run_summary(source, tokenizer):
    row = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}
    found = load_sequences([source("messages", [row, row])], DataSettings(), tokenizer)
    summary = describe_data(records=found)
    [said] = [value for name, value in summary.items() if "'conversations' taken for messages" in name]
    assert "2" in said


def test_turns_of_one_role_are_merged_on_request(source, tokenizer):
    """For templates whose roles must alternate."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not loop.first and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    said = [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in said]}]
    with pytest.raises(DataError, match="roles must alternate"):
        load_sequences([source("messages", rows)], DataSettings(), tokenizer)
    merged = load_sequences([source("messages", rows)], DataSettings(same_role_turns="merge"), tokenizer)
    batch = merged.batch(torch.tensor([0]))
    assert tokenizer.decode(batch.tokens[0]) == "<user>a\n\nb<assistant>c\n\nd</s>"
    assert tokenizer.decode(batch.tokens[0][batch.loss_mask[0]]) == "c\n\nd</s>"
    # What is not to be learnt from is not joined with what is.
    rows[0]["messages"][2]["weight"] = 0
    with pytest.raises(DataError, match="roles must alternate"):
        load_sequences([source("messages", rows)], DataSettings(same_role_turns="merge"), tokenizer)
    rows[0]["messages"][3]["weight"] = 0
    rows[0]["messages"] += [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]
    merged = load_sequences([source("messages", rows)], DataSettings(same_role_turns="merge"), tokenizer)
    batch = merged.batch(torch.tensor([0]))
    assert tokenizer.decode(batch.tokens[0][batch.loss_mask[0]]) == "f</s>"
    assert "c\n\nd" in tokenizer.decode(batch.tokens[0])
    # So it is with the responses of preferences.
    turns = [{"role": "assistant", "content": text} for text in "cd"]
    pairs = [{"prompt": "a", "chosen": turns, "rejected": turns[:1]}]
    merged = load_pairs([source("preference", pairs)], DataSettings(same_role_turns="merge"), tokenizer, 0)
    assert tokenizer.decode(merged.batch(torch.tensor([0])).tokens[0, 0]) == "<user>a<assistant>c\n\nd</s>"


def test_a_prompt_of_one_long_turn_keeps_its_end_and_a_long_response_its_beginning(source, tokenizer):
    """Its header and the system message stay."""
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    limit = 60
    settings = DataSettings(max_length_tokens=limit, on_too_long="truncate_left")
    said = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4
    asked = {"prompt": [{"role": "system", "content": "S!"}, {"role": "user", "content": said}]}
    prompts = load_prompts([source("prompt", [asked])], tokenizer, limit, settings)
    [prompt] = prompts.batch([0]).tokens
    text = tokenizer.decode(prompt)
    assert text.startswith("<system>S!<user>")
    assert text.endswith(said[-10:] + "<assistant>")
    assert limit - 2 <= len(prompt) <= limit
    assert prompts.report.num_truncated == 1
    pair = asked | {"chosen": "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22", "rejected": "no"}
    pairs = load_pairs([source("preference", [pair])], settings, tokenizer, 0).batch(torch.tensor([0]))
    rows = [tokenizer.decode(row) for row in pairs.tokens.reshape(-1, pairs.tokens.shape[-1])]
    heads = {row.partition("<assistant>")[0] for row in rows}
    assert len(heads) == 1
    assert heads.pop().startswith("<system>S!<user>")
    assert rows[0].partition("<assistant>")[2].startswith("1 2 3 4")
    chat = [*asked["prompt"], {"role": "assistant", "content": "yes"}]
    batch = load_sequences([source("messages", [{"messages": chat}])], settings, tokenizer).batch(torch.tensor([0]))
    assert tokenizer.decode(batch.tokens[0]).startswith("<system>S!<user>")
    assert tokenizer.decode(batch.tokens[0][batch.loss_mask[0]]) == "yes</s>"


@pytest.mark.parametrize(
    "num_bytes", [3_000_000, 1_500_000, 700_000]
)  # full with records, their contents, their tokens
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_full_disk_of_the_cache_is_named(source, tokenizer, small_disk, monkeypatch, num_bytes, num_proc):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", small_disk)
    monkeypatch.setattr("rlhf_dist.data.tokenization.MIN_RECORDS_PER_PROCESS", 1 if num_proc > 1 else 10_000)
    records = source("text", [{"text": "calm and cool. " * (num_bytes // 15 // 40) + str(i)} for i in range(40)])
    with pytest.raises(DataError, match=r"disk of .* is full .* of 2,097,152 bytes are free.* HF_DATASETS_CACHE"):
        load_sequences([records], DataSettings(), tokenizer)
