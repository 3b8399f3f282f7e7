"""`rlhf-dist data inspect`: the command, and its page in a browser."""

from __future__ import annotations

import json
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.curation.commands.inspect import parse
from rlhf_dist.ppo.build import prepare as prepare_ppo
from rlhf_dist.reward.build import prepare as prepare_reward
from rlhf_dist.sft.build import prepare as prepare_sft

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "</div><script>document.title=1</script><img src=//192.0.2.1/x>"
ROWS = [
    {"instruction": "Say hi & bye", "output": HOSTILE, "task": "<b>bold</b>"},
    {"instruction": "Color", "output": "\x1b[31mred\x1b[0m \u202eback\u202c \u200b."},
    {"instruction": "Đẹp quá 👋", "output": "Tiếng Việt"},
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def sft(tmp_path: Path, model: Path, rows: list[Any], **data: Any) -> list[str]:
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"model_path": str(model)},
        "data": {
            "max_length_tokens": 128,
            "train": [{"path": write(tmp_path / "a.jsonl", rows), "kind": "instruction"}],
            **data,
        },
        "sft": {"batch_size": 1},
    }
    path = tmp_path / "sft.yaml"
    path.write_text(json.dumps(config))
    return ["data", "inspect", "sft", str(path)]


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_what_is_shown_is_what_the_trainer_has(tmp_path: Path, tiny_lm: Path, capsys: pytest.CaptureFixture[str]):
    arguments = sft(
        tmp_path, tiny_lm, ROWS, eval=[{"path": write(tmp_path / "e.jsonl", ROWS[2:]), "kind": "instruction"}]
    )
    out = tmp_path / "out"
    assert main([*arguments, "--out_dir", str(out), "--seed", "3"]) == 0
    found = parse([*arguments[2:], "--seed", "3"])
    assert found is not None
    trained = prepare_sft(found[1]).data.train
    train, held_out = report_of(out)["sets"]
    examples = {int(e["location"].rpartition(":")[2]) - 1: e["sequences"][0] for e in train["examples"]}
    assert sorted(examples) == [0, 1, 2]
    from rlhf_dist.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_lm))
    for item, shown in examples.items():
        batch = trained.batch([item])
        ids, mask = batch.tokens[0], batch.loss_mask[0]
        assert "".join(piece["text"] for piece in shown["pieces"]) == tokenizer.decode(
            ids, clean_up_tokenization_spaces=False
        )
        assert (shown["tokens"], shown["targets"]) == (len(ids), int(mask.sum()))
        learnt = "".join(piece["text"] for piece in shown["pieces"] if piece.get("target"))
        assert learnt == tokenizer.decode(ids[mask], clean_up_tokenization_spaces=False)
    assert held_out["overlap"]["held-out records that are trained on"] == 1
    assert not (tmp_path / "run").exists()
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "index.html", "report.json"]
    printed = capsys.readouterr().out
    acting = {c for c in printed if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n"}
    assert not acting
    assert "⟦Tiếng Việt" in printed


def test_bad_rows_stop_it_as_they_stop_training_unless_they_are_to_be_listed(
    tmp_path: Path, tiny_lm: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = sft(tmp_path, tiny_lm, [*ROWS, {"instruction": "x", "output": ""}, "{broken"])
    out = tmp_path / "out"
    assert main([*arguments, "--out_dir", str(out)]) != 0
    assert "a.jsonl:4: field 'output'" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--out_dir", str(out), "--list_bad_rows", "true"]) == 0
    (train,) = report_of(out)["sets"]
    assert train["bad rows"] == 2
    assert [row["rows"] for row in train["kinds of bad rows"]] == [1, 1]
    assert len((out / "bad_rows.jsonl").read_text().splitlines()) == 2
    assert main([*arguments, "--out_dir", str(out), "--list_bad_rows", "true"]) != 0
    assert "--overwrite true" in capsys.readouterr().err
    assert main([*arguments, "--out_dir", str(out), "--list_bad_rows", "true", "--overwrite", "true"]) == 0


def test_pairs_of_a_reward_run_without_its_low_margin_pairs(tmp_path: Path, tiny_lm: Path):
    rows = [{"prompt": "Hi", "chosen": f"good {i}", "rejected": "bad", "margin": i} for i in range(4)]
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"model_path": str(tiny_lm)},
        "data": {
            "max_length_tokens": 128,
            "train": [{"path": write(tmp_path / "p.jsonl", rows), "kind": "preference"}],
        },
        "reward": {"batch_size": 1, "low_margin": {"below": 1.5, "weight": 0}},
    }
    (tmp_path / "reward.yaml").write_text(json.dumps(config))
    assert main(["data", "inspect", "reward", str(tmp_path / "reward.yaml"), "--out_dir", str(tmp_path / "out")]) == 0
    found = parse(["reward", str(tmp_path / "reward.yaml")])
    assert found is not None
    (train,) = report_of(tmp_path / "out")["sets"]
    assert train["sequences"] == len(prepare_reward(found[1]).data.train) == 2
    assert {example["margin"] for example in train["examples"]} == {2, 3}


def test_prompts_and_text_of_a_ppo_run_whose_reward_model_is_not_there_yet(
    tmp_path: Path, tiny_lm: Path, tiny_rm: Path
):
    config = {
        "run_dir": str(tmp_path / "run"),
        "policy": {"model_path": str(tiny_lm)},
        "reward": {"model_path": str(tmp_path / "later")},
        "rollout": {"max_response_tokens": 16},
        "data": {
            "max_length_tokens": 64,
            "on_too_long": "skip",
            "prompts": [
                {"path": write(tmp_path / "p.jsonl", [{"prompt": "Hi"}, {"prompt": "calm " * 60}]), "kind": "prompt"}
            ],
            "ptx": [{"path": write(tmp_path / "t.jsonl", [{"text": "calm is good"}]), "kind": "text"}],
        },
        "ppo": {
            "num_iterations": 1,
            "ptx_coef": 0.1,
            "prompts_per_iteration": 1,
            "mini_batch_size": 1,
            "ptx_batch_size": 1,
        },
    }
    (tmp_path / "ppo.yaml").write_text(json.dumps(config))
    out = tmp_path / "out"
    arguments = ["ppo", str(tmp_path / "ppo.yaml")]
    assert main(["data", "inspect", *arguments, "--out_dir", str(out)]) == 0
    prompts, text = report_of(out)["sets"]
    found = parse([*arguments, "--reward.model_path", str(tiny_rm)])
    assert found is not None
    data = prepare_ppo(found[1]).data
    assert (prompts["sequences"], prompts["records skipped"]) == (len(data.prompts), 1)
    assert prompts["lengths"]["max_length_tokens"] == 48
    assert text["tokens"] == int(data.ptx.lengths.sum())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "x.yaml"], "invalid choice: 'eval'"),
        (["sft"], "needs a configuration file"),
        (["sft", "x.yaml", "--num_examples", "-1"], "num_examples"),
        (["sft", "x.yaml", "--numb_examples", "1"], "numb_examples"),
    ],
)
def test_rejections(tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.yaml").write_text("seed: 0\n")
    assert main(["data", "inspect", *(str(tmp_path / a) if a == "x.yaml" else a for a in arguments)]) != 0
    assert said in capsys.readouterr().err


def test_help_and_schema(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "inspect", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--list_bad_rows" in shown
    assert "{sft,reward,ppo} CONFIG.yaml" in shown
    assert main(["schema", "data", "inspect"]) == 0
    assert "max_tokens_shown" in json.loads(capsys.readouterr().out)["properties"]


def test_the_page_holds_data_as_text_only(tmp_path: Path, tiny_lm: Path):
    out = tmp_path / "out"
    assert main([*sft(tmp_path, tiny_lm, ROWS), "--out_dir", str(out)]) == 0
    page = (out / "index.html").read_text("utf-8")
    tags: list[tuple[str, dict[str, str | None]]] = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))  # pyright: ignore
    reader.feed(page)
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in tags}
    assert all(str(attrs[name]).startswith("#") for _, attrs in tags for name in ("href", "src") if name in attrs)
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
    assert "<b>bold" not in page
    assert not {c for c in page if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n"}
    policy = next(attrs["content"] for tag, attrs in tags if tag == "meta" and "http-equiv" in attrs)
    assert str(policy).startswith("default-src 'none'")


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no Chromium at {CHROMIUM}")
def test_the_page_in_a_browser_without_a_network(tmp_path: Path, tiny_lm: Path):
    sync_api = pytest.importorskip("playwright.sync_api")
    out = tmp_path / "out"
    assert main([*sft(tmp_path, tiny_lm, ROWS * 2), "--out_dir", str(out), "--num_examples", "6"]) == 0
    requests: list[str] = []
    said: list[str] = []
    colors = {}
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 900})
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: said.append(message.text))
            page.goto((out / "index.html").as_uri())
            assert page.title() == "Data of sft run run"
            texts = page.locator("article .tokens").all_inner_texts()
            assert any(HOSTILE in text for text in texts)
            learnt = page.locator("article .target").all_inner_texts()
            assert any("Tiếng Việt" in text for text in learnt)
            assert not any("Đẹp quá" in text for text in learnt)
            assert "⟨U+202E⟩" in page.locator("article", has_text="Color").first.inner_text()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            style = "e => { const s = getComputedStyle(e); return [s.backgroundColor, s.color] }"
            colors[scheme] = (
                page.locator("body").evaluate(style),
                page.locator("article .target span").first.evaluate(style),
            )
            picture = page.screenshot(path=str(tmp_path / f"{scheme}.png"), full_page=True)
            assert len(picture) > 10_000
            page.set_viewport_size({"width": 380, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
            page.close()
        browser.close()
    assert set(requests) == {(out / "index.html").as_uri()}
    assert said == []
    assert all(light != dark for light, dark in zip(colors["light"], colors["dark"], strict=True))
    assert colors["light"][0] != colors["light"][1]


def test_a_run_s_own_configuration_on_real_data(tmp_path: Path, tiny_lm: Path, shared_data: Path):
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"model_path": str(tiny_lm)},
        "data": {
            "max_length_tokens": 512,
            "eval_fraction": 0.1,
            "train": [
                {
                    "path": str(shared_data / "movieReviewSnippets_GroundTruth.txt"),
                    "kind": "instruction",
                    "columns": ["id", "rating", "text"],
                    "limit": 300,
                    "name": "reviews",
                    "templates": {
                        "builtin": "classification",
                        "labels": {
                            "column": "rating",
                            "bins": [{"below": 0, "name": "negative"}, {"name": "positive"}],
                        },
                    },
                },
                {
                    "path": str(shared_data / "gsm8k_train_1000.jsonl"),
                    "kind": "instruction",
                    "fields": {"instruction": "question", "output": "answer"},
                    "limit": 100,
                    "name": "gsm8k",
                },
            ],
            "mixing": {"method": "equal"},
        },
        "sft": {"batch_size": 4},
    }
    (tmp_path / "sft.yaml").write_text(json.dumps(config))
    assert main(["data", "inspect", "sft", str(tmp_path / "sft.yaml"), "--out_dir", str(tmp_path / "out")]) == 0
    train, held_out = report_of(tmp_path / "out")["sets"]
    assert train["sequences"] + held_out["sequences"] == 400
    assert {row["name"] for row in train["tasks"]} == {"(none)", "classification"}
    taken = {row["source"]: row["taken"] for row in train["mixing"]}
    assert taken["reviews"] == taken["gsm8k"]
    assert [row["script"] for row in train["scripts"]] == ["Latin"]
