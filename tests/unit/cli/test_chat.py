from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_dist.cli.chat import Chat
from rlhf_dist.cli.main import main
from rlhf_dist.data.tokenizer import load_tokenizer

WORDS = ["<unk>", "<eos>", "hello", "good", "day", "Instruction", "Response", "#", "##", "###", ":", "."]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few thousand parameters with a dozen words."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<unk>")
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=1,
        bos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def chat_with(monkeypatch: pytest.MonkeyPatch, model_dir: Path, lines: str, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", str(model_dir), "--device", "cpu", "--max-response-tokens", "4", *flags])


def test_answers_each_line(monkeypatch: pytest.MonkeyPatch, model_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert chat_with(monkeypatch, model_dir, "hello\n\n/reset\nhello\n/exit\nhello\n", "--temperature", "0") == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 2, "the empty line, the commands and what follows /exit are not answered"
    assert answers[0] == answers[1], "after /reset the same prompt gets the same greedy answer"


def test_unknown_command(monkeypatch: pytest.MonkeyPatch, model_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert chat_with(monkeypatch, model_dir, "/help\n") == 0
    assert "There is no command /help" in capsys.readouterr().err


def test_earlier_turns_are_in_view_and_a_full_context_is_rejected(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = load_tokenizer(str(model_dir))
    chat = Chat(LlamaForCausalLM.from_pretrained(model_dir), tokenizer, temperature=0.0, max_response_tokens=3)
    first = chat.say("hello")
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    chat.say("good day")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat_with(monkeypatch, model_dir, " ".join(["day"] * 125) + "\n") == 0
    assert "exceeds the model's context of 128. Type /reset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (["--temperature", "-1"], 2, "--temperature is -1.0; it must be 0"),
        (["--max-response-tokens", "0"], 2, "--max-response-tokens is 0; it must be at least 1"),
    ],
)
def test_wrong_options(
    monkeypatch: pytest.MonkeyPatch,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    expected: str,
):
    assert chat_with(monkeypatch, model_dir, "", *flags) == code
    assert expected in capsys.readouterr().err


def test_a_reply_ends_at_the_end_of_turn_token(model_dir: Path):
    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.add_special_tokens({"additional_special_tokens": ["good"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ 'good' }}{% endfor %}"
    model: Any = LlamaForCausalLM.from_pretrained(model_dir)
    end_of_turn = tokenizer.convert_tokens_to_ids("good")
    with torch.no_grad():
        # Greedy decoding then says "good" at once, and again and again.
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(
            torch.nn.functional.one_hot(torch.tensor(end_of_turn), len(WORDS)).float()
        )
    asked: list[torch.Tensor] = []
    generate = model.generate
    model.generate = lambda *args, **kwargs: asked.append(generate(*args, **kwargs)) or asked[-1]
    Chat(model, tokenizer, temperature=0.0, max_response_tokens=5).say("hello")
    assert asked[0][0].tolist().count(end_of_turn) == 2, "the user's turn and the reply's: nothing is said after it"


def test_a_reward_model_is_rejected(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    load_tokenizer(str(model_dir)).save_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(model_dir, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    assert main(["chat", str(tmp_path), "--device", "cpu"]) == 4
    assert "is no causal language model" in capsys.readouterr().err


def test_a_directory_without_a_model(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]):
    for file in model_dir.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(["chat", str(tmp_path)]) == 4
    assert "no model at" in capsys.readouterr().err
