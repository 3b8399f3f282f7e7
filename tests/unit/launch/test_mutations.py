"""The mutations of tests/support/mutations.py can still be made, and all of them are in the table with a test each."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.mutations import END, MUTATIONS, README, ROOT, START, Mutation, mutate


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies_and_is_still_python(mutation: Mutation, tmp_path: Path):
    package = tmp_path / "rlhf_dist"
    shutil.copytree(ROOT / "rlhf_dist", package, ignore=shutil.ignore_patterns("__pycache__"))
    mutate(package, mutation)
    for name, _, _ in mutation.edits:
        compile((package / name).read_text(encoding="utf-8"), name, "exec")


def test_every_mutation_was_caught():
    rows = README.read_text(encoding="utf-8").split(START)[1].split(END)[0].splitlines()[2:]
    found = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in rows}
    assert found.keys() == {mutation.name for mutation in MUTATIONS}
    for caught in found.values():
        tests = re.findall(r"`([\w/]+): (\w+)`", caught)
        assert tests
        for path, test in tests:
            assert f"def {test}(" in (ROOT / "tests" / f"{path}.py").read_text(encoding="utf-8")
