"""Training, the package, the registered model and the endpoint make the same ids; one byte that is changed anywhere
between stops the hop, which says where."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from endpoint_fixtures import running
from tunewright import chat, deploy, life, models, tracking, work
from tunewright import recipe as recipes
from tunewright.backends.local import DIRECT, LocalBackend
from tunewright.chat import Message
from tunewright.data import tokens
from tunewright.data.sources import Row
from tunewright.endpoint import create_app, load
from tunewright.errors import DataError, EndpointError, RunError, StageError
from tunewright.models import ModelRef
from tunewright.package import formats
from tunewright.package.predictor import Columns, Predictor
from tunewright.run import Run, read_json
from tunewright.testing import tiny_model
from tunewright.tracking import Tracker

Make = Callable[..., Run]
Change = Callable[[Path, set[int]], None]

TOOL = {
    "function": {"parameters": {"properties": {"q": {"type": "string"}}, "type": "object"}, "name": "find"},
    "type": "function",
}
"""Its keys are in an order of its own, as in many data sets."""


def talk(number: int) -> dict[str, Any]:
    call = {"id": f"c{number}", "type": "function", "function": {"name": "find", "arguments": '{"q": "e\u0301"}'}}
    return {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"hello {number}"},
            {"role": "assistant", "content": "lovely", "weight": 0},
            {"role": "user", "content": "cafe\u0301\u00a0\U0001f642?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "superb", "tool_call_id": f"c{number}"},
            {"role": "assistant", "content": "great fine"},
        ],
        "tools": [TOOL],
    }


@pytest.fixture(scope="module")
def caller(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained to call tools, packaged and registered. Not to be changed."""
    folder = tmp_path_factory.mktemp("calls")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(talk(number)) + "\n" for number in range(6)))
    run = make(
        model=tiny_model(folder / "model", context=1024),
        task="chat",
        data={"train": str(path), "test": str(path)},
        train={"max_steps": 2, "batch_size": 2},
        evaluate={"bootstrap": 200, "max_new_tokens": 4},
        package={"register": "caller"},
        tracking={"enabled": True},
    )
    with tracking.attach(run) as tracker:
        formats.package(run, tracker)
    return run


def copied(run: Run, folder: Path) -> Run:
    """The run, free to be spoilt."""
    shutil.copytree(run.path, folder / run.id)
    return Run.open(folder / run.id)


def golden(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_json(run.rendering_file)["golden"]
    return rows


@pytest.fixture
def ask(caller: Run) -> Iterator[Callable[..., list[int]]]:
    """The endpoint over HTTP: the ids that it gives the model for a chat request."""
    with running(create_app(load(caller), name="caller", keys={"key": False})) as url:

        def asked(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
            body = {"model": "caller", "messages": messages} | ({"tools": tools} if tools else {})
            request = urllib.request.Request(
                f"{url}/tokenize", json.dumps(body).encode(), {"authorization": "Bearer key"}
            )
            with DIRECT.open(request, timeout=30) as reply:
                said = json.load(reply)
            assert said["count"] == len(said["tokens"])
            assert said["max_model_len"] == 1024
            ids: list[int] = said["tokens"]
            return ids

        yield asked


def loaded(run: Run, folder: str | None = None) -> Any:
    import mlflow

    mlflow.set_tracking_uri(run.resolved()["tracking"]["uri"])
    return mlflow.pyfunc.load_model(folder or run.manifest("package")["mlflow"])


def prompt_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [Message.from_dict(one).to_dict() for one in row["messages"][:-1]]


# --- the same ids ---


def test_prepared_packaged_registered_and_served_ids_are_the_same(caller: Run, ask: Callable[..., list[int]]) -> None:
    rows = golden(caller)
    prepared = tokens.TokenStore.open(caller, "test")
    for row, stored in zip(rows[:4], prepared, strict=False):
        assert row["ids"] == stored.ids
        assert row["mask"] == [int(flag) for flag in stored.mask]
    tokenizer = models.load_folder_tokenizer(caller.packaged_model)
    registered = loaded(caller).unwrap_python_model()
    batch = Predictor(caller.package)
    for row in rows:
        messages, tools = list(map(Message.from_dict, row["messages"])), row.get("tools", [])
        assert chat.render(tokenizer, messages, tools).ids == row["ids"]
        asked = prompt_of(row)
        assert registered._prompt({"text": float("nan"), "messages": asked, "tools": tools}) == row["prompt_ids"]
        assert registered._prompt({"messages": asked, "tools": json.dumps(tools)}) == row["prompt_ids"]
        assert (
            batch._prompt(Row("a", {"messages": asked, "tools": tools}), Columns(messages="messages"))
            == row["prompt_ids"]
        )
        assert ask(asked, tools) == row["prompt_ids"]


def test_golden_conversations_are_of_every_kind(caller: Run) -> None:
    rows = golden(caller)
    own, ours = rows[:4], rows[4:]
    assert [row["messages"][1]["content"] for row in own] == [f"hello {number}" for number in range(4)]
    for some in (own, ours):
        messages = [one for row in some for one in row["messages"]]
        text = json.dumps(some, ensure_ascii=False)
        assert any("tools" in row for row in some)
        assert any(one.get("tool_calls") for one in messages)
        assert {one["role"] for one in messages} == {"system", "user", "assistant", "tool"}
        assert any(one.get("weight") == 0 for one in messages)
        assert all(character in text for character in ("e\u0301", "\u00a0", "\U0001f642"))
    weighed = next(row for row in ours if any(one.get("weight") == 0 for one in row["messages"]))
    start, end = weighed["ends"][0], weighed["ends"][1]
    assert not any(weighed["mask"][start:end])
    assert any(weighed["mask"][end:])


def test_the_manifest_says_what_was_compared(caller: Run, packaged: Run) -> None:
    rows = golden(caller)
    assert caller.manifest("package")["rendering"] == {
        "conversations": len(rows),
        "with_tools": 6,
        "tokens": sum(len(row["ids"]) for row in rows),
        "prepared_rows": 8,
        "hops": ["trained", "packaged", "mlflow"],
    }
    assert packaged.manifest("package")["rendering"]["with_tools"] == 2


def test_a_registered_model_answers_with_tools_in_a_table(caller: Run) -> None:
    rows = [row for row in golden(caller) if "tools" in row]
    frame = pd.DataFrame({"messages": [prompt_of(row) for row in rows], "tools": [row["tools"] for row in rows]})
    said = list(loaded(caller).predict(frame)["prediction"])
    known = pd.read_parquet(caller.predictions_file)
    offline = list(known[known["model"] == "tuned"]["prediction"])
    assert said[:4] == offline[:4]


def test_a_deployed_endpoint_is_asked_for_its_ids_and_answers_as_offline(packaged: Run, tmp_path: Path) -> None:
    run, backend = copied(packaged, tmp_path), LocalBackend({"threads": 1})
    try:
        result = deploy.test(run, backend)
        assert (result["equal"], result["differ"]) == (result["compared"], [])
        assert result["compared"] == 10
        rows = golden(run)
        assert run.manifest("deploy")["rendering"] == run.manifest("package")["rendering"] | {
            "endpoint": {
                "conversations": len(rows),
                "prompt_tokens": sum(len(row["prompt_ids"]) for row in rows),
                "not_asked": [],
            },
            "hops": ["trained", "packaged", "mlflow", "endpoint"],
        }
        with pytest.raises(DataError, match="no role"):
            backend.rendered(run, [{"role": "nobody", "content": "a"}], [])
    finally:
        backend.undeploy(run)


# --- one byte ---


def tools_header(folder: Path, _known: set[int]) -> None:
    replace_in(folder / "chat_template.jinja", "'Tools:", "'tools:")


def comment(folder: Path, _known: set[int]) -> None:
    replace_in(folder / "chat_template.jinja", "{%- endfor -%}", "{%- endfor  %}", count=1)


def user_header(folder: Path, _known: set[int]) -> None:
    replace_in(folder / "chat_template.jinja", "':\\n' + message", "';\\n' + message")


def used_token(folder: Path, known: set[int]) -> None:
    change_an_id(folder / "tokenizer.json", lambda number: number in known)


def unused_token(folder: Path, known: set[int]) -> None:
    change_an_id(folder / "tokenizer.json", lambda number: number not in known)


def space(folder: Path, _known: set[int]) -> None:
    replace_in(folder / "tokenizer.json", "{", "{ ", count=1)


def bracket(folder: Path, _known: set[int]) -> None:
    replace_in(folder / "tokenizer.json", "{", "[", count=1)


def merge(folder: Path, _known: set[int]) -> None:
    first = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"][0]
    path = folder / "tokenizer.json"
    text = path.read_text()
    begin, end = text.split('"merges"')
    path.write_text(begin + '"merges"' + end.replace(f'"{first[0]}"', '"\u4f60"', 1))


def config(folder: Path, _known: set[int]) -> None:
    replace_in(folder / "tokenizer_config.json", "{", "{ ", count=1)


def replace_in(path: Path, old: str, new: str, *, count: int = -1) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def change_an_id(path: Path, wanted: Callable[[int], bool]) -> None:
    """Another last digit for the id of a token of the vocabulary."""
    text = path.read_text()
    vocabulary = text.index('"vocab"')
    for found in re.finditer(r": (\d+)", text[vocabulary : text.index('"merges"')]):
        if wanted(int(found[1])) and int(found[1]) > 100:
            at = vocabulary + found.end() - 1
            path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
            return
    raise AssertionError("no such token")


TOKEN = r"token \d+ is (\d+ '.*'|\(nothing\)) here and was \d+ '.*' in training"
CHANGES: list[tuple[Change, str]] = [
    (tools_header, r"golden conversation 1, message 1 \(system: 'Be kind.'\): " + TOKEN),
    (user_header, r"golden conversation 1: the chat .*; first, in message 1 \(system: 'Be kind.'\): " + TOKEN),
    (comment, "the chat template is not the one of training|" + TOKEN),
    (used_token, r"golden conversation \d+, message \d+ \(\w+: '.*'\): " + TOKEN),
    (unused_token, r"tokenizer.json is not the one that was packaged \(sha256 \w{12} here, \w{12} there\)"),
    (space, "tokenizer.json is not the one that was packaged"),
    (merge, "its tokenizer cannot be read"),
    (bracket, "its tokenizer cannot be read"),
    (config, "tokenizer_config.json is not the one that was packaged"),
]
IDS = [change.__name__ for change, _ in CHANGES]


def known_ids(run: Run) -> set[int]:
    return {number for row in golden(run) for number in row["ids"]}


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=IDS)
def test_one_byte_in_the_package_is_refused_by_the_endpoint(
    caller: Run, tmp_path: Path, change: Change, said: str
) -> None:
    run = copied(caller, tmp_path)
    change(run.packaged_model, known_ids(run))
    with pytest.raises(EndpointError, match=said) as caught:
        load(run)
    assert "package again" in str(caught.value)
    with pytest.raises((RunError, ValueError), match=said):
        Predictor(run.package)


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=IDS)
def test_one_byte_in_the_registered_copy_is_refused_by_mlflow(
    caller: Run, tmp_path: Path, change: Change, said: str
) -> None:
    import mlflow

    mlflow.set_tracking_uri(caller.resolved()["tracking"]["uri"])
    folder = mlflow.artifacts.download_artifacts(caller.manifest("package")["mlflow"], dst_path=str(tmp_path))
    change(Path(folder) / "artifacts" / "model", known_ids(caller))
    with pytest.raises(Exception, match=said):
        loaded(caller, folder)


def test_deployment_refuses_and_nothing_stands(caller: Run, tmp_path: Path) -> None:
    run, backend = copied(caller, tmp_path), LocalBackend({"threads": 1})
    tools_header(run.packaged_model, set())
    with pytest.raises(EndpointError, match=CHANGES[0][1]):
        deploy.deploy(run, backend)
    assert not backend.serving(run)
    assert not run.manifest_file("deploy").is_file()


class Elsewhere(LocalBackend):
    """An endpoint that gives the model other ids than its tokenizer would."""

    def __init__(self) -> None:
        super().__init__({})
        self.stands = False

    def deploy(self, run: Run) -> dict[str, Any]:
        self.stands = True
        return {"base_url": "http://elsewhere/v1"}

    def undeploy(self, run: Run) -> None:
        self.stands = False

    def rendered(self, run: Run, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        if tools:
            raise DataError("no tools here")
        known = next(row for row in golden(run) if prompt_of(row) == messages)
        return [*known["prompt_ids"][:-1], 7]


def test_an_endpoint_that_makes_other_ids_is_taken_down(caller: Run, tmp_path: Path) -> None:
    run, backend = copied(caller, tmp_path), Elsewhere()
    said = (
        r"http://elsewhere/v1: .* golden conversation 5, message 2 \(assistant: 'Hello.*'\): token \d+ is 7 .* was \d+ "
    )
    with pytest.raises(EndpointError, match=said):
        deploy.deploy(run, backend)
    assert not backend.stands
    assert not run.manifest_file("deploy").is_file()


# --- between training and the package ---


def trained_again(run: Run, folder: Path) -> tuple[Run, Path]:
    """The run up to `evaluate` with a base of its own."""
    run = copied(run, folder)
    shutil.rmtree(run.package)
    resolved = read_json(run.path / "resolved.json")
    base = Path(resolved["model"]["source"])
    shutil.copytree(base, folder / "base")
    text = (run.path / "resolved.json").read_text().replace(str(base), str(folder / "base"))
    (run.path / "resolved.json").write_text(text)
    return run, folder / "base"


def test_a_base_whose_template_changed_after_training_is_not_packaged(caller: Run, tmp_path: Path) -> None:
    run, base = trained_again(caller, tmp_path)
    (base / "chat_template.jinja").write_text(
        chat.DEFAULT_TEMPLATE.replace("{{- BOS -}}", "").replace("'Tools", "'tools")
    )
    said = r"prepared -> trained: .*rows.jsonl:1 does not .*: message 1 \(system: 'Be kind.'\): token 1 is \d+ 't'"
    with pytest.raises(StageError, match=said):
        formats.package(run, Tracker(run))
    assert not run.manifest_file("package").is_file()


def test_a_base_whose_tokenizer_changed_where_no_row_is_touched_is_not_packaged(caller: Run, tmp_path: Path) -> None:
    run, base = trained_again(caller, tmp_path)
    unused_token(base, known_ids(caller))
    with pytest.raises(StageError, match="its tokenizer is another one now, though the first rows come out the same"):
        formats.package(run, Tracker(run))


def test_a_copy_that_is_not_the_package_is_found_when_it_is_registered(
    caller: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(caller, tmp_path)
    log = Tracker.model

    def spoiling(self: Tracker, code: Path, artifacts: dict[str, Path], **more: Any) -> str:
        spoilt = tmp_path / "spoilt" / "model"
        shutil.copytree(artifacts["model"], spoilt)
        tools_header(spoilt, set())
        return log(self, code, artifacts | {"model": spoilt}, **more)

    monkeypatch.setattr(Tracker, "model", spoiling)
    run.manifest_file("package").unlink()
    with (
        pytest.raises(
            StageError, match=r"packaged -> mlflow: models:/caller/\d does not .*: golden conversation 1, message 1"
        ),
        tracking.attach(run) as tracker,
    ):
        formats.package(run, tracker)
    assert not run.manifest_file("package").is_file()


PAIR = {"prompt": "hello", "chosen": "lovely great", "rejected": "awful"}
KINDS: dict[str, dict[str, Any]] = {
    "pretraining": {"text": "lovely great fine superb kind " * 40},
    "preference": PAIR,
    "reward": {"prompt": "hello " * 200, "answer": "lovely"},
    "chat": {"prompt": "hello " * 200, "completion": "lovely"},
}
GRADER = {"type": "string_check", "reference": "{{ item.answer }}", "operation": "eq"}


@pytest.mark.parametrize("task", KINDS)
def test_every_kind_of_prepared_row_is_rendered_again(tmp_path: Path, task: str) -> None:
    """Long texts in pieces, and prompts that were cut to fit."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(KINDS[task]) + "\n" for _ in range(6)))
    given = {
        "name": "kinds",
        "model": str(tiny_model(tmp_path / "model")),
        "task": task,
        "data": {"train": str(path), "test": str(path), "over_length": "truncate"},
        "tracking": {"enabled": False},
    }
    if task == "reward":
        given |= {"grader": GRADER}
    run = life.start(recipes.loads(yaml.safe_dump(given)), tmp_path / "runs", resume=False)
    life.advance(run, until="check")
    work.prepare(run)
    tokenizer = models.load_tokenizer(ModelRef.from_dict(run.resolved()["model"]))
    chat.equip(tokenizer)
    assert formats._refuse_another_rendering(run, tokenizer) == 8
    store = tokens.TokenStore.open(run, "train")
    assert max(store.lengths) <= run.manifest("prepare")["max_length"]
    ids = np.load(store.files[0])
    ids[3] += 1
    np.save(store.files[0], ids)
    with pytest.raises(StageError, match=r"prepared -> trained: .*rows.jsonl:1 does not .*token 4 is \d+ .* was \d+"):
        formats._refuse_another_rendering(run, tokenizer)
