"""The registered model answers, from MLflow's own command line, as it answered in evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tunewright import tracking
from tunewright.data import prepare
from tunewright.package import formats
from tunewright.run import Run

Make = Callable[..., Run]
COMMAND = [sys.executable, "-m", "mlflow", "models", "predict", "-t", "json", "--env-manager", "local"]


def predict(run: Run, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """`mlflow models predict` in a process of its own, which knows nothing but the tracking server."""
    path = folder / "input.json"
    path.write_text(json.dumps({"dataframe_records": rows}))
    uri = run.manifest("package")["mlflow"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": run.resolved()["tracking"]["uri"], "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [*COMMAND, "-m", uri, "-i", str(path)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    answers: list[dict[str, Any]] = json.loads(said.stdout.strip().splitlines()[-1])["predictions"]
    return answers


def test_the_command_line_answers_as_evaluation_did(packaged: Run, tmp_path: Path) -> None:
    test = prepare.examples(packaged, "test")
    answers = predict(packaged, [{"text": example.prompt[-1].content} for example in test], tmp_path)
    table = pd.read_parquet(packaged.predictions_file)
    offline = table[table["model"] == "tuned"].reset_index(drop=True)
    assert [one["prediction"] for one in answers] == list(offline["prediction"])
    assert [one["probability"] for one in answers] == pytest.approx([max(row) for row in offline["probabilities"]])
    talks = [[message.to_dict() for message in example.prompt] for example in test]
    again = loaded(packaged).predict(pd.DataFrame({"messages": talks}))
    assert again.to_dict("records") == answers


def test_it_is_registered_with_its_run(packaged: Run) -> None:
    uri = packaged.manifest("package")["mlflow"]
    assert uri == "models:/kindness/1"
    assert tracking.versions_of(packaged, "kindness") == ["1"]
    (entry,) = [one for one in packaged.resources() if one["kind"] == "mlflow-model"]
    assert (entry["is"], entry["name"], entry["version"]) == ("made", "kindness", "1")


@pytest.fixture(scope="module")
def talker(make: Make, tmp_path_factory: pytest.TempPathFactory, packaged: Run) -> Any:
    folder = tmp_path_factory.mktemp("talk")
    path = folder / "rows.jsonl"
    rows = [{"prompt": f"hello {number}", "completion": "lovely great fine"} for number in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make(
        task="chat",
        data={"train": str(path), "test": str(path), "system": "Be kind."},
        train={"max_steps": 3, "batch_size": 2},
        evaluate={"bootstrap": 200, "max_new_tokens": 5},
        package={"register": "talker"},
        tracking={"enabled": True, "uri": packaged.resolved()["tracking"]["uri"]},
    )
    with tracking.attach(run) as tracker:
        formats.package(run, tracker)
    return run


def loaded(run: Run) -> Any:
    import mlflow

    mlflow.set_tracking_uri(run.resolved()["tracking"]["uri"])
    return mlflow.pyfunc.load_model(run.manifest("package")["mlflow"])


def test_a_chat_model_answers_as_evaluation_did(talker: Run) -> None:
    model = loaded(talker)
    table = pd.read_parquet(talker.predictions_file)
    offline = list(table[table["model"] == "tuned"]["prediction"])
    asked = pd.DataFrame({"text": [f"hello {number}" for number in range(8)]})
    assert list(model.predict(asked)["prediction"]) == offline
    messages = [[message.to_dict() for message in example.prompt] for example in prepare.examples(talker, "test")]
    assert list(model.predict(pd.DataFrame({"messages": messages}))["prediction"]) == offline
    longer = model.predict(asked, params={"max_new_tokens": 9})["prediction"]
    assert all(one.startswith(other) for one, other in zip(longer, offline, strict=True))
    assert list(longer) != offline


def test_a_row_with_nothing_to_answer_is_refused(talker: Run) -> None:
    with pytest.raises(Exception, match="needs `text`, or `messages`"):
        loaded(talker).predict(pd.DataFrame({"text": [None]}))


def test_a_tokenizer_that_renders_otherwise_is_refused(talker: Run, tmp_path: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(talker.resolved()["tracking"]["uri"])
    folder = Path(mlflow.artifacts.download_artifacts(talker.manifest("package")["mlflow"], dst_path=str(tmp_path)))
    (template,) = folder.rglob("chat_template.jinja")
    template.write_text(template.read_text().replace("capitalize", "upper"))
    with pytest.raises(Exception, match="renders prompts otherwise than in training"):
        mlflow.pyfunc.load_model(str(folder))


def test_a_model_of_plain_text_goes_on_with_it(make: Make, tmp_path: Path) -> None:
    """It never saw a chat template, so it is not given one."""
    from tunewright import chat, models
    from tunewright.chat import Equipment
    from tunewright.generate import LocalCompleter
    from tunewright.package import mlflow_model
    from tunewright.run import read_json
    from tunewright.tracking import Tracker

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "lovely great fine superb kind"}\n' * 6)
    run = make(task="pretraining", data={"train": str(path), "test": str(path)}, train={"max_steps": 2})
    formats.package(run, Tracker(run))
    model = mlflow_model.TunedModel()
    artifacts = {"model": str(run.packaged_model), "rendering": str(run.rendering_file)}
    model.load_context(type("Context", (), {"artifacts": artifacts}))
    rendering = read_json(run.rendering_file)
    tokenizer = models.load_folder_tokenizer(run.packaged_model)
    completer = LocalCompleter(
        models.load_folder(run.packaged_model),
        tokenizer,
        Equipment(**{key: rendering[key] for key in Equipment.__dataclass_fields__}),
    )
    asked = pd.DataFrame({"text": ["lovely great"]})
    (said,) = model.predict(None, asked, {"max_new_tokens": 6})["prediction"]
    assert said == completer.generate([chat.encode(tokenizer, "lovely great")], max_new_tokens=6)[0]
