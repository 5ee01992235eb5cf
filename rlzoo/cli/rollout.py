"""``rlzoo rollout``."""

from __future__ import annotations

from rlzoo.cli import options


def rollout(
    experiment: options.ExperimentName = "arithmetic",
    *,
    model: options.Model = None,
    reward: options.Reward = None,
    data: options.Data = None,
    column: options.Column = None,
    bad_rows: options.BadRows = None,
    limit: options.Limit = None,
    rollout_samples: options.RolloutSamples = None,
    sets: options.Set = None,
    out: options.BufferOut,
    push_to_hub: options.PushToHub = None,
    public: options.Public = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    trust_remote_code: options.Trust = False,
) -> int:
    """Sample a policy on an experiment's training problems, score the samples, and save them as a buffer.

    The policy is the experiment's base model, after its warm-up if it has one, or the --model that is given, as it is.

    Examples:
      rlzoo rollout arithmetic --limit 100 --out runs/buffer
      rlzoo rollout --model runs/rft --rollout-samples 8 --out samples.jsonl
      rlzoo rollout smollm2-gsm8k --set rollouts.engine=vllm --out runs/buffer
    """
    from rlzoo.cli.settings import check_public, experiment_of_model, prepare
    from rlzoo.errors import UserError

    check_public(public, push_to_hub)
    if push_to_hub is not None and out.suffix in (".parquet", ".jsonl"):
        raise UserError(f"--push-to-hub pushes a folder, with its card: give --out one in place of {str(out)!r}")
    chosen = experiment_of_model(
        experiment, sets, model,
        reward=reward, data=data, columns=column, bad_rows=bad_rows, limit=limit, rollout_samples=rollout_samples,
    )  # fmt: skip
    from rich.console import Console

    from rlzoo.cli.pushing import files_of_buffer
    from rlzoo.jobs.cached_results import CachedResults
    from rlzoo.jobs.hub import pushed
    from rlzoo.jobs.pool import silence
    from rlzoo.jobs.progress import counting, loading, reporting
    from rlzoo.jobs.ranks import is_main
    from rlzoo.jobs.runs import run_in

    with loading():
        from rlzoo.buffers import OfflineBuffer
        from rlzoo.buffers.bad_rows import BadRows
        from rlzoo.buffers.problems import encode_problems, load_problems
        from rlzoo.comparison.resolve import reward_of
        from rlzoo.comparison.shared_buffer import card_of, flops_of_sampling
        from rlzoo.comparison.warm_up import base_policy
        from rlzoo.policy.sequences import learned_tokens
        from rlzoo.rollout import collect_rollouts, cut_short, mismatch, sampler_class, sampler_of, unscored

    prepare(threads, trust_remote_code)
    bad = BadRows(chosen.train.bad_rows)
    sampler_class(chosen.rollouts).check_installed()
    scored_by, problems = reward_of(chosen), load_problems(chosen.train, bad)[: chosen.rollouts.prompts]
    silence()
    asked = {"experiment": chosen.model_dump(mode="json"), "seed": seed, "threads": threads}
    console = Console(stderr=True, quiet=not is_main())
    with pushed(push_to_hub, "dataset", not public, out, files_of_buffer):
        with run_in(out, "rollout", asked, "whole") as run, reporting(console, "loading the model") as report:
            if run.finished:
                print(f"already finished: {out}")
                return 0
            settings = chosen.rollouts
            with base_policy(chosen, report, run.state) as policy:
                encoded = encode_problems(policy.tokenizer, problems, bad)
                report(0.0, "sampling")
                sampler, recompute = sampler_of(policy, settings), not settings.wants_sampler_logp
                rows = collect_rollouts(
                    policy, sampler, encoded, scored_by, settings, seed,
                    token_budget=chosen.training.token_budget, progress=counting(len(encoded), "sampling", report),
                    recompute=recompute, cached=CachedResults(run.state), bad=bad,
                )  # fmt: skip
                flops = flops_of_sampling(policy, rows)
            buffer = OfflineBuffer.from_trajectories(rows)
            events = [*bad.events(), *cut_short(rows, settings.max_new_tokens)]
            known = {"dropped_rows": bad.summary(), "events": events}
            lead = (
                f"Samples of a policy on problems of the experiment {chosen.name}, scored by a reward, made by rlzoo."
            )
            card = card_of(chosen, buffer, out.absolute().name, lead, seed, sum(map(learned_tokens, rows)), flops)
            buffer.write(out, {name: value for name, value in known.items() if value}, card)
        right = sum((row.reward or 0) >= chosen.evaluation.correct_at for row in rows)
        for line in bad.lines():
            print(line)
        prompts = len({row.prompt_id for row in rows})
        print(f"{len(rows)} samples of {prompts} prompts, {right} correct; saved to {out}")
        for line in cut_short(rows, settings.max_new_tokens):
            print(line)
        if without := unscored((row.reward, row.prompt) for row in rows):
            print(without)
        if found := mismatch(rows):
            print(
                f"log-probs of engine and trainer differ by {found['mean_absolute']:.2g} on average and "
                f"{found['largest']:.2g} at most; mean ratio {found['mean_ratio']:.6f}"
            )
    return 0
