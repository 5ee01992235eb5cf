"""Outcomes of a comparison in the files of EleutherAI's evaluation harness, which its own tools and viewers read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlzoo.comparison.outcomes import BASE_TEXT
from rlzoo.comparison.plan import Cell
from rlzoo.comparison.report.schema import Results, read_run
from rlzoo.comparison.studies import study_folder
from rlzoo.config import BASE
from rlzoo.jobs.outputs import write_atomically

METRIC = "correct"
"""The metric in the files: the fraction of a problem's samples that are correct."""
_OPTIONAL = ("learning_rate", "reward", "answer", "retention")
_READ = ("algorithm", "seed", "benchmark", "problem_id", "prompt", "decoding", "sample", METRIC, "truncated", "text")


def export_samples(study: str, into: Path) -> list[Path]:
    """Write all samples of a study, or of a finished comparison, as lm-eval writes them with ``--log_samples``.

    Each cell has a folder, as a model has there, with one ``samples_TASK_DATE.jsonl`` per benchmark and decoding, and
    the ``results_DATE.json`` that goes with them. A line is a problem with all of its samples (``resps``); besides
    lm-eval's own keys it has a list ``rewards`` and a list ``truncated``, with one entry per sample. Gold answers are
    not among a comparison's outcomes, so the targets are empty. Keys checked against lm-eval 0.4.13.
    Returns the files. Raises UserError as `read_run` does.
    """
    folder = study_folder(study)
    results = read_run(folder).results
    file = folder / "outcomes.parquet"
    there = pq.read_schema(file).names
    table = pq.read_table(file, columns=[*_READ, *(name for name in _OPTIONAL if name in there)])
    written: list[Path] = []
    for model, rows in _models(table):
        written += _write(into / model, model, rows, results)
    return written


def _models(table: pa.Table) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The folder of each cell, and its rows."""
    rows = table.filter(pc.not_equal(table["decoding"], BASE_TEXT)).to_pylist()
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        rate = row.get("learning_rate")
        cell = Cell(row["algorithm"], row["seed"], math.nan if rate is None else rate)
        cells.setdefault(BASE if row["algorithm"] == BASE else cell.id, []).append(row)
    yield from cells.items()


def _write(folder: Path, model: str, rows: Sequence[dict[str, Any]], results: Results) -> list[Path]:
    """The files of one model."""
    date = results.created.replace(":", "-")
    config = results.config if isinstance(results.config, Mapping) else {}
    tasks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        task = row["benchmark"] + ("" if row["decoding"] == "sample" else f"_{row['decoding']}")
        tasks.setdefault(task, {}).setdefault(row["problem_id"], []).append(row)
    files, summary = (
        [],
        dict[str, Any](results={}, configs={}, versions={}, higher_is_better={})
        | {
            "n-samples": {},
            "n-shot": {},
            "config": {"model": "rlzoo", "model_args": f"pretrained={model}"},
            "git_hash": None,
            "date": results.created,
            "task_hashes": {},
            "model_source": "rlzoo",
            "model_name": model,
            "model_name_sanitized": model,
        },
    )
    for task, problems in tasks.items():
        how = _generation(config, greedy=next(iter(problems.values()))[0]["decoding"] == "greedy")
        lines = [_line(number, some, how) for number, some in enumerate(problems.values())]
        files.append(folder / f"samples_{task}_{date}.jsonl")
        write_atomically(files[-1], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        values = [line[METRIC] for line in lines]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else "N/A"
        summary["results"][task] = {"alias": task, f"{METRIC},none": mean(values), f"{METRIC}_stderr,none": error}
        summary["configs"][task] = {
            "task": task,
            "output_type": "generate_until",
            "generation_kwargs": how,
            "repeats": max(len(line["resps"][0]) for line in lines),
            "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        }
        summary["versions"][task], summary["n-shot"][task] = 0, 0
        summary["higher_is_better"][task] = {METRIC: True}
        summary["n-samples"][task] = {"original": len(lines), "effective": len(lines)}
        hashes = "".join(line["doc_hash"] + line["prompt_hash"] + line["target_hash"] for line in lines)
        summary["task_hashes"][task] = _hash(hashes)
    files.append(folder / f"results_{date}.json")
    write_atomically(files[-1], json.dumps(summary, indent=2, ensure_ascii=False))
    return files


def _line(number: int, rows: Sequence[dict[str, Any]], how: Mapping[str, Any]) -> dict[str, Any]:
    """The line of one problem."""
    samples = sorted(rows, key=lambda row: row["sample"])
    first, texts = samples[0], [row["text"] for row in samples]
    doc = {"id": first["problem_id"], "prompt": first["prompt"]}
    return {
        "doc_id": number,
        "doc": doc,
        "target": "",
        "arguments": {"gen_args_0": {"arg_0": first["prompt"], "arg_1": dict(how)}},
        "resps": [texts],
        "filtered_resps": texts if len(texts) == 1 else [texts],
        "filter": "none",
        "metrics": [METRIC],
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(first["prompt"]),
        "target_hash": _hash(""),
        METRIC: mean(float(row[METRIC]) for row in samples),
        "rewards": [row["reward"] if "reward" in row else float(row[METRIC]) for row in samples],
        "truncated": [row["truncated"] for row in samples],
    }


def _generation(config: Mapping[str, Any], greedy: bool) -> dict[str, Any]:
    """How a task's samples were generated, in lm-eval's words."""
    settings = config.get("evaluation")
    settings = settings if isinstance(settings, Mapping) else {}
    most = {"max_gen_toks": settings["max_new_tokens"]} if "max_new_tokens" in settings else {}
    if greedy:
        return {"until": [], "do_sample": False, "temperature": 0.0, **most}
    heat, top_p = settings.get("temperature", 1.0), settings.get("top_p", 1.0)
    return {"until": [], "do_sample": True, "temperature": heat, "top_p": top_p, **most}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
