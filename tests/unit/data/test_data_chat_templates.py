"""What chat templates and tokenizers of published families do: what they drop, tokens that are ordinary text, headers, calls.

The baseline is plain transformers: `tokenizer(tokenizer.apply_chat_template(...))`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from data_support import CHATML, train_tokenizer
from support.families import FAMILIES, MISTRAL
from support.tiny import tiny_tokenizer
from test_data_encoding import MARKS, TOOLS, bot, trained, user
from test_data_encoding_multi_turn import FORMATS
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from rlhf_dist.config.data import DataSource, SFTData
from rlhf_dist.core.errors import DataError
from rlhf_dist.data.chat_template import stop_token_ids
from rlhf_dist.data.encoding import encode_conversation, encode_prompt, encode_text
from rlhf_dist.data.loading import load_sft
from rlhf_dist.data.records import arranged
from rlhf_dist.data.rendering import render_conversation

ASSISTANT_CUE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def tool(content: str) -> dict[str, str]:
    return {"role": "tool", "content": content, "tool_call_id": "callid000", "name": "get"}


def calling(*calls: tuple[str, Any], content: str | None = "") -> dict[str, Any]:
    found = [{"type": "function", "id": "callid000", "function": {"name": n, "arguments": given}} for n, given in calls]
    return {"role": "assistant", "content": content, "tool_calls": found}


def with_tokens(template: str, plain: Iterable[str] = (), special: Iterable[str] = ()) -> Any:
    """A tokenizer with added tokens that are not special, and some that are."""
    made = train_tokenizer(*special)
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    made.chat_template = template
    return made


NEWLINES = ("\n", "\n\n", "\n\n\n", "  ", "<h1>", "user", "###")


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("content", ["c\n\nd\n\n\ne", "a  b\n", "<h1>x</h1> user", "### A\n### B", "Rất đẹp\n\n🌾"])
def test_tokens_of_ordinary_text_are_those_of_plain_transformers(family: str, content: str) -> None:
    """Gemma's tokenizer has runs of line ends and spaces as added tokens, which its template renders around turns."""
    template, special, _ = FORMATS[family]
    tokenizer = with_tokens(template, NEWLINES, special)
    messages = [user(content), bot(content), user(content), bot("end")]
    plain = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    if family == "Phi 3":  # a second stop token, which is never generated
        plain = plain.removesuffix("</s>").rstrip()
    assert encode_conversation(tokenizer, messages)[0] == tokenizer(plain, add_special_tokens=False)["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert encode_prompt(tokenizer, messages[:3]) == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_line_ends_beside_what_spells_a_special_token_stay_tokens() -> None:
    template, special, _ = FORMATS["Gemma"]
    tokenizer = with_tokens(template, NEWLINES, special)
    ids = encode_prompt(tokenizer, [user("c\n\nd</s>e\n\n\nf")])
    assert tokenizer.decode(ids) == "<s><start_of_turn>user\nc\n\nd</s>e\n\n\nf<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.eos_token_id not in ids
    assert (
        ids.count(tokenizer.convert_tokens_to_ids("\n\n")) == ids.count(tokenizer.convert_tokens_to_ids("\n\n\n")) == 1
    )


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_TOOL = (
    "{% for m in messages if m.role != 'tool' %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LAST_EXCHANGE = (
    "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASSISTANT_CUE
)
LAST_ANSWER = (
    "{% for m in messages %}{% if m.role == 'user' or loop.index >= loop.length - 1 %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + ASSISTANT_CUE
)
CUTS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:30] }}<|im_end|>\n{% endfor %}" + ASSISTANT_CUE
NEMO = (  # the system message comes before the last user message, if that is the last message
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{{ system + '\n\n' if system and loop.last }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
DROPPING = {
    "system": (
        NO_SYSTEM,
        [system("SECRETSYS"), user("hi")],
        r"system message 'SECRETSYS' .*data\.system to merge_into",
    ),
    "short system": (NO_SYSTEM, [system("N"), user("hi")], "system message 'N'"),
    "equal system": (NO_SYSTEM, [system("hi"), user("hi")], "system message 'hi'"),
    "tool": (NO_TOOL, [user("u"), bot("a"), tool("TOOLRESULT 21C")], "tool message 'TOOLRESULT 21C'"),
    "short tool": (NO_TOOL, [user("u"), bot("a"), tool("t")], "tool message 't'"),
    "earlier turns": (LAST_EXCHANGE, [user("first"), bot("a"), user("u2")], "user message 'first'"),
    "earlier answer": (LAST_ANSWER, [user("u"), bot("an"), user("u"), bot("a"), user("u")], "assistant message 'an'"),
    "end": (CUTS, [user("a" * 10 + " b" * 15)], "all of the user message 'aaaaaaaaaa b b"),
}


@pytest.mark.parametrize("case", DROPPING)
def test_a_message_that_the_template_drops_makes_the_row_invalid(chatml: Any, case: str) -> None:
    chatml.chat_template, messages, words = DROPPING[case]
    with pytest.raises(DataError, match=words):
        encode_conversation(chatml, [*messages, bot("yo")], [len(messages)])
    with pytest.raises(DataError, match=words):
        encode_prompt(chatml, messages)


def test_a_system_message_that_only_a_prompt_has() -> None:
    tokenizer = with_tokens(NEMO)
    assert "Be brief." in tokenizer.decode(encode_prompt(tokenizer, [system("Be brief."), user("u")]))
    for messages in ([user("u1"), bot("a1")], [user("u1"), bot("a1"), user("u2"), bot("a2")]):
        with pytest.raises(DataError, match=r"'Be brief\.'.* set data\.system to merge_into_user"):
            encode_conversation(tokenizer, [system("Be brief."), *messages])
    in_last = with_tokens(
        NEMO.replace("loop.last", "m == (messages | selectattr('role', 'equalto', 'user') | list)[-1]")
    )
    with pytest.raises(DataError, match=r"assistant turn 2 .* set data\.system to merge_into_user, .*train_on to last"):
        encode_conversation(in_last, [system("Be brief."), user("u1"), bot("a1"), user("u2"), bot("a2")])


@pytest.mark.parametrize(
    "change",
    [
        "{{ m.content | trim }}",
        "{{ m.content | tojson }}",
        "{{ m.content | upper }}",
        "{{ m.content.replace('\n', ' ') }}",
    ],
)
@pytest.mark.parametrize("content", ["two\nlines", 'a "b" \\ c', "  x  ", "Tiếng Việt", "x</s><|im_end|>"])
def test_a_message_that_the_template_changes_is_valid(chatml: Any, change: str, content: str) -> None:
    chatml.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{{ m.content }}{% else %}" + change + "{% endif %}<|im_end|>\n{% endfor %}" + ASSISTANT_CUE
    )
    messages = [system(content), user(content), bot("a"), tool(content), bot("b")]
    assert trained(chatml, messages) == "a<|im_end|>b<|im_end|>"
    plain = chatml.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert chatml.decode(encode_prompt(chatml, messages[:2])) == plain


FIRST_CALL = TOOLS.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
NO_ARGUMENTS = TOOLS.replace(" {{ c.function.arguments | tojson }}", "")


@pytest.mark.parametrize(
    ("calls", "which"),
    [
        ([("get", {"city": "Paris"}), ("get", {"city": "Rome"})], "call 2 of message 2, 'get'"),
        ([("get", {}), ("get", {})], "call 2 of message 2, 'get'"),
        ([("get", {"a": 1}), ("put", {"a": 1})], "call 2 of message 2, 'put'"),
    ],
)
def test_one_of_several_calls_that_the_template_drops(chatml: Any, calls: Any, which: str) -> None:
    chat = [user("u"), calling(*calls)]
    chatml.chat_template = FIRST_CALL
    with pytest.raises(DataError, match=rf"has tool_calls, which the chat template does not render \({which}\)"):
        encode_conversation(chatml, chat)
    with pytest.raises(DataError, match="has tool_calls"):
        encode_prompt(chatml, [*chat, tool("21C")])
    chatml.chat_template = TOOLS
    assert trained(chatml, chat).count("CALL") == 2
    chatml.chat_template = TOOLS.replace("tojson", "tojson(indent=4)")
    assert trained(chatml, chat).count("CALL") == 2


def test_arguments_that_the_template_drops(chatml: Any) -> None:
    chatml.chat_template = NO_ARGUMENTS
    with pytest.raises(DataError, match="has tool_calls, which"):
        encode_conversation(chatml, [user("u"), calling(("get", {"city": "Paris"}))])


QWEN3 = (  # reasoning is found in content, and rendered in the last turn
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ content.lstrip('\n') }}{% else %}{{ content }}"
    "{% endif %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + ASSISTANT_CUE
)


@pytest.mark.parametrize("is_special", [True, False])
def test_reasoning_in_content_is_the_templates_where_its_tokens_are_special(is_special: bool) -> None:
    think = ("<think>", "</think>")
    tokenizer = with_tokens(QWEN3, () if is_special else think, (*MARKS, *think) if is_special else MARKS)
    chat = [user("u"), bot("<think>\nr2\n</think>\n\nd")]
    assert trained(tokenizer, chat) == "<think>\nr2\n</think>\n\nd<|im_end|>"
    plain = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()
    assert encode_conversation(tokenizer, chat)[0] == tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert trained(tokenizer, [user("u"), bot("d") | {"reasoning_content": "r2"}]) == trained(tokenizer, chat)


@pytest.mark.parametrize("family", FORMATS)
def test_an_answer_forges_no_turn(family: str) -> None:
    """Tokens that a turn is made of, and the tokenizer's own, are text in an answer too; others are the tokens they are."""
    template, special, _ = FORMATS[family]
    marks = {*special, "<s>", "</s>"} | ({"<|assistant|>", "<|system|>"} if family == "Zephyr" else set())
    tokenizer = with_tokens(template, (), (*sorted(marks - {"<s>", "</s>"}), "<note>"))
    forging = set(tokenizer.convert_tokens_to_ids(sorted(marks)))
    honest, _ = encode_conversation(tokenizer, [user("u"), bot("x")])
    ids, _ = encode_conversation(tokenizer, [user("u"), bot("x" + " ".join(sorted(marks)) + "<note>")])
    assert [i for i in ids if i in forging] == [i for i in honest if i in forging]
    assert ids.count(tokenizer.convert_tokens_to_ids("<note>")) == 1
    asked = encode_prompt(tokenizer, [user("<note>")])
    assert tokenizer.convert_tokens_to_ids("<note>") not in asked


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("text", ["x<|im_end|>y", "<|im_start|>x", "x</s>y<|im_end|>", "a\n<s>b"])
def test_turn_marks_in_plain_text_are_text(is_special: bool, text: str) -> None:
    tokenizer = with_tokens(CHATML, () if is_special else MARKS, MARKS if is_special else ())
    marks = set(tokenizer.convert_tokens_to_ids([*MARKS, "<s>", "</s>"]))
    ids = encode_text(tokenizer, text)
    assert tokenizer.decode(ids) == text + "</s>"
    assert [i for i in ids if i in marks] == [tokenizer.eos_token_id]


def test_plain_text_begins_with_bos_where_the_tokenizer_adds_it() -> None:
    tokenizer = with_tokens(CHATML, MARKS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert encode_text(tokenizer, "ab") == [*tokenizer("ab")["input_ids"], tokenizer.eos_token_id]
    for text in ("a<|im_end|>b", "<s>a"):
        ids = encode_text(tokenizer, text)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids) == f"<s>{text}</s>"


def test_a_template_that_ignores_add_generation_prompt() -> None:
    cue = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    for encode, messages in ((encode_conversation, [user("u"), bot("yo")]), (encode_prompt, [user("u")])):
        with pytest.raises(DataError, match=r"renders '<\|assistant\|>\\n' before a response, but not in a prompt"):
            encode(with_tokens(template), messages)  # pyright: ignore[reportArgumentType]
    assert trained(with_tokens(template + cue), [user("u"), bot("yo")]) == "yo</s>"


def test_inner_turns_without_a_stop_token() -> None:
    tokenizer = with_tokens(
        "{% for m in messages %}{{ ('Bot: ' if m.role == 'assistant' else 'User: ') + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}"
    )
    chat = [user("u1"), bot("yo"), user("u2"), bot("bye")]
    with pytest.raises(DataError, match=r"turn 'yo\\n' with no stop token.* set data\.train_on to last"):
        encode_conversation(tokenizer, chat)
    assert trained(tokenizer, chat, targets=[3]) == "bye</s>"


R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' and m.content is none %}<|im_start|>assistant\n"
    "{% for c in m.tool_calls %}{{ '<call>' + c.function.name + '\n' + c.function.arguments + '</call>' }}{% endfor %}"
    "<|im_end|>"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}"
    "{% if m.role == 'tool' %}<result>{{ m.content }}</result>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize("answer", ["<answer>42</answer>", "<", "<think", ".<thing>", "42", "<thinking>\n"])
def test_an_answer_that_begins_as_the_prompt_for_it_ends(chatml: Any, answer: str) -> None:
    chatml.chat_template = R1
    assert trained(chatml, [user("u"), bot(answer)]) == answer + "<|im_end|>"
    chat = [user("u"), bot(answer), user("v"), bot(answer)]
    assert trained(chatml, chat) == (answer + "<|im_end|>") * 2
    # Where the cue depends on the turn: seen with another answer in the conversation itself.
    chatml.chat_template = R1.replace(
        "assistant\n<think>\n{% endif", "assistant\n<think>{{ messages | length }}\n{% endif"
    )
    assert trained(chatml, chat) == (answer + "<|im_end|>") * 2


R1_FIXED = R1.replace(" and m.content is none", " and m.tool_calls").replace(
    "{% elif m.role == 'assistant' %}", "{% endif %}{% if m.role == 'assistant' and m.content is not none %}"
)


@pytest.mark.parametrize("template", [R1, R1_FIXED])
def test_calls_in_the_form_that_the_template_renders(chatml: Any, template: str) -> None:
    """DeepSeek R1's takes calls with content None and arguments as a string, as OpenAI writes them; a later version renders an
    empty turn where the content is no None."""
    chatml.chat_template = template
    chat = [user("u"), calling(("get", {"city": "Hà Nội"})), tool("21C"), bot("Warm.")]
    call = '<call>get\n{"city": "Hà Nội"}</call><|im_end|>'
    assert trained(chatml, chat[:2]) == call
    assert trained(chatml, chat) == call + "Warm.<|im_end|>"
    raw = [user("u"), calling(("get", '{"city": "Hà Nội"}'), content=None), tool("21C")]
    plain = chatml.apply_chat_template(raw, tokenize=False, add_generation_prompt=True)
    assert chatml.decode(encode_prompt(chatml, chat[:3])) == plain
    if template == R1:
        with pytest.raises(DataError, match="has tool_calls, which"):
            encode_conversation(chatml, [user("u"), calling(("get", {}), content="Let me see.")])
    forged = [user("u"), calling(("get", {"a": "x<|im_end|>"}))]
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    assert encode_conversation(chatml, forged)[0].count(end) == 1


def test_what_the_prompt_has_and_a_finished_turn_lacks_is_in_every_report(
    chatml: Any, source: Callable[..., DataSource], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    chatml.chat_template = R1
    rows = [{"messages": [user(f"u{i}"), bot("a"), user("v"), bot("b")]} for i in range(3)]
    data = SFTData(train=(source("messages", rows),))
    for _ in range(2):  # the second reads the cache
        [(note, shown)] = load_sft(data, chatml, seed=0).train.report.losses().items()
        assert r"without '<think>\n'" in note
        assert shown == "3 rows"
    assert render_conversation(chatml, [user("u"), bot("a")]).notes


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.template])
@pytest.mark.parametrize("with_system", [False, True])
def test_templates_of_the_model_tests_render_all_or_nothing(family: str, with_system: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = FAMILIES[family].template
    messages = [system("Be brief.")] * with_system + [user("u1"), bot("a1"), user("u2"), bot("a2")]
    if with_system and "Gemma" in family:
        with pytest.raises(DataError, match="System role not supported"):
            encode_conversation(tokenizer, messages)
        return
    ids, mask = encode_conversation(tokenizer, messages)
    whole = tokenizer.decode(ids)
    assert all(message["content"] in whole for message in messages)
    read = tokenizer.decode([i for i, target in zip(ids, mask, strict=True) if not target])
    assert ("Be brief." in read) == with_system
    assert sum(i in stop_token_ids(tokenizer) for i, target in zip(ids, mask, strict=True) if target) == 2


def test_a_system_message_before_the_first_user_text_is_that_of_mistral() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MISTRAL
    messages = [system("Be brief."), user("u1"), bot("a1"), user("u2"), bot("a2")]
    eos = tokenizer.eos_token
    text = f"[INST] Be brief.\n\nu1 [/INST] a1{eos}[INST] u2 [/INST] a2{eos}"
    assert tokenizer.decode(encode_conversation(tokenizer, messages)[0]) == text
    merged, _ = arranged(tuple(messages), "merge_into_user", "keep")
    assert encode_conversation(tokenizer, merged) == encode_conversation(tokenizer, messages)
    with pytest.raises(DataError, match=r"Only user and assistant roles|must alternate"):
        encode_conversation(tokenizer, [user("u"), bot("a"), tool("t"), bot("b")])
