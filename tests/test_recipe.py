"""A recipe says what it means or is refused with the place and the reason."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright import recipe as recipes
from tunewright.errors import RecipeError
from tunewright.recipe import REFUSED, RENAMED, Recipe, Section, Train, dump, json_schema, load, loads

DESIGN = """
name: imdb-sentiment
model: gpt2                          # hub name, folder, or starter
task: classification                 # classification | chat | pretraining | preference | reward
data:
  train: imdb:train                  # hub dataset, file or glob (jsonl, csv, parquet), spark table
  test: imdb:test
  text: text
  label: label
  limit: {train: 1000, test: 500, seed: 42}
train:
  method: lora                       # lora | full
  epochs: 3
  learning_rate: 2.0e-4
  batch_size: 2
  max_length: 1024
evaluate: {baselines: [zero-shot, few-shot, tfidf], must_beat: base}
package: {formats: [safetensors, mlflow]}
deploy: {name: imdb, tokens_per_minute: 5000, content_filter: default}
backend: {kind: local}               # the rest of this table belongs to the backend, which validates it
"""

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
HEAD = "name: one\nmodel: starter\ntask: classification\n"
SHORT = HEAD + "data: {train: a.csv}\n"
CHAT = "name: one\nmodel: starter\ntask: chat\ndata: {train: a.csv}\n"


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as refused:
        loads(text, "recipe.yaml", overrides)
    return str(refused.value)


# Reading


def test_the_design_s_recipe_is_read_as_it_says() -> None:
    recipe = loads(DESIGN)
    assert recipe.data.train == ("imdb:train",)
    assert recipe.data.limit.test == 500
    assert recipe.train.learning_rate == 2e-4
    assert recipe.baselines == ("zero-shot", "few-shot", "tfidf")
    assert recipe.endpoint_name == "imdb"
    assert recipe.registered_name == "imdb-sentiment"
    assert recipe.backend.kind == "local"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_that_ships_can_be_read(path: Path) -> None:
    assert load(path).name


def test_a_recipe_is_read_from_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbf" + SHORT.encode())
    assert load(tmp_path / "recipe.yaml") == loads(SHORT)


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", "'1e-4'", "0.0001"])
def test_a_number_may_be_written_as_people_write_it(number: str) -> None:
    assert loads(SHORT + f"train: {{learning_rate: {number}}}").train.learning_rate == 1e-4


def test_numbers_in_keyword_tables_are_numbers_too() -> None:
    text = SHORT + "train: {lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-5, mode: e-5}}"
    assert loads(text).train.lr_scheduler_kwargs == {"min_lr": 1e-5, "mode": "e-5"}


def test_save_steps_alone_means_steps() -> None:
    assert loads(SHORT + "train: {save_steps: 5}").train.save_strategy == "steps"
    assert loads(SHORT).train.save_strategy == "epoch"


def test_one_source_is_a_list_of_one() -> None:
    assert loads(SHORT).data.train == loads(HEAD + "data: {train: [a.csv]}").data.train == ("a.csv",)


def test_a_recipe_cannot_be_changed() -> None:
    recipe = loads(DESIGN)
    for part, key in (
        (recipe, "name"),
        (recipe.train, "epochs"),
        (recipe.data.limit, "seed"),
        (recipe.backend, "kind"),
    ):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(part, key, 1)


def test_reading_does_no_more_than_reading() -> None:
    """The data and the model are not looked for."""
    assert (
        loads(HEAD.replace("starter", "/no/such/model") + "data: {train: /no/such/file.csv}").model == "/no/such/model"
    )


def test_the_fingerprint_is_that_of_what_is_asked_for() -> None:
    assert loads(SHORT).fingerprint() == loads("# a note\n" + SHORT + "train: {epochs: 3}").fingerprint()
    assert loads(SHORT).fingerprint() != loads(SHORT + "train: {epochs: 2}").fingerprint()


# Refusing


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trian: {}", "recipe.yaml:5: unknown key `trian`; did you mean `train`?"),
        ("train:\n  epoch: 3", "recipe.yaml:6: unknown key `epoch` in `train`; did you mean `epochs`?"),
        ("train:\n  lora: {rank: 3}", "recipe.yaml:6: unknown key `rank` in `train.lora`; known keys: r, lora_alpha"),
        ("package: {registre: a}", "recipe.yaml:5: unknown key `registre` in `package`; did you mean `register`?"),
        ("learning_rate: 1e-4", "recipe.yaml:5: unknown key `learning_rate`; it belongs in `train`"),
        ("train: {num_train_epochs: 3}", "recipe.yaml:5: `num_train_epochs` in `train` is called `epochs` here"),
        ("train: {lora_r: 8}", "recipe.yaml:5: `lora_r` in `train` is called `lora: {r: ...}` here"),
        ("train: {report_to: wandb}", "recipe.yaml:5: `report_to` in `train` cannot be set: tracking goes to MLflow"),
        ("train:\n  epochs: none", "recipe.yaml:6: `train.epochs`: Input should be a valid number"),
        ("train:\n  epochs: .inf", "recipe.yaml:6: `train.epochs`: Input should be a finite number"),
        ("train: {learning_rate: .nan}", "recipe.yaml:5: `train.learning_rate`: Input should be"),
        ("train: {optim: adamw_torhc}", "recipe.yaml:5: `train.optim`: did you mean 'adamw_torch'?"),
        ("train: {lr_scheduler_type: cosin}", "recipe.yaml:5: `train.lr_scheduler_type`: did you mean 'cosine'?"),
        ("train: {lora: {target_modules: 3}}", "recipe.yaml:5: `train.lora.target_modules`: Input should be a"),
        ("train: {lora: {target_modules: 3}}", ", or Input should be a list (it says 3)"),
        ("evaluate:\n  baselines: tfidf", "recipe.yaml:6: `evaluate.baselines`: Input should be a list (it"),
        ("evaluate:\n  baselines:\n  - zero-shot\n  - tdidf", "recipe.yaml:8: `evaluate.baselines.1`: Input should"),
        ("backend: local", "recipe.yaml:5: `backend`: Input should be a valid dictionary"),
        ("train: {epochs: 1}\ntrain: {epochs: 2}", "recipe.yaml:6: `train` is given a second time"),
        ("train:\n  epochs: 1\n  epochs: 2", "recipe.yaml:7: `epochs` is given a second time"),
        ("train:\n epochs: 1\n\tx: 2", "recipe.yaml:7: not YAML: found character"),
        ("deploy: {name: a b}", "recipe.yaml:5: `deploy.name`: String should match pattern"),
    ],
)  # fmt: skip
def test_what_no_recipe_says_is_named_with_its_line(text: str, said: str) -> None:
    message = refusal(SHORT + text)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {warmup_ratio: 0.1,\n  warmup_steps: 5}", "recipe.yaml:5: `train`: warmup_ratio and warmup_steps"),
        ("train: {bf16: true, fp16: true}", "bf16 and fp16 are both set"),
        ("train:\n  epochs: 1\n  eval_steps: 5", "recipe.yaml:7: `train`: eval_steps is set but eval_strategy"),
        ("train: {logging_steps: 1.5}", "logging_steps is 1.5; say whole steps"),
        ("train: {max_steps: 0}", "max_steps is 0; say how many, or -1 to leave it to epochs"),
        ("train: {save_steps: 2.5}", "save_steps is 2.5; say whole steps"),
        ("train: {load_best_model_at_end: true}", "load_best_model_at_end needs a validation loss"),
        ("train: {eval_on_start: true}", "eval_on_start needs a validation loss"),
        ("train: {lr_scheduler_type: greedy}", "lr_scheduler_type: greedy follows the validation loss"),
        ("train: {dataloader_prefetch_factor: 2}", "dataloader_prefetch_factor is for worker processes"),
        ("train: {metric_for_best_model: eval_f1}", "Input should be 'loss', 'eval_loss', 'accuracy'"),
        ("train: {adapter: runs/a, method: full}", "adapter goes on from an adapter, and method: full has none"),
        ("train: {adapter: runs/a, lora: {r: 4}}", "lora says how a fresh adapter is made, and adapter names one"),
        (
            "train: {frozen_layers: 2, adapter: runs/a}",
            "frozen_layers leaves the lower layers alone, and adapter changes",
        ),
        ("train: {fsdp: hybrid_shard}", "recipe.yaml:5: `train.fsdp`: Input should be a valid boolean"),
        ("train: {fsdp_config: {version: 2}}", "fsdp_config has the options of fsdp, which is not set; add fsdp"),
        ("train: {fsdp: true, fsdp_config: {version: 1}}", "recipe.yaml:5: `train.fsdp_config.version`: Input should"),
        ("train: {fsdp: true, fsdp_config: {cpu_offload: true}}", "`train.fsdp_config` cannot be set: gloo and NCCL"),
        ("train: {fsdp: true, fsdp_config: {fsdp_min_num_params: 1}}", "cannot be set: each of the model's layers is"),
        ("train: {fsdp: shard_grad_op, fsdp_config: {reshard_after_forward: true}}", "true contradict; remove one"),
        ("train: {fsdp: full_shard, method: qlora}", "has weights of 4 bits, and fsdp cannot shard those; use lora"),
        ("train: {fsdp: full_shard, method: auto}", "auto weighs the memory of one device, and fsdp has several"),
        ("train: {fsdp: full_shard, frozen_layers: 1}", "frozen_layers starts in the middle of a model, and fsdp"),
        ("train: {fsdp: full_shard, fp16: true}", "fp16 was not tried with fsdp and is not supported there"),
        ("train: {fsdp: full_shard, torch_compile: true}", "torch_compile was not tried with fsdp"),
        ("train: {fsdp: full_shard, optim: adafactor}", "with fsdp choose one of adamw_torch, adamw_torch_fused"),
        ("train: {fsdp: full_shard, ddp_bucket_cap_mb: 1}", "ddp_bucket_cap_mb is for training without fsdp"),
        ("train: {early_stopping_patience: 2}", "early_stopping_patience needs a validation loss; add eval_strategy"),
        ("train: {eval_strategy: epoch}", "recipe.yaml:5: train.eval_strategy measures the loss on data.validation"),
        ("evaluate:\n  must_beat: few-shot", "recipe.yaml:6: evaluate.must_beat is few-shot, which is not among"),
        ("evaluate: {metric: loss}", "recipe.yaml:5: evaluate.metric: loss is not measured for task: classification"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(text: str, said: str) -> None:
    assert said in refusal(SHORT + text)


@pytest.mark.parametrize(
    ("task", "data", "said"),
    [
        ("chat", "label: x", "recipe.yaml:6: data.label is for task: classification, not for chat"),
        ("chat", "labels: [a, b]", "data.labels is for task: classification"),
        ("chat", "text: x", "data.text is for task: classification or pretraining, not for chat"),
        (
            "classification",
            "prompt: x",
            "data.prompt is for task: chat or preference or reward, not for classification",
        ),
        ("pretraining", "messages: x", "data.messages is for task: chat or reward, not for pretraining"),
        (
            "pretraining",
            "system: x",
            "data.system is for task: classification or chat or preference or reward, not for",
        ),
        ("pretraining", "over_length: drop", "recipe.yaml:6: data.over_length is for prompts"),
        ("chat", "prompt: x\n  response: y", "prompt, response are not of one kind of row"),
        ("classification", "labels: [a, b, a]", "recipe.yaml:6: `data`: labels names 'a' twice"),
        ("classification", "labels: {0: a, 1: ' '}", "recipe.yaml:6: `data`: labels holds an empty word"),
        ("chat", "input: x", "recipe.yaml:6: data.input alone says nothing"),
        ("chat", "test: b.csv\n  split: {test: 0.5}", "recipe.yaml:7: `data`: split holds out rows where no test set"),
        ("chat", "limit: {validation: 5}", "recipe.yaml:6: `data`: limit.validation limits rows that are not there"),
        ("chat", "labels: {x: y}", "recipe.yaml:6: `data.labels.x`: Input should be a valid integer"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(task: str, data: str, said: str) -> None:
    assert said in refusal(f"name: one\nmodel: starter\ntask: {task}\ndata:\n  train: a.csv\n  {data}\n")


@pytest.mark.parametrize(
    ("task", "evaluate", "said"),
    [
        ("chat", "{baselines: [tfidf]}", "the baseline tfidf needs task: classification"),
        ("chat", "{must_beat: majority}", "the baseline majority needs task: classification"),
        ("pretraining", "{baselines: [few-shot]}", "the baseline few-shot needs task: classification or chat"),
        ("pretraining", "{metric: accuracy}", "choose loss"),
    ],
)
def test_a_comparison_that_the_task_does_not_have_is_refused(task: str, evaluate: str, said: str) -> None:
    assert said in refusal(f"name: one\nmodel: starter\ntask: {task}\ndata: {{train: a.csv}}\nevaluate: {evaluate}\n")


def test_the_best_checkpoint_needs_one_for_each_measurement() -> None:
    head = HEAD + "data: {train: a.csv, validation: b.csv}\ntrain: {load_best_model_at_end: true, "
    assert loads(head + "eval_strategy: epoch}").train.load_best_model_at_end
    assert loads(head + "eval_strategy: steps, eval_steps: 5, save_steps: 5}").train.load_best_model_at_end
    assert "to be the same; they are epoch and steps" in refusal(head + "eval_strategy: steps}")
    for eval_steps in (4, 5):  # a best that falls between two checkpoints could not be loaded
        assert f"save_steps is 10 and eval_steps {eval_steps}; make them the same" in refusal(
            head + f"eval_strategy: steps, eval_steps: {eval_steps}, save_steps: 10}}"
        )


def test_every_mistake_is_named_at_once() -> None:
    message = refusal(
        "model: starter\ntask: chat\ndata: {train: a.csv, limit: {train: 0}}\ntrain: {epochs: -1}\nx: 1\n"
    )
    assert message.splitlines() == [
        "recipe.yaml: `name` is missing",
        "recipe.yaml:3: `data.limit.train`: Input should be greater than or equal to 1 (it says 0)",
        "recipe.yaml:4: `train.epochs`: Input should be greater than 0 (it says -1)",
        "recipe.yaml:5: unknown key `x`; known keys: name, model, revision, task, data, train, grader, evaluate, "
        "package, deploy, tracking, backend",
    ]


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "5"])
def test_a_file_that_is_no_table_is_no_recipe(text: str) -> None:
    assert refusal(text) == "recipe.yaml: a recipe is a table of keys such as name, model, task and data"


@pytest.mark.parametrize(
    "text", ["name: 2026-13-45", "a: {b", "a: \x00", "[" * 5000, "a: *b", "--- 1\n--- 2", "? [a]\n: b\n"]
)
def test_what_is_no_yaml_is_refused_in_one_line(text: str) -> None:
    message = refusal(text)
    assert message.startswith("recipe.yaml")
    assert "\n" not in message


def test_a_recipe_that_contains_itself_is_refused() -> None:
    assert "recipe.yaml" in refusal("name: &a [*a]\n")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    for name, said in (("absent.yaml", "no such recipe"), ("latin.yaml", "cannot be read"), (".", "cannot be read")):
        with pytest.raises(RecipeError, match=said):
            load(tmp_path / name)


# --set


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.lora.r=4", 4),
        ("train.learning_rate=null", None),
        ("train.learning_rate=", None),
        ("data.train=[b.csv, c.csv]", ("b.csv", "c.csv")),
        ("data.train=b.csv", ("b.csv",)),
        ("data.limit={train: 5}", recipes.Limit(train=5)),
        (" train.optim = sgd", "sgd"),
        ("data.system=a = b", None),
    ],
)
def test_a_setting_can_be_given_on_the_command_line(override: str, value: Any) -> None:
    recipe: Any = loads(SHORT, overrides=[override])
    for key in override.partition("=")[0].strip().split("."):
        recipe = getattr(recipe, key)
    assert recipe == value or (value is None and recipe == "a = b")


def test_the_last_of_two_settings_counts() -> None:
    assert loads(SHORT + "train: {epochs: 1}", overrides=["train.epochs=2", "train.epochs=5"]).train.epochs == 5


def test_a_setting_goes_into_a_table_that_stands_empty() -> None:
    assert loads(SHORT + "train:\n", overrides=["train.lora.r=2"]).train.lora.r == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs", "--set train.epochs: say key=value"),
        ("=3", "--set =3: say key=value"),
        ("name.first=a", "--set name.first=a: name is not a table"),
        ("train.epochs=[", "--set train.epochs=[: "),
        ("train.epochs=2026-13-45", "--set train.epochs=2026-13-45: month must be"),
        ("train.epcohs=3", "--set train.epcohs=3: unknown key `epcohs` in `train`; did you mean `epochs`?"),
        ("train.lora={r: 0}", "--set train.lora={r: 0}: `train.lora.r`: Input should be greater than or equal to 1"),
        ("train.epochs=many", "--set train.epochs=many: `train.epochs`: Input should be a valid number"),
    ],
)
def test_a_setting_that_is_wrong_is_named_as_it_was_given(override: str, said: str) -> None:
    assert refusal(SHORT, override).startswith(said)


# Writing


def test_what_is_written_is_what_was_set() -> None:
    assert yaml.safe_load(dump(loads(SHORT))) == {
        "name": "one",
        "model": "starter",
        "task": "classification",
        "data": {"train": ["a.csv"]},
    }
    assert "register: other" in dump(loads(SHORT + "package: {register: other}"))


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
CLASSES = st.lists(WORDS.filter(str.strip), min_size=2, max_size=3, unique=True)
NUMBERS = st.floats(min_value=1e-12, max_value=1e6)
TABLES = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True),
        "model": WORDS,
        "task": st.just("classification"),
        "data": st.fixed_dictionaries(
            {"train": WORDS | st.lists(WORDS, min_size=1, max_size=3)},
            optional={
                "test": WORDS,
                "text": WORDS,
                "label": WORDS,
                "labels": CLASSES | CLASSES.map(lambda words: dict(enumerate(words, start=-1))),
                "system": WORDS,
                "limit": st.fixed_dictionaries({}, optional={"train": st.integers(1), "seed": st.integers()}),
            },
        ),
    },
    optional={
        "train": st.fixed_dictionaries(
            {},
            optional={
                "epochs": NUMBERS,
                "learning_rate": NUMBERS | st.none(),
                "method": st.sampled_from(["lora", "full"]),
                "save_steps": st.integers(1, 1000),
                "lora": st.fixed_dictionaries({}, optional={"target_modules": WORDS | st.lists(WORDS)}),
                "lr_scheduler_kwargs": st.dictionaries(WORDS, st.integers() | NUMBERS | st.booleans()),
            },
        ),
        "package": st.fixed_dictionaries({}, optional={"register": WORDS}),
        "backend": st.fixed_dictionaries({"kind": WORDS}, optional={"size": st.integers(), "on": st.booleans()}),
    },
)  # fmt: skip


@given(TABLES)
def test_a_recipe_that_was_written_is_read_as_the_same(table: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(table)
    again = loads(dump(recipe))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()
    assert loads(yaml.safe_dump(table, allow_unicode=True)) == recipe


@given(st.text(max_size=60) | st.dictionaries(WORDS, st.integers() | WORDS | st.none(), max_size=3).map(yaml.safe_dump))
@settings(max_examples=60)
def test_any_text_is_a_recipe_or_refused_in_words(text: str) -> None:
    with pytest.raises(RecipeError) as refused:
        loads(SHORT.replace("data", "data_") + text, "recipe.yaml")
    assert str(refused.value).startswith("recipe.yaml")


# The schema


def accepts(schema: dict[str, Any], value: Any, whole: dict[str, Any]) -> bool:
    """Enough of JSON Schema for ours; a keyword that is not known here fails the test."""
    known = {
        "$schema", "$defs", "$ref", "title", "description", "default", "type", "properties", "required", "items",
        "additionalProperties", "anyOf", "enum", "const", "pattern", "minimum", "exclusiveMinimum", "maximum",
        "exclusiveMaximum", "minLength", "minItems", "oneOf", "discriminator",
    }  # fmt: skip
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema:
        return accepts(whole["$defs"][schema["$ref"].rpartition("/")[2]], value, whole)
    if "anyOf" in schema and not any(accepts(one, value, whole) for one in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(accepts(one, value, whole) for one in schema["oneOf"]) != 1:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    kinds: dict[str, tuple[type, ...]] = {
        "object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "integer": (int,),
        "boolean": (bool,), "null": (type(None),),
    }  # fmt: skip
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, bool):
        return schema.get("type") not in ("number", "integer")
    if isinstance(value, dict):
        rest = schema.get("additionalProperties", True)
        properties = schema.get("properties", {})
        return set(schema.get("required", ())) <= set(value) and all(
            accepts(properties[key], below, whole)
            if key in properties
            else rest is True or (rest is not False and accepts(rest, below, whole))
            for key, below in value.items()
        )
    if isinstance(value, list):
        fits = all(accepts(schema.get("items", {}), one, whole) for one in value)
        return fits and len(value) >= schema.get("minItems", 0)
    if isinstance(value, int | float):
        return not (
            value < schema.get("minimum", value)
            or value > schema.get("maximum", value)
            or value <= schema.get("exclusiveMinimum", value - 1)
            or value >= schema.get("exclusiveMaximum", value + 1)
        )
    return not isinstance(value, str) or len(value) >= schema.get("minLength", 0)


def fits_the_schema(table: Any) -> bool:
    schema = json_schema()
    return accepts(schema, table, schema)


def test_the_schema_takes_the_recipes_that_can_be_read() -> None:
    assert fits_the_schema(yaml.safe_load(DESIGN))
    for path in SHIPPED:
        assert fits_the_schema(yaml.safe_load(path.read_text())), path


@given(TABLES)
def test_the_schema_takes_what_can_be_read(table: dict[str, Any]) -> None:
    table = yaml.safe_load(yaml.safe_dump(table, allow_unicode=True))
    labels = table["data"].get("labels")
    if isinstance(labels, dict):
        table["data"]["labels"] = {str(number): word for number, word in labels.items()}  # JSON has no other keys
    assert fits_the_schema(table)


@pytest.mark.parametrize(
    "text",
    [
        "x: 1",
        "train: {epoch: 3}",
        "train: {lora: {rank: 3}}",
        "train: {epochs: 0}",
        "train: {optim: adam}",
        "deploy: {port: 0}",
    ],
)
def test_the_schema_refuses_what_cannot_be_read(text: str) -> None:
    table = yaml.safe_load(SHORT + text)
    assert not fits_the_schema(table)
    refusal(SHORT + text)


def test_the_schema_refuses_an_empty_list_of_sources() -> None:
    for train in ([], "", [""]):
        table = yaml.safe_load(SHORT) | {"data": {"train": train}}
        assert not fits_the_schema(table)
        refusal(yaml.safe_dump(table))


def sections() -> list[type[pydantic.BaseModel]]:
    return [Recipe, recipes.BackendChoice, *(kind for kind in vars(recipes).values() if is_section(kind))]


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section) and kind not in (Section, Recipe)


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_key_is_described_or_is_called_as_transformers_calls_it(section: type[pydantic.BaseModel]) -> None:
    for name, field in section.model_fields.items():
        assert field.description or (section is Train and name in ARGUMENTS), f"{section.__name__}.{name}"


# Transformers' TrainingArguments


def _arguments() -> dict[str, Any]:
    from transformers import TrainingArguments

    return {field.name: field for field in dataclasses.fields(TrainingArguments)}


ARGUMENTS = _arguments()


def test_no_training_argument_is_forgotten() -> None:
    assert set(ARGUMENTS) <= {*Train.model_fields, *RENAMED, *REFUSED}


def test_a_key_is_either_taken_or_renamed_or_refused() -> None:
    taken, renamed, refused = set(Train.model_fields), set(RENAMED), set(REFUSED)
    assert not taken & (renamed | refused)
    assert not renamed & refused
    assert all(REFUSED.values())
    for name in renamed | refused:
        said = "is called" if name in renamed else "cannot be set"
        assert f"`{name}` in `train` {said}" in refusal(SHORT + f"train: {{{name}: 1}}")


def test_what_a_renamed_key_is_called_is_a_key() -> None:
    for name in RENAMED.values():
        value = yaml.safe_load(name if ":" in name else f"{name}: 1")
        (key,) = value
        assert key in Train.model_fields


def _plain(annotation: Any) -> set[type]:
    """The JSON types that an annotation takes."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _plain(get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return {type(value) for value in get_args(annotation)}
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*(_plain(one) for one in get_args(annotation)))
    kind = typing.get_origin(annotation) or annotation
    return {kind} if isinstance(kind, type) and kind in (int, float, str, bool, dict, type(None)) else set()


@pytest.mark.parametrize("name", sorted(set(Train.model_fields) & set(ARGUMENTS)))
def test_a_key_that_is_handed_through_has_a_type_that_transformers_takes(name: str) -> None:
    hints = typing.get_type_hints(__import__("transformers").TrainingArguments)
    ours, theirs = _plain(Train.model_fields[name].annotation), _plain(hints[name])
    if name in ("learning_rate", "bf16"):
        ours -= {type(None), str}  # settled by `check`
    if name == "fsdp":
        ours -= {bool}  # what it says of its str, it asks for in its documentation
    if float in theirs:
        theirs.add(int)
    assert ours <= theirs


def test_transformers_takes_the_defaults_without_a_warning(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    train = loads(SHORT).train
    settled = {"learning_rate", "bf16", "gradient_checkpointing", "gradient_checkpointing_kwargs"}  # by `train.exact`
    given = {name: getattr(train, name) for name in set(Train.model_fields) & set(ARGUMENTS) - settled}
    made = TrainingArguments(output_dir=str(tmp_path), report_to="none", **(given | {"use_cpu": True}))
    assert made.logging_steps == 1


def test_schedulers_and_optimizers_are_those_of_transformers() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert {one.value for one in SchedulerType} == set(get_args(recipes.Scheduler))
    need_modules = {one.value for one in OptimizerNames if one.value.startswith(("galore", "apollo"))}
    assert {one.value for one in OptimizerNames} - need_modules == set(get_args(recipes.Optimizer))


# Preference and reward

PAIRS = "name: one\nmodel: starter\ntask: preference\ndata: {train: a.jsonl}\n"
PROMPTS = (
    "name: one\nmodel: starter\ntask: reward\ndata: {train: a.jsonl}\n"
    "grader: {type: string_check, reference: x, operation: eq}\n"
)


def test_preference_and_reward_have_their_own_metrics_and_small_steps() -> None:
    pairs, prompts = loads(PAIRS), loads(PROMPTS)
    assert (pairs.metric, prompts.metric) == ("reward_margin", "reward")
    assert pairs.baselines == prompts.baselines == ("zero-shot",)
    assert loads(PROMPTS + "train: {learning_rate: 1e-3}\n").train.learning_rate == 1e-3
    assert (prompts.max_new_tokens, prompts.answer_room, pairs.answer_room) == (128, 128, 0)
    assert loads(PAIRS + "train: {dpo: {loss_type: ipo}}\n").train.dpo.loss_type == ("ipo",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PAIRS + "train: {grpo: {beta: 0.1}}", "recipe.yaml:5: train.grpo is for task: reward, not for preference"),
        (PROMPTS + "train: {dpo: {beta: 0.1}}", "recipe.yaml:6: train.dpo is for task: preference, not for reward"),
        (
            PAIRS + "grader: {type: string_check, reference: x, operation: eq}",
            "grader is for task: reward, not for pref",
        ),
        (PAIRS + "train: {lora: {lora_dropout: 0.1}}", "train.lora.lora_dropout: dropout would blur"),
        (PAIRS + "train: {neftune_noise_alpha: 5}", "train.neftune_noise_alpha is for supervised training"),
        (PROMPTS + "train: {train_sampling_strategy: group_by_length}", "group_by_length is not for reward"),
        (PROMPTS + "train: {batch_size: 6}", "is 6, which is no multiple of train.grpo.num_generations (8)"),
        (PROMPTS + "train: {dataloader_drop_last: true}", "train.dataloader_drop_last is not for reward"),
        (PROMPTS.replace("a.jsonl}", "a.jsonl, validation: b.jsonl}"), "task: reward has none"),
        (PROMPTS + "evaluate: {max_new_tokens: 5}", "evaluate.max_new_tokens is for chat"),
        (PROMPTS + "evaluate: {baselines: [few-shot]}", "few-shot needs task: classification or chat"),
        (PAIRS + "evaluate: {metric: accuracy}", "choose reward_margin or preference_accuracy"),
        (PAIRS + "train: {dpo: {beta: 3}}", "`train.dpo.beta`: Input should be less than or equal to 2"),
        (PAIRS + "train: {dpo: {betta: 1}}", "unknown key `betta` in `train.dpo`; did you mean `beta`?"),
        (PAIRS + "train: {dpo: {loss_type: sigmod}}", "did you mean 'sigmoid'?"),
        (PAIRS + "train: {dpo: {loss_type: [sigmoid, sft], loss_weights: [1]}}", "loss_weights has 1 numbers for 2"),
        (PAIRS + "train: {dpo: {label_smoothing: 0.1}}", "label_smoothing is for loss_type: robust or exo_pair"),
        (PAIRS + "train: {dpo: {loss_type: exo_pair}}", "label_smoothing must be above 0"),
        (PAIRS.replace("a.jsonl}", "a.jsonl, chosen: x, input: y}"), "are not of one kind of row"),
        (PROMPTS.replace("a.jsonl}", "a.jsonl, prompt: x, messages: y}"), "are not of one kind of row"),
        (PAIRS.replace("a.jsonl}", "a.jsonl, completion: x}"), "data.completion is for task: chat, not for preference"),
    ],
)
def test_what_preference_and_reward_cannot_do_is_refused(text: str, said: str) -> None:
    assert said in refusal(text + "\n")


@pytest.mark.parametrize(
    ("train", "reshards"),
    [
        ("fsdp: true", True),
        ("fsdp: full_shard auto_wrap", True),
        ("fsdp: shard_grad_op", False),
        ("fsdp: true, fsdp_config: {reshard_after_forward: false}", False),
    ],
)
def test_what_shards_says_when_weights_are_let_go_of(train: str, reshards: bool) -> None:
    assert loads(SHORT + f"train: {{{train}}}\n").train.reshards is reshards


def test_preference_is_not_sharded() -> None:
    assert "train.fsdp is for task: classification or chat or pretraining" in refusal(PAIRS + "train: {fsdp: true}")
