"""Every shipped recipe loads, and runs in short."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub import Hub, shared_folder, write_imdb, write_tiny_gpt2
from tunewright import life, starter
from tunewright import recipe as recipes

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SHORT = ["train.max_steps=2", "evaluate.bootstrap=200", "tracking.enabled=false", "deploy.test_rows=3"]


def test_there_is_one_for_each_kind() -> None:
    assert {path.stem for path in RECIPES} == {
        "imdb-gpt2",
        "chat",
        "prompt-completion",
        "pretraining",
        "preference",
        "reward",
    }


@pytest.mark.parametrize("path", [*RECIPES, starter.recipe_path()], ids=lambda path: path.stem)
def test_it_loads_and_round_trips(path: Path) -> None:
    recipe = recipes.load(path)
    assert recipes.loads(recipes.dump(recipe)) == recipe


SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("preference", "pretraining", "prompt-completion", "reward")
]


@pytest.mark.parametrize("name", ["chat", *SLOW])
def test_it_runs_in_short(name: str, tmp_path: Path) -> None:
    path = next(one for one in RECIPES if one.stem == name)
    recipe = life.located(recipes.load(path, [*SHORT, "data.limit.train=8", "data.limit.test=3"]), path.parent)
    run = life.start(recipe, tmp_path / "runs")
    life.advance(run, until="package")
    assert run.manifest("train")["steps"] == 2
    assert run.manifest("evaluate")["rows"] == 3
    assert (run.packaged_model / "model.safetensors").is_file()


def test_the_labs_own_runs_in_short_from_a_hub(tmp_path: Path) -> None:
    """gpt2 and imdb by name, from a hub-shaped server: a small GPT-2 with the real tokenizer, real reviews."""
    import subprocess
    import sys

    shared = shared_folder()
    if shared is None:
        pytest.skip("no shared folder with data/imdb-cad and models/gpt2-tokenizer beside the checkout")
    write_tiny_gpt2(tmp_path / "gpt2", shared / "models" / "gpt2-tokenizer")
    write_imdb(tmp_path / "imdb", shared / "data" / "imdb-cad")
    path = next(one for one in RECIPES if one.stem == "imdb-gpt2")
    sets = [word for one in [*SHORT, "data.limit.train=20", "data.limit.test=10"] for word in ("--set", one)]
    words = [sys.executable, "-m", "tunewright.cli", "run", str(path), "--runs", str(tmp_path / "runs"), *sets]
    with Hub() as hub:
        hub.add_model("openai-community/gpt2", tmp_path / "gpt2", aliases=("gpt2",))
        hub.add_dataset("stanfordnlp/imdb", tmp_path / "imdb", aliases=("imdb",))
        environment = hub.environment(tmp_path / "home", OMP_WAIT_POLICY="PASSIVE")
        done = subprocess.run(
            [*words, "--until", "package"], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode in (0, 3), done.stderr
    run = life.run_folders.Run.open(done.stdout.strip())
    assert run.resolved()["model"]["revision"]
    assert run.manifest("prepare")["labels"] == ["neg", "pos"]
    assert run.manifest("train")["steps"] == 2
