"""Prompts in; label scores, losses or text out.

`LocalCompleter` works on weights in this process: evaluation and the endpoint both use it, so an answer over HTTP is
computed by the code that computed the report. `RemoteCompleter` asks an endpoint that speaks the OpenAI API.

Shapes: B prompts in a batch, T tokens in the longest of them, N nodes of the label tree, V vocabulary, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunewright import chat
from tunewright.chat import Equipment, Message, Rendering

Progress = Callable[[int, int], None]


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


class LocalCompleter:
    """A causal language model in this process."""

    def __init__(self, model: Any, tokenizer: Any, equipment: Equipment, *, batch_tokens: int = 8192) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.equipment = equipment
        self.batch_tokens = batch_tokens
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)

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
        scores: list[list[float]] = [[] for _ in prompts]
        done = 0
        for batch in self._batches([len(prompt) + len(tree.tokens) for prompt in prompts]):
            for row, nodes in zip(batch, self._score_nodes([prompts[row] for row in batch], tree), strict=True):
                scores[row] = [float(sum(nodes[node] for node in path)) for path in tree.paths]
            done += len(batch)
            if progress:
                progress(done, len(prompts))
        return scores

    def _score_nodes(self, prompts: Sequence[list[int]], tree: LabelTree) -> Any:
        """Log-probability of each tree node given its prompt and ancestors, B x N, in one forward pass.

        The tree stands behind each prompt in one sequence; an attention mask lets a node see the prompt and its own
        ancestors alone, and its position id is the one it would have if only its label stood there.
        """
        import torch

        device = self.model.device
        num_nodes = len(tree.tokens)
        longest = max(map(len, prompts))
        size = longest + num_nodes
        ids_BT = torch.full((len(prompts), size), self.equipment.pad_id, dtype=torch.long)
        positions_BT = torch.zeros((len(prompts), size), dtype=torch.long)
        sees_BTT = torch.zeros((len(prompts), size, size), dtype=torch.bool)
        ancestors_NN = torch.eye(num_nodes, dtype=torch.bool)
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                ancestors_NN[node] |= ancestors_NN[parent]
        depths_N = torch.tensor(tree.depths)
        for row, prompt in enumerate(prompts):
            length = len(prompt)
            ids_BT[row, :length] = torch.tensor(prompt)
            positions_BT[row, :length] = torch.arange(length)
            sees_BTT[row, :length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
            ids_BT[row, longest:] = torch.tensor(tree.tokens)
            positions_BT[row, longest:] = length + depths_N
            sees_BTT[row, longest:, :length] = True
            sees_BTT[row, longest:, longest:] = ancestors_NN
            padding = torch.arange(length, longest)
            sees_BTT[row, padding, padding] = True  # a row of the mask must not be empty
        inner = sorted({parent for parent in tree.parents if parent >= 0})
        place = {-1: 0} | {parent: number for number, parent in enumerate(inner, start=1)}
        keep_BT = torch.zeros((len(prompts), size), dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            keep_BT[row, len(prompt) - 1] = True
            keep_BT[row, [longest + node for node in inner]] = True
        with torch.inference_mode():
            logits = self.model(
                input_ids=ids_BT.to(device),
                position_ids=positions_BT.to(device),
                attention_mask=sees_BTT[:, None].to(device),
                logits_to_keep=keep_BT.to(device),
                use_cache=False,
            ).logits
            logprobs = logits.float().log_softmax(-1).view(len(prompts), len(place), -1).cpu()
        rows = torch.tensor([place[parent] for parent in tree.parents])
        return logprobs[:, rows, torch.tensor(tree.tokens)].double().numpy()

    # --- losses ---

    def losses(self, renderings: Sequence[Rendering], *, progress: Progress | None = None) -> list[tuple[float, int]]:
        """For each rendering, the summed negative log-likelihood (nats) of its targets, and their number."""
        import torch

        results: list[tuple[float, int]] = [(0.0, 0)] * len(renderings)
        done = 0
        for batch in self._batches([len(one.ids) for one in renderings]):
            longest = max(len(renderings[row].ids) for row in batch)
            ids_BT = torch.full((len(batch), longest), self.equipment.pad_id, dtype=torch.long)
            real_BT = torch.zeros((len(batch), longest), dtype=torch.long)
            target_BT = torch.zeros((len(batch), longest), dtype=torch.bool)
            for place, row in enumerate(batch):
                length = len(renderings[row].ids)
                ids_BT[place, :length] = torch.tensor(renderings[row].ids)
                real_BT[place, :length] = 1
                target_BT[place, :length] = torch.tensor(renderings[row].mask)
            target_BT[:, 0] = False  # nothing predicts the first token
            before_BT = target_BT.roll(-1, dims=1)
            with torch.inference_mode():
                logits = self.model(
                    input_ids=ids_BT.to(self.model.device),
                    attention_mask=real_BT.to(self.model.device),
                    logits_to_keep=before_BT.to(self.model.device),
                    use_cache=False,
                ).logits.float()
                nll = torch.nn.functional.cross_entropy(logits, ids_BT[target_BT].to(logits.device), reduction="none")
            counts = target_BT.sum(dim=1).tolist()
            for row, part in zip(batch, nll.double().cpu().split(counts), strict=True):
                results[row] = (float(part.sum()), len(part))
            done += len(batch)
            if progress:
                progress(done, len(renderings))
        return results

    # --- text ---

    def generate(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int, progress: Progress | None = None
    ) -> list[str]:
        """Greedy answers, without the end-of-turn token."""
        import torch

        answers = [""] * len(prompts)
        done = 0
        for batch in self._batches([len(prompt) + max_new_tokens for prompt in prompts]):
            room = max_new_tokens
            longest = max(len(prompts[row]) for row in batch)
            if self.context is not None:
                room = max(1, min(room, self.context - longest))
            ids_BT = torch.full((len(batch), longest), self.equipment.pad_id, dtype=torch.long)
            real_BT = torch.zeros((len(batch), longest), dtype=torch.long)
            for place, row in enumerate(batch):
                ids_BT[place, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
                real_BT[place, longest - len(prompts[row]) :] = 1
            with torch.inference_mode():
                out_BT = self.model.generate(
                    input_ids=ids_BT.to(self.model.device),
                    attention_mask=real_BT.to(self.model.device),
                    max_new_tokens=room,
                    do_sample=False,
                    eos_token_id=self.equipment.stop_ids,
                    pad_token_id=self.equipment.pad_id,
                )
            for row, ids in zip(batch, out_BT[:, longest:].tolist(), strict=True):
                answers[row] = self.text(ids)
            done += len(batch)
            if progress:
                progress(done, len(prompts))
        return answers

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
        """Tokens one at a time, up to and including a stop token. Temperature 0 is greedy.

        Token texts joined give the decoded answer: a character whose bytes are spread over several tokens comes with
        the last of them.
        """
        import torch

        generator = torch.Generator(device="cpu")
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        cache = None
        ids = torch.tensor([prompt], device=self.model.device)
        said: list[int] = []
        shown = ""
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logprobs_V = out.logits[0, -1].float().log_softmax(-1).cpu()
            token = _choose(logprobs_V, temperature, top_p, generator)
            top = logprobs_V.topk(num_top) if num_top else None
            alternatives = list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top is not None else []
            stops = token in self.equipment.stop_ids
            if not stops:
                said.append(token)
            whole = self.text(said)
            fresh = "" if stops or whole.endswith("\N{REPLACEMENT CHARACTER}") else whole[len(shown) :]
            shown += fresh
            yield Token(token, fresh, float(logprobs_V[token]), alternatives)
            if stops:
                return
            ids = torch.tensor([[token]], device=self.model.device)

    def text(self, ids: Sequence[int]) -> str:
        """What generated ids say, up to a stop token."""
        ids = list(ids)
        for place, token in enumerate(ids):
            if token in self.equipment.stop_ids:
                ids = ids[:place]
                break
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Row numbers in batches of like length, each batch at most `batch_tokens` with its padding."""
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        batch: list[int] = []
        for row in order:
            if batch and (len(batch) + 1) * lengths[batch[0]] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


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


def _choose(logprobs_V: Any, temperature: float, top_p: float, generator: Any) -> int:
    """The next token: the best at temperature 0, else drawn from the smallest set of tokens that holds `top_p`."""
    import torch

    if temperature <= 0:
        return int(logprobs_V.argmax())
    probs_V = (logprobs_V / temperature).softmax(-1)
    sorted_V, order_V = probs_V.sort(descending=True)
    sorted_V[(sorted_V.cumsum(-1) - sorted_V) >= top_p] = 0
    return int(order_V[torch.multinomial(sorted_V, 1, generator=generator)])
