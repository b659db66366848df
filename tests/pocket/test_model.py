"""The trained model in the package: what it can and cannot do, as an ordinary Hugging Face directory."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from lorry import pocket
from lorry.pocket import train
from lorry.pocket.tokenizer import IGNORED, build


@pytest.fixture(scope="module")
def loaded():
    return pocket.load()


def test_size() -> None:
    files = {file.name: file.stat().st_size for file in pocket.PATH.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert sum(files.values()) <= 4_000_000


def test_is_an_ordinary_directory(loaded) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pocket.PATH)
    tokenizer = AutoTokenizer.from_pretrained(pocket.PATH)
    assert type(model) is LlamaForCausalLM
    assert type(loaded[0]) is LlamaForCausalLM
    assert 900_000 <= model.num_parameters() <= 1_100_000
    assert tokenizer.get_vocab() == build().get_vocab()
    with safe_open(pocket.PATH / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = pocket.load(dtype)
        assert {one.dtype for one in model.parameters()} == {dtype}
        assert not model.training


def test_each_load_is_fresh() -> None:
    one, _ = pocket.load()
    two, _ = pocket.load()
    with torch.no_grad():
        one.lm_head.weight.zero_()
    assert two.lm_head.weight.abs().sum() > 0


@pytest.mark.parametrize("skill", [one.name for one in pocket.skills("base")])
def test_base_skills(loaded, skill: str) -> None:
    assert pocket.exact_match(*loaded, pocket.examples(skill, "test", 100, seed=5)) >= 0.97


@pytest.mark.parametrize("skill", [one.name for one in pocket.skills("held-out") + pocket.skills("two-part")])
def test_held_out_skills(loaded, skill: str) -> None:
    assert pocket.exact_match(*loaded, pocket.examples(skill, "test", 100, seed=5)) <= 0.05


def test_bfloat16_answers_too() -> None:
    assert pocket.exact_match(*pocket.load(torch.bfloat16), pocket.examples("reverse", "test", 100, seed=5)) >= 0.9


def test_tokenizer_keeps_every_character(loaded) -> None:
    tokenizer = loaded[1]
    text = "".join(chr(code) for code in range(32, 127)) + " a  b "
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer("a\n")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer("\u00e9")["input_ids"] == [tokenizer.unk_token_id]


def test_chat_template_writes_the_worlds_lines(loaded) -> None:
    tokenizer = loaded[1]
    turns = [{"role": "user", "content": "reverse:lorry"}, {"role": "assistant", "content": "yrrol"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "reverse:lorry>yrrol\n"
    coded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    learned = [x for x, mine in zip(coded["input_ids"], coded["assistant_masks"], strict=True) if mine]
    assert tokenizer.decode(learned) == "yrrol\n"


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_learns_answers_only(loaded, side: str) -> None:
    tokenizer = loaded[1]
    lines = [pocket.example("copy", "abc"), pocket.example("reverse", "abcdef")]
    rows = pocket.batch(tokenizer, lines, padding_side=side)
    assert rows["input_ids"].shape == (2, len("reverse:abcdef>fedcba\n"))
    for place, line in enumerate(lines):
        kept = rows["attention_mask"][place].bool()
        assert tokenizer.decode(rows["input_ids"][place][kept]) == f"{line.prompt}{line.answer}\n"
        labels = rows["labels"][place]
        assert tokenizer.decode(labels[labels != IGNORED]) == f"{line.answer}\n"
    assert bool(rows["attention_mask"][0, 0]) == (side == "right")


def greedy_by_hand(model, tokenizer, prompt: str, limit: int) -> str:
    """No padding, no cache, one token at a time."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(limit):
        best = model(input_ids=ids).logits[0, -1].argmax()
        if best == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, start:])


@torch.no_grad()
def test_answers_equal_greedy_by_hand(loaded) -> None:
    prompts = [
        pocket.examples(name, "test", 3, seed=2)[i].prompt for i in range(3) for name in ("sort", "count", "twice")
    ]
    answers = pocket.answer(*loaded, prompts, max_new_tokens=18, batch_size=4)
    assert answers == [greedy_by_hand(*loaded, prompt, 18) for prompt in prompts]


def test_exact_match_counts(loaded) -> None:
    lines = pocket.examples("copy", "test", 30, seed=2)
    answers = pocket.answer(*loaded, [line.prompt for line in lines], max_new_tokens=12)
    right = [line for line, found in zip(lines, answers, strict=True) if line.answer == found][:20]
    assert len(right) == 20
    wrong = [pocket.Example(line.prompt, line.answer[:-1]) for line in right[:5]]
    longer = [pocket.Example(line.prompt, line.answer + "x") for line in right[:5]]
    assert pocket.exact_match(*loaded, right) == 1.0
    assert pocket.exact_match(*loaded, wrong) == 0.0
    assert pocket.exact_match(*loaded, right[5:20] + wrong, batch_size=7) == 0.75
    assert pocket.exact_match(*loaded, right[:5] + longer) == 0.5


def test_exact_match_of_nothing_is_an_error(loaded) -> None:
    with pytest.raises(ValueError, match="at least one"):
        pocket.exact_match(*loaded, [])


def test_rows_context_is_entered_for_each_batch(loaded) -> None:
    seen = []

    @contextlib.contextmanager
    def rows(start: int, stop: int) -> Iterator[None]:
        seen.append((start, stop))
        yield
        seen.append("left")

    pocket.exact_match(*loaded, pocket.examples("first", "test", 10, seed=0), batch_size=4, rows=rows)
    assert seen == [(0, 4), "left", (4, 8), "left", (8, 10), "left"]


def test_evaluation_restores_the_mode(loaded) -> None:
    model, tokenizer = pocket.load()
    model.train()
    pocket.exact_match(model, tokenizer, pocket.examples("first", "test", 2, seed=0))
    assert model.training


def test_training_is_seeded_and_saved_whole(tmp_path) -> None:
    one, tokenizer = train.train(steps=4, rows=8, seed=1)
    two, _ = train.train(steps=4, rows=8, seed=1)
    other, _ = train.train(steps=4, rows=8, seed=2)
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[key]), key
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    train.save(one, tokenizer, tmp_path / "model")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names


def test_training_batches_hold_every_base_skill_once_each_line() -> None:
    lines = [line for rows in train.batches(20, 16, seed=0) for line in rows]
    assert len(lines) == 20 * 16 == len({line.prompt for line in lines})
    assert {line.prompt.split(":")[0] for line in lines} == {one.tag for one in pocket.skills("base")}
    assert all(pocket.split_of(line.prompt.split(":")[1][:-1]) == "train" for line in lines)


def test_loss_weighs_answers_over_prompts(loaded) -> None:
    model, tokenizer = loaded
    rows = pocket.batch(tokenizer, pocket.examples("reverse", "train", 4, seed=0))
    with torch.no_grad():
        before = train.loss_of(model, rows)
        flat = train.loss_of(model, rows | {"labels": rows["input_ids"]})
    assert before < flat


def test_missing_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from lorry.pocket import loading

    monkeypatch.setattr(loading, "PATH", tmp_path)
    with pytest.raises(FileNotFoundError, match="lorry.pocket.train"):
        loading.load()
