"""Tests run offline and on one thread: fast on small tensors, and the same everywhere."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start

import hypothesis
import pytest
import torch  # after the variables above, which huggingface_hub reads when it is imported

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """A GPU is for the tests that ask for one: the others compare with what a CPU computes."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """What has been imported stays: nobody need look through half a million objects again to collect garbage."""
    gc.collect()
    gc.freeze()


LEFT_OUT = ("gpu", "vllm", "real_model", "slow")
"""Markers that say why a test is left out, the first that it has."""
_left_out = pytest.StashKey[dict[str, int]]()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count what markers leave out, by reason."""
    for item in items:
        reason = next((name for name in LEFT_OUT if item.get_closest_marker(name)), None)
        if reason and not item.config.option.keyword:
            counts = item.config.stash.setdefault(_left_out, {})
            counts[reason] = counts.get(reason, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist tells the process that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_left_out, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """All workers leave the same out."""
    node.config.stash[_left_out] = getattr(node, "workeroutput", {}).get("left_out", {})  # none of one that died


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many tests were left out and why."""
    meaning = dict(line.split(": ", 1) for line in config.getini("markers") if ": " in line)
    for reason, count in config.stash.get(_left_out, {}).items():
        terminalreporter.write_line(f"LEFT OUT [{count}] {reason}: {meaning[reason]}")


hypothesis.settings.register_profile("untimed", deadline=None, max_examples=50)  # however busy the machine
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rlzoo.cli.main` adds the current folder to sys.path, which is right for a command and not for a test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded rows of the tests are kept in a folder of their own, and found by the processes that tests start."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_DATASETS_CACHE", folder)
        import datasets

        patched.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(autouse=True, scope="session")
def unsynced() -> Iterator[None]:
    """Nothing waits for the disk: processes are killed here, and what they wrote is kept; machines do not crash."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of comparisons run in this process."""
    from comparisons import inline_pool

    from rlzoo.comparison import runner

    monkeypatch.setattr(runner, "pool", inline_pool)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes are copies of this one: one that starts afresh imports for five seconds of a core."""
    if sys.platform == "linux":  # elsewhere libraries do not survive it
        monkeypatch.setattr("rlzoo.jobs.pool.START", "fork")


@pytest.fixture
def undrawn(inline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no report is drawn, which takes longer than a small comparison."""
    from rlzoo.comparison import runner

    monkeypatch.setattr(runner, "write_report", lambda *_: None)


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are written with an empty drawing for each figure: to draw them takes longer than a small comparison."""
    from rlzoo.document.drawing import Drawing

    monkeypatch.setattr(Drawing, "svg", '<svg width="1pt" height="1pt" viewBox="0 0 1 1"></svg>')


@pytest.fixture
def hears_interrupts() -> Iterator[None]:
    """A shell that runs the tests in the background has told them to ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded worlds' tokenizer."""
    from rlzoo.worlds.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def make_policy(tokenizer: Any) -> Callable[..., Any]:
    """A factory of tiny random policies that speak the embedded tokenizer.

    ``kind`` is ``gpt2``, which computes in float64 throughout and has dropout, or ``llama``, whose norms compute
    in float32 whatever the dtype.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from rlzoo.policy import Policy

    def make(kind: str = "gpt2", dtype: torch.dtype = torch.float64, seed: int = 0) -> Policy:
        torch.manual_seed(seed)
        common = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "eos_token_id": tokenizer.eos_token_id}
        if kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common))
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    intermediate_size=48,
                    max_position_embeddings=64,
                    **common,
                )
            )
        return Policy(model.to(dtype).eval(), tokenizer, kind)

    return make
