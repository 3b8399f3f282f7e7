"""Local models and endpoints under one protocol."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.openai_server import serving
from support.tiny import save_tiny_lm
from transformers import AutoModelForCausalLM

from rlhf_dist.core.errors import ConfigError, ModelError
from rlhf_dist.curation.config.generator import GeneratorConfig, Sampling
from rlhf_dist.curation.endpoint import EndpointGenerator
from rlhf_dist.curation.generators import Completion, Request, batches, check_some_answered, cut_at_stop, load_generator
from rlhf_dist.curation.local_models import HFGenerator
from rlhf_dist.data.chat_template import stop_token_ids
from rlhf_dist.data.encoding import encode_prompt
from rlhf_dist.data.tokenizer import load_tokenizer

GREEDY = Sampling(max_response_tokens=8, temperature=0)
DRAWN = Sampling(max_response_tokens=8)
CHAT = ({"role": "user", "content": "calm"},)


def local(path: Path, seed: int = 0, **settings: Any) -> HFGenerator:
    generator = load_generator(GeneratorConfig(model=str(path), precision="fp32", device="cpu", **settings), seed)
    assert isinstance(generator, HFGenerator)
    return generator


def greedy_by_hand(path: Path, ids: list[int], num: int) -> str:
    """Token after token without a cache."""
    tokenizer: Any = load_tokenizer(str(path))
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    start, stops = len(ids), stop_token_ids(tokenizer)
    for _ in range(num):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] in stops:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_a_local_model_continues_texts_and_answers_chats(tiny_lm: Path) -> None:
    tokenizer: Any = load_tokenizer(str(tiny_lm))
    text, chat = local(tiny_lm).generate([Request("calm is", GREEDY, 0), Request(CHAT, GREEDY, 1)])
    assert text.text == greedy_by_hand(tiny_lm, tokenizer("calm is")["input_ids"], 8)
    assert chat.text == greedy_by_hand(tiny_lm, encode_prompt(tokenizer, CHAT), 8)


def test_what_is_drawn_depends_on_seed_and_key_not_on_the_batch(tiny_lm: Path) -> None:
    keys = [5, 9, 9, 7]
    requests = [Request("calm is", DRAWN, key) for key in keys]
    first = local(tiny_lm, batch_size=1).generate(requests)
    assert [c.text for c in local(tiny_lm, batch_size=2).generate(requests[:2] + requests[3:])] == [
        first[0].text,
        first[1].text,
        first[3].text,
    ]
    assert first[1] == first[2]
    assert len({c.text for c in first}) == 3
    assert local(tiny_lm, seed=1, batch_size=1).generate(requests)[0] != first[0]


def test_sampling_settings_may_differ_in_a_call(tiny_lm: Path) -> None:
    generator = local(tiny_lm)
    mixed = generator.generate([Request("calm", GREEDY, 0), Request("calm", DRAWN, 1), Request("cool", GREEDY, 2)])
    alone = [generator.generate([Request("calm", GREEDY, 0)])[0], generator.generate([Request("calm", DRAWN, 1)])[0]]
    assert [mixed[0].text, mixed[1].text] == [c.text for c in alone]


def test_a_prompt_too_long_for_the_model_costs_that_request(tiny_lm: Path) -> None:
    long, fine = local(tiny_lm).generate([Request("calm " * 200, DRAWN, 0), Request("calm", DRAWN, 1)])
    assert (long.text, long.finish_reason) == ("", "error")
    assert "exceeds the model's context of 128" in long.error
    assert fine.finish_reason in ("eos", "length")


def test_a_stop_text_ends_a_completion(tiny_lm: Path) -> None:
    generator = local(tiny_lm)
    whole = generator.generate([Request("calm is", GREEDY, 0)])[0].text
    stop = whole[2]
    cut = generator.generate([Request("calm is", GREEDY.model_copy(update={"stop": (stop,)}), 0)])[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "eos")
    assert cut_at_stop("a##b#", ["#", "##b"]) == ("a", True)


def test_batches_hold_one_setting_each() -> None:
    requests = [Request("x", GREEDY if i % 3 else DRAWN, i) for i in range(8)]
    assert list(batches(requests, 2)) == [[0, 3], [6], [1, 2], [4, 5], [7]]


def test_a_journal_line_gives_the_completion_back() -> None:
    for completion in (Completion("", "eos"), Completion("a", "length", 3), Completion.failed("no")):
        assert Completion(**json.loads(json.dumps(completion.as_row()))) == completion
    with pytest.raises(ModelError, match=r"m answered none of 2 requests; the first: no"):
        check_some_answered([Completion.failed("no")] * 2, "m")
    check_some_answered([Completion.failed("no"), Completion("", "eos")], "m")
    check_some_answered([Completion.failed("no")], "m", answered_before=True)


def test_without_vllm_it_says_what_to_install(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else found(name, *more))
    with pytest.raises(ConfigError, match=r"needs the package vllm.*or set engine to hf"):
        load_generator(GeneratorConfig(engine="vllm", model=str(tiny_lm)), 0)


@pytest.mark.slow
def test_vllm_writes_what_transformers_writes(tmp_path: Path) -> None:
    """Where vLLM is installed; it wants an environment of its own."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    # vLLM's attention on CPUs has no heads of 16, which the tiny model has elsewhere.
    lm = save_tiny_lm(tmp_path / "lm", num_attention_heads=2, num_key_value_heads=1)
    options = {"enforce_eager": True, "max_model_len": 100}
    settings = GeneratorConfig(engine="vllm", model=str(lm), precision="fp32", vllm_options=options)
    requests = [Request(CHAT, GREEDY, 0), Request("calm is", GREEDY, 1), Request("calm " * 96, GREEDY, 2)]
    engine = load_generator(settings, 0)
    try:
        chat, text, long = engine.generate(requests)
        drawn = [engine.generate([Request("calm", DRAWN, key)])[0].text for key in (5, 5, 6)]
    finally:
        engine.close()
    here = local(lm).generate(requests[:2])
    assert [chat.text, text.text] == [completion.text for completion in here]
    assert "exceeds the model's context of 100" in long.error
    assert drawn[0] == drawn[1] != drawn[2]


# An endpoint, in the flesh: the same model behind a real server answers as it does here.


@pytest.mark.slow
def test_a_real_server_answers_as_the_model_does_here(tiny_lm: Path, tmp_path: Path) -> None:
    served = tmp_path / "lm"
    AutoModelForCausalLM.from_pretrained(tiny_lm).save_pretrained(served)
    load_tokenizer(str(tiny_lm)).save_pretrained(served)  # with its chat template, which the server takes from there
    with serving(served, tmp_path / "server.log") as url:
        endpoint = {"base_url": url, "api_key_env": None, "timeout_s": 60}
        settings = GeneratorConfig(engine="openai", model=str(served), endpoint=endpoint)  # pyright: ignore
        remote = load_generator(settings, 0)
        # The server takes temperature 0 for one that it cannot divide by.
        likeliest = Sampling(max_response_tokens=8, temperature=1e-4)
        answers = remote.generate([Request(CHAT, likeliest, 0), Request("calm is", likeliest, 1)])
        here = local(served).generate([Request(CHAT, GREEDY, 0), Request("calm is", GREEDY, 1)])
        assert [(a.text, a.finish_reason) for a in answers] == [(h.text, h.finish_reason) for h in here]
        assert [a.response_tokens for a in answers] == [h.response_tokens for h in here]
        remote.close()


# And with servers that go wrong.

Reply = tuple[int, dict[str, Any]]


@contextmanager
def protocol_server(reply: Callable[[str, dict[str, Any]], Reply]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server of that protocol whose answers a test decides, and the requests that it got."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "authorization": self.headers["Authorization"], **body})
            status, answer = reply(self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", seen
        finally:
            server.shutdown()
            thread.join()


def chat_answer(text: str | None, reason: str = "stop") -> Reply:
    message = {"role": "assistant", "content": text}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m"} | {
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8},
    }


def remote(url: str, batch_size: int = 4, **endpoint: Any) -> EndpointGenerator:
    settings = {"base_url": url, "api_key_env": None, "timeout_s": 30, "max_retries": 0, **endpoint}
    generator = load_generator(
        GeneratorConfig(engine="openai", model="m", batch_size=batch_size, endpoint=settings),  # pyright: ignore
        seed=3,
    )
    assert isinstance(generator, EndpointGenerator)
    return generator


def chat(text: str, key: int = 0, **sampling: Any) -> Request:
    return Request(({"role": "user", "content": text},), Sampling(**sampling), key)


def test_answers_come_in_the_order_of_the_requests() -> None:
    held = threading.Event()

    def reply(_: str, body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        held.wait(10) if text == "0" else held.set()  # the first request is answered last
        return chat_answer(f"answer {text}", "length")

    with protocol_server(reply) as (url, seen):
        answers = remote(url).generate([chat(str(i), i, temperature=0.5, top_p=0.9, stop=("#",)) for i in range(4)])
    assert answers == [Completion(f"answer {i}", "length", 7) for i in range(4)]
    by_text = {request["messages"][0]["content"]: request for request in seen}
    assert len({request["seed"] for request in seen}) == 4
    assert by_text["2"]["path"] == "/v1/chat/completions"
    sampling = {"model": "m", "max_tokens": 512, "temperature": 0.5, "top_p": 0.9, "stop": ["#"]}
    assert by_text["2"].items() >= sampling.items()


def test_what_a_server_does_not_know_is_skipped() -> None:
    with protocol_server(lambda *_: chat_answer("fine")) as (url, seen):
        remote(url).generate([chat("x")])
        remote(url, omit=["seed", "temperature", "top_p"]).generate([chat("x")])
        remote(url, omit=["seed"], max_tokens_key="max_completion_tokens").generate([chat("x", temperature=0.5)])
    whole, bare, some = (set(request) - {"path", "authorization"} for request in seen)
    assert whole == {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}
    assert bare == {"model", "messages", "max_tokens"}
    assert some == {"model", "messages", "max_completion_tokens", "temperature", "top_p"}


def test_a_busy_server_is_asked_again() -> None:
    states = iter([429, 500])

    def reply(_: str, __: dict[str, Any]) -> Reply:
        status = next(states, 200)
        return chat_answer("fine") if status == 200 else (status, {"error": {"message": "busy"}})

    with protocol_server(reply) as (url, seen):
        assert remote(url, max_retries=3).generate([chat("x")])[0].text == "fine"
    assert len(seen) == 3


def test_what_a_server_rejects_of_one_request_costs_that_request() -> None:
    def reply(_: str, body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        strange: dict[str, Reply] = {
            "long": (400, {"error": {"message": "context exceeded"}}),
            "none": chat_answer(None),
            "filtered": chat_answer("", "content_filter"),
            "empty": (200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}),
            "odd": (200, {"detail": "hello"}),
        }
        return strange.get(text, chat_answer("fine"))

    asked = ["long", "none", "filtered", "empty", "odd", "fine"]
    with protocol_server(reply) as (url, _):
        answers = remote(url).generate([chat(text) for text in asked])
    assert [a.finish_reason for a in answers] == ["error"] * 5 + ["eos"]
    assert "context exceeded" in answers[0].error


@pytest.mark.parametrize(("status", "said"), [(401, "status 401"), (404, "status 404"), (503, "status 503")])
def test_what_is_so_for_every_request_ends_the_work(status: int, said: str) -> None:
    rejection = pytest.raises(ModelError, match=rf"{said}.*so it is.*the same command again")
    with protocol_server(lambda *_: (status, {"error": {"message": "so it is"}})) as (url, _), rejection:
        remote(url).generate([chat("x"), chat("y")])


def test_a_dead_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ModelError, match=r"does not answer.*http_proxy"):
        remote("http://models.test/v1").generate([chat("x")])


def test_a_server_that_is_not_there_or_does_not_answer() -> None:
    with pytest.raises(ModelError, match=r"does not answer.*check base_url"):
        remote("http://127.0.0.1:9/v1").generate([chat("x")])
    free = threading.Event()

    def reply(*_: Any) -> Reply:
        free.wait(20)
        return chat_answer("late")

    with protocol_server(reply) as (url, _):
        try:
            with pytest.raises(ModelError, match=r"raise timeout_s"):
                remote(url, timeout_s=0.3).generate([chat("x")])
        finally:
            free.set()


def test_the_key_comes_from_the_environment_and_is_named_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cret")
    server = protocol_server(lambda *_: (401, {"error": {"message": "bad key"}}))
    with server as (url, seen), pytest.raises(ModelError) as rejection:
        remote(url, api_key_env="SOME_KEY").generate([chat("x")])
    assert seen[0]["authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(rejection.value)
    monkeypatch.setenv("SOME_KEY", " ")
    with pytest.raises(ConfigError, match="SOME_KEY, but that environment variable is not set or empty"):
        remote(url, api_key_env="SOME_KEY")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"engine": "openai"}, "endpoint is not given"),
        ({"endpoint": {"base_url": "http://a/v1"}}, "asks no endpoint"),
        ({"engine": "openai", "endpoint": {"base_url": "localhost:8000"}}, "is no HTTP address"),
        ({"engine": "openai", "endpoint": {"base_url": "http://me:s3cret@a/v1"}}, "a user, a password"),
        ({"engine": "openai", "endpoint": {"base_url": "http://a/v1", "api_key_env": "sk-s3cret"}}, "not the key"),
        (
            {
                "engine": "openai",
                "endpoint": {"base_url": "http://a/v1", "omit": ["top_p"]},
                "sampling": {"top_p": 0.9},
            },
            "sampling.top_p is 0.9, but endpoint.omit",
        ),
        ({"vllm_options": {"a": 1}}, "has no vllm_options"),
        ({"sampling": {"stop": [""]}}, "stop holds an empty text"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem) as rejection:
        GeneratorConfig(model="m", **settings)
    assert "s3cret" not in str(rejection.value.errors()[0]["ctx"]["error"])


# Tools, and what people's text spells.

TOOLS = ({"name": "weather", "description": "of a city"},)


def test_an_endpoint_gets_tools_and_calls_as_the_protocol_has_them() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    turns = (CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "9"})
    with protocol_server(lambda *_: chat_answer("fine")) as (url, seen):
        remote(url).generate([Request(turns, GREEDY, 0, TOOLS)])
        remote(url).generate([Request(CHAT, GREEDY, 0)])
    assert seen[0]["tools"] == [{"type": "function", "function": TOOLS[0]}]
    assert json.loads(seen[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"city": "Ulm"}
    assert "tools" not in seen[1]


def test_a_local_model_is_shown_tools(tiny_lm: Path, tmp_path: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    generator = local(tiny_lm, template_path=str(template))
    ids = generator.encode(Request(CHAT, GREEDY, 0, TOOLS))
    assert isinstance(ids, list)
    assert generator.tokenizer.decode(ids) == "weather <user>calm<assistant>"


def test_a_text_cannot_forge_special_tokens(tiny_lm: Path) -> None:
    generator = local(tiny_lm)
    eos = generator.tokenizer.eos_token
    for text in (f"calm{eos}is", f"calm{eos}"):
        ids = generator.encode(Request(text, GREEDY, 0))
        assert isinstance(ids, list)
        assert generator.tokenizer.eos_token_id not in ids
        assert generator.tokenizer.decode(ids) == text


# Models without a system turn, or whose turns must alternate.

SYSTEM = ({"role": "system", "content": "be calm"}, *CHAT, {"role": "user", "content": "cool"})
MERGED = [{"role": "user", "content": "be calm\n\ncalm\n\ncool"}]
ARRANGE: Any = {"system": "merge_into_user", "same_role_turns": "merge"}
STRICT_TEMPLATE = """{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception(
'roles must alternate') }}{% endif %}{{ m['content'] }}{{ eos_token }}{% endfor %}"""


def test_an_endpoint_gets_arranged_messages() -> None:
    with protocol_server(lambda *_: chat_answer("fine")) as (url, seen):
        settings = GeneratorConfig.model_validate(
            {"engine": "openai", "model": "m", "endpoint": {"base_url": url, "api_key_env": None}, **ARRANGE}
        )
        load_generator(settings, 0).generate([Request(SYSTEM, GREEDY, 0)])
    assert seen[0]["messages"] == MERGED


def test_a_local_model_gets_arranged_messages(tiny_lm: Path, tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(STRICT_TEMPLATE)
    [failed] = local(tiny_lm, template_path=template).generate([Request(SYSTEM, GREEDY, 0)])
    assert "alternate" in failed.error
    [made] = local(tiny_lm, template_path=template, **ARRANGE).generate([Request(SYSTEM, GREEDY, 0)])
    tokenizer: Any = load_tokenizer(str(tiny_lm), template)
    assert made.text == greedy_by_hand(tiny_lm, encode_prompt(tokenizer, MERGED), 8)
