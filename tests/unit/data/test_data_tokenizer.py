from __future__ import annotations

from pathlib import Path

import pytest
from data_support import CHATML, train_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from rlhf_dist.core.errors import ConfigError, ModelError
from rlhf_dist.data.chat_template import stop_token_ids
from rlhf_dist.data.rendering import render_conversation
from rlhf_dist.data.tokenization import _tokenizer_identity
from rlhf_dist.data.tokenizer import add_pad_token, load_tokenizer

TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "Xin chào"},
]


def test_built_in_template_text(tokenizer):
    text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert text == (
        "### System:\nbe kind\n\n### Instruction:\nhi\n\n### Response:\nhello</s>\n\n"
        "### Instruction:\nXin chào\n\n### Response:\n"
    )


def test_what_was_set_is_saved_with_the_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again.pad_token == tokenizer.pad_token


def test_bos_is_rendered_once_where_the_tokenizer_adds_one(tmp_path):
    made = train_tokenizer()
    bos = made.bos_token_id
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_own_template_stays_unless_another_is_given(tmp_path, caplog):
    made = train_tokenizer("<|im_start|>", "<|im_end|>")
    made.chat_template = CHATML
    made.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == CHATML
    other = tmp_path / "other.jinja"
    other.write_text("{{ 1 }}")
    tokenizer = load_tokenizer(str(tmp_path), other)
    assert "other.jinja" in caplog.text
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).chat_template == "{{ 1 }}"


def test_template_path_is_used_where_there_is_none(tokenizer_path, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{{ m['role'] + '> ' + m['content'] + eos_token }}{% endfor %}")
    tokenizer = load_tokenizer(str(tokenizer_path), path)
    assert tokenizer.apply_chat_template(TURNS[1:2], tokenize=False) == "user> hi</s>"


@pytest.mark.parametrize("content", ["{% for", "{{ raise_exception('no') }}"])
def test_bad_template_is_invalid(tokenizer_path, tmp_path, content):
    path = tmp_path / "t.jinja"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"t\.jinja is not a chat template .* see "):
        load_tokenizer(str(tokenizer_path), path)


def test_missing_template_is_invalid(tokenizer_path, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jinja cannot be read"):
        load_tokenizer(str(tokenizer_path), tmp_path / "none.jinja")


@pytest.mark.parametrize(("special", "names", "pad"), [((), {}, "</s>"), (("<pad>",), {}, "<pad>")])
def test_pad_is_an_existing_token(tmp_path, special, names, pad):
    made = train_tokenizer(*special, **names)
    made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == len(made)


def test_unk_pads_where_there_is_one(tmp_path):
    train_tokenizer("<unk>", unk_token="<unk>").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<unk>"


def test_directory_without_tokenizer(tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer "):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_missing_directory(path):
    with pytest.raises(ModelError, match="is not a directory; give a directory"):
        load_tokenizer(path)


def test_hub_name_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"no-such-org/no-such-model cannot be loaded .*; give a directory"):
        load_tokenizer("no-such-org/no-such-model")


def test_broken_tokenizer_file(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_eos_is_required(tmp_path):
    made = train_tokenizer()
    made.eos_token = None
    made.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r'no EOS token.*set "eos_token"'):
        load_tokenizer(str(tmp_path))


def test_stop_tokens(tokenizer, chatml):
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]
    assert stop_token_ids(chatml) == [chatml.eos_token_id, chatml.convert_tokens_to_ids("<|im_end|>")]
    chatml.chat_template = None
    assert stop_token_ids(chatml) == [chatml.eos_token_id]


def test_a_reserved_token_pads_where_there_is_one(tmp_path):
    train_tokenizer("<|reserved_special_token_0|>").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<|reserved_special_token_0|>"


def test_several_templates(tokenizer_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    plain = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = {"tool_use": "{{ tools | tojson }}" + plain, "default": plain}
    tokenizer.save_pretrained(tmp_path / "both")
    loaded = load_tokenizer(str(tmp_path / "both"))
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    assert render_conversation(loaded, chat).text == "u</s>a</s>"
    assert render_conversation(loaded, chat, tools=[{"n": 1}]).text == '[{"n": 1}]u</s>a</s>'
    before = _tokenizer_identity(loaded)
    loaded.chat_template = loaded.chat_template | {"tool_use": "{{ tools }}" + plain}
    assert _tokenizer_identity(loaded) != before
    tokenizer.chat_template = {"tool_use": plain}
    tokenizer.save_pretrained(tmp_path / "one")
    with pytest.raises(ModelError, match="tool_use and none named default"):
        load_tokenizer(str(tmp_path / "one"))


def test_a_template_that_prints_the_date_is_named(tmp_path, caplog):
    made = train_tokenizer("<|im_start|>", "<|im_end|>")
    made.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    made.save_pretrained(tmp_path)
    for _ in range(2):
        load_tokenizer(str(tmp_path))
    assert [record.message.count("strftime_now") for record in caplog.records] == [1]


@pytest.mark.parametrize("pad", ["</s>", "<|im_end|>", "<pad>"])
def test_a_pad_token_that_ends_a_response_is_replaced(tokenizer_path, tmp_path, pad):
    """A reward model's score is read, in plain transformers, at the last token that is no padding."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<pad>"]})
    tokenizer.pad_token = pad
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "made")
    loaded = load_tokenizer(str(tmp_path / "made"))
    add_pad_token(loaded)
    assert loaded.pad_token_id not in stop_token_ids(loaded)
    assert (loaded.pad_token == "<pad>") == (pad == "<pad>")
