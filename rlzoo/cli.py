"""The ``rlzoo`` command. Heavy imports wait until a command needs them, so that --help answers at once."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rlzoo.errors import UserError
from rlzoo.interrupts import Terminated, raise_signal
from rlzoo.overrides import (
    add_overrides,
    add_processes,
    add_table,
    add_threads,
    add_trust,
    check_processes,
    experiment_of,
    pairs,
    table_of,
    use_threads,
)

Handler = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Exit status: 0 done, 1 some runs failed, 2 wrong input (one line on standard error), 130 or 143 stopped by a signal.
    """
    parsed = _parser().parse_args(arguments)
    os.environ.pop("RLZOO_TRUST_REMOTE_CODE", None)
    if getattr(parsed, "trust_remote_code", False):
        os.environ["RLZOO_TRUST_REMOTE_CODE"] = "1"  # an environment variable, so that worker processes have it too
    sys.path.append(str(Path.cwd()))  # for package.module:Name of a user's own; last, so that it hides nothing
    signal.signal(signal.SIGTERM, raise_signal)  # a job that the system stops ends as for Ctrl-C
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from rlzoo.ranks import joined

            with joined():
                return int(parsed.handler(parsed))
        return int(parsed.handler(parsed))
    except UserError as error:
        print(f"rlzoo: {_told(error, str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"rlzoo: {_told(error, 'interrupted')}", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130


def _told(error: BaseException, message: str) -> str:
    """One line: the message, and what the run's folder has to say about it."""
    return " ".join("; ".join([message, *getattr(error, "__notes__", [])]).split())


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"rlzoo: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rlzoo",
        description="Compare fine-tuning objectives of language models: one interface, one buffer, one budget.",
        epilog="example: rlzoo compare arithmetic",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_compare, _variance, _train, _rollout, _evaluate, _report, _list, _new):
        add(commands)
    return parser


def _command(commands: Any, name: str, handler: Handler, text: str, example: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=textwrap.fill(text, 79),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # an example stays as it is to be typed
    )
    command.set_defaults(handler=handler)
    return command


def _compare(commands: Any) -> None:
    command = _command(
        commands, "compare", _run_compare,
        "Train every algorithm on every seed from one base and one buffer, evaluate, and report.",
        "rlzoo compare arithmetic --algorithms sft,dft --seeds 0,1,2",
    )  # fmt: skip
    add_overrides(
        command, "data", "bad-rows", "test-data", "limit", "train-limit", "test-limit", "steps", "batch-size",
        "samples", "rollout-samples", "k",
    )  # fmt: skip
    command.add_argument("--algorithms", help="comma-separated: names, module:Name, or path/to/file.py:Name")
    command.add_argument("--seeds", help="comma-separated whole numbers")
    command.add_argument("--learning-rates", help="comma-separated; the best on validation is reported")
    add_processes(command)
    command.add_argument("--executor", choices=("local", "ray"), default="local", help="what runs the cells")
    command.add_argument("--address", help="of a Ray cluster; default: one that is started here")
    command.add_argument("--out", type=Path, help="a folder, new or of the same run; default: runs/<name>-<time>")


def _run_compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from rlzoo.comparison.plan import counted
    from rlzoo.comparison.report import report_table
    from rlzoo.comparison.runner import compare, where
    from rlzoo.ranks import is_main

    check_processes(arguments)
    if arguments.address is not None and arguments.executor != "ray":
        raise UserError("--address is of a Ray cluster: add --executor ray")
    experiment = experiment_of(arguments)
    out = arguments.out or where(experiment, arguments.threads)
    results = compare(
        experiment,
        out,
        arguments.workers,
        arguments.threads,
        executor=arguments.executor,
        address=arguments.address,
    )
    console = Console(quiet=not is_main())
    for table in report_table(results):
        console.print(table)
    report = out / "report.html"
    console.print(f"{results['wall_seconds']:.0f} s; report: {report}", soft_wrap=True, highlight=False)
    if failed := len(results["failed"]):
        told = f"{counted(failed, 'run')} failed: the report says why; the same command tries again"
        console.print(told, highlight=False)
    return 1 if failed else 0


def _variance(commands: Any) -> None:
    command = _command(
        commands, "variance", _run_variance,
        "Measure the variance of objectives' gradients: token by token, over the data, and along training.",
        "rlzoo variance both-worlds --objectives sft,dft,my.py:Mine --rows 128",
    )  # fmt: skip
    add_overrides(command, "data", "bad-rows", "limit", "steps", "rollout-samples", default="both-worlds")
    command.add_argument(
        "--objectives", dest="algorithms", help="comma-separated: names, module:Name, or path/to/file.py:Name"
    )
    command.add_argument("--buffer", help="a saved buffer (see rollout) in place of the experiment's data")
    command.add_argument("--rows", type=int, help="rows an objective is measured on; default 512")
    command.add_argument("--draws", type=int, help="Monte-Carlo samples per token; default 4096, 0 for none")
    command.add_argument("--every", type=int, help="steps between measurements along training; 0 for no training")
    command.add_argument("--probe-rows", type=int, help="rows that are measured along training; default 64")
    command.add_argument("--seed", type=int, help="of the rows, the draws and the training; default 0")
    add_processes(command)
    command.add_argument(
        "--out", type=Path, help="a folder, new or of the same run; default: runs/<name>-variance-<time>"
    )


def _run_variance(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from rlzoo.config import validated
    from rlzoo.variance.report import report_tables
    from rlzoo.variance.run import VarianceSettings, run_variance, where

    check_processes(arguments)
    given = {name: getattr(arguments, name) for name in VarianceSettings.model_fields}
    settings = validated(VarianceSettings, {k: v for k, v in given.items() if v is not None}, "variance")
    experiment = experiment_of(arguments)
    out = arguments.out or where(experiment, settings, arguments.buffer, arguments.threads)
    found = run_variance(experiment, out, settings, arguments.buffer, arguments.workers, arguments.threads)
    console = Console()
    for table in report_tables(found):
        console.print(table)
    for name, reason in {**found["skipped"], **found["failed"]}.items():
        console.print(f"{name}: {reason}", soft_wrap=True, highlight=False, markup=False)
    report = out / "report.html"
    console.print(f"{found['wall_seconds']:.0f} s; report: {report}", soft_wrap=True, highlight=False)
    return 1 if found["failed"] else 0


def _train(commands: Any) -> None:
    command = _command(
        commands, "train", _run_train, "Train a policy with one objective on a saved buffer.",
        "rlzoo train rft --buffer runs/buffer --model embedded --steps 50 --out runs/rft",
    )  # fmt: skip
    command.add_argument("objective", help="a name, module:Name, or path/to/file.py:Name")
    add_table(command)
    command.add_argument("--model", default="embedded", help="'embedded', a folder, or a Hub id")
    add_trust(command)
    command.add_argument("--out", type=Path, required=True, help="a folder for the model, new or of the same run")
    command.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the objective")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the training")
    command.add_argument("--steps", type=int, help="optimizer steps")
    command.add_argument("--learning-rate", type=float)
    command.add_argument("--seed", type=int, default=0)
    add_threads(command)


def _run_train(arguments: argparse.Namespace) -> int:
    from rlzoo.bad_rows import BadRows
    from rlzoo.buffers import read_buffer
    from rlzoo.comparison.pool import silence
    from rlzoo.config import Training, validated
    from rlzoo.objective import get_objective
    from rlzoo.outputs import write_atomically
    from rlzoo.policy.loading import load_policy, save_policy
    from rlzoo.ranks import is_main
    from rlzoo.runs import run_in
    from rlzoo.training import train

    use_threads(arguments)
    settings = pairs(arguments.set, "--set")
    for name, value in (("steps", arguments.steps), ("learning_rate", arguments.learning_rate)):
        if value is not None:
            settings[name] = value
    training = validated(Training, settings, "training")
    table = table_of(arguments)
    objective = get_objective(arguments.objective, **pairs(arguments.option, "--option"))
    silence()
    asked = {
        "objective": arguments.objective,
        "options": pairs(arguments.option, "--option"),
        "training": training.model_dump(mode="json"),
        "model": arguments.model,
        "buffer": table.model_dump(mode="json"),
        "seed": arguments.seed,
        "threads": arguments.threads,
    }

    def show(trainer: Any, step: int) -> None:
        row = trainer.record.steps[-1]
        if is_main():
            line = f"step {step}/{training.steps}  loss {row['loss']:.4f}  gradient norm {row['gradient_norm']:.3f}"
            print(line, flush=True)  # a log is to show how far it is

    out = arguments.out
    with run_in(out, "train", asked) as run:
        if run.finished:
            print(f"finished before: {out}")
            return 0
        policy = load_policy(arguments.model, training.dtype)
        bad, longest = BadRows(table.bad_rows), training.max_completion_tokens
        buffer = read_buffer(
            table.source, policy.tokenizer, longest, table.split, table.columns, bad, training.special_tokens,
            policy.row_check(),
        )  # fmt: skip
        if is_main():
            for line in bad.lines():
                print(line, flush=True)
        record = train(
            policy, objective, buffer, training, arguments.seed, [show], out / "logs", run.state / "checkpoints"
        )
        save_policy(policy, out)
        if is_main():
            summary = {
                "steps": record.plain_steps(),
                "costs": record.costs.as_dict(),
                "events": [*bad.events(), *record.events],
                "dropped_rows": bad.summary(),
            }
            write_atomically(out / "training.json", json.dumps(summary, indent=1))
            for event in record.events:
                print(event)
            print(f"saved to {out}")
    return 0


def _rollout(commands: Any) -> None:
    command = _command(
        commands, "rollout", _run_rollout,
        "Sample a policy on an experiment's training problems, score the samples, and save them as a buffer.",
        "rlzoo rollout arithmetic --limit 100 --out runs/buffer",
    )  # fmt: skip
    add_overrides(command, "data", "bad-rows", "limit", "rollout-samples")
    command.add_argument("--seed", type=int, default=0)
    add_threads(command)
    command.add_argument(
        "--out", type=Path, required=True, help="a folder, new or of the same run, or a .parquet or .jsonl file"
    )


def _run_rollout(arguments: argparse.Namespace) -> int:
    use_threads(arguments)
    experiment = experiment_of(arguments)
    from rlzoo.bad_rows import BadRows
    from rlzoo.buffers import OfflineBuffer
    from rlzoo.comparison.pool import silence
    from rlzoo.comparison.work import reward_of
    from rlzoo.pieces import Pieces
    from rlzoo.policy import load_policy
    from rlzoo.problems import encode_problems, load_problems
    from rlzoo.rollout import collect_rollouts, cut_short, mismatch, sampler_of, unscored
    from rlzoo.runs import run_in

    bad = BadRows(experiment.train.bad_rows)
    reward, problems = reward_of(experiment), load_problems(experiment.train, bad)[: experiment.rollouts.prompts]
    silence()
    asked = {"experiment": experiment.model_dump(mode="json"), "seed": arguments.seed, "threads": arguments.threads}
    with run_in(arguments.out, "rollout", asked, "whole") as run:
        if run.finished:
            print(f"finished before: {arguments.out}")
            return 0
        policy = load_policy(experiment.model, experiment.training.dtype)
        encoded = encode_problems(policy.tokenizer, problems, bad)
        settings = experiment.rollouts
        sampler, recompute = sampler_of(policy, settings), settings.behaviour == "recompute"
        rows = collect_rollouts(
            policy, sampler, encoded, reward, settings, arguments.seed,
            token_budget=experiment.training.token_budget, recompute=recompute, pieces=Pieces(run.state), bad=bad,
        )  # fmt: skip
        buffer = OfflineBuffer.from_trajectories(rows)
        events = [*bad.events(), *cut_short(rows, settings.max_new_tokens)]
        known = {"dropped_rows": bad.summary(), "events": events}
        save = partial(buffer.save, notes={name: value for name, value in known.items() if value})
        writers: dict[str, Callable[[Path], None]] = {".parquet": buffer.to_parquet, ".jsonl": buffer.to_jsonl}
        writers.get(arguments.out.suffix, save)(arguments.out)
    right = sum((row.reward or 0) >= experiment.evaluation.correct_at for row in rows)
    for line in bad.lines():
        print(line)
    prompts = len({row.prompt_id for row in rows})
    print(f"{len(rows)} samples of {prompts} prompts, {right} correct; saved to {arguments.out}")
    for line in cut_short(rows, settings.max_new_tokens):
        print(line)
    if without := unscored((row.reward, row.prompt) for row in rows):
        print(without)
    if found := mismatch(rows):
        print(
            f"log-probs of the engine and the trainer: {found['mean_absolute']:.2g} apart in the mean, "
            f"{found['largest']:.2g} at most, mean ratio {found['mean_ratio']:.6f}"
        )
    return 0


def _evaluate(commands: Any) -> None:
    command = _command(
        commands, "evaluate", _run_evaluate, "Score a policy on an experiment's benchmarks.",
        "rlzoo evaluate arithmetic --model runs/rft --samples 8 --k 4",
    )  # fmt: skip
    add_overrides(command, "test-data", "limit", "samples", "k")
    command.add_argument("--seed", type=int, default=0)
    add_threads(command)
    command.add_argument("--json", action="store_true", help="print the scores as JSON")


def _run_evaluate(arguments: argparse.Namespace) -> int:
    use_threads(arguments)
    experiment = experiment_of(arguments)
    from rlzoo.bad_rows import BadRows
    from rlzoo.comparison.pool import silence
    from rlzoo.comparison.work import reward_of
    from rlzoo.evaluation import evaluate
    from rlzoo.policy import load_policy
    from rlzoo.problems import load_problems
    from rlzoo.rollout import unscored

    reward = reward_of(experiment)
    bad = {name: BadRows(source.bad_rows) for name, source in experiment.benchmarks.items()}
    problems = {name: load_problems(source, bad[name]) for name, source in experiment.benchmarks.items()}
    silence()
    policy = load_policy(experiment.model, experiment.training.dtype)
    found = {
        name: evaluate(policy, some, reward, experiment.evaluation, arguments.seed, bad=bad[name])
        for name, some in problems.items()
    }
    scores = {name: one.metrics for name, one in found.items()}
    for name, one in found.items():
        for line in bad[name].lines():
            print(f"{name}: {line}", file=sys.stderr)
        if without := unscored((row["reward"], row["prompt"]) for row in one.outcomes):
            print(f"{name}: {without}; they count as wrong", file=sys.stderr)
    if arguments.json:
        print(json.dumps(scores, indent=1))
        return 0
    for name, m in scores.items():
        print(
            f"{name}: avg@{m['samples']} {m['avg_at_k']:.1%}  greedy {m['greedy']:.1%}  "
            f"pass@{m['k']} {m['pass_at_k']:.1%}"
            + "".join(f"  {n.removeprefix('reward/')} {v:.4g}" for n, v in m.items() if n.startswith("reward/"))
        )
    return 0


def _report(commands: Any) -> None:
    command = _command(
        commands, "report", _run_report, "Write report.md and report.html again from a folder's results.",
        "rlzoo report runs/arithmetic --baseline sft",
    )  # fmt: skip
    command.add_argument("folder", type=Path, help="a folder that rlzoo compare or rlzoo variance wrote")
    command.add_argument("--baseline", help="the algorithm that the others are compared with")


def _run_report(arguments: argparse.Namespace) -> int:
    if (arguments.folder / "variance.json").is_file():
        from rlzoo.variance.report import write_report as write_variance_report

        write_variance_report(arguments.folder)
    else:
        from rlzoo.comparison.report import write_report

        write_report(arguments.folder, arguments.baseline)
    print(f"wrote {arguments.folder / 'report.html'}")
    return 0


def _list(commands: Any) -> None:
    command = _command(
        commands, "list", _run_list, "List objectives with their options, rewards, and experiments.",
        "rlzoo list --json",
    )  # fmt: skip
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print the reference of the built-in objectives")


def _run_list(arguments: argparse.Namespace) -> int:
    from rlzoo.catalogue import catalogue, catalogue_text
    from rlzoo.objectives_page import objectives_page

    if arguments.markdown:
        print(objectives_page())
    elif arguments.json:
        print(json.dumps(catalogue(), indent=1, default=str))  # an option's default may be of any type
    else:
        print(catalogue_text())
    return 0


def _new(commands: Any) -> None:
    command = _command(
        commands, "new", _run_new, "Write an objective that works, and its test, to start your own from.",
        "rlzoo new objective my-objective",
    )  # fmt: skip
    command.add_argument("kind", choices=("objective",))
    command.add_argument("name", help="what it is to be called, as in my-objective")
    command.add_argument("--folder", type=Path, default=Path(), help="where; default: here (in a clone, its folders)")


def _run_new(arguments: argparse.Namespace) -> int:
    from rlzoo.scaffold import new_objective

    print(new_objective(arguments.name, arguments.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
