"""A preflight: a few rows learnt by heart with the parts that training is made of, then said as an endpoint would.

First some steps at the recipe's own learning rate, which must neither explode nor do nothing. Then, from the weights
that the run begins with, rates of its own, the lowest first, until every answer's token is the likeliest and their mean
loss is small. Then each row's prompt, rendered and answered as evaluation and the endpoint do it.

What is left out of the recipe's `train`: the schedule and its warm-up, noise on the embeddings, compiling. The weights
that this changes are its own, and the random numbers are put back where they were.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from tunewright import chat
from tunewright import recipe as recipes
from tunewright.chat import Example, Rendering
from tunewright.data import prepare
from tunewright.data.tokens import TokenStore
from tunewright.errors import RecipeError
from tunewright.generate import LocalCompleter
from tunewright.lean import halve_frozen
from tunewright.preflight import LENGTH, LONG_S, ROWS, Few, Preflight
from tunewright.run import Run, write_json
from tunewright.train import checkpoints, exact
from tunewright.train.assembling import Layout, Rendered, Rows, collate
from tunewright.train.frozen import Lower
from tunewright.train.steps import Steps, settle
from tunewright.train.weights import Base, trainable

LOSS = 0.1
"""Mean loss, in nats, below which the answers are learnt by heart."""
OWN_STEPS = 5
"""Steps at the recipe's own rate."""
STEPS = 120
"""Steps at one of the preflight's rates, at most; at the last one twice as many."""
LADDER = (5, 30, 150)
"""The preflight's rates, as multiples of the method's default."""
LOOK_EVERY = 10
"""Steps between measurements while the loss is far from `LOSS`."""
BACK = 3
"""Measurements before the last one, from which on progress is judged."""
NEXT_TO_NOTHING = 1e-3
"""A share of the loss: where all steps of the run together would change less, the rate is too low."""
NOISE = 1e-6
"""A share of the loss: a change that is no more than this is rounding."""
TARGETS = 512
"""Tokens to learn by heart, about, and of a text."""
TEXT_TARGETS = 64
ENDS_SHARE = 0.75
"""Share of the loss, once learning stops, on the tokens that end an answer: then it is these that are not learnt."""
SAME_ROW = 1e-2
"""Two rows of the output layer that differ by no more than this share of their length are taken for the same."""
CANDIDATES = 256
"""Rows of a prepared run that are looked at, of the length looked for, and as many of any length."""
MORE = 8
"""Tokens that a model may say beyond an answer before it is stopped."""
SHOWN = 60

Tell = Callable[[int, int, str], None]


def before(run: Run) -> None:
    """A preflight before training where the recipe asks for one or, left open, where training will take long; what came
    of it is in train/preflight.json. A run that goes on from a checkpoint has shown already that it learns, and several
    processes would each learn by heart for themselves.

    Raises:
        RecipeError: it failed; the message names how. Classes are told apart by whole labels, so where the recipe
            leaves the preflight open, a base that cannot end its answers is said and trained all the same.
    """
    recipe = run.recipe()
    if recipe.task == "reward" or not _wanted(run, recipe.train.preflight):
        return
    if "RANK" in os.environ or checkpoints.latest(run.checkpoints) is not None:
        return
    run.event("train", "preflight started")

    def tell(done: int, total: int, note: str) -> None:
        run.set_progress("train", done, total, f"preflight: {note}")

    found = attempt(run, prepared(run), tell)
    write_json(run.preflight_file, found.to_dict())
    run.event("train", "preflight", outcome=found.outcome, code=found.code, said=found.sentence)
    if found.code == "cannot_end" and recipe.task == "classification" and recipe.train.preflight == "auto":
        print(f"going on all the same, since classes are told apart by whole labels: {found.sentence}", file=sys.stderr)
    elif found.code is not None:
        raise RecipeError(f"{found.sentence}. (train.preflight: never trains all the same)")


def _wanted(run: Run, asked: str) -> bool:
    if asked != "auto":
        return asked == "always"
    return run.manifest_file("plan").is_file() and run.manifest("plan").get("train_seconds", [0])[0] >= LONG_S


def given(run: Run) -> list[tuple[Example, Rendering | None]]:
    """All rows of a run whose data are a few rows and nothing else."""
    return [(example, None) for example in prepare.examples(run, "train")]


def prepared(run: Run) -> list[tuple[Example, Rendering | None]]:
    """A few of the rows that training reads, as they are stored."""
    store = TokenStore.open(run, "train")
    near = np.argsort(np.abs(store.lengths - LENGTH), kind="stable")[:CANDIDATES]
    anywhere = np.linspace(0, len(store) - 1, CANDIDATES).astype(int)
    few, places = Few(), dict[str, int]()
    for place in dict.fromkeys([*near.tolist(), *anywhere.tolist()]):
        example = store.example(place)
        if places.setdefault(example.source, place) == place:
            few.add(example, int(store.lengths[place]))
    is_stored = run.recipe().task == "classification" or run.recipe().task == "chat"
    return [(example, store[places[example.source]] if is_stored else None) for example in few.chosen()]


@dataclass(frozen=True)
class Lesson:
    """A row that is learnt by heart."""

    source: str
    rendering: Rendering
    """With the loss on the last answer alone: nobody has said that the ones before follow from what is before them."""
    prompt: list[int] | None
    """What an endpoint would feed the model; None for a text."""
    answer: list[int]
    """The tokens with a loss."""
    ends: bool
    """Whether the last of them ends an answer."""


class FailedError(Exception):
    """Ends a preflight: how it failed, and what was seen."""

    def __init__(self, code: str, seen: str) -> None:
        super().__init__(code, seen)
        self.code = code
        self.seen = seen


def attempt(run: Run, rows: Sequence[tuple[Example, Rendering | None]], tell: Tell) -> Preflight:
    """Learn a few rows of a run by heart, with its recipe, and have them said.

    Args:
        rows: each with its rendering, where it was prepared already.
        tell: is told steps, of how many, and the loss.

    Raises:
        RecipeError, ModelError, StageError: as training itself.
    """
    learner: Learner | None = None
    began = time.monotonic()
    result = Preflight("failed")
    with _undisturbed(), tempfile.TemporaryDirectory(prefix="tunewright-preflight-") as folder:
        try:
            learner = Learner(run, rows, Path(folder), tell)
            learner.try_own_rate()
            learner.learn_by_heart()
            result = replace(result, outcome="passed", answers=learner.say())
        except FailedError as failed:
            result = replace(result, code=failed.code, seen=failed.seen)
        if learner is not None:
            result = replace(result, **learner.facts())
            learner.clear()
    return replace(result, seconds=round(time.monotonic() - began, 2))


class Learner:
    """The model that learns by heart, and what it learns."""

    def __init__(self, run: Run, rows: Sequence[tuple[Example, Rendering | None]], folder: Path, tell: Tell) -> None:
        self.run, self.folder, self.tell = run, folder, tell
        self.recipe, self.resolved = run.recipe(), run.resolved()
        self.base = base = Base.of(run)
        self.bf16 = self.resolved["train"]["bf16"]
        self.lessons = _lessons(rows, base, self.resolved["max_length"])
        set_seed(self.recipe.train.seed)
        self.model = model = trainable(run, base)
        self._refuse_broken_weights()
        self._refuse_unknown_tokens()
        self.layout: Layout = settle(model, len(base.tokenizer), self.resolved["max_length"])
        if self.bf16 and hasattr(model, "peft_config"):
            halve_frozen(model)
        renderings = [lesson.rendering for lesson in self.lessons]
        self.rows = Rows(Rendered(renderings, [lesson.source for lesson in self.lessons]))
        self.lower: Lower | None = None
        if frozen := self.recipe.train.frozen_layers:
            inner = model.get_base_model() if hasattr(model, "peft_config") else model
            self.lower = Lower(inner, frozen, folder / "lower.npy")
            self.lower.fill(self.rows, self.layout, base.equipment.pad_id, self._budget, bf16=self.bf16)
        self.completer = LocalCompleter(model, base.tokenizer, base.equipment, batch_rows=ROWS)
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.initial = [weight.detach().cpu().clone() for weight in self.trained]
        self.steps = 0
        self.rate: float | None = None
        self.least = math.inf
        self.ends_share = 0.0
        """Of the least loss so far, how much is on the tokens that end an answer."""
        self.before, self.all_right = self.measure()
        self.after = self.before
        if not math.isfinite(self.before):
            raise FailedError("not_finite", f"the loss of {len(self.lessons)} rows is {self.before} before any step")
        guessing = math.log(model.config.get_text_config().vocab_size)
        self.highest = 2 * max(guessing, self.before)

    @property
    def _budget(self) -> int:
        budget: int = self.resolved["train"]["tokens_per_forward"]
        return budget

    def facts(self) -> dict[str, Any]:
        return {
            "rows": tuple(lesson.source for lesson in self.lessons),
            "steps": self.steps,
            "learning_rate": self.rate,
            "loss_before": round(self.before, 4),
            "loss_after": round(self.after, 4) if math.isfinite(self.after) else None,
        }

    def clear(self) -> None:
        """Let go of the weights, for the model that trains next."""
        del self.model, self.completer, self.trained, self.initial, self.lower
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def measure(self) -> tuple[float, bool]:
        """Mean loss of the answers' tokens, and whether each is the likeliest at its place."""
        self.model.eval()
        with self._precision():
            told = self.completer.tell([lesson.rendering for lesson in self.lessons])
        self.model.train()
        number = sum(len(one.logprobs) for one in told)
        loss = sum(one.loss for one in told) / number
        if loss < self.least:
            self.least = loss
            ends = sum(one.logprobs[-1] for one, lesson in zip(told, self.lessons, strict=True) if lesson.ends)
            self.ends_share = -ends / (loss * number)
        return loss, sum(one.right for one in told) == number

    def try_own_rate(self) -> None:
        """A few steps at the recipe's rate, then back to the weights of before."""
        rate = self.resolved["learning_rate"]
        watch = Watch(self, OWN_STEPS, is_own=True)
        self._train(rate, watch)
        after, _ = self.measure()
        if watch.exploded or not after <= self.highest:
            raise FailedError(
                "explodes",
                f"at train.learning_rate {rate:g} the loss went from {self.before:.2f} to "
                f"{_number(watch.losses, after)} in {len(watch.losses)} steps",
            )
        # A preference's own loss is another, with other gradients; its rates are small on purpose.
        change, steps = abs(after - self.before), self._planned_steps()
        whole = 0.0 if change <= NOISE * self.before else change * steps / OWN_STEPS
        if self.recipe.task != "preference" and whole < NEXT_TO_NOTHING * self.before:
            raise FailedError(
                "rate_too_low",
                f"at train.learning_rate {rate:g} {OWN_STEPS} steps on the same {len(self.lessons)} rows changed the "
                f"loss of {self.before:.4f} by {change:.1g}, and the run has {steps} steps",
            )
        self._begin_again()

    def learn_by_heart(self) -> None:
        """The ladder of rates, each from the weights of before."""
        default = recipes.default_rate("chat", self.run.method)
        rates = [factor * default for factor in LADDER]
        tried = []
        while rates:
            self.rate = rate = rates.pop(0)
            watch = Watch(self, STEPS if rates else 2 * STEPS, is_last=not rates)
            self._train(rate, watch)
            self.steps = len(watch.losses)
            self.after, self.all_right = self.measure()
            if self.after < LOSS and self.all_right:
                return
            ended = "and rose" if watch.exploded else f"after {self.steps} steps"
            tried.append(f"{rate:g}: {self.after:.2f} {ended}")
            if watch.exploded:
                rates = [default] if len(tried) == 1 else []
            self._begin_again()
        if self.ends_share > ENDS_SHARE:
            raise FailedError("cannot_end", self._end_is_lost())
        raise FailedError(
            "cannot_memorise",
            f"{len(self.lessons)} rows ({_some(self.lessons)}) with a mean loss of {self.before:.2f} came to, by "
            f"learning rate, {'; '.join(tried)}; wanted is {LOSS} and every token the likeliest{self._suspects()}",
        )

    def say(self) -> int:
        """Have every answer said; gives how many there are.

        Raises:
            FailedError: one comes out otherwise, or does not end.
        """
        asked = [lesson for lesson in self.lessons if lesson.prompt is not None]
        room = max((len(one.answer) for one in asked), default=0) + MORE
        self.model.eval()
        with self._precision():
            for number, lesson in enumerate(asked, start=1):
                assert lesson.prompt is not None
                stream = self.completer.stream(lesson.prompt, max_new_tokens=len(lesson.answer) + MORE)
                said = [token.id for token in stream]
                if said != lesson.answer or not lesson.ends:
                    words = lesson.answer[:-1] if lesson.ends else lesson.answer
                    raise self._otherwise(lesson, said, goes_on=said[: len(words)] == words)
                self.tell(number, len(asked), "answers said")
            texts = self.completer.generate([one.prompt for one in asked if one.prompt], max_new_tokens=room)
        for lesson, text in zip(asked, texts, strict=True):
            if text != self.completer.text(lesson.answer):
                raise FailedError(
                    "says_something_else",
                    f"{lesson.source}: asked alone it says {self._shown(lesson.answer)}, and in a batch, as evaluation "
                    f"asks, {text[:SHOWN]!r}",
                )
        return len(asked)

    def _otherwise(self, lesson: Lesson, said: Sequence[int], *, goes_on: bool) -> FailedError:
        token, stops = self.base.tokenizer.convert_ids_to_tokens, self.base.equipment.stop_ids
        if goes_on:
            known = " and ".join(repr(token(one)) for one in stops)
            seen = (
                f"{lesson.source}: behind its answer {self._shown(lesson.answer)} it goes on: {self._shown(said)}; the "
                f"last token that is learnt there is {token(lesson.answer[-1])!r}, and {known} ends an answer"
            )
            return FailedError("does_not_stop", seen)
        seen = (
            f"{lesson.source}: learnt is {self._shown(lesson.answer)} at a loss of {self.after:.2f}, and said "
            f"is {self._shown(said)}"
        )
        before = lesson.rendering.ids[: lesson.rendering.mask.index(True)]
        if lesson.prompt is not None and lesson.prompt != before:
            place = next(
                (place for place, both in enumerate(zip(lesson.prompt, before, strict=False)) if len(set(both)) > 1),
                min(len(lesson.prompt), len(before)),
            )
            there, here = (self._shown(ids[place : place + 12]) for ids in (before, lesson.prompt))
            seen += f"; from token {place + 1} on the prompt reads {there} in training and {here} where it is asked"
        elif any(one in stops for one in lesson.answer[:-1]):
            seen += "; the answer holds a token that ends an answer, before its end"
        return FailedError("says_something_else", seen)

    def _shown(self, ids: Sequence[int]) -> str:
        text: str = self.base.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")

    def _end_is_lost(self) -> str:
        end, token = self.base.equipment.end_of_turn_id, self.base.equipment.end_of_turn
        weight_VD = self.model.get_output_embeddings().weight.detach()
        same_V = (weight_VD - weight_VD[end]).norm(dim=-1) <= SAME_ROW * weight_VD[end].norm()
        twins = int(same_V.sum()) - 1
        why = f": {twins} other tokens have the same row in the output layer, which is not trained" if twins else ""
        share = f"{self.ends_share:.0%} of the mean loss of {self.least:.2f} that is left"
        return f"{share} is on {token!r}, which ends the answers{why}"

    def _suspects(self) -> str:
        """What in the recipe may stand in the way."""
        train, config = self.recipe.train, self.model.config.get_text_config()
        found = [f"{key} {value:g}" for key, value in config.to_dict().items() if _is_dropout(key, value)]
        if self.run.method != "full":
            found = [f"train.lora.r {train.lora.r}", *found]
            if train.lora.lora_dropout:
                found = [f"train.lora.lora_dropout {train.lora.lora_dropout:g}", *found]
        if train.frozen_layers:
            found.append(f"train.frozen_layers {train.frozen_layers}")
        return f" (with {', '.join(found)})" if found else ""

    def _planned_steps(self) -> int:
        train = self.recipe.train
        together = train.batch_size * train.gradient_accumulation_steps
        number = self.resolved["data"]["train"]["sequences"]
        return train.max_steps if train.max_steps > 0 else max(1, math.ceil(number / together * train.epochs))

    def _train(self, rate: float, watch: Watch) -> None:
        arguments = exact.arguments(
            self.recipe,
            self.run,
            self.base.device,
            output_dir=str(self.folder),
            per_device_train_batch_size=len(self.lessons),
            gradient_accumulation_steps=1,
            learning_rate=rate,
            max_steps=watch.most,
            lr_scheduler_type="constant",
            lr_scheduler_kwargs=None,
            warmup_steps=0,
            save_strategy="no",
            eval_strategy="no",
            eval_steps=None,
            eval_on_start=False,
            load_best_model_at_end=False,
            metric_for_best_model=None,
            logging_strategy="no",
            neftune_noise_alpha=None,
            torch_compile=False,
            torch_compile_backend=None,
            torch_compile_mode=None,
            dataloader_drop_last=False,
            dataloader_num_workers=0,
            dataloader_prefetch_factor=None,
            dataloader_persistent_workers=False,
        )
        trainer = Heart(
            watch=watch,
            model=self.model,
            args=arguments,
            train_dataset=self.rows,
            data_collator=collate,
            callbacks=[watch],
            layout=self.layout,
            pad_id=self.base.equipment.pad_id,
            budget=self._budget,
            lower=self.lower,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        self.model.zero_grad()

    def _begin_again(self) -> None:
        with torch.no_grad():
            for weight, initial in zip(self.trained, self.initial, strict=True):
                weight.copy_(initial)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.autocast(torch.device(self.base.device).type, torch.bfloat16, enabled=self.bf16):
            yield

    def _refuse_broken_weights(self) -> None:
        for name, weight in self.model.named_parameters():
            if weight.is_floating_point() and (broken := int((~torch.isfinite(weight.detach())).sum())):
                raise FailedError("not_finite", f"{broken} of the {weight.numel():,} numbers in {name} are NaN or inf")

    def _refuse_unknown_tokens(self) -> None:
        room = self.model.get_input_embeddings().weight.shape[0]
        for lesson in self.lessons:
            largest = max([*lesson.rendering.ids, *(lesson.prompt or ())])
            if largest >= room:
                token = self.base.tokenizer.convert_ids_to_tokens(largest)
                raise FailedError(
                    "token_out_of_range",
                    f"{lesson.source} holds token {largest} ({token!r}), and the embeddings have {room} rows; the "
                    f"tokenizer has {len(self.base.tokenizer)} tokens",
                )


class Watch(TrainerCallback):
    """Looks on at the steps of one rate, and ends them."""

    def __init__(self, learner: Learner, most: int, *, is_own: bool = False, is_last: bool = False) -> None:
        self.learner, self.most, self.is_own, self.is_last = learner, most, is_own, is_last
        self.losses: list[float] = []
        """Of each step."""
        self.measured: list[float] = []
        """Every `LOOK_EVERY` steps."""
        self.exploded = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        learner, loss, steps = self.learner, self.losses[-1], len(self.losses)
        note = "the recipe's learning rate, " if self.is_own else ""
        learner.tell(steps, self.most, f"{note}loss {loss:.4f}")
        self.exploded = not loss <= learner.highest
        control.should_training_stop = self.exploded
        near = loss < 3 * LOSS
        if self.is_own or self.exploded or not (near or steps % LOOK_EVERY == 0):
            return
        measured, all_right = learner.measure()
        self.exploded = not measured <= learner.highest
        learnt = measured < LOSS and all_right
        control.should_training_stop = self.exploded or learnt or (not near and self._is_slow(measured))

    def _is_slow(self, measured: float) -> bool:
        """Whether the steps that are left will not do, going on like the last ones; of the last rate, whether there is
        no progress any more."""
        self.measured.append(measured)
        if len(self.measured) <= BACK:
            return False
        progress = (self.measured[-1 - BACK] - measured) / (BACK * LOOK_EVERY)
        left = self.most - len(self.losses)
        return progress * (left if not self.is_last else self.most) < measured - LOSS


class Heart(Steps):
    """Steps on the same rows again and again."""

    def __init__(self, *, watch: Watch, **options: Any) -> None:
        self.watch = watch
        super().__init__(**options)

    def training_step(self, *given: Any, **options: Any) -> torch.Tensor:
        first = not self.watch.losses
        try:
            loss = super().training_step(*given, **options)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise FailedError("no_gradient", "the loss does not depend on any weight that is trained") from error
        self.watch.losses.append(float(loss))
        if first and self.watch.is_own:
            self._refuse_gradients(float(loss))
        return loss

    def _refuse_gradients(self, loss: float) -> None:
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        largest = {name: float(one.grad.abs().max()) for name, one in trained.items() if one.grad is not None}
        broken = next((name for name, value in largest.items() if not math.isfinite(value)), None)
        if not math.isfinite(loss) or (broken and not self.args.fp16):  # there the scale is lowered, step by step
            what = f"the gradient of {broken}" if math.isfinite(loss) else "the loss"
            raise FailedError("not_finite", f"{what} is no finite number at the first step")
        if not any(largest.values()):
            number = sum(weight.numel() for weight in trained.values())
            raise FailedError(
                "no_gradient", f"the gradient of all {number:,} weights that are trained is 0, at a loss of {loss:.2f}"
            )


def _lessons(rows: Sequence[tuple[Example, Rendering | None]], base: Base, max_length: int) -> list[Lesson]:
    """What is learnt by heart: no more rows than are learnt quickly, no place that something else may follow.

    Raises:
        FailedError: no row has a token with a loss.
    """
    made = [lesson for row in rows if (lesson := _lesson(*row, base, max_length)) is not None]
    if not made:
        some = ", ".join(example.source for example, _ in rows[:3])
        seen = f"of {len(rows)} rows ({some}) none has an answer with a loss"
        raise FailedError("nothing_in_loss", seen)
    chosen: list[Lesson] = []
    for lesson in made:
        if len(chosen) == ROWS or (chosen and sum(len(one.answer) for one in [*chosen, lesson]) > TARGETS):
            break
        if all(lesson.rendering.ids != other.rendering.ids for other in chosen):
            chosen.append(lesson)
    return [lesson if lesson.prompt is not None else _determined(lesson, chosen) for lesson in chosen]


def _lesson(example: Example, rendering: Rendering | None, base: Base, max_length: int) -> Lesson | None:
    tokenizer, stops = base.tokenizer, base.equipment.stop_ids
    if example.text is not None:
        piece = prepare.pieces(rendering or prepare.render(tokenizer, example), max_length)[0]
        ids, mask = piece.ids[: TEXT_TARGETS + 1], piece.mask[: TEXT_TARGETS + 1]
        return Lesson(example.source, Rendering(ids, mask), None, ids[1:], False) if any(mask) else None
    if example.rejected is not None:
        pair = chat.render_pair(tokenizer, example)
        return Lesson(example.source, pair.renderings()[0], pair.prompt, pair.chosen, pair.chosen[-1] in stops)
    rendering = rendering or prepare.render(tokenizer, example)
    learnt = [number for number, one in enumerate(example.messages) if one.role == "assistant" and one.weight]
    places = [place for place, flag in enumerate(rendering.mask) if flag and place]
    if not places or not learnt or not learnt[-1]:
        return None
    end = places[-1] + 1
    start = next(place for place in range(end, 0, -1) if not rendering.mask[place - 1])
    prompt = chat.render_prompt(tokenizer, example.messages[: learnt[-1]], example.tools)
    ids, mask = rendering.ids[:end], [False] * start + [True] * (end - start)
    return Lesson(example.source, Rendering(ids, mask), prompt, ids[start:], ids[-1] in stops)


def _determined(lesson: Lesson, others: Sequence[Lesson]) -> Lesson:
    """A text without a loss where another one, the same until there, goes on otherwise."""
    ids, mask = lesson.rendering.ids, list(lesson.rendering.mask)
    for other in others:
        pairs = zip(ids, other.rendering.ids, strict=False)
        place = next((place for place, (one, another) in enumerate(pairs) if one != another), None)
        if place is not None and place + 1 < len(ids):
            mask[place] = False
    return replace(lesson, rendering=Rendering(ids, mask))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put all random numbers back afterwards."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _is_dropout(key: str, value: Any) -> bool:
    return (key.endswith(("pdrop", "dropout"))) and isinstance(value, float) and value > 0


def _number(losses: Sequence[float], measured: float) -> str:
    """The last loss that is a number, or that there is none."""
    last = max([one for one in [*losses, measured] if math.isfinite(one)], default=math.nan)
    return f"{last:.4g}" if math.isfinite(measured) else f"{last:.4g} and beyond all numbers"


def _some(lessons: Sequence[Lesson]) -> str:
    more = ", ..." if len(lessons) > 3 else ""
    return ", ".join(lesson.source for lesson in lessons[:3]) + more
