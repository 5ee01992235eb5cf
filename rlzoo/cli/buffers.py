"""``rlzoo import``, ``rlzoo rescore`` and ``rlzoo buffer``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument

from rlzoo.cli import completion, options
from rlzoo.jobs.sources import path_of

if TYPE_CHECKING:
    from rlzoo.training.uses import Use

Saved = Annotated[
    str,
    Argument(
        metavar="BUFFER",
        help="Saved buffer: a folder, a .parquet or a .jsonl file, or NAMESPACE/NAME of one on the Hugging Face Hub.",
    ),
]


def import_(
    form: Annotated[
        str,
        Argument(
            metavar="FORMAT",
            help=f"Format of the log: {options.SPEC}.",
            autocompletion=completion.log_formats,
        ),
    ],
    log: Annotated[
        str, Argument(metavar="LOG", help="The log: a file, a folder that contains the log's files, or a pattern.")
    ],
    *,
    option: Annotated[
        list[str] | None,
        options.data(metavar="KEY=VALUE", help="Option of the format, such as temperature=0.7. Repeatable."),
    ] = None,
    model: Annotated[
        str,
        options.data(metavar="MODEL", help="Model that sampled, for its tokenizer: 'embedded', a folder, or a Hub ID."),
    ] = "embedded",
    max_completion_tokens: Annotated[
        int | None,
        options.data(
            metavar="N",
            parser=options.count,
            help="Length limit of the samples. Where the log does not say which samples were cut, those with N tokens "
            "or more count as truncated.",
        ),
    ] = None,
    bad_rows: options.BadRows = None,
    out: options.BufferOut,
    trust_remote_code: options.Trust = False,
) -> int:
    """Import samples that another stack has logged, with their rewards and log-probs, as a buffer.

    Log-probs are kept if they are of the tokens in the buffer. Samples of the same prompt are a group.

    Examples:
      rlzoo import trl outputs/grpo --out runs/buffer
      rlzoo import verl rollouts/ --model Qwen/Qwen3-0.6B --out runs/buffer
      rlzoo import lm-eval samples.jsonl --option metric=acc --out runs/buffer
    """
    from rlzoo.cli.settings import pairs, prepare

    prepare(None, trust_remote_code)
    given = pairs(option or (), "--option")
    from rlzoo.jobs.pool import silence
    from rlzoo.jobs.progress import loading
    from rlzoo.jobs.runs import run_in

    with loading():
        from rlzoo.buffers import get_importer, import_log
        from rlzoo.buffers.bad_rows import BadRows
        from rlzoo.buffers.card import buffer_card
        from rlzoo.policy.loading import load_tokenizer

    importer, bad = get_importer(form, **given), BadRows(bad_rows or "reject")
    silence()
    asked = {
        "format": form, "log": log, "options": given, "model": model,
        "max_completion_tokens": max_completion_tokens, "bad_rows": bad.mode,
    }  # fmt: skip
    with run_in(out, "import", asked, "whole") as run:
        if run.finished:
            print(f"already finished: {out}")
            return 0
        buffer = import_log(importer, log, load_tokenizer(model), max_completion_tokens, bad)
        known = {"imported_from": asked, "dropped_rows": bad.summary(), "events": bad.events()}
        origin = {"log": log, "format": form, "options": given, "tokenizer": model}
        card = buffer_card(buffer, out.name, f"Samples of a log of {importer.name}, imported by rlzoo.", origin, asked)
        buffer.write(out, {name: value for name, value in known.items() if value}, card)
    for line in bad.lines():
        print(line)
    prompts = len(set(buffer.column("prompt_id")))
    rewarded, scored = (int(buffer.has(name).sum()) for name in ("reward", "behaviour_logp"))
    print(
        f"{len(buffer):,} samples of {prompts:,} prompts, {rewarded:,} with a reward, {scored:,} with log-probs; "
        f"saved to {out}"
    )
    if not rewarded:
        print(f"no sample has a reward: give them some with rlzoo rescore {out} --reward REWARD")
    return 0


def rescore(
    buffer: Saved,
    *,
    reward: options.Reward = None,
    column: Annotated[
        list[str] | None,
        options.data(
            metavar="NAME=COLUMN",
            help="Column of the buffer that the reward gets as NAME, as in answer=gts. Repeatable.",
        ),
    ] = None,
    bad_rows: options.BadRows = None,
    sets: options.Set = None,
    out: Annotated[
        Path | None,
        options.running(
            metavar="PATH",
            help="Where the new buffer is saved: a new folder, or a .parquet or .jsonl file. Default: beside the old "
            "one (or here, if that is on the Hub), with -rescored after its name.",
        ),
    ] = None,
) -> int:
    """Score the completions of a saved buffer with another reward, and save the result as a new buffer.

    Settings for --set are those of an experiment's reward and scoring.

    Examples:
      rlzoo rescore runs/buffer --reward math-answer --column answer=target
      rlzoo rescore samples.jsonl --reward mine.py:reward --out rescored.jsonl
      rlzoo rescore alice/samples --reward math-answer
    """
    from rlzoo.cli.settings import prepare, rescore_settings

    prepare(None, False)
    given = {"buffer": buffer, "reward": reward, "bad_rows": bad_rows}
    settings = rescore_settings(given, column, sets)
    from rlzoo.jobs.pool import silence
    from rlzoo.jobs.progress import loading
    from rlzoo.jobs.runs import run_in

    with loading():
        from rlzoo.buffers import OfflineBuffer
        from rlzoo.buffers.bad_rows import BadRows
        from rlzoo.buffers.card import buffer_card
        from rlzoo.buffers.overview import turns_of
        from rlzoo.buffers.storage import local_path, notes_of
        from rlzoo.reward.isolation import Limits, isolated
        from rlzoo.rollout import unscored
        from rlzoo.rollout.rescoring import rescored

    scoring, source = settings.scoring, local_path(settings.buffer)
    limits = Limits(scoring.seconds, scoring.memory_gb)
    scored_by = isolated(settings.reward, limits, scoring.on_error, scoring.processes)
    place = _beside(settings.buffer) if out is None else out
    bad = BadRows(settings.bad_rows)
    silence()
    with run_in(place, "rescore", settings.model_dump(mode="json"), "whole") as run:
        if run.finished:
            print(f"already finished: {place}")
            return 0
        old = OfflineBuffer.load(settings.buffer, bad)
        new = rescored(old, scored_by, settings.columns)
        asked = settings.model_dump(mode="json")
        origin = {"rows": asked["buffer"], "reward": asked["reward"], "mean reward": _mean(new.numbers("reward"))}
        lead = "Rows of a buffer, scored again by rlzoo."
        card = buffer_card(new, place.name, lead, origin, asked, [asked["buffer"]])
        new.write(place, {**notes_of(source), "rescored_with": asked["reward"]}, card)
    for line in bad.lines():
        print(line)
    before, after = old.numbers("reward"), new.numbers("reward")
    changed = int(((before != after) & ~((before != before) & (after != after))).sum())
    told = [f"{len(new):,} rows scored with {scored_by.name}", f"{changed:,} rewards changed"]
    print(f"{', '.join(told)}: mean {_mean(after)}, was {_mean(before)}; saved to {place}")
    if unknown := turns_of(old)["text"]:
        print(f"{unknown:,} completions have masked tokens but not their messages: the reward got one turn of text")
    if without := unscored(zip(new.column("reward"), new.column("prompt"), strict=True)):
        print(without)
    return 0


def _beside(buffer: str) -> Path:
    """Where a rescored buffer is saved by default."""
    path = path_of(buffer)
    kind = path.suffix if path.suffix in (".parquet", ".jsonl") else ""
    return (path if path.exists() else Path(path.name)).with_name(f"{path.name.removesuffix(kind)}-rescored{kind}")


def _mean(rewards: Any) -> str:
    known = rewards[rewards == rewards]
    return f"{known.mean():.4g}" if len(known) else "none"


def buffer(
    action: Annotated[Literal["show"], Argument(metavar="ACTION", help="show")],
    which: Saved,
    *,
    as_json: Annotated[bool, options.running("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Show what a saved buffer holds, and which objectives can be trained on it.

    Examples:
      rlzoo buffer show runs/buffer
      rlzoo buffer show samples.jsonl --json
      rlzoo buffer show alice/samples
    """
    from dataclasses import asdict

    from rlzoo.jobs.progress import loading

    with loading():
        from rlzoo.buffers import OfflineBuffer, overview
        from rlzoo.buffers.overview import described
        from rlzoo.training.uses import uses_of

    found = OfflineBuffer.load(which)
    numbers, uses = overview(found), uses_of(found)
    if as_json:
        print(json.dumps({**numbers, "objectives": [asdict(use) for use in uses]}, indent=1))
        return 0
    width = max(len(name) for name, _ in described(numbers))
    for name, text in described(numbers):
        print(f"{name:{width}}  {text}")
    for line in _uses(uses):
        print(line)
    return 0


def _uses(uses: Sequence[Use]) -> Iterator[str]:
    """The objectives that can be trained, by the number of units in their views, and the others, by what is missing."""
    able = sorted((use for use in uses if use.lacks is None), key=lambda use: (use.views, use.units))
    yield "can train" if able else "can train nothing"
    for (views, units), some in groupby(able, key=lambda use: (use.views, use.units)):
        yield f"  {', '.join(use.objective for use in some)}: {units:,} in {' and '.join(views)}"
    unable = sorted((use for use in uses if use.lacks is not None), key=lambda use: str(use.lacks))
    yield "cannot train" if unable else "cannot train: none"
    for lacks, some in groupby(unable, key=lambda use: use.lacks):
        yield f"  {', '.join(use.objective for use in some)}: {lacks}"
