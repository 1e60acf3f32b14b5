"""Scores, losses and text are those of the model itself, computed one token at a time, whatever stands beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tunewright import chat, generate, models
from tunewright.chat import Equipment, Message, Rendering
from tunewright.errors import DataError
from tunewright.generate import LabelTree, LocalCompleter, RemoteCompleter, Token

VOCABULARY = 97
STOP, PAD = 2, 0
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "qwen2": {"num_key_value_heads": 2},
    "qwen2 with a window": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "openai-gpt": {},
    "mamba": {"state_size": 4},
    "falcon_h1": {
        "num_key_value_heads": 2,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
}
"""Learned and rotary positions, ALiBi, windows of both kinds, a recurrent state; kernels that take a mask, and none."""


def model_of(kind: str, *, attention: str | None = None) -> Any:
    given = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "gpt_neo":
        given = {"hidden_size": 32, "intermediate_size": 48}
    config = AutoConfig.for_model(
        kind.split()[0],
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=STOP,
        pad_token_id=PAD,
        **given | SHAPES[kind],
    )
    torch.manual_seed(0)
    with models.quiet():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data *= 5  # else a random model finds all tokens alike
    return model


def completer_of(model: Any, **options: Any) -> LocalCompleter:
    return LocalCompleter(model, None, Equipment("own", "e", STOP, [STOP], PAD), **options)


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return model_of("llama")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> LocalCompleter:
    """A model with a tokenizer."""
    from tunewright.testing import tiny_model

    ref = models.find(str(tiny_model(tmp_path_factory.mktemp("generate") / "tiny", context=48)))
    tokenizer = models.load_tokenizer(ref)
    equipment = chat.equip(tokenizer)
    weights = models.load_model(ref)
    weights.get_input_embeddings().weight.data *= 30
    return LocalCompleter(weights, tokenizer, equipment)


def by_hand(model: Any, prompt: list[int], answer: list[int]) -> float:
    """The answer's log-probability, one forward pass for each of its tokens."""
    total = 0.0
    for place, token in enumerate(answer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer[:place]]), use_cache=False).logits
        total += float(logits[0, -1].double().log_softmax(-1)[token])
    return total


LABELS = [[10, 11, STOP], [10, STOP], [10, 11, 12, 13, STOP], [14, 15, STOP], [12, STOP]]
"""Some are beginnings of others; one shares no token with the rest."""
PROMPTS = [[5, 6, 7, 8, 9], [20 + token for token in range(20)], [3], [30, 31, 30, 31, 30, 31, 30, 31, 30, 31, 32]]


# --- label scores ---


@pytest.mark.parametrize("batch_tokens", [8192, 40])
def test_a_score_is_the_sum_of_the_label_tokens_logprobs(model: Any, batch_tokens: int) -> None:
    tree = LabelTree.plant("abcde", LABELS)
    scores = completer_of(model, batch_tokens=batch_tokens).score(PROMPTS, tree)
    for prompt, row in zip(PROMPTS, scores, strict=True):
        assert row == pytest.approx([by_hand(model, prompt, label) for label in LABELS], abs=2e-4)


SHARED = [40, 41, 42, 43, 44, 45]
"""What all of a call's prompts may begin with."""
AT_ONCE = {"llama", "gpt2", "qwen2", "gemma", "opt"}
"""Shapes that take keys and values of earlier tokens and a mask of ours."""


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every beginning is worth sharing and two nodes are a large tree."""
    monkeypatch.setattr(generate, "WORTH_SHARING", 1)
    monkeypatch.setattr(generate, "PIECE", 2)


def fed(model: Any, work: Callable[[], Any]) -> int:
    """Tokens that go through the model."""
    count = 0

    def watch(_: Any, __: Any, given: dict[str, Any]) -> None:
        nonlocal count
        count += given["input_ids"].numel()

    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        work()
    finally:
        hook.remove()
    return count


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("batch_tokens", [2048, 30])
def test_a_shared_beginning_and_a_tree_in_pieces_give_the_same_scores(model: Any, batch_tokens: int) -> None:
    tree = LabelTree.plant("abcde", LABELS)
    completer = completer_of(model, batch_tokens=batch_tokens)
    prompts = [SHARED + prompt for prompt in PROMPTS]
    for prompt, row in zip(prompts, completer.score(prompts, tree), strict=True):
        assert row == pytest.approx([by_hand(model, prompt, label) for label in LABELS], abs=2e-4)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", list(SHAPES))
def test_each_architecture_goes_the_shortest_way_that_it_keeps_to(kind: str) -> None:
    tree = LabelTree.plant("abcde", LABELS)
    model = model_of(kind)
    completer = completer_of(model)
    prompts = [SHARED + prompt for prompt in PROMPTS]
    completer.score(prompts, tree)  # tries the ways
    own, behind = sum(map(len, PROMPTS)), len(prompts) * len(tree.inner)
    apart = sum(len(prompt) * len(tree.branches) for prompt in prompts)
    count = fed(model, lambda: [completer.score([SHARED + one, SHARED + one], tree) for one in PROMPTS])
    if kind in AT_ONCE:
        assert count <= 2 * (own + behind + 2 * len(prompts)) + len(SHARED) * len(prompts) + own
    else:
        assert count >= apart


@pytest.mark.parametrize("size", [1, 2, 64])
def test_scores_are_those_of_a_sequence_for_each_label_in_double_precision(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """What differs in single precision is rounding, then: the sums are the same."""
    monkeypatch.setattr(generate, "PIECE", size)
    monkeypatch.setattr(generate, "WORTH_SHARING", 1)
    tree = LabelTree.plant("abcde", LABELS)
    model = model_of("llama").double()
    prompts = [SHARED + prompt for prompt in PROMPTS]
    for prompt, row in zip(prompts, completer_of(model).score(prompts, tree), strict=True):
        assert row == pytest.approx([by_hand(model, prompt, label) for label in LABELS], abs=1e-9)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", sorted(AT_ONCE))
def test_scores_are_those_of_a_sequence_for_each_label_to_a_hundred_thousandth(kind: str) -> None:
    tree = LabelTree.plant("abcde", LABELS)
    model = model_of(kind)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data /= 2  # else logits of some tens, with rounding to match
    prompts = [SHARED + prompt for prompt in PROMPTS]
    for prompt, row in zip(prompts, completer_of(model).score(prompts, tree), strict=True):
        assert row == pytest.approx([by_hand(model, prompt, label) for label in LABELS], abs=1e-5)


def test_what_all_prompts_begin_with_is_computed_once(llama: Any) -> None:
    tree = LabelTree.plant("ab", [[10, 11], [12, 11]])
    prompts = [[*SHARED, *SHARED, *SHARED, last] for last in range(50, 60)]
    completer = completer_of(llama)
    completer.score(prompts, tree)  # tries the way
    assert fed(llama, lambda: completer.score(prompts, tree)) == 18 + 10 * (1 + 2)


@pytest.mark.usefixtures("small_pieces")
def test_an_adapter_s_model_is_scored_the_same_way(llama: Any) -> None:
    from peft import LoraConfig, get_peft_model

    tree = LabelTree.plant("abcde", LABELS)
    prompts = [SHARED + prompt for prompt in PROMPTS]
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with models.quiet():
        adapted = get_peft_model(model_of("llama"), lora).eval()
    scores = completer_of(adapted).score(prompts, tree)
    assert scores[0] != pytest.approx(completer_of(llama).score(prompts, tree)[0], abs=0.1)
    for prompt, row in zip(prompts, scores, strict=True):
        assert row == pytest.approx([by_hand(adapted, prompt, label) for label in LABELS], abs=2e-4)


@given(
    labels=st.lists(st.lists(st.integers(3, 6), max_size=7), min_size=1, max_size=20, unique_by=tuple),
    size=st.integers(1, 6),
)
def test_pieces_hold_each_inner_node_once_behind_its_ancestors(labels: list[list[int]], size: int) -> None:
    tree = LabelTree.plant([str(label) for label in labels], [[*label, STOP] for label in labels])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "PIECE", size)
        pieces = tree.pieces
    assert sorted(node for piece in pieces for node in piece.nodes) == tree.inner
    for piece in pieces:
        assert 0 < len(piece.nodes) <= size
        before = [-1]
        for node in [*piece.ancestors, *piece.nodes]:
            assert tree.parents[node] in before
            before.append(node)


def test_an_attention_without_a_kernel_gives_the_same_scores() -> None:
    tree = LabelTree.plant("abcde", LABELS)
    scores = [completer_of(model_of("llama", attention=kind)).score(PROMPTS, tree) for kind in ("sdpa", "eager")]
    for one, other in zip(*scores, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


@given(order=st.permutations(range(len(PROMPTS))), rows=st.integers(1, 4))
@settings(max_examples=30)
def test_scores_do_not_depend_on_order_or_batch(llama: Any, order: list[int], rows: int) -> None:
    tree = LabelTree.plant("abcde", LABELS)
    straight = completer_of(llama, batch_rows=1).score(PROMPTS, tree)
    mixed = completer_of(llama, batch_rows=rows).score([PROMPTS[row] for row in order], tree)
    for place, row in enumerate(order):
        assert mixed[place] == pytest.approx(straight[row], abs=1e-5)


@given(st.lists(st.lists(st.integers(3, 9), max_size=4), min_size=1, max_size=8, unique_by=tuple))
def test_the_label_tree_holds_every_label_and_no_beginning_twice(labels: list[list[int]]) -> None:
    labels = [[*label, STOP] for label in labels]
    tree = LabelTree.plant([str(label) for label in labels], labels)
    assert [[tree.tokens[node] for node in path] for path in tree.paths] == labels
    beginnings = {tuple(label[:size]) for label in labels for size in range(1, len(label) + 1)}
    assert len(tree.tokens) == len(beginnings)
    assert {node for branch in tree.branches for node in branch} == set(range(len(tree.tokens)))
    assert all(tree.parents[node] in tree.inner for node in range(len(tree.tokens)) if tree.parents[node] >= 0)


def test_beginnings_of_labels_can_be_scored_too(llama: Any) -> None:
    """What the endpoint plants, to have the logprob of each token."""
    beginnings = [label[:size] for label in LABELS for size in range(1, len(label) + 1)]
    tree = LabelTree.plant([str(one) for one in beginnings], beginnings)
    (scores,) = completer_of(llama).score(PROMPTS[:1], tree)
    assert scores == pytest.approx([by_hand(llama, PROMPTS[0], one) for one in beginnings], abs=1e-4)


def test_progress_reaches_the_end(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    completer_of(model, batch_rows=2).score(
        PROMPTS, LabelTree.plant("ab", LABELS[:2]), progress=lambda *at: seen.append(at)
    )
    assert seen == sorted(seen)
    assert seen[-1] == (4, 4)


def test_a_label_may_fill_the_context_and_not_pass_it(llama: Any) -> None:
    tree = LabelTree.plant("abcde", LABELS)  # the longest has 5 tokens, of which the last needs no place
    fits, beyond = [7] * 60, [7] * 61
    assert completer_of(llama).score([fits], tree)[0] == pytest.approx(
        [by_hand(llama, fits, label) for label in LABELS], abs=2e-4
    )
    with pytest.raises(DataError, match="61 tokens and an answer of 5 does not fit into the 64"):
        completer_of(llama).score([fits, beyond], tree)


def test_labels_are_written_as_they_stand_behind_a_prompt(real: LocalCompleter) -> None:
    tree = real.tree(["good", "bad"])
    messages = (Message("user", "fine"), Message("assistant", "bad"))
    whole, prompt = chat.render(real.tokenizer, messages).ids, chat.render_prompt(real.tokenizer, messages[:1])
    assert [tree.tokens[node] for node in tree.paths[1]] == whole[len(prompt) :]
    scores = real.score([prompt], tree)[0]
    assert scores[1] == pytest.approx(by_hand(real.model, prompt, whole[len(prompt) :]), abs=2e-4)


# --- losses ---


def renderings() -> st.SearchStrategy[list[Rendering]]:
    def masked(ids: list[int]) -> st.SearchStrategy[Rendering]:
        return st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)).map(lambda mask: Rendering(ids, mask))

    return st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=12).flatmap(masked), min_size=1, max_size=6)


@given(rows=renderings())
def test_losses_are_those_computed_by_hand(llama: Any, rows: list[Rendering]) -> None:
    found = completer_of(llama, batch_tokens=30).losses(rows)
    for row, (loss, count) in zip(rows, found, strict=True):
        with torch.no_grad():
            logprobs = llama(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].double().log_softmax(-1)
        targets = [place for place in range(1, len(row.ids)) if row.mask[place]]
        assert count == len(targets)
        assert loss == pytest.approx(-sum(float(logprobs[at - 1, row.ids[at]]) for at in targets), abs=1e-4)


def test_a_target_is_right_where_the_model_would_have_said_it(llama: Any) -> None:
    prompt = [5, 9, 17]
    said = greedy(llama, prompt, 6)
    other = [*said[:3], (said[3] + 1) % llama.config.vocab_size]
    rows = [Rendering(prompt + ids, [False] * 3 + [True] * len(ids)) for ids in (said, other)]
    told = completer_of(llama).tell([*rows, Rendering(prompt + said, [False] * 7 + [True] * 2)])
    assert [(one.right, len(one.logprobs)) for one in told] == [(6, 6), (3, 4), (2, 2)]


def test_losses_leave_a_training_model_trainable(llama: Any) -> None:
    rows = [Rendering([5, 6, 7, 8], [True] * 4)]
    completer_of(llama).losses(rows)
    llama(input_ids=torch.tensor([rows[0].ids]), labels=torch.tensor([rows[0].ids])).loss.backward()
    llama.zero_grad()


@pytest.mark.parametrize("what", ["losses", "score", "score in pieces"])
def test_no_batch_computes_more_logits_than_fit(llama: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """50,000 words of vocabulary times 8,192 tokens would be 1.6 GB, and twice that for their logarithms."""
    monkeypatch.setattr(generate, "LOGITS", 40 * VOCABULARY)
    if what == "score in pieces":
        monkeypatch.setattr(generate, "PIECE", 2)
    largest = 0

    def watch(_: Any, __: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, output.logits.numel())

    hook = llama.register_forward_hook(watch)
    try:
        if what == "losses":
            completer_of(llama).losses([Rendering([7] * 20, [True] * 20)] * 16)
        else:
            completer_of(llama).score(PROMPTS * 8, LabelTree.plant("abcde", LABELS))
    finally:
        hook.remove()
    assert 0 < largest <= 40 * VOCABULARY


# --- text ---


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Without a cache, a batch or a library's loop."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == STOP:
            break
    return ids[len(prompt) :]


def test_greedy_ids_are_the_models_own_choice(model: Any) -> None:
    """Batched with padding, and streamed with a cache."""
    completer = completer_of(model)
    completer.text = lambda ids: "x" * len(ids)  # type: ignore[method-assign]
    wanted = [greedy(model, prompt, 6) for prompt in PROMPTS]
    for prompt, ids in zip(PROMPTS, wanted, strict=True):
        assert [token.id for token in completer.stream(prompt, max_new_tokens=6)] == ids
    padded = completer._generate(PROMPTS, 6)
    assert [ids[: len(want)] for ids, want in zip(padded, wanted, strict=True)] == wanted


def test_the_models_own_generation_settings_do_not_sway_the_answer(llama: Any) -> None:
    """Published models bring a temperature and a penalty on repetition; the endpoint's stream has neither."""
    own = GenerationConfig(
        do_sample=True, temperature=2.0, repetition_penalty=5.0, min_new_tokens=5, bad_words_ids=[[3]], num_beams=2
    )
    llama.generation_config = own
    try:
        said = completer_of(llama)._generate(PROMPTS, 6)
    finally:
        kept, llama.generation_config = llama.generation_config, GenerationConfig()
    assert kept is own
    for prompt, ids in zip(PROMPTS, said, strict=True):
        want = greedy(llama, prompt, 6)
        assert ids[: len(want)] == want


def streamed(completer: LocalCompleter, prompt: list[int], **options: Any) -> list[Token]:
    return list(completer.stream(prompt, **options))


@pytest.mark.parametrize("said", ["fine", "lovely \u4f60\u597d", "\U0001f642\U0001f642", "na\u00efve", ""])
def test_generated_text_equals_streamed_text(real: LocalCompleter, said: str) -> None:
    prompt = chat.render_prompt(real.tokenizer, [Message("user", said)])
    tokens = streamed(real, prompt, max_new_tokens=20)
    assert "".join(token.text for token in tokens) == real.text([token.id for token in tokens])
    assert real.generate([prompt], max_new_tokens=20) == [real.text([token.id for token in tokens])]
    assert real.answer([Message("user", said)], max_new_tokens=20) == real.text([token.id for token in tokens])


class Scripted:
    """A model that says given tokens, one for each call."""

    def __init__(self, ids: list[int], vocabulary: int) -> None:
        self.ids = iter(ids)
        self.vocabulary = vocabulary
        self.device = torch.device("cpu")
        self.config = AutoConfig.for_model("llama", max_position_embeddings=512)

    def __call__(self, **_: Any) -> Any:
        logits = torch.full((1, 1, self.vocabulary), -5.0)
        logits[0, 0, next(self.ids)] = 5.0
        return type("Out", (), {"logits": logits, "past_key_values": None})


@given(text=st.text(min_size=1, max_size=12), cut=st.integers(0, 6), stops=st.booleans())
def test_streamed_pieces_join_to_the_text_also_within_characters(
    real: LocalCompleter, text: str, cut: int, stops: bool
) -> None:
    """The tokenizer has a token for each byte, so a character may come in four, and an answer may end amid one."""
    ids = real.tokenizer(text, add_special_tokens=False).input_ids
    ids = ids[: max(1, len(ids) - cut)]
    script = [*ids, real.equipment.end_of_turn_id] if stops else ids
    completer = LocalCompleter(Scripted(script, len(real.tokenizer)), real.tokenizer, real.equipment)
    tokens = streamed(completer, [5], max_new_tokens=len(script))
    assert [token.id for token in tokens] == script
    joined = "".join(token.text for token in tokens)
    assert joined == completer.text(script)
    whole = text.encode("utf-8", "surrogatepass")
    if not cut:
        assert joined == text.rstrip("\N{REPLACEMENT CHARACTER}")
    assert whole.startswith(joined.encode()) or "\N{REPLACEMENT CHARACTER}" in text


def test_logprobs_are_before_temperature_and_the_best_come_first(real: LocalCompleter) -> None:
    prompt = chat.render_prompt(real.tokenizer, [Message("user", "fine")])
    for token in streamed(real, prompt, max_new_tokens=5, temperature=1.7, seed=3, num_top=4):
        assert token.logprob == pytest.approx(by_hand(real.model, prompt, [token.id]), abs=1e-4)
        logprobs = [logprob for _, logprob in token.top]
        assert len(logprobs) == 4
        assert logprobs == sorted(logprobs, reverse=True)
        assert all(by_hand(real.model, prompt, [one]) == pytest.approx(logprob, abs=1e-4) for one, logprob in token.top)
        prompt = [*prompt, token.id]


def test_a_seed_repeats_an_answer_and_another_seed_does_not(real: LocalCompleter) -> None:
    prompt = chat.render_prompt(real.tokenizer, [Message("user", "fine")])

    def drawn(seed: int | None) -> list[int]:
        return [token.id for token in streamed(real, prompt, max_new_tokens=12, temperature=9.0, seed=seed)]

    state = torch.get_rng_state()
    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1
    assert len({tuple(drawn(None)) for _ in range(5)}) > 1
    assert torch.equal(torch.get_rng_state(), state), "sampling must not touch the process's own generator"


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.5)])
def test_sampling_follows_temperature_and_top_p(temperature: float, top_p: float) -> None:
    logprobs = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    probabilities = (logprobs / temperature).softmax(-1)
    inside, total = [], 0.0
    for token in range(4):
        if total >= top_p - 1e-6:
            break
        inside.append(token)
        total += float(probabilities[token])
    generator = torch.Generator().manual_seed(0)
    counts = Counter(generate._choose(logprobs, temperature, top_p, generator) for _ in range(4000))
    assert set(counts) == set(inside)
    for token in inside:
        assert counts[token] / 4000 == pytest.approx(float(probabilities[token]) / total, abs=0.04)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 0.0), (1.0, 0.01)])
def test_the_best_token_is_always_left(temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.tensor([0.1, 0.5, 0.4]).log()
    assert {generate._choose(logprobs, temperature, top_p, generator) for _ in range(20)} == {1}


# --- the context ---


def test_answers_end_where_the_context_does(real: LocalCompleter) -> None:
    """Each prompt has its own room, whoever shares its batch."""
    assert real.context == 48
    prompts = [[7] * 45, [7] * 20, [7] * 48, [9] * 45]
    counted = LocalCompleter(real.model, real.tokenizer, Equipment("own", "none", 999, [], 0))
    counted.text = lambda ids: str(len(ids))  # type: ignore[method-assign]
    assert counted.generate(prompts, max_new_tokens=10) == ["3", "10", "", "3"]
    assert [len(streamed(counted, prompt, max_new_tokens=10)) for prompt in prompts] == [3, 10, 0, 3]


def test_neighbours_do_not_change_an_answer(real: LocalCompleter) -> None:
    prompts = [chat.render_prompt(real.tokenizer, [Message("user", "fine " * size)]) for size in (1, 2, 9, 3)]
    together = real.generate(prompts, max_new_tokens=12)
    assert together == [real.generate([prompt], max_new_tokens=12)[0] for prompt in prompts]


def test_a_prompt_beyond_the_context_is_refused_with_its_length(real: LocalCompleter) -> None:
    said = "a prompt of 49 tokens does not fit into the 48 tokens"
    with pytest.raises(DataError, match=said):
        real.generate([[7] * 49], max_new_tokens=1)
    with pytest.raises(DataError, match=said):
        next(real.stream([7] * 49, max_new_tokens=1))


def test_nothing_to_do_is_done(real: LocalCompleter) -> None:
    assert real.generate([], max_new_tokens=3) == []
    assert real.score([], real.tree(["good", "bad"])) == []
    assert real.losses([]) == []


# --- elsewhere ---


def test_an_endpoint_is_asked_for_the_greedy_answer() -> None:
    asked: dict[str, Any] = {}

    class Completions:
        def create(self, **given: Any) -> Any:
            asked.update(given)
            message = type("Message", (), {"content": None})
            return type("Reply", (), {"choices": [type("Choice", (), {"message": message})]})

    client = type("Client", (), {"chat": type("Chat", (), {"completions": Completions()})})
    said = RemoteCompleter(client, "m").answer([Message("user", "hi", weight=0)], max_new_tokens=7)
    assert said == ""
    assert asked == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 7,
        "temperature": 0,
    }
