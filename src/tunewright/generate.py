"""Prompts in; label scores, losses or text out.

`LocalCompleter` works on weights in this process: evaluation and the endpoint both use it, so an answer over HTTP is
computed by the code that computed the report. `RemoteCompleter` asks an endpoint that speaks the OpenAI API.

Shapes: B prompts in a batch, T tokens in the longest of them, N nodes of the label tree, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunewright import chat
from tunewright.chat import Equipment, Message, Rendering
from tunewright.errors import DataError

Progress = Callable[[int, int], None]
Shape = Callable[[Any, Sequence[int]], Any]
"""Has a say in which token comes next: from its logits and the ids that were generated so far, the logits to choose by,
V. Those of a token that must not come are -inf."""

LOGITS = 2**26
"""Numbers in one batch's logits at most (256 MB in float32), so that a large vocabulary does not fill the memory."""
CPU_NUMBERS = 400_000
"""Numbers in a batch's hidden states on a CPU, about: what a layer makes of four times as many does not fit into its
caches, and takes a quarter longer."""
PIECE = 64
"""Nodes of a label tree in one row at most: a row's attention costs the square of its length."""
WORTH_SHARING = 64
"""Tokens that computing a shared beginning once must save."""
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
class Told:
    """What a model says of the targets of a rendering."""

    logprobs: list[float]
    """Each target's natural log of its probability."""
    right: int
    """How many of them are the most probable token at their place."""

    @property
    def loss(self) -> float:
        """Summed negative log-likelihood, in nats."""
        return -math.fsum(self.logprobs)


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
        return [node for node, children in enumerate(self.children) if children]

    @functools.cached_property
    def children(self) -> list[list[int]]:
        """For each node, those that hang under it."""
        found: list[list[int]] = [[] for _ in self.tokens]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                found[parent].append(node)
        return found

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """The inner nodes, branch by branch, in pieces of at most `PIECE`."""
        inner = set(self.inner)
        waiting = [node for node in self.inner if self.parents[node] < 0][::-1]
        order = []
        while waiting:
            order.append(node := waiting.pop())
            waiting += [child for child in reversed(self.children[node]) if child in inner]
        size = math.ceil(len(order) / max(1, math.ceil(len(order) / PIECE)))
        return [self._piece(order[start : start + size]) for start in range(0, len(order), max(1, size))]

    def _piece(self, nodes: list[int]) -> Piece:
        ancestors = set()
        for node in nodes:
            while (node := self.parents[node]) >= 0:
                ancestors.add(node)
        return Piece(sorted(ancestors - set(nodes)), nodes)

    @functools.cached_property
    def branches(self) -> list[list[int]]:
        """From the first token to each node that has no children; together they hold all nodes."""
        found = []
        for node, children in enumerate(self.children):
            if not children:
                branch = [node]
                while self.parents[branch[0]] >= 0:
                    branch.insert(0, self.parents[branch[0]])
                found.append(branch)
        return found


@dataclass(frozen=True)
class Piece:
    """Some inner nodes of a label tree, and those of their ancestors that are not among them; a parent always stands
    before its children."""

    ancestors: list[int]
    nodes: list[int]


@dataclass(frozen=True)
class Way:
    """How a label tree goes through a model."""

    remembers: bool
    """Behind the keys and values of what all prompts begin with."""
    in_pieces: bool
    """In rows of their own behind the prompts, instead of in the prompts' rows."""


class LocalCompleter:
    """A causal language model in this process."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        equipment: Equipment,
        *,
        batch_tokens: int | None = None,
        batch_rows: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.equipment = equipment
        self.batch_tokens = batch_tokens or _batch_tokens(model)
        self.batch_rows = batch_rows
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        self._proven: dict[Way, bool] = {}

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
        from tunewright import scoring

        self.refuse_beyond_context(prompts, 1 + max(tree.depths))
        scores: list[list[float]] = [[] for _ in prompts]
        done = 0

        def settle(row: int, nodes: Any) -> None:
            nonlocal done
            scores[row] = [float(sum(nodes[node] for node in path)) for path in tree.paths]
            done += 1

        way, rows = self._way(prompts, tree)
        if rows:
            together = [prompts[row] for row in rows]
            shared = scoring.shared_beginning(together) if way.remembers else 0
            if shared * (len(rows) - 1) < WORTH_SHARING:
                shared = 0
            beginning = scoring.begin(self.model, together[0][:shared]) if shared else None
            behind = 0 if way.in_pieces else len(tree.inner)
            lengths = [len(prompt) - shared + behind for prompt in together]
            for batch in self._batches(lengths, [1 + behind] * len(together)):
                found = self._score_nodes([together[place] for place in batch], tree, way, beginning)
                for place, nodes in zip(batch, found, strict=True):
                    settle(rows[place], nodes)
                if progress:
                    progress(done, len(prompts))
        for row in sorted(set(range(len(prompts))) - set(rows)):
            settle(row, self._score_apart(prompts[row], tree, tree.branches))
            if progress:
                progress(done, len(prompts))
        return scores

    def _way(self, prompts: Sequence[list[int]], tree: LabelTree) -> tuple[Way, list[int]]:
        """How prompts are scored with all labels together, and which of them can be: not those where a place does not
        see all that is before it, and none where the architecture does not keep to our mask.

        The first time that a way is wanted, some labels of a prompt are scored by it and each in an ordinary sequence
        of its own; where the two differ, the next way is tried.
        """
        from tunewright import scoring

        sight = scoring.sight(self.model) - max(tree.depths)
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) <= sight]
        large = len(tree.inner) > PIECE
        ways = [Way(remembers=False, in_pieces=False)]
        if rows and scoring.remembers(self.model):
            ways.insert(0, Way(remembers=True, in_pieces=large))
        expected: dict[int, float] = {}
        for way in ways if rows else []:
            if way not in self._proven:
                shortest = min((prompts[row] for row in rows), key=len)
                shortest = shortest if len(shortest) > 1 else shortest * 2  # else it has no beginning to share
                expected = expected or self._score_apart(shortest, tree, tree.branches[-2:])
                self._proven[way] = self._agrees(way, shortest, tree, expected)
            if self._proven[way]:
                return way, rows
        return ways[-1], []

    def _agrees(self, way: Way, prompt: list[int], tree: LabelTree, expected: dict[int, float]) -> bool:
        """Whether a prompt's nodes come out the same by this way, its first half shared where beginnings can be."""
        from tunewright import scoring

        try:
            beginning = scoring.begin(self.model, prompt[: len(prompt) // 2]) if way.remembers else None
            nodes = self._score_nodes([prompt], tree, way, beginning)[0]
        except (IndexError, RuntimeError, TypeError, ValueError):
            return False  # how an architecture says that it does not take such a mask, such as GPT-1
        return all(abs(nodes[node] - logprob) < SAME_SCORE for node, logprob in expected.items())

    def _score_nodes(self, prompts: Sequence[list[int]], tree: LabelTree, way: Way, beginning: Any) -> Any:
        """Log-probability of each tree node given its prompt and ancestors, B x N."""
        from tunewright import scoring

        pad_id = self.equipment.pad_id
        if not way.in_pieces:
            return scoring.score_at_once(self.model, prompts, tree, beginning, pad_id).numpy()
        limits = scoring.Limits(self.batch_tokens, self.batch_rows, self._most_kept)
        return scoring.score_in_pieces(self.model, prompts, tree, beginning, pad_id, limits).numpy()

    def _score_apart(self, prompt: list[int], tree: LabelTree, branches: Sequence[Sequence[int]]) -> dict[int, float]:
        """Log-probability of the nodes of some branches, each branch in an ordinary sequence of its own."""
        before = [False] * len(prompt)
        renderings = [
            Rendering(prompt + [tree.tokens[node] for node in branch], before + [True] * len(branch))
            for branch in branches
        ]
        nodes: dict[int, float] = {}
        for branch, told in zip(branches, self.tell(renderings), strict=True):
            nodes |= dict(zip(branch, told.logprobs, strict=True))
        return nodes

    # --- losses ---

    def losses(self, renderings: Sequence[Rendering], *, progress: Progress | None = None) -> list[tuple[float, int]]:
        """For each rendering, the summed negative log-likelihood (nats) of its targets, and their number.

        Nothing predicts a first token, so it is never counted.
        """
        return [(told.loss, len(told.logprobs)) for told in self.tell(renderings, progress=progress)]

    def tell(self, renderings: Sequence[Rendering], *, progress: Progress | None = None) -> list[Told]:
        """For each rendering, how probable each of its targets is (but a first token), how many are the likeliest."""
        import torch

        found = [Told([], 0)] * len(renderings)
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
                targets = ids_BT[target_BT].to(logits.device)
                nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                right = logits.gather(1, targets[:, None])[:, 0] == logits.amax(-1)
            counts = target_BT.sum(dim=1).tolist()
            parts = ((-nll.double()).cpu().split(counts), right.cpu().split(counts))
            for row, logprobs, hits in zip(batch, *parts, strict=True):
                found[row] = Told(logprobs.tolist(), int(hits.sum()))
            done += len(batch)
            if progress:
                progress(done, len(renderings))
        return found

    # --- text ---

    def generate(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int, progress: Progress | None = None
    ) -> list[str]:
        """Greedy answers, without the end-of-turn token, each as long as the context has room for."""
        self.refuse_beyond_context(prompts)
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
        shapes: Sequence[Shape] = (),
    ) -> Iterator[Token]:
        """Tokens one at a time, up to and including a stop token or to the end of the context. Temperature 0 is greedy.

        Token texts joined give `text` of the ids: a character whose bytes are spread over several tokens comes with
        the last of them. Log-probabilities are the model's own, whatever `shapes` made of them.
        """
        import torch

        self.refuse_beyond_context([prompt])
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
            shaped_V = functools.reduce(lambda logits_V, shape: shape(logits_V, said), shapes, logprobs_V)
            token = _choose(shaped_V, temperature, top_p, generator)
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

    def read(self, ids: Sequence[int], *, num_top: int = 0) -> list[Token]:
        """A text's tokens from its second on, each with the log-probability that the model gives it there; without
        their own texts."""
        import torch

        self.refuse_beyond_context([list(ids)])
        found: list[Token] = []
        cache = None
        for start in range(0, len(ids) - 1, self._most_kept):
            end = min(start + self._most_kept, len(ids) - 1)
            piece = ids[start if cache is not None else 0 : end]
            with torch.inference_mode():
                out = self.model(
                    input_ids=torch.tensor([list(piece)], device=self.model.device),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=end - start,
                )
            cache = getattr(out, "past_key_values", None)  # recurrent architectures have none of this kind
            logprobs_TV = out.logits[0].float().log_softmax(-1).cpu()
            best = logprobs_TV.topk(num_top) if num_top else None
            for place, token in enumerate(ids[start + 1 : end + 1]):
                top = []
                if best is not None:
                    top = list(zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True))
                found.append(Token(token, "", float(logprobs_TV[place, token]), top))
        return found

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
        most_kept = self._most_kept
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

    @property
    def num_tokens(self) -> int:
        """Ids that there are, those of rows without a token included."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def _most_kept(self) -> int:
        """Places of one batch with logits at most."""
        return LOGITS // self.num_tokens

    def refuse_beyond_context(self, prompts: Sequence[list[int]], answer: int = 0) -> None:
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


def _batch_tokens(model: Any) -> int:
    if model.device.type != "cpu":
        return 8192
    return int(min(2048, max(256, CPU_NUMBERS // getattr(model.config.get_text_config(), "hidden_size", 256))))


def _choose(logprobs_V: Any, temperature: float, top_p: float, generator: Any) -> int:
    """The next token: the best at temperature 0, else drawn from the smallest set of tokens that holds `top_p`."""
    import torch

    if temperature <= 0:
        return int(logprobs_V.argmax())
    probs_V = (logprobs_V / temperature).softmax(-1)
    sorted_V, order_V = probs_V.sort(descending=True)
    sorted_V[1:][(sorted_V.cumsum(-1) - sorted_V)[1:] >= top_p] = 0
    return int(order_V[torch.multinomial(sorted_V, 1, generator=generator)])
