"""Learning from a grader: group relative policy optimization (Shao et al., 2024) by TRL's GRPOTrainer.

One step: answers are drawn for a few prompts, `graders` says what each is worth, an answer that is worth more than
the others to the same prompt becomes more probable. TRL draws and computes the loss; what it is given are prompts in
ids that `chat.py` rendered, and what the grader is given is the text that an endpoint would have said.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from tunewright import chat, graders
from tunewright.chat import Example
from tunewright.data import prepare
from tunewright.errors import RecipeError
from tunewright.generate import LocalCompleter
from tunewright.graders import Answer, Grading
from tunewright.recipe import LabelModel, Multi, PythonGrader, Recipe, ScoreModel
from tunewright.run import Run
from tunewright.tracking import Tracker
from tunewright.train import exact
from tunewright.train.borrowed import Borrowed, refuse_new_tokens
from tunewright.train.weights import Base, trainable


def fit(run: Run, tracker: Tracker) -> None:
    """Train on a grader's reward, going on from the last whole checkpoint; train/manifest.json is written last.

    Raises:
        GraderError: the grader fails on an answer; the message names the row.
        RecipeError: `train` asks for something that cannot be done here or with this model.
        StageError: the loss is no longer a number.
        InterruptedError: the process was asked to stop; a checkpoint of the last step was written first.
    """
    recipe = run.recipe()
    base = Base.of(run)
    tokenizer, equipment = base.tokenizer, base.equipment
    refuse_new_tokens(run, equipment)
    examples = prepare.examples(run, "train")
    prompts = [chat.render_prompt(tokenizer, example.prompt) for example in examples]
    grpo = recipe.train.grpo
    arguments = exact.arguments(
        recipe,
        run,
        base.device,
        GRPOConfig,
        **grpo.model_dump(exclude={"beta"}),
        beta=0.0,  # the trainer below has it; told of it, TRL would load a reference of its own
        gradient_checkpointing=None,  # TRL's own default is True; `activation_checkpointing` says it, where it is asked
        disable_dropout=True,
    )
    set_seed(recipe.train.seed)
    model = trainable(run, base)
    start = exact.begin(run)
    arguments.use_cache = getattr(model.config, "use_cache", True)  # else Trainer writes False into what is saved
    watch = exact.Watch(run)
    assert recipe.grader is not None
    with graders.opened(recipe.grader) as grading:
        try:
            trainer = RewardTrainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict({"prompt": prompts, "row": list(range(len(prompts)))}),
                processing_class=tokenizer,
                callbacks=[watch],
                run=run,
                tracker=tracker,
                start=start,
                grading=grading,
                examples=examples,
                completer=LocalCompleter(model, tokenizer, equipment),
                beta=grpo.beta,
            )
        except (ValueError, NotImplementedError) as error:
            raise RecipeError(f"train: {error}") from error
        tokens = sum(len(prompt) for prompt in prompts) * grpo.num_generations
        exact.drive(
            trainer,
            watch,
            tokens=tokens,
            algorithm="GRPO",
            beta=grpo.beta,
            num_generations=grpo.num_generations,
            repeats_exactly=_repeats(recipe),
        )


class RewardTrainer(Borrowed, GRPOTrainer):
    """TRL's GRPOTrainer on prompts that are ids, with a grader of ours."""

    STEPS = ("_step", "_buffered_inputs")

    def __init__(
        self,
        *,
        grading: Grading,
        examples: Sequence[Example],
        completer: LocalCompleter,
        beta: float,
        model: Any,
        **options: Any,
    ) -> None:
        self.grading = grading
        self.examples = examples
        self.completer = completer
        reference = copy.deepcopy(model) if beta and not hasattr(model, "peft_config") else None
        super().__init__(model=model, reward_funcs=self.grader, **options)
        self.beta = beta
        if reference is not None:  # an adapter is switched off instead
            self.ref_model = reference.eval().requires_grad_(False)
            disable_dropout_in_model(self.ref_model)
            add_fused_lm_head(self.ref_model, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
        stops = list(completer.equipment.stop_ids)
        self.eos_token_ids = self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = stops

    def tokens_done(self, of_one_epoch: int) -> int:
        """Of prompts and drawn answers, as TRL counts them."""
        return int(self.state.num_input_tokens_seen)

    def grader(
        self, completion_ids: Sequence[Sequence[int]], row: Sequence[int], log_metric: Any, **_: Any
    ) -> list[float]:
        """What the grader says of each answer drawn; its name is that of a column in the log."""
        answers = [
            Answer(self.completer.text(ids), self.examples[number].item or {}, self.examples[number].source)
            for ids, number in zip(completion_ids, row, strict=True)
        ]
        grades = self.grading.score(answers)
        for name in grades[0].parts:
            log_metric(f"rewards/{name}", sum(grade.parts[name] for grade in grades) / len(grades))
        return [grade.score for grade in grades]

    def _prepare_inputs(self, inputs: Any) -> Any:
        with warnings.catch_warnings():  # TRL 1.16 looks at names that Transformers 5.23 calls otherwise
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            return super()._prepare_inputs(inputs)

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """They are ids already; TRL would apply the template its own way."""
        return prompts, None, {}

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Groups:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return Groups(
            len(self.train_dataset),
            group=self.num_generations,
            together=self.args.generation_batch_size // self.num_generations,
            repeats=self.num_iterations * self.args.steps_per_generation,
            seed=None if self.args.train_sampling_strategy == "sequential" else seed,
        )


class Groups(Sampler[int]):
    """Row numbers, each as often as answers are drawn for it, in an order that the seed and the epoch alone decide.

    TRL's own sampler goes on drawing from one generator, so a resumed run would see its epoch in another order, and it
    leaves out the rows that do not fill the last step. Here that step is filled with the epoch's first rows.

    Args:
        group: answers to each prompt.
        together: prompts that answers are drawn for at once.
        repeats: how often the same rows come in a row: TRL asks for them at each pass over the answers drawn.
        seed: None leaves the rows in their order.
    """

    def __init__(self, rows: int, *, group: int, together: int, repeats: int, seed: int | None) -> None:
        self.rows = rows
        self.group = group
        self.together = together
        self.repeats = repeats
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.together) * self.together * self.group * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.rows))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.rows, generator=generator).tolist()
        for start in range(0, self.rows, self.together):
            chosen = [order[place % self.rows] for place in range(start, start + self.together)]
            for _ in range(self.repeats):
                for row in chosen:
                    yield from [row] * self.group


def _repeats(recipe: Recipe) -> str:
    """Whether the same recipe, ended or not, gives the same weights: as far as its grader says the same."""
    spec = recipe.grader
    kinds = spec.graders.values() if isinstance(spec, Multi) else [spec]
    if any(isinstance(kind, ScoreModel | LabelModel) for kind in kinds):
        return "as far as the judging model answers the same each time"
    if any(isinstance(kind, PythonGrader) for kind in kinds):
        return "as far as the python grader answers the same each time"
    return "yes"
