"""The ``rlzoo`` command. Heavy imports wait until a command needs them, so that --help answers at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlzoo.errors import UserError

Handler = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 some runs failed, 2 wrong input (one line on standard error)."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.handler(parsed))
    except UserError as error:
        print(f"rlzoo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rlzoo: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlzoo",
        description="Compare fine-tuning objectives of language models: one interface, one buffer, one budget.",
        epilog="example: rlzoo compare arithmetic",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _compare(commands)
    _train(commands)
    _rollout(commands)
    _evaluate(commands)
    _report(commands)
    _list(commands)
    return parser


def _command(commands: Any, name: str, handler: Handler, text: str, example: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"example: {example}"
    )
    command.set_defaults(handler=handler)
    return command


def _overrides(command: argparse.ArgumentParser) -> None:
    """Options that change an experiment, shared by every command that reads one."""
    command.add_argument("experiment", nargs="?", default="arithmetic", help="a name (rlzoo list) or a .yaml file")
    command.add_argument("--model", help="'embedded', a folder, or a Hub id")
    command.add_argument("--data", help="training problems: a file, a folder's table, a Hub id, or world:NAME/SPLIT")
    command.add_argument("--test-data", help="benchmark problems, for every benchmark of the experiment")
    command.add_argument("--reward", help="a name, package.module:Name, or path/to/file.py:Name")
    command.add_argument("--steps", type=int, help="optimizer steps")
    command.add_argument("--batch-size", type=int, help="sequences an optimizer step")
    command.add_argument("--limit", type=int, help="use at most this many training problems, and of each benchmark")
    command.add_argument("--samples", type=int, help="samples a problem when evaluating")
    command.add_argument("--k", type=int, help="pass@k's k")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="any other setting, by its dotted name; the value is YAML: --set rollouts.samples=8",
    )  # fmt: skip


def _experiment(arguments: argparse.Namespace) -> Any:
    """The experiment with the command's options laid over it."""
    from rlzoo.config import load_experiment

    changes: dict[str, Any] = {}
    given = {
        "model": arguments.model,
        "reward": arguments.reward,
        "train.source": arguments.data,
        "train.limit": arguments.limit,
        "rollouts.prompts": arguments.limit,
        "training.steps": arguments.steps,
        "training.batch_size": arguments.batch_size,
        "evaluation.samples": arguments.samples,
        "evaluation.k": arguments.k,
    }
    changes |= {key: value for key, value in given.items() if value is not None}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r}: write KEY=VALUE, as in --set rollouts.samples=8")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {text!r}: the value is not valid YAML") from None
    plain = load_experiment(arguments.experiment)
    for name in plain.benchmarks:
        if arguments.limit is not None:
            changes.setdefault(f"benchmarks.{name}.limit", arguments.limit)
        if arguments.test_data is not None:
            changes[f"benchmarks.{name}.source"] = arguments.test_data
    if getattr(arguments, "algorithms", None):
        changes["algorithms"] = _rows(arguments.algorithms.split(","), plain)
        baseline = changes.get("baseline", plain.baseline)
        changes["baseline"] = baseline if baseline in changes["algorithms"] else next(iter(changes["algorithms"]))
    if getattr(arguments, "learning_rates", None):
        rates = [_number(text, "--learning-rates") for text in arguments.learning_rates.split(",")]
        rows = changes.get("algorithms", {n: a.model_dump() for n, a in plain.algorithms.items()})
        changes["algorithms"] = {name: {**row, "learning_rates": rates} for name, row in rows.items()}
    if getattr(arguments, "seeds", None):
        changes["seeds"] = [int(_number(text, "--seeds")) for text in arguments.seeds.split(",")]
    return load_experiment(arguments.experiment, changes)


def _rows(specs: Sequence[str], plain: Any) -> dict[str, Any]:
    """Rows for --algorithms: those of the experiment keep their settings, others get the experiment's defaults."""
    from rlzoo.objective import objective_class
    from rlzoo.registry import canonical

    rows: dict[str, Any] = {}
    for spec in (s.strip() for s in specs):
        row = canonical(spec)
        if row in plain.algorithms:
            rows[row] = plain.algorithms[row].model_dump()
        else:
            rows[objective_class(spec).name] = {"objective": spec}
    return rows


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option}: {text!r} is not a number; separate numbers by commas") from None


def _compare(commands: Any) -> None:
    command = _command(
        commands, "compare", _run_compare,
        "Train every algorithm on every seed from one base and one buffer, evaluate, and report.",
        "rlzoo compare arithmetic --algorithms sft,dft --seeds 0,1,2",
    )  # fmt: skip
    _overrides(command)
    command.add_argument("--algorithms", help="comma-separated: names, module:Name, or path/to/file.py:Name")
    command.add_argument("--seeds", help="comma-separated whole numbers")
    command.add_argument("--learning-rates", help="comma-separated; the best on validation is reported")
    command.add_argument("--workers", type=int, help="processes; default: one a core")
    command.add_argument("--threads", type=int, default=1, help="threads a process")
    command.add_argument("--out", type=Path, help="a new folder; default: runs/<name>-<time>")


def _run_compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from rlzoo.comparison.report import report_table
    from rlzoo.comparison.runner import compare

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: give a whole number of at least 1")
    experiment = _experiment(arguments)
    from datetime import UTC, datetime

    out = arguments.out or Path("runs") / f"{experiment.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    results = compare(experiment, out, arguments.workers, arguments.threads)
    console = Console()
    for table in report_table(results):
        console.print(table)
    console.print(f"{results['wall_seconds']:.0f} s; report: {out / 'report.html'}", soft_wrap=True, highlight=False)
    return 1 if results["failed"] else 0


def _train(commands: Any) -> None:
    command = _command(
        commands, "train", _run_train, "Train a policy with one objective on a saved buffer.",
        "rlzoo train dft --buffer runs/buffer --model embedded --steps 50 --out runs/dft",
    )  # fmt: skip
    command.add_argument("objective", help="a name, module:Name, or path/to/file.py:Name")
    command.add_argument("--buffer", required=True, help="a saved buffer (see rollout), or a table in a TRL format")
    command.add_argument("--model", default="embedded", help="'embedded', a folder, or a Hub id")
    command.add_argument("--out", type=Path, required=True, help="a new folder for the trained model")
    command.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the objective")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the training")
    command.add_argument("--steps", type=int, help="optimizer steps")
    command.add_argument("--learning-rate", type=float)
    command.add_argument("--seed", type=int, default=0)


def _run_train(arguments: argparse.Namespace) -> int:
    from rlzoo.buffers import read_buffer
    from rlzoo.config import Training, validated
    from rlzoo.objective import get_objective
    from rlzoo.policy.loading import load_policy, save_policy
    from rlzoo.training import train

    settings = _pairs(arguments.set, "--set")
    for name, value in (("steps", arguments.steps), ("learning_rate", arguments.learning_rate)):
        if value is not None:
            settings[name] = value
    training = validated(Training, settings, "training")
    objective = get_objective(arguments.objective, **_pairs(arguments.option, "--option"))
    _must_be_new(arguments.out)
    policy = load_policy(arguments.model, training.dtype)
    buffer = read_buffer(arguments.buffer, policy.tokenizer)

    def show(trainer: Any, step: int) -> None:
        row = trainer.record.steps[-1]
        print(f"step {step}/{training.steps}  loss {row['loss']:.4f}  gradient norm {row['gradient_norm']:.3f}")

    record = train(policy, objective, buffer, training, arguments.seed, [show])
    save_policy(policy, arguments.out)
    (arguments.out / "training.json").write_text(
        json.dumps({"steps": record.steps, "costs": record.costs.as_dict()}, indent=1)
    )
    print(f"saved to {arguments.out}")
    return 0


def _rollout(commands: Any) -> None:
    command = _command(
        commands, "rollout", _run_rollout,
        "Sample a policy on an experiment's training problems, judge the samples, and save them as a buffer.",
        "rlzoo rollout arithmetic --limit 100 --out runs/buffer",
    )  # fmt: skip
    _overrides(command)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", type=Path, required=True, help="a new folder, or a .parquet or .jsonl file")


def _run_rollout(arguments: argparse.Namespace) -> int:
    experiment = _experiment(arguments)
    _must_be_new(arguments.out)
    from rlzoo.buffers import OfflineBuffer
    from rlzoo.policy import load_policy
    from rlzoo.problems import encode_problems, load_problems
    from rlzoo.reward import get_reward
    from rlzoo.rollout import TransformersSampler, collect_rollouts

    reward, problems = get_reward(experiment.reward), load_problems(experiment.train)
    policy = load_policy(experiment.model, experiment.training.dtype)
    problems = problems[: experiment.rollouts.prompts]
    rows = collect_rollouts(
        policy,
        TransformersSampler(policy),
        encode_problems(policy.tokenizer, problems),
        reward,
        experiment.rollouts,
        arguments.seed,
    )
    buffer = OfflineBuffer.from_trajectories(rows)
    writers = {".parquet": buffer.to_parquet, ".jsonl": buffer.to_jsonl}
    writers.get(arguments.out.suffix, buffer.save)(arguments.out)
    right = sum((row.reward or 0) >= experiment.evaluation.correct_at for row in rows)
    print(f"{len(rows)} samples of {len(problems)} prompts, {right} correct; saved to {arguments.out}")
    return 0


def _evaluate(commands: Any) -> None:
    command = _command(
        commands, "evaluate", _run_evaluate, "Score a policy on an experiment's benchmarks.",
        "rlzoo evaluate arithmetic --model runs/dft --samples 8 --k 4",
    )  # fmt: skip
    _overrides(command)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", action="store_true", help="print the scores as JSON")


def _run_evaluate(arguments: argparse.Namespace) -> int:
    experiment = _experiment(arguments)
    from rlzoo.evaluation import evaluate
    from rlzoo.policy import load_policy
    from rlzoo.problems import load_problems
    from rlzoo.reward import get_reward

    reward = get_reward(experiment.reward)
    problems = {name: load_problems(source) for name, source in experiment.benchmarks.items()}
    policy = load_policy(experiment.model, experiment.training.dtype)
    scores = {
        name: evaluate(policy, some, reward, experiment.evaluation, arguments.seed).metrics
        for name, some in problems.items()
    }
    if arguments.json:
        print(json.dumps(scores, indent=1))
        return 0
    for name, m in scores.items():
        print(
            f"{name}: avg@{m['samples']} {m['avg_at_k']:.1%}  greedy {m['greedy']:.1%}  "
            f"pass@{m['k']} {m['pass_at_k']:.1%}"
        )
    return 0


def _report(commands: Any) -> None:
    command = _command(
        commands, "report", _run_report, "Write report.md and report.html from a folder's results.",
        "rlzoo report runs/arithmetic --baseline sft",
    )  # fmt: skip
    command.add_argument("folder", type=Path, help="a folder that rlzoo compare wrote")
    command.add_argument("--baseline", help="the algorithm that the others are compared with")


def _run_report(arguments: argparse.Namespace) -> int:
    from rlzoo.comparison.report import write_report

    write_report(arguments.folder, arguments.baseline)
    print(f"wrote {arguments.folder / 'report.html'}")
    return 0


def _list(commands: Any) -> None:
    command = _command(
        commands, "list", _run_list, "List objectives with their options, rewards, and experiments.",
        "rlzoo list --json",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print JSON")


def _run_list(arguments: argparse.Namespace) -> int:
    from rlzoo.config import list_experiments
    from rlzoo.objective import list_objectives, objective_class, options_of
    from rlzoo.reward import list_rewards

    found: dict[str, list[dict[str, Any]]] = {"objectives": [], "rewards": [], "experiments": []}
    for name in list_objectives():
        objective = objective_class(name)
        found["objectives"].append(
            {
                "name": name,
                "summary": (objective.__doc__ or "").splitlines()[0],
                "source": objective.source,
                "learns_from": objective.learns_from.value,
                "options": options_of(objective),
            }
        )
    found["rewards"] = [{"name": name} for name in list_rewards()]
    found["experiments"] = [{"name": n, "description": text} for n, text in list_experiments().items()]
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    print("objectives")
    for row in found["objectives"]:
        options = ", ".join(f"{k}={v['default']}" for k, v in row["options"].items())
        print(f"  {row['name']:10} {row['summary']}" + (f" [{options}]" if options else ""))
    print("rewards\n  " + ", ".join(row["name"] for row in found["rewards"]))
    print("experiments")
    for row in found["experiments"]:
        print(f"  {row['name']:18} {row['description'].split('. ')[0].rstrip('.')}.")
    return 0


def _pairs(texts: Sequence[str], option: str) -> dict[str, Any]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{option} {text!r}: write KEY=VALUE")
        try:
            pairs[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{option} {text!r}: the value is not valid YAML") from None
    return pairs


def _must_be_new(path: Path) -> None:
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"--out {str(path)!r} exists already: give another name, or remove it")


if __name__ == "__main__":
    sys.exit(main())
