"""Prompts in; label scores, losses or text out.

`LocalCompleter` works on weights in this process: evaluation and the endpoint both use it, so an answer over HTTP is
computed by the code that computed the report. `RemoteCompleter` asks an endpoint that speaks the OpenAI API.

Shapes: B prompts in a batch, T tokens in the longest of them, N nodes of the label tree, I of them with children, V
vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunewright import chat
from tunewright.chat import Equipment, Message, Rendering
from tunewright.errors import DataError

Progress = Callable[[int, int], None]

LOGITS = 2**26
"""Numbers in one batch's logits at most (256 MB in float32), so that a large vocabulary does not fill the memory."""
SAME_SCORE = 1e-3
"""Log-probabilities nearer than this are the same but for rounding."""


class Completer(Protocol):
    """Answers a conversation."""

    def answer(self, messages: Sequence[Message], *, max_new_tokens: int) -> str:
        """The greedy answer, without its end-of-turn token."""
        ...


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    text: str
    logprob: float
    """Natural log of its probability before temperature."""
    top: list[tuple[int, float]] = field(default_factory=list)
    """The most probable token ids at this place with their logprobs, best first."""


@dataclass(frozen=True)
class LabelTree:
    """The labels' token ids as a prefix tree, so that each shared beginning is computed once.

    Node n holds token `tokens[n]`, hangs under `parents[n]` (-1: directly behind the prompt) at depth `depths[n]`.
    `paths[l]` are the nodes of label l, end of turn included.
    """

    labels: tuple[str, ...]
    tokens: list[int]
    parents: list[int]
    depths: list[int]
    paths: list[list[int]]

    @classmethod
    def plant(cls, labels: Sequence[str], ids: Sequence[Sequence[int]]) -> LabelTree:
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        paths: list[list[int]] = []
        children: dict[tuple[int, int], int] = {}
        for label_ids in ids:
            node, path = -1, []
            for depth, token in enumerate(label_ids):
                key = (node, token)
                if key not in children:
                    children[key] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    depths.append(depth)
                node = children[key]
                path.append(node)
            paths.append(path)
        return cls(tuple(labels), tokens, parents, depths, paths)

    @functools.cached_property
    def inner(self) -> list[int]:
        """The nodes that have children, each behind its parent."""
        return sorted({parent for parent in self.parents if parent >= 0})

    @functools.cached_property
    def branches(self) -> list[list[int]]:
        """From the first token to each node that has no children; together they hold all nodes."""
        inner = set(self.inner)
        found = []
        for node in range(len(self.tokens)):
            if node not in inner:
                branch = [node]
                while self.parents[branch[0]] >= 0:
                    branch.insert(0, self.parents[branch[0]])
                found.append(branch)
        return found


class LocalCompleter:
    """A causal language model in this process."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        equipment: Equipment,
        *,
        batch_tokens: int = 8192,
        batch_rows: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.equipment = equipment
        self.batch_tokens = batch_tokens
        self.batch_rows = batch_rows
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        self._keeps_to_mask: bool | None = None

    # --- labels ---

    def tree(self, labels: Sequence[str]) -> LabelTree:
        """The labels as this tokenizer writes them behind a prompt."""
        return LabelTree.plant(labels, [chat.render_answer(self.tokenizer, self.equipment, label) for label in labels])

    def score(
        self, prompts: Sequence[list[int]], tree: LabelTree, *, progress: Progress | None = None
    ) -> list[list[float]]:
        """For each prompt (token ids), the log-probability of each label: its tokens and its end of turn.

        Only the label's own tokens are scored; nothing is taken from an argmax over the vocabulary.
        """
        self._refuse_beyond_context(prompts, 1 + max(tree.depths))
        scores: list[list[float]] = [[] for _ in prompts]
        together, apart = self._ways(prompts, tree)
        done = 0

        def settle(row: int, nodes: Any) -> None:
            nonlocal done
            scores[row] = [float(sum(nodes[node] for node in path)) for path in tree.paths]
            done += 1

        num_inner = len(tree.inner)
        lengths = [len(prompts[row]) + num_inner for row in together]
        for batch in self._batches(lengths, [1 + num_inner] * len(together)):
            rows = [together[place] for place in batch]
            for row, nodes in zip(rows, self._score_nodes([prompts[row] for row in rows], tree), strict=True):
                settle(row, nodes)
            if progress:
                progress(done, len(prompts))
        for row in apart:
            settle(row, self._score_apart(prompts[row], tree, tree.branches))
            if progress:
                progress(done, len(prompts))
        return scores

    def _ways(self, prompts: Sequence[list[int]], tree: LabelTree) -> tuple[list[int], list[int]]:
        """The prompts that can be scored with the whole tree at once, and those that need a sequence for each label:
        where a place does not see all that is before it, or the architecture does not keep to our mask."""
        sight = _sight(self.model) - max(tree.depths)
        together = [row for row, prompt in enumerate(prompts) if len(prompt) <= sight]
        if together and self._keeps_to_mask is None:
            shortest = min((prompts[row] for row in together), key=len)
            tried = self._score_apart(shortest, tree, tree.branches[-2:])
            nodes = self._score_nodes([shortest], tree)[0]
            self._keeps_to_mask = all(abs(nodes[node] - logprob) < SAME_SCORE for node, logprob in tried.items())
        if not self._keeps_to_mask:
            together = []
        return together, [row for row in range(len(prompts)) if row not in set(together)]

    def _score_nodes(self, prompts: Sequence[list[int]], tree: LabelTree) -> Any:
        """Log-probability of each tree node given its prompt and ancestors, B x N, in one forward pass.

        The nodes that have children stand behind each prompt in one sequence; an attention mask lets each see the
        prompt and its own ancestors alone, and its position id is the one it would have if only its label stood there.
        """
        import torch

        device = self.model.device
        inner = tree.inner
        place = {-1: 0} | {node: number for number, node in enumerate(inner, start=1)}
        longest = max(map(len, prompts))
        size = longest + len(inner)
        ids_BT = torch.full((len(prompts), size), self.equipment.pad_id, dtype=torch.long)
        positions_BT = torch.zeros((len(prompts), size), dtype=torch.long)
        sees_BTT = torch.zeros((len(prompts), size, size), dtype=torch.bool)
        keep_BT = torch.zeros((len(prompts), size), dtype=torch.bool)
        ancestors_II = torch.eye(len(inner), dtype=torch.bool)
        for number, node in enumerate(inner):
            if tree.parents[node] >= 0:
                ancestors_II[number] |= ancestors_II[place[tree.parents[node]] - 1]
        tokens_I = torch.tensor([tree.tokens[node] for node in inner], dtype=torch.long)
        depths_I = torch.tensor([tree.depths[node] for node in inner], dtype=torch.long)
        for row, prompt in enumerate(prompts):
            length = len(prompt)
            ids_BT[row, :length] = torch.tensor(prompt)
            positions_BT[row, :length] = torch.arange(length)
            sees_BTT[row, :length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
            ids_BT[row, longest:] = tokens_I
            positions_BT[row, longest:] = length + depths_I
            sees_BTT[row, longest:, :length] = True
            sees_BTT[row, longest:, longest:] = ancestors_II
            padding = torch.arange(length, longest)
            sees_BTT[row, padding, padding] = True  # a row of the mask must not be empty
            keep_BT[row, length - 1] = True
            keep_BT[row, longest:] = True
        # Numbers to add, not truth values: an attention without a kernel adds what it is given.
        dtype = self.model.dtype
        mask_BTT = torch.zeros(sees_BTT.shape, dtype=dtype).masked_fill_(~sees_BTT, torch.finfo(dtype).min)
        with torch.no_grad():
            logits = self.model(
                input_ids=ids_BT.to(device),
                position_ids=positions_BT.to(device),
                attention_mask=mask_BTT[:, None].to(device),
                logits_to_keep=keep_BT.to(device),
                use_cache=False,
            ).logits
            logprobs = logits.float().log_softmax(-1).view(len(prompts), len(place), -1).cpu()
        rows = torch.tensor([place[parent] for parent in tree.parents])
        return logprobs[:, rows, torch.tensor(tree.tokens)].double().numpy()

    def _score_apart(self, prompt: list[int], tree: LabelTree, branches: Sequence[Sequence[int]]) -> dict[int, float]:
        """Log-probability of the nodes of some branches, each branch in an ordinary sequence of its own."""
        before = [False] * len(prompt)
        renderings = [
            Rendering(prompt + [tree.tokens[node] for node in branch], before + [True] * len(branch))
            for branch in branches
        ]
        nodes: dict[int, float] = {}
        for branch, logprobs in zip(branches, self._target_logprobs(renderings), strict=True):
            nodes |= dict(zip(branch, logprobs, strict=True))
        return nodes

    # --- losses ---

    def losses(self, renderings: Sequence[Rendering], *, progress: Progress | None = None) -> list[tuple[float, int]]:
        """For each rendering, the summed negative log-likelihood (nats) of its targets, and their number.

        Nothing predicts a first token, so it is never counted.
        """
        return [(-math.fsum(logprobs), len(logprobs)) for logprobs in self._target_logprobs(renderings, progress)]

    def _target_logprobs(self, renderings: Sequence[Rendering], progress: Progress | None = None) -> list[list[float]]:
        """For each rendering, the log-probability of each of its targets but a first token."""
        import torch

        found: list[list[float]] = [[] for _ in renderings]
        done = 0
        lengths = [len(one.ids) for one in renderings]
        for batch in self._batches(lengths, [sum(one.mask[1:]) for one in renderings]):
            longest = max(lengths[row] for row in batch)
            ids_BT = torch.full((len(batch), longest), self.equipment.pad_id, dtype=torch.long)
            real_BT = torch.zeros((len(batch), longest), dtype=torch.long)
            target_BT = torch.zeros((len(batch), longest), dtype=torch.bool)
            for place, row in enumerate(batch):
                ids_BT[place, : lengths[row]] = torch.tensor(renderings[row].ids)
                real_BT[place, : lengths[row]] = 1
                target_BT[place, : lengths[row]] = torch.tensor(renderings[row].mask)
            target_BT[:, 0] = False
            before_BT = target_BT.roll(-1, dims=1)
            with torch.no_grad():  # no inference mode: training calls this too, and must not find its tensors
                logits = self.model(
                    input_ids=ids_BT.to(self.model.device),
                    attention_mask=real_BT.to(self.model.device),
                    logits_to_keep=before_BT.to(self.model.device),
                    use_cache=False,
                ).logits.float()
                nll = torch.nn.functional.cross_entropy(logits, ids_BT[target_BT].to(logits.device), reduction="none")
            counts = target_BT.sum(dim=1).tolist()
            for row, part in zip(batch, (-nll.double()).cpu().split(counts), strict=True):
                found[row] = part.tolist()
            done += len(batch)
            if progress:
                progress(done, len(renderings))
        return found

    # --- text ---

    def generate(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int, progress: Progress | None = None
    ) -> list[str]:
        """Greedy answers, without the end-of-turn token, each as long as the context has room for."""
        self._refuse_beyond_context(prompts)
        answers = [""] * len(prompts)
        done = 0
        rooms = [self.room(prompt, max_new_tokens) for prompt in prompts]
        for room in sorted(set(rooms), reverse=True):
            rows = [row for row, its_room in enumerate(rooms) if its_room == room]
            for batch in self._batches([len(prompts[row]) + room for row in rows], [1] * len(rows)):
                chosen = [rows[place] for place in batch]
                if room > 0:
                    for row, ids in zip(chosen, self._generate([prompts[row] for row in chosen], room), strict=True):
                        answers[row] = self.text(ids)
                done += len(batch)
                if progress:
                    progress(done, len(prompts))
        return answers

    def _generate(self, prompts: Sequence[list[int]], room: int) -> list[list[int]]:
        """What follows each prompt, in ids: greedy, whatever the model's own generation settings say."""
        import torch
        from transformers import GenerationConfig

        longest = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), longest), self.equipment.pad_id, dtype=torch.long)
        real_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
            real_BT[row, longest - len(prompt) :] = 1
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            out_BT = self.model.generate(
                input_ids=ids_BT.to(self.model.device),
                attention_mask=real_BT.to(self.model.device),
                max_new_tokens=room,
                do_sample=False,
                eos_token_id=self.equipment.stop_ids,
                pad_token_id=self.equipment.pad_id,
            )
        finally:
            self.model.generation_config = own
        said: list[list[int]] = out_BT[:, longest:].tolist()
        return said

    def room(self, prompt: Sequence[int], wanted: int) -> int:
        """How many tokens can be generated behind a prompt: `wanted`, or what the context still holds."""
        return wanted if self.context is None else min(wanted, self.context - len(prompt))

    def answer(self, messages: Sequence[Message], *, max_new_tokens: int) -> str:
        return self.generate([chat.render_prompt(self.tokenizer, messages)], max_new_tokens=max_new_tokens)[0]

    def stream(
        self,
        prompt: list[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        num_top: int = 0,
    ) -> Iterator[Token]:
        """Tokens one at a time, up to and including a stop token or to the end of the context. Temperature 0 is greedy.

        Token texts joined give `text` of the ids: a character whose bytes are spread over several tokens comes with
        the last of them.
        """
        import torch

        self._refuse_beyond_context([prompt])
        generator = torch.Generator(device="cpu")
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        cache = None
        ids = torch.tensor([prompt], device=self.model.device)
        said: list[int] = []
        shown = ""
        for _ in range(self.room(prompt, max_new_tokens)):
            with torch.inference_mode():
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = getattr(out, "past_key_values", None)  # recurrent architectures have none of this kind
            logprobs_V = out.logits[0, -1].float().log_softmax(-1).cpu()
            token = _choose(logprobs_V, temperature, top_p, generator)
            top = logprobs_V.topk(num_top) if num_top else None
            alternatives = list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top is not None else []
            stops = token in self.equipment.stop_ids
            if not stops:
                said.append(token)
            fresh = self.text(said)[len(shown) :]
            shown += fresh
            yield Token(token, fresh, float(logprobs_V[token]), alternatives)
            if stops:
                return
            ids = torch.tensor([[token] if cache is not None else [*prompt, *said]], device=self.model.device)

    def text(self, ids: Sequence[int]) -> str:
        """What generated ids say, up to a stop token. A character that has not got all its bytes is left out."""
        ids = list(ids)
        for place, token in enumerate(ids):
            if token in self.equipment.stop_ids:
                ids = ids[:place]
                break
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip("\N{REPLACEMENT CHARACTER}")

    def _batches(self, lengths: Sequence[int], kept: Sequence[int]) -> Iterator[list[int]]:
        """Row numbers in batches of like length, each batch at most `batch_tokens` with its padding, `batch_rows`, and
        `LOGITS` for the `kept` places of its rows."""
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        most_kept = LOGITS // self.model.config.get_text_config().vocab_size
        batch: list[int] = []
        for row in order:
            if batch and (
                (len(batch) + 1) * lengths[batch[0]] > self.batch_tokens
                or len(batch) == self.batch_rows
                or sum(kept[one] for one in batch) + kept[row] > most_kept
            ):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _refuse_beyond_context(self, prompts: Sequence[list[int]], answer: int = 0) -> None:
        # The last token of an answer is only predicted, so it needs no place.
        longest = max(map(len, prompts), default=0)
        if self.context is not None and longest + max(0, answer - 1) > self.context:
            behind = f" and an answer of {answer}" if answer else ""
            raise DataError(
                f"a prompt of {longest} tokens{behind} does not fit into the {self.context} tokens that the model holds"
            )


class RemoteCompleter:
    """An endpoint that speaks the OpenAI API."""

    def __init__(self, client: Any, model: str) -> None:
        self.client = client
        self.model = model

    def answer(self, messages: Sequence[Message], *, max_new_tokens: int) -> str:
        reply = self.client.chat.completions.create(
            model=self.model,
            messages=[message.to_dict() for message in messages],
            max_tokens=max_new_tokens,
            temperature=0,
        )
        return reply.choices[0].message.content or ""


def savable(settings: Any) -> Any:
    """A model's generation settings in a form that Transformers agrees to save.

    Some published models have a temperature without `do_sample`, or a penalty that only beams heed.
    """
    from transformers import GenerationConfig

    for changed in ({}, {"do_sample": True}):
        mended = GenerationConfig.from_dict(settings.to_dict() | changed)
        try:
            mended.validate(strict=True)
        except ValueError:
            continue
        return mended
    ends = {key: getattr(settings, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**ends)


def _choose(logprobs_V: Any, temperature: float, top_p: float, generator: Any) -> int:
    """The next token: the best at temperature 0, else drawn from the smallest set of tokens that holds `top_p`."""
    import torch

    if temperature <= 0:
        return int(logprobs_V.argmax())
    probs_V = (logprobs_V / temperature).softmax(-1)
    sorted_V, order_V = probs_V.sort(descending=True)
    sorted_V[1:][(sorted_V.cumsum(-1) - sorted_V)[1:] >= top_p] = 0
    return int(order_V[torch.multinomial(sorted_V, 1, generator=generator)])


def _sight(model: Any) -> float:
    """The longest sequence in which each place attends to all before it under a mask and position ids of ours; 0 where
    an architecture takes no position ids, or measures its window along the sequence."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config()
    takes_places = "position_ids" in inspect.signature(inner.forward).parameters and not getattr(config, "alibi", False)
    if not takes_places or hasattr(config, "window_size"):
        return 0
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if window), default=math.inf)
