"""``--push-to-hub``: which files of a finished run go to the Hub. Settings in them have no path of this machine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import yaml

from rlzoo.jobs.sharing import CARD, public

KEPT_HERE = ("run.json", "logs")
"""What names files of this machine, and what trackers have written."""
WITH_SETTINGS = ("training.json", "adapter/adapter_config.json")
"""Files of a model that may name its base model or its data by a path."""
OF_A_REPORT = ("results.json", "report.md", "report.html", "figures/*")


def files_of_model(folder: Path) -> dict[str, Path | bytes]:
    """The files of `rlzoo train`, by their names on the Hub: weights, tokenizer, card, and metrics per step."""
    files = _files(folder)
    for name in WITH_SETTINGS:
        if name in files:
            files[name] = json.dumps(public(json.loads((folder / name).read_text(encoding="utf-8"))), indent=1).encode()
    return files


def files_of_buffer(folder: Path) -> dict[str, Path | bytes]:
    """The files of `rlzoo rollout`: rows, card, and notes."""
    from rlzoo.buffers import storage

    settings = storage.public_settings(folder)
    return {**_files(folder), **({} if settings is None else {storage.SETTINGS: settings})}


def files_of_comparison(folder: Path) -> dict[str, Path | bytes]:
    """The files of `rlzoo compare` without its buffers: card, report, results, every sampled answer, configuration.

    If results.json names paths, it and the report are written again without them.
    """
    from rlzoo.comparison.report import write_report

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    shown, outcomes = public(results), folder / "outcomes.parquet"
    with tempfile.TemporaryDirectory() as place:
        report = folder
        if shown != results:
            report = Path(place)
            (report / "results.json").write_text(json.dumps(shown, indent=1), encoding="utf-8")
            (report / outcomes.name).symlink_to(outcomes.absolute())
            write_report(report, shown["config"]["baseline"])
        pages = [path for pattern in OF_A_REPORT for path in sorted(report.glob(pattern))]
        return {
            CARD: folder / CARD,
            outcomes.name: outcomes,
            "experiment.yaml": yaml.safe_dump(shown["config"], sort_keys=False).encode(),
            **{path.relative_to(report).as_posix(): path.read_bytes() for path in pages},
        }


def _files(folder: Path) -> dict[str, Path | bytes]:
    """All files of a folder by name, except hidden ones and those that are `KEPT_HERE`."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if name.parts[0] not in KEPT_HERE and not any(part.startswith(".") for part in name.parts)
    }
