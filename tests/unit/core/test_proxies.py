"""A proxy of the environment is named with its variable, its address without the password, and only where it is used."""

from __future__ import annotations

import pytest

from rlhf_dist.core.proxies import proxy_hint

VARIABLES = [name for base in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for name in (base, base.upper())]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variable", "url", "named"),
    [
        ("http_proxy", "http://head:8265", True),
        ("HTTP_PROXY", "http://head:8265", True),
        ("all_proxy", "https://head/v1", True),
        ("https_proxy", "http://head:8265", False),
    ],
)
def test_the_variable_that_is_used_is_named(variable: str, url: str, named: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "http://me:secret@proxy:3128")
    hint = proxy_hint(url)
    assert (variable in hint and "proxy:3128" in hint and "head to no_proxy" in hint) == named
    assert "secret" not in hint


def test_a_host_that_bypasses_the_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "head")
    assert proxy_hint("http://head:8265") == ""
    assert proxy_hint("http://other:8265")


def test_without_a_proxy():
    assert proxy_hint("http://head:8265") == ""
