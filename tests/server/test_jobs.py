"""Fine-tuning jobs over HTTP, before any worker has them: what is taken, what is refused, and in which words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from sqlalchemy import insert, select, update

from server_running import Running
from tunewright.server import jobs, models, tables
from tunewright.server.state import Server
from tunewright.server.store import new_id
from tunewright.server.worker import CHECKING, TRAINING, claim

ON_BOTH = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
ROWS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 12
GRADER = {
    "type": "string_check",
    "name": "exact",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}


@pytest.fixture
def base(served: Running) -> str:
    models.add_base(served.server.store, "tiny-1", "starter")
    return "tiny-1"


def upload(served: Running, content: bytes = ROWS, name: str = "train.jsonl") -> str:
    return served.client().files.create(file=(name, content), purpose="fine-tune").id


def required_keys() -> list[str]:
    """The keys that OpenAI's specification requires."""
    required = """id object created_at error fine_tuned_model finished_at hyperparameters model organization_id
        result_files status trained_tokens training_file validation_file seed"""
    return required.split()


def test_a_job_has_every_key_that_openai_promises(served: Running, base: str) -> None:
    made = served.client().fine_tuning.jobs.create(
        model=base, training_file=upload(served), suffix="my Model", seed=105
    )
    shown = made.to_dict()
    for key in required_keys():
        assert key in shown, key
    assert made.object == "fine_tuning.job"
    assert made.status == "validating_files"
    assert made.seed == 105
    assert made.hyperparameters.n_epochs == "auto"
    assert made.method is not None
    assert made.method.type == "supervised"
    assert served.client().fine_tuning.jobs.retrieve(made.id) == made
    messages = [event.message for event in served.client().fine_tuning.jobs.list_events(made.id)]
    assert messages == [f"Validating training file: {made.training_file}", f"Created fine-tuning job: {made.id}"]
    assert served.client().fine_tuning.jobs.checkpoints.list(made.id).data == []


def test_without_an_error_openai_sends_one_of_nulls_and_azure_null(served: Running, base: str) -> None:
    """Clients of the one look into it, and clients of the other ask whether there is one."""
    file = upload(served)
    for client, error in (
        (served.client(), {"code": None, "message": None, "param": None}),
        (served.azure(), None),
    ):
        made = client.fine_tuning.jobs.create(model=base, training_file=file)
        assert made.to_dict()["error"] == error


def test_a_seed_is_made_where_none_is_given(served: Running, base: str) -> None:
    made = served.client().fine_tuning.jobs.create(model=base, training_file=upload(served))
    assert isinstance(made.seed, int)


@pytest.mark.parametrize(
    "asked",
    [
        {"hyperparameters": {}},
        {"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}},
        {"method": {"type": "supervised"}},
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}}}},
        {"method": {"type": "reinforcement", "reinforcement": {"grader": GRADER}}},
        {"extra_body": {"trainingType": 1}},
        {"extra_body": {"trainingType": "GlobalStandard", "hyperparameters": {"prompt_loss_weight": 0.1}}},
        {"metadata": {"team": "search"}},
    ],
)
def test_what_clients_send_is_taken(served: Running, base: str, asked: dict[str, Any]) -> None:
    made = served.client().fine_tuning.jobs.create(model=base, training_file=upload(served), **asked)
    assert made.status == "validating_files"


JUDGE = {"type": "score_model", "name": "j", "model": "m", "input": [{"role": "user", "content": "q"}]}


@pytest.mark.parametrize(
    "grader",
    [
        {"type": "python", "name": "p", "source": "def grade(sample, item): return 1.0"},
        JUDGE | {"api_key_env": "HOME"},
        JUDGE | {"base_url": "http://127.0.0.1:9/v1"},
        {"type": "multi", "graders": {"a": JUDGE | {"api_key_env": "HOME"}}, "calculate_output": "a"},
    ],
)
def test_a_training_key_runs_no_code_and_sends_nothing_of_the_machine_anywhere(
    served: Running, base: str, grader: dict[str, Any]
) -> None:
    method = {"type": "reinforcement", "reinforcement": {"grader": grader}}
    with pytest.raises(openai.BadRequestError) as refused:
        served.client().fine_tuning.jobs.create(model=base, training_file=upload(served), method=method)  # type: ignore[arg-type]
    assert refused.value.code == "unsupported_grader"
    assert refused.value.param == "method.reinforcement.grader"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": "large"}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"dreams": 1}}, "hyperparameters.dreams"),
        ({"method": {"type": "magic"}}, "method.type"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "method.dpo.hyperparameters.beta"),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement.grader"),
        (
            {"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "string_check"}}}},
            "method.reinforcement.grader",
        ),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
    ],
)
def test_what_is_refused_names_the_parameter(served: Running, base: str, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        served.client().fine_tuning.jobs.create(model=base, training_file=upload(served), **asked)
    assert (refused.value.param or "").startswith(param)
    assert served.client().fine_tuning.jobs.list().data == []


def test_what_is_not_there(served: Running, base: str) -> None:
    client = served.client()
    with pytest.raises(openai.NotFoundError) as refused:
        client.fine_tuning.jobs.create(model="gpt-9", training_file=upload(served))
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as refused:
        client.fine_tuning.jobs.create(model=base, training_file="file-none")
    assert refused.value.param == "training_file"
    wrong = client.files.create(file=("b.jsonl", ROWS), purpose="batch").id
    with pytest.raises(openai.BadRequestError) as bad:
        client.fine_tuning.jobs.create(model=base, training_file=wrong)
    assert bad.value.param == "training_file"
    for call in (client.fine_tuning.jobs.retrieve, client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.list_events):
        with pytest.raises(openai.NotFoundError) as refused:
            call("ftjob-none")
        assert refused.value.code == "fine_tune_not_found"


def test_lists_by_page_and_by_metadata(served: Running, base: str) -> None:
    client = served.client()
    file = upload(served)
    made = [
        client.fine_tuning.jobs.create(model=base, training_file=file, metadata={"n": str(n % 2)}).id for n in range(4)
    ]
    bare = client.fine_tuning.jobs.create(model=base, training_file=file).id
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == [bare, *made[::-1]]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [made[3], made[1]]
    assert [job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})] == [bare]
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.list(limit=0)


def test_a_job_that_nobody_works_on_ends_at_once(served: Running, base: str) -> None:
    client = served.client()
    made = client.fine_tuning.jobs.create(model=base, training_file=upload(served))
    assert client.fine_tuning.jobs.pause(made.id).status == "paused"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.pause(made.id)
    assert client.fine_tuning.jobs.resume(made.id).status == "validating_files"
    cancelled = client.fine_tuning.jobs.cancel(made.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at is not None
    for call in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            call(made.id)


def test_a_pause_that_has_not_come_about_can_be_taken_back(served: Running, base: str) -> None:
    client = served.client()
    made = client.fine_tuning.jobs.create(model=base, training_file=upload(served))
    taken = claim(served.server, "w", ("validating_files",))
    assert taken is not None
    with served.server.store.begin() as connection:
        connection.execute(update(tables.jobs).values(status="running"))
    with pytest.raises(openai.BadRequestError, match="running"):
        client.fine_tuning.jobs.resume(made.id)
    client.fine_tuning.jobs.pause(made.id)
    assert client.fine_tuning.jobs.resume(made.id).status == "running"
    with served.server.store.read() as connection:
        assert connection.execute(select(tables.jobs.c.wanted)).scalar() == "run"


def put(server: Server, key: str, **values: Any) -> str:
    """A job's row, as `create_job` writes one."""
    row: dict[str, Any] = {
        "id": new_id("ftjob-"), "created_at": 1, "key_id": key, "surface": "openai", "model": "m", "seed": 1,
        "training_file": "file-1", "method": {"type": "supervised", "supervised": {}}, "hyperparameters": {},
        "status": "queued", "wanted": "run", "result_files": [],
    } | values  # fmt: skip
    with server.store.begin() as connection:
        connection.execute(insert(tables.jobs).values(**row))
    return str(row["id"])


@ON_BOTH
def test_keys_take_turns(open_server: Callable[[], Server]) -> None:
    server = open_server()
    many = [put(server, "a") for _ in range(3)]
    one = put(server, "b")
    taken = [found["id"] for _ in range(4) if (found := claim(server, "w", TRAINING))]
    assert taken == [many[0], one, many[1], many[2]]
    assert claim(server, "w", TRAINING) is None


@ON_BOTH
def test_a_claim_that_nobody_renews_is_given_to_the_next(open_server: Callable[[], Server]) -> None:
    server = open_server()
    job = put(server, "a")
    assert claim(server, "first", TRAINING) is not None
    assert claim(server, "second", TRAINING) is None
    with server.store.begin() as connection:
        connection.execute(update(tables.jobs).values(heartbeat_at=time.time() - server.settings.handover_s - 1))
    again = claim(server, "second", TRAINING)
    assert again is not None
    assert (again["id"], again["claimed_by"]) == (job, "second")


@ON_BOTH
def test_what_nobody_should_work_on_is_left(open_server: Callable[[], Server]) -> None:
    server = open_server()
    for status in (*jobs.FINAL, "paused"):
        put(server, "a", status=status)
    put(server, "a", status="validating_files", wanted="pause")
    assert claim(server, "w", TRAINING) is None
    assert claim(server, "w", CHECKING) is None


@ON_BOTH
def test_two_servers_and_many_workers_never_have_a_job_twice(open_server: Callable[[], Server]) -> None:
    servers = [open_server(), open_server()]
    made = {put(servers[0], f"key-{number % 3}") for number in range(60)}
    taken: list[str] = []
    errors: list[Exception] = []

    def take(number: int) -> None:
        try:
            while (found := claim(servers[number % 2], f"worker-{number}", TRAINING)) is not None:
                taken.append(found["id"])
        except Exception as error:  # noqa: BLE001 - a thread's is shown by the test
            errors.append(error)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(taken) == len(made)
    assert set(taken) == made
    with servers[0].store.begin() as connection:
        assert len(set(connection.execute(select(tables.jobs.c.claimed_by)).scalars())) > 1
