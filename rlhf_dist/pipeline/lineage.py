"""The lineage of a stage: what it read, what it made, and the lineages of the stages before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_dist.data.files import read_rows
from rlhf_dist.pipeline.stages import KEY_LENGTH, Input, Stage
from rlhf_dist.run.lineage import ContentHashes, sha256_of_file, sha256_of_listing, surroundings

Lineage = dict[str, Any]


def inputs_of(stage: Stage, earlier: Mapping[str, Lineage]) -> Lineage:
    """What a stage reads, by content: `data` with numbers of records, `models`, other `files`.

    To be made when the stage starts: the files may change afterwards. `earlier`: stage → lineage of those before it.
    """
    data = [item for item in stage.inputs if item.source is not None]
    models = [item for item in stage.inputs if item.place.endswith("model_path")]
    others = [item for item in stage.inputs if item not in data and item not in models]
    return {
        "data": [_input(item, earlier) | {"records": _num_records(item)} for item in data],
        "models": [_input(item, earlier) for item in models],
        "files": [_input(item, earlier) for item in others],
    }


def _input(item: Input, earlier: Mapping[str, Lineage]) -> Lineage:
    file = Path(item.path).expanduser()
    path = str(file.absolute()) if file.exists() else item.path  # a hub name stays what it is
    found: Lineage = {"place": item.place, "path": path, "sha256": None, "content": item.content}
    if item.made_by is None:
        scheme, _, rest = item.content.partition(":")
        if scheme != "hub":
            found["sha256"] = rest[:64]  # a file's ending stands behind
        return found | {"stage": None, "output": None, "key": None}
    origin = earlier[item.made_by.stage]
    if item.made_by.stage == "data":
        found["sha256"] = origin["outputs"]["sets/" + "/".join(Path(item.path).parts[-2:])]
    else:
        found["sha256"] = next(made["sha256"] for made in origin["made"] if made["output"] == item.made_by.output)
    return found | {"stage": item.made_by.stage, "output": item.made_by.output, "key": origin["key"]}


def _num_records(item: Input) -> int:
    """Records that the source holds (up to its limit)."""
    path = Path(item.path).expanduser()
    if path.is_file() and path.stat().st_size == 0:
        return 0  # a source may have no record in a small part
    return sum(1 for _ in read_rows(item.source)) if item.source is not None else 0


def lineage_of(
    stage: Stage,
    folder: Path,
    inputs: Lineage,
    earlier: Mapping[str, Lineage],
    hashes: ContentHashes,
    seconds: float | None,
    resumed_step: int | None,
) -> Lineage:
    """What is written beside a finished stage's model.

    Args:
        stage: the stage.
        folder: where its results are now.
        inputs: what `inputs_of` gave.
        earlier: stage → lineage of the stages before it.
        hashes: of the files it made.
        seconds: wall time of the last process that worked at it; None where only the lineage was left to write.
        resumed_step: the step that process went on from; None where it began anew.
    """
    files = {name: hashes.files(folder / name) for name in stage.produces}
    outputs = {f"{name}/{file}": digest for name, found in files.items() for file, digest in found.items()}
    outputs |= {
        name: hashes.file(folder / name) for name in ("summary.json", "manifest.json") if (folder / name).exists()
    }
    # By stage and key: a stage that was skipped may descend from an earlier data stage than the present one.
    used = {item.made_by.stage for item in stage.inputs if item.made_by is not None}
    ancestors: dict[str, Lineage] = {}
    for name in (name for name in earlier if name in used):
        alone = {key: value for key, value in earlier[name].items() if key != "ancestors"}
        ancestors |= earlier[name]["ancestors"] | {f"{name}-{earlier[name]['key'][:KEY_LENGTH]}": alone}
    return {
        "stage": stage.name,
        "key": stage.key,
        "seed": stage.seed,
        "config_sha256": sha256_of_file(folder / "config.yaml"),
        **inputs,
        "made": [
            {"output": name, "sha256": sha256_of_listing(found)} for name, found in files.items() if name != "sets"
        ],
        "outputs": outputs,
        **surroundings(),
        "seconds": seconds,
        "resumed_from_step": resumed_step,
        "ancestors": ancestors,
    }
