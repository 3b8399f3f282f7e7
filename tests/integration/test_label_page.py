"""The labeling page in a real browser: judged by keys and clicks, killed, gone on with, exported, trained on."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.runs import cli, write_config

from rlhf_dist.curation import label

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser and is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

STATIC = Path(label.__file__).parent / "static"
EVIL = "<script>window.pwned=1</script><img src=x onerror='window.pwned=2'> `${window.pwned=3}` {{window.pwned=4}}</script>\n x"
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Server:
    """`rlhf-dist label` in its own process."""

    def __init__(self, config: Path, *overrides: str) -> None:
        self.process = cli("label", str(config), *overrides)
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if line.startswith("Ctrl-C"):
                break
        found = re.findall(r"(http://\S+)", self.said)
        assert len(found) == 2, self.said
        self.annotators, self.organizer = found
        self.port = urlsplit(self.annotators).port

    def end(self, how: signal.Signals) -> int:
        """Its exit code; what it said is in `said`."""
        self.process.send_signal(how)
        rest, _ = self.process.communicate(timeout=60)
        self.said += rest
        return self.process.returncode


@contextlib.contextmanager
def serving(config: Path, *overrides: str) -> Iterator[Server]:
    server = Server(config, *overrides)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@contextlib.contextmanager
def visiting(browser: Any, **context: Any) -> Iterator[Any]:
    """A page of a browser of its own that may talk to 127.0.0.1 only, without an error."""
    opened = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | context))
    hosts: set[str | None] = set()
    errors: list[str] = []
    opened.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page = opened.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if "Content Security Policy" in m.text else None)
    page.on("websocket", lambda socket: hosts.add(urlsplit(socket.url).hostname))
    page.set_default_timeout(30_000)
    yield page
    opened.close()
    assert hosts - {None} == {"127.0.0.1"}  # data: and blob: have no host
    assert errors == []


def enter(page: Any, address: str, name: str) -> None:
    page.goto(address)
    page.get_by_label("name").fill(name)
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-unit]")


def shown(page: Any) -> tuple[str, str, str]:
    """What names the pair, and the texts of A and B."""
    unit = page.locator("[data-unit]").get_attribute("data-unit")
    return unit, *(page.locator(f".side-{side} .pane-body").inner_text() for side in "ab")


def until_another(page: Any, unit: str) -> None:
    page.wait_for_function("unit => document.querySelector('[data-unit]')?.dataset.unit !== unit", arg=unit)


def lines(path: Path) -> list[dict[str, Any]]:
    """Read as any program would, not by the code under test."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def labeling(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    path = tmp_path / "candidates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "out_dir": str(tmp_path / "label"),
        "sources": [{"path": str(path), "kind": "candidates"}],
        "server": {"port": 0},
    }
    return write_config(tmp_path / "label.yaml", config | settings)


def test_the_keys_of_the_page(browser: Any):
    page = browser.new_page()
    page.set_content("<div data-unit=first></div>")
    page.evaluate("() => { window.sent = []; window.emitEvent = (name, args) => sent.push(args.choice); }")
    page.add_script_tag(path=STATIC / "page.js")
    chosen = {
        "a": "1 a A ArrowLeft",
        "b": "2 b B ArrowRight",
        "tie": "3 t",
        "both_bad": "4 x",
        "skip": "s",
        "undo": "u U",
    }
    for choice, keys in chosen.items():
        for key in keys.split():
            page.keyboard.press(key)
            assert page.evaluate("sent.splice(0)") == [choice]
    for key in ("Backspace", "Delete", "Enter", "Control+a", "Escape", "5"):  # no slip takes a judgement back
        page.keyboard.press(key)
        assert page.evaluate("sent.splice(0)") == [], key
    page.close()


def prefer_good(page: Any, by_key: bool) -> dict[str, str]:
    """Choose the response that says so; returns once the next pair is there."""
    unit, left, right = shown(page)
    choice = "a" if "good" in left else "b"
    assert ("good" in left) != ("good" in right)
    if by_key:
        page.keyboard.press({"a": "ArrowLeft", "b": "2"}[choice])
    else:
        page.locator(f".choice-{choice}").click()
    until_another(page, unit)
    return {"unit": unit, "choice": choice}


def test_ten_pairs_a_killed_server_an_undo_an_export_and_a_reward_model(
    browser: Any, tmp_path: Path, make_config: Make
):
    words = ["calm", "kind", "cool", "lime", "mild", "warm", "dear", "fond", "glad", "neat"]
    rows = [
        {
            "prompt": f"say {word}",
            "candidates": [{"text": f"good {word}"}, {"text": f"bad {word} {word}"}][:: (-1) ** n],
        }
        for n, word in enumerate(words)
    ]
    config = labeling(tmp_path, rows)
    journal = tmp_path / "label" / "judgements.jsonl"
    said: list[dict[str, str]] = []
    with visiting(browser) as page:
        with serving(config) as server:
            enter(page, server.annotators, "Ann")
            assert "token" not in page.url
            for n in range(5):
                if n == 2:
                    page.locator(".criterion").first.get_by_role("button", name="=").click()
                    page.keyboard.press("c")
                    page.keyboard.type("1 2 s u: no choices while writing")
                    page.keyboard.press("Escape")
                said.append(prefer_good(page, by_key=n % 2 == 0))
                # What the page has moved on from is on disk.
                assert [line["choice"] for line in lines(journal)] == [entry["choice"] for entry in said]
                assert page.locator(".lab-count").inner_text() == f"{n + 1} of 10"
            standing = shown(page)
            page.evaluate("window.before = true")
            assert server.end(signal.SIGKILL) == -signal.SIGKILL
        with serving(config, "--server.port", str(server.port)) as server:
            # The page finds the new server by itself: same address, same token.
            page.wait_for_function("window.before === undefined && document.querySelector('[data-unit]')")
            assert shown(page) == standing
            assert page.locator(".lab-count").inner_text() == "5 of 10"
            # A slip, taken back.
            wrong = "2" if "good" in standing[1] else "1"
            page.keyboard.press(wrong)
            until_another(page, standing[0])
            page.keyboard.press("u")
            page.wait_for_function(
                "unit => document.querySelector('[data-unit]').dataset.unit === unit", arg=standing[0]
            )
            assert shown(page) == standing
            for n in range(5):
                prefer_good(page, by_key=n % 2 == 1)
            page.get_by_text("Everything is judged").wait_for()
            assert server.end(signal.SIGINT) == 0
            assert "Stopped. 12 entries" in server.said
            assert "Traceback" not in server.said
    entries = lines(journal)
    assert len(entries) == 12
    assert entries[6]["choice"] == "withdrawn"
    assert entries[2]["comment"] == "1 2 s u: no choices while writing"
    assert entries[2]["criteria"] == {"helpful": "tie"}
    assert all(entry["seconds"] > 0 for entry in entries if entry["choice"] != "withdrawn")
    assert {tuple(entry["shown"]) for entry in entries} == {(0, 1), (1, 0)}

    finished("label", "export", str(config))
    records = tmp_path / "label" / "export" / "records.jsonl"
    assert {(r["prompt"], r["chosen"], r["rejected"]) for r in lines(records)} == {
        (f"say {word}", f"good {word}", f"bad {word} {word}") for word in words
    }
    assert "10 of 10" in finished("label", "report", str(config))

    reward = make_config("reward", tmp_path / "reward", zero_stage=0, cluster="inline")
    reward["data"] |= {"train": [{"path": str(records), "kind": "preference"}]}
    reward["reward"] |= {"num_steps": 20}
    finished("reward", str(write_config(tmp_path / "reward.yaml", reward)))
    summary = json.loads((tmp_path / "reward" / "summary.json").read_text(encoding="utf-8"))
    assert summary["after"]["eval_margin"] > summary["before"]["eval_margin"]
    assert summary["after"]["eval_accuracy"] == 1


def finished(*arguments: str) -> str:
    """What a command said that ended well."""
    process = cli(*arguments)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def test_untrusted_texts_several_annotators_and_the_organizer(browser: Any, tmp_path: Path):
    turns = [
        {"role": "system", "content": EVIL},
        {"role": "user", "content": "q " * 500},
        {"role": "assistant", "content": "r"},
        {"role": "user", "content": "the last question"},
    ]
    code = "text\n```html\n<b>bold</b>\n\tindented\n```"
    rows = [{"prompt": turns, "candidates": [{"text": EVIL, "model": "m"}, {"text": code}]}]
    rows += [{"prompt": EVIL, "candidates": ["x", "long" * 2000]}]
    config = labeling(tmp_path, rows, title=EVIL[:50], guidelines=EVIL)
    with serving(config) as server, visiting(browser) as page:
        enter(page, server.annotators, "Ann </div>")
        for _ in rows:
            unit, left, right = shown(page)
            # As text, to the last space, and nothing of it as an element.
            assert EVIL in (left, right) or EVIL in page.locator(".prompt").inner_text()
            assert page.locator(".pane script, .pane img, .pane b").count() == 0
            assert page.evaluate("window.pwned") is None
            if EVIL not in (left, right):
                assert page.locator(".pane-body").first.evaluate("e => e.scrollWidth <= e.clientWidth")
            else:
                assert page.locator(".code").inner_text() == "<b>bold</b>\n\tindented"
                assert page.get_by_text("the last question").is_visible()
            # Two presses before the page has moved on are one answer.
            page.evaluate("""for (const key of ["1", "1"])
                document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}))""")
            until_another(page, unit)
        page.get_by_text("Everything is judged").wait_for()
        assert len(lines(tmp_path / "label" / "judgements.jsonl")) == 2
        assert page.evaluate("window.pwned") is None
        dark = page.evaluate("document.body.classList.contains('body--dark')")
        page.get_by_label("light or dark").click()
        page.wait_for_function("dark => document.body.classList.contains('body--dark') !== dark", arg=dark)
        assert page.goto(server.organizer.partition("?")[0]).status == 403

        with visiting(browser, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True) as phone:
            phone.goto(server.annotators)
            phone.get_by_text("Ann </div> (2 of 2)").wait_for()
            phone.get_by_label("name").fill("Bob")
            phone.get_by_text("Start", exact=True).tap()
            for _ in rows:
                phone.wait_for_selector("[data-unit]")
                # Once it is laid out, nothing is wider than the screen.
                phone.wait_for_function("document.documentElement.scrollWidth === 390")
                unit, *_ = shown(phone)
                phone.locator(".choice-skip").tap()  # in reach, however long the responses
                until_another(phone, unit)
            phone.get_by_text("Show the 2 skipped pairs again").tap()
            phone.wait_for_selector("[data-unit]:not([data-unit=finished])")
            phone.locator(".choice-tie").tap()
        with visiting(browser) as organizer:
            organizer.goto(server.organizer)
            cells = organizer.locator("tbody").first.locator("tr").all_inner_texts()
            assert [row.split("\n\t\n")[:2] for row in cells][:2] == [["Ann </div>", "2 of 2"], ["Bob", "1 of 2"]]
        assert rejected(server, {"Host": "evil.example"}) == 421
        assert rejected(server, {}) == 401
        assert server.end(signal.SIGINT) == 0
        assert "Traceback" not in server.said


def rejected(server: Server, headers: dict[str, str]) -> int:
    """The status of a request without a cookie."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", "/", headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_second_server_on_the_same_judgements_is_rejected(tmp_path: Path):
    config = labeling(tmp_path, [{"prompt": "p", "candidates": ["x", "y"]}])
    with serving(config) as server:
        second = cli("label", str(config))
        out, _ = second.communicate(timeout=120)
        assert second.returncode == 5
        assert "another process writes" in out
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(timeout=30)
        assert server.process.returncode is not None
