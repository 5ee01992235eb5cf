"""Model and data set cards, and what --push-to-hub makes of them; the Hub is one on this machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from comparisons import inline_pool, small
from fake_hub import FakeHub, FakeRepository, connected
from huggingface_hub import DatasetCard, ModelCard
from rich.console import Console

from rlzoo import OfflineBuffer, compare, get_objective, load_policy
from rlzoo.buffers import from_trl, read_buffer
from rlzoo.buffers.card import buffer_card
from rlzoo.cli import main
from rlzoo.comparison.dry_run import unchecked
from rlzoo.errors import UserError
from rlzoo.jobs.hub import pushed
from rlzoo.jobs.sharing import HIDDEN, hub_id, public, public_command
from rlzoo.policy import log_probs
from rlzoo.training.card import changed_options, objective_table

ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"}]
PAIRS = [([5, 6], [7, 8])]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with connected(FakeHub(), monkeypatch) as found:
        yield found


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Demonstrations in a place that names somebody."""
    folder = tmp_path / "home" / "alice"
    folder.mkdir(parents=True)
    file = folder / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def train(table: Path, out: Path, *more: str) -> int:
    options = ["--buffer", str(table), "--steps", "1", "--batch-size", "2", "--out", str(out)]
    return main(["train", "dft", *options, *more])


def hash_of(card: str) -> tuple[str, str]:
    """The hash that a card gives, and that of the configuration that it shows."""
    shown = re.search(r"```yaml\n(.*?)\n```", card, re.S)
    assert shown is not None
    told = re.search(r"\b[0-9a-f]{64}\b", card)
    assert told is not None
    return told[0], sha256(yaml.safe_load(shown[1]))


def sha256(configuration: Any) -> str:
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def cells_of(card: str, name: str) -> list[str]:
    """The entries of the row of a table that begins with this name."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
    return [one.strip() for one in re.split(r"(?<!\\)\|", line)[2:-1]]


@pytest.mark.slow
def test_a_trained_model_has_a_card(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my-model"
    assert train(table, out, "--set", "training.lora={}") == 0
    card, found = ModelCard.load(out / "README.md"), json.loads((out / "training.json").read_text())
    assert card.data.library_name == "transformers" and card.data.license == "apache-2.0"
    assert card.data.base_model is None  # the embedded base is not on the Hub
    assert {"rlzoo", "dft"} <= set(card.data.tags)
    text = card.content
    assert cells_of(text, "coefficient") == [r"p\_t"] and "arXiv 2508.05629" in text
    assert "All options have their default values" in text
    assert cells_of(text, "source") == ["sums.jsonl"]
    assert cells_of(text, "rows") == ["2 (2 demonstrations) of 2 prompts"]
    assert cells_of(text, "gradient tokens") == [f"{found['costs']['gradient_tokens']:,}"]
    assert "rlzoo train dft --buffer sums.jsonl" in text and "torch" in text and "adapter" in text
    assert len(set(hash_of(text))) == 1
    assert str(tmp_path) not in text and "alice" not in text
    adapter = ModelCard.load(out / "adapter" / "README.md")
    assert adapter.data.library_name == "peft" and {"rlzoo", "dft", "lora"} <= set(adapter.data.tags)
    assert cells_of(adapter.content, "coefficient") == [r"p\_t"] and len(set(hash_of(adapter.content))) == 1
    shown = re.search(r"```python\n(.*?)\n```", adapter.content, re.S)
    assert shown is not None
    loaded: dict[str, Any] = {}
    exec(shown[1].replace("FOLDER", str(out / "adapter")), loaded)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded["model"](ids).logits, load_policy(str(out)).model(ids).logits)
    again = tmp_path / "after"  # a model of a model: what is known of the first goes on
    (out / "README.md").write_text("---\nbase_model: org/base\nlicense: mit\n---\nedited")
    assert train(table, again, "--model", str(out)) == 0
    card = ModelCard.load(again / "README.md")
    assert (card.data.base_model, card.data.license) == ("org/base", "mit")
    assert "My-model, fine-tuned with dft" in card.content
    capsys.readouterr()
    (out / "README.md").write_text("edited once more")
    assert train(table, again, "--model", str(out)) == 0, "a card is not part of what a run depends on"
    assert "already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trained_model_is_pushed(
    table: Path, tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    out, option = tmp_path / "dft", ["--push-to-hub", "alice/dft"]
    base = tmp_path / "home" / "alice" / "base"
    load_policy("embedded").model.save_pretrained(base)
    load_policy("embedded").tokenizer.save_pretrained(base)
    more = ["--model", str(base), "--set", "training.lora={}", "--set", "training.trackers=[tensorboard]"]
    assert train(table, out, *more, *option) == 0
    assert f"pushed to {hub.url}/alice/dft" in capsys.readouterr().out
    repository = hub.repositories["models/alice/dft"]
    assert repository.private
    of_adapter = {"adapter/adapter_config.json", "adapter/README.md"}
    assert {"model.safetensors", "config.json", "README.md", "training.json"} | of_adapter <= set(repository.files)
    assert b"rlzoo evaluate --model alice/dft" in repository.files["README.md"]
    assert not [name for name in repository.files if name.startswith(("run.json", "logs"))]
    for name, content in repository.files.items():
        assert str(tmp_path).encode() not in content and b"home/alice" not in content, name
    copy = tmp_path / "copy"
    for name, content in repository.files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    assert log_probs(load_policy(str(copy)), PAIRS) == log_probs(load_policy(str(out)), PAIRS)
    hub.requests.clear()
    assert train(table, out, *more, *option) == 0  # again
    told = capsys.readouterr().out
    assert "already finished" in told and "already on the Hub" in told
    assert not [request for request in hub.requests if "commit" in request]


@pytest.mark.slow
def test_a_push_only_when_asked_that_fails_and_loses_nothing(
    table: Path, tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    out, option = tmp_path / "out", ["--push-to-hub", "alice/dft", "--public"]
    assert train(table, out) == 0
    assert hub.requests == []
    hub.refuses = {"/commit/": 413}
    assert train(table, out, *option) == 2  # of a run that has finished
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "complete, but not pushed" in errors and f"--out {out}" in errors
    assert (out / "model.safetensors").exists() and (out / "training.json").exists()
    hub.refuses = {}
    assert train(table, out, *option) == 0
    assert "already finished" in capsys.readouterr().out
    repository = hub.repositories["models/alice/dft"]
    assert "model.safetensors" in repository.files and not repository.private
    assert train(table, out, "--push-to-hub", "alice/dft") == 2  # privately
    assert "is public: add --public" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (PermissionError(13, "Permission denied", "model.bin"), "model.bin cannot be used (Permission denied): check"),
        (ConnectionResetError("reset by peer"), "the Hub cannot be reached (reset by peer): check the connection"),
        (ValueError("no JSON"), "the Hub refuses alice/dft (no JSON)"),
        (TypeError("unexpected keyword"), None),
        (KeyError("oid"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("of_upload", [False, True])
def test_what_goes_wrong_in_a_push_is_told_as_what_it_is(
    problem: Exception, told: str | None, of_upload: bool, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the client raises it, and in its wrapper of an upload."""

    def fails(*_: Any, **__: Any) -> None:
        if of_upload:
            raise RuntimeError("Error while uploading 'model.bin' to the Hub.") from problem
        raise problem

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", fails)
    (tmp_path / "README.md").write_text("a card")
    kind = UserError if told is not None else RuntimeError if of_upload else type(problem)
    with pytest.raises(kind) as raised, pushed("alice/dft", "model", True, tmp_path, lambda _: {}):
        pass
    assert told is None or f"is complete, but not pushed: {told}" in str(raised.value)


@pytest.mark.slow
def test_what_would_fail_later_fails_before_the_run(
    table: Path, tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, *more: str) -> str:
        assert train(table, tmp_path / "out", "--push-to-hub", name, *more) == 2
        assert not (tmp_path / "out").exists(), "nothing was spent"
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and "Traceback" not in errors
        return errors

    for name in ("dft", "alice/d ft", "alice/dft/more", "/dft", "alice/-dft"):
        assert "NAMESPACE/NAME" in refused(name)
    assert not hub.requests
    hub.repositories["models/alice/taken"] = FakeRepository(True, {"README.md": b"mine", ".gitattributes": b""})
    assert "holds other files" in refused("alice/taken")
    hub.repositories["models/alice/open"] = FakeRepository(False, {".gitattributes": b""})
    assert "is public: add --public" in refused("alice/open")
    for status, told in {401: "does not accept the token", 403: "may not write to alice/dft", 429: "not today"}.items():
        hub.refuses = {"/create": status}
        assert told in refused("alice/dft")
    hub.refuses = {}
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        assert "cannot be reached" in refused("alice/dft")
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in refused("alice/dft")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in refused("alice/dft")
    assert train(table, tmp_path / "out", "--public") == 2
    assert "add --push-to-hub" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sampled_buffer_has_a_card_and_is_pushed(
    tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "samples", ["rollout", "facts", "--model", "embedded", "--limit", "3"]
    assert main([*options, "--out", str(out), "--push-to-hub", "alice/samples"]) == 0
    card, buffer = DatasetCard.load(out / "README.md"), OfflineBuffer.load(out)
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "data-*.arrow"}]
    assert list(out.glob("data-*.arrow")) and "size_categories" in card.data.to_dict()
    assert cells_of(card.content, "sampled from") == ["embedded"]
    assert cells_of(card.content, "rows") == [f"{len(buffer)} ({len(buffer)} samples) of 3 prompts"]
    sampled = sum(len(row.completion_ids) for row in buffer)
    assert cells_of(card.content, "cost")[0].startswith(f"{sampled} sampled tokens, ")
    assert len(set(hash_of(card.content))) == 1
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in hub.repositories["datasets/alice/samples"].files.items():  # .gitattributes among them
        (copy / name).write_bytes(content)
    assert [row.completion for row in OfflineBuffer.load(copy)] == [row.completion for row in buffer]
    (copy / "README.md").write_text("edited")
    assert len(OfflineBuffer.load(copy)) == len(buffer)
    assert "--buffer FOLDER" in card.content
    assert "--buffer alice/samples" in hub.repositories["datasets/alice/samples"].files["README.md"].decode()
    assert main([*options, "--out", str(out), "--push-to-hub", "alice/samples"]) == 0
    assert "already on the Hub" in capsys.readouterr().out
    assert main([*options, "--out", str(tmp_path / "a.jsonl"), "--push-to-hub", "alice/file"]) == 2
    assert "give --out" in capsys.readouterr().err


def test_the_origin_of_a_buffer_is_shown_as_it_was_set() -> None:
    origin = {"reward": {"name": "math-answer", "marked": True, "column": None}, "samples": 1000, "seed": "1000"}
    card = buffer_card(OfflineBuffer.from_trajectories([]), "rows", "Some rows.", origin, {})
    shown = {name: cells_of(card, name) for name in origin}
    assert shown == {"reward": ["name: math-answer, marked: True"], "samples": ["1,000"], "seed": ["1000"]}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_every_command_opens_a_pushed_buffer(
    tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = "alice/qwen2.5-facts"
    (tmp_path / "mine.py").write_text(
        "def right(completions, **_):\n    return [1.0] * len(completions)\n\n\n"
        "def half(completions, **_):\n    return [0.5] * len(completions)\n"
    )
    options = ["--model", "embedded", "--limit", "3", "--reward", "mine.py:right", "--push-to-hub", where]
    assert main(["rollout", "facts", *options, "--out", "own"]) == 0
    buffer, files = OfflineBuffer.load("own"), hub.repositories[f"datasets/{where}"].files
    files |= {"LICENSE": b"mine", "README.md": files["README.md"] + b"\nedited"}  # as its owner may do on the Hub
    opened = OfflineBuffer.load(where)
    assert list(opened) == list(buffer)
    capsys.readouterr()
    assert main(["buffer", "show", where]) == 0
    of_hub = capsys.readouterr().out
    assert main(["buffer", "show", "own"]) == 0
    assert capsys.readouterr().out == of_hub
    options = ["--buffer", where, "--steps", "1", "--batch-size", "2", "--out", "model"]
    assert main(["train", "rft", *options]) == 0
    assert ModelCard.load("model/README.md").data.datasets == [where]
    assert main(["rescore", where, "--reward", "mine.py:half"]) == 0
    rescored = Path("qwen2.5-facts-rescored")
    assert set(OfflineBuffer.load(rescored).column("reward")) == {0.5}
    assert DatasetCard.load(rescored / "README.md").data.source_datasets == [where]
    monkeypatch.setattr("rlzoo.variance.run.pool", inline_pool)
    options = ["--buffer", where, "--objectives", "rft", "--every", "0", "--draws", "0"]
    assert main(["variance", "facts", *options, "--out", "analysis"]) == 0
    measured = json.loads(Path("analysis/variance.json").read_text())["objectives"]["rft"]
    card = DatasetCard.load("analysis/README.md")
    assert card.data.source_datasets == [where] and len(set(hash_of(card.content))) == 1
    assert cells_of(card.content, "rft")[-1] == str(measured["rows"]) and cells_of(card.content, "rows") == [where]
    assert "| rft | Rejection" in card.content and str(tmp_path) not in card.content
    card = DatasetCard.load("analysis/buffer/README.md")
    assert card.data.source_datasets == [where] and cells_of(card.content, "rows")[0] == where
    study = small({"rft": {}}, demonstrations={"source": where})
    assert unchecked(study) == [], "a dry run finds it too"
    compare(study, tmp_path / "study", console=Console(quiet=True))
    assert OfflineBuffer.load("study/buffer").column("completion")[: len(buffer)] == buffer.column("completion")
    with pytest.raises(UserError, match=f"{where} is a saved buffer: only a table's columns"):
        read_buffer(where, None, columns={"completion": "answer"})
    with pytest.raises(UserError, match=f"{where} is a saved buffer, which has no split 'test'"):
        read_buffer(where, None, split="test")


@pytest.mark.slow
def test_a_buffer_on_the_hub_that_cannot_be_opened(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy("embedded")
    from_trl(ROWS, policy.tokenizer).save(tmp_path / "own")
    files = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    hub.repositories["datasets/alice/sums"] = FakeRepository(True, files)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    with pytest.raises(UserError, match="alice/none is neither a file here nor a data set that the Hub gives"):
        OfflineBuffer.load("alice/none")
    hub.refuses = {"data-00000": 403}
    with pytest.raises(UserError, match=r"alice/sums cannot be downloaded from the Hub .*try again"):
        OfflineBuffer.load("alice/sums")
    hub.refuses = {}
    assert len(OfflineBuffer.load("alice/sums")) == 2
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert len(OfflineBuffer.load("alice/sums")) == 2, "a copy needs no connection"
    files["data-00000-of-00001.arrow"] = files["data-00000-of-00001.arrow"].replace(b"1+1", b"1+2")
    with pytest.raises(UserError, match="is damaged: its checksum has changed"):
        OfflineBuffer.load("alice/sums")
    rows = OfflineBuffer.load(tmp_path / "own").rows  # as a table, which datasets pushes and reads
    monkeypatch.setattr("datasets.load_dataset", lambda name, *_, **__: rows if name == "alice/table" else None)
    hub.repositories["datasets/alice/table"] = FakeRepository(True, {"data/train.parquet": b""})
    assert list(OfflineBuffer.load("alice/table")) == list(read_buffer("alice/table", policy.tokenizer))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_comparison_has_cards(tmp_path: Path) -> None:
    text = "objectives | compared: `sft`, <b>*and*</b> #1"
    algorithms: dict[str, Any] = {"sft": {}, "gentle": {"objective": "power", "options": {"alpha": 0.5}}}
    experiment = small(algorithms, seeds=[0, 1], description=text)
    results = compare(experiment, tmp_path / "out", console=Console(quiet=True))
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.configs[0]["data_files"][0]["path"] == "outcomes.parquet"
    assert set(card.data.tags) >= {"rlzoo", "sft", "gentle"}
    assert r"objectives \| compared: \`sft\`, &lt;b&gt;" in card.content
    row = next(r for r in results["summary"] if (r["algorithm"], r["metric"]) == ("gentle", "avg_at_k"))
    told = f"{100 * row['mean']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
    assert cells_of(card.content, "gentle")[0].strip("*") == told
    assert "rlzoo compare experiment.yaml" in card.content
    assert "| gentle | Power family |" in card.content and "alpha = 0.5" in card.content
    assert sha256(yaml.safe_load((tmp_path / "out" / "experiment.yaml").read_text())) in card.content
    buffer = DatasetCard.load(tmp_path / "out" / "buffer" / "README.md").content
    assert cells_of(buffer, "problems") == ["world:facts/train"]
    assert cells_of(buffer, "rows")[0].startswith(f"{results['buffer']['rows']} (")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")  # but for the push, which draws a report without paths
def test_a_comparison_is_pushed_without_paths(tmp_path: Path, hub: FakeHub) -> None:
    folder = tmp_path / "home" / "alice"
    folder.mkdir(parents=True)
    reward = folder / "mine.py"
    reward.write_text("def short(completions, **_):\n    return [float(len(c) < 9) for c in completions]\n")
    options = ["compare", "facts", "--algorithms", "sft", "--seeds", "0", "--steps", "1", "--limit", "4"]
    options += ["--samples", "2", "--batch-size", "8", "--reward", f"{reward}:short", "--set", "retention={}"]
    options += ["--set", "evaluation.max_new_tokens=8", "--out", str(tmp_path / "out")]
    assert main([*options, "--push-to-hub", "alice/facts"]) == 0
    files = hub.repositories["datasets/alice/facts"].files
    assert {"README.md", "results.json", "outcomes.parquet", "experiment.yaml", "report.md", "report.html"} <= set(
        files
    )
    assert any(name.startswith("figures/") for name in files)
    assert not [name for name in files if name.startswith(("run.json", "buffer", "logs"))]
    for name, content in files.items():
        assert str(tmp_path).encode() not in content and b"home/alice" not in content, name
    assert yaml.safe_load(files["experiment.yaml"])["reward"] == "mine.py:short"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["config"]["reward"] == f"{reward}:short"
    assert sha256(yaml.safe_load(files["experiment.yaml"])).encode() in files["README.md"]


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_with_a_failed_cell_is_not_pushed(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {"failed": [{}], "wall_seconds": 1.0}
    monkeypatch.setattr("rlzoo.comparison.runner.compare", lambda *_, **__: failed)
    monkeypatch.setattr("rlzoo.comparison.report.report_table", lambda _: [])
    assert main(["compare", "facts", "--out", str(tmp_path / "out"), "--push-to-hub", "alice/facts"]) == 1
    assert "retries them, and then pushes" in capsys.readouterr().out
    assert not [request for request in hub.requests if "commit" in request]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/alice/x.jsonl", "x.jsonl"),
        ("~/models/base", "base"),
        ("../../alice/mine.py:Mine", "mine.py:Mine"),
        ("runs/buffer", "runs/buffer"),
        ("inspect:/home/alice/tasks.py@sums", "inspect:tasks.py@sums"),
        ("/data/alice/x.jsonl line 3: empty", "x.jsonl line 3: empty"),
        ("see https://a.org/b/c/d and 1/2", "see https://a.org/b/c/d and 1/2"),
        ("http://alice:pw@a.org/x", "http://a.org/x"),
        (f"a token hf_{'x' * 30}", f"a token {HIDDEN}"),
        ("{name: judge, api_key: abc123}", f"{{name: judge, api_key: {HIDDEN}}}"),
        ({"api_key": "abc", "url": "http://gpu1:8000", "token_budget": "auto", "eos_token": "</s>", "top_p": 1.0},
         {"api_key": HIDDEN, "url": HIDDEN, "token_budget": "auto", "eos_token": "</s>", "top_p": 1.0}),
        ({"password": None, "columns": ["/a/b/c"]}, {"password": None, "columns": ["c"]}),
    ],
)  # fmt: skip
def test_what_others_see_has_no_path_and_no_secret(value: Any, shown: Any) -> None:
    assert public(value) == shown


def test_a_command_for_others_to_see() -> None:
    home = str(Path.home())
    arguments = ["train", f"sft,{home}/o/mine.py:Mine", "--set", "rollouts.url=http://gpu1:1", "--out=/a/b c"]
    assert public_command(arguments) == f"rlzoo train sft,mine.py:Mine --set 'rollouts.url={HIDDEN}' '--out=b c'"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("openai/gsm8k:main", "openai/gsm8k"),
        ("world:arithmetic/test", None),
        ("inspect:gsm8k", None),
        ("gpt2", "gpt2"),
        ("a/b.jsonl", None),
        ("/a/b", None),
    ],
)
def test_hub_ids(source: str, found: str | None) -> None:
    assert hub_id(source) == found


def test_objectives_in_a_table(tmp_path: Path) -> None:
    plain = tmp_path / "plain.py"
    plain.write_text(
        "from dataclasses import dataclass\n\nfrom rlzoo import Objective\nfrom rlzoo.types import Coefficients\n\n\n"
        "@dataclass(frozen=True)\nclass Plain(Objective):\n    name = 'plain'\n    teacher: str = 'none'\n\n"
        "    def coefficients(self, batch):\n        return Coefficients(batch.logp)\n"
    )
    mine = get_objective(f"{plain}:Plain", teacher=str(tmp_path))
    assert changed_options(mine) == {"teacher": (tmp_path.name, "none")}
    (row,) = objective_table({"mine": mine}).rows  # without a docstring
    assert [entry.text for entry in row] == ["mine", "plain", "", f"teacher = {tmp_path.name}", ""]
