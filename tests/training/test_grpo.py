"""Learning from rewards: equal to TRL's trainer on the same rollouts, learned, and refused."""

import pytest
import torch
from training.passes import first_pass
from training.results import difference, tensors
from training.test_preference import options, tiny, trl_gradients
from training.tiny_tokenizers import byte_tokenizer

import lorry
from lorry import pocket
from lorry.training import DataError, Job, train
from lorry.training.objectives import make_objective

LORA = {"method": "lora", "rank": 4}
PROMPTS = [{"prompt": "the town? "}, {"prompt": "the load of the lorry? "}, {"prompt": "no? "}]


def vowels(prompts, completions, **columns):
    """The share of vowels in an answer."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


FORMS = [("grpo", True), ("grpo", False), ("dr_grpo", True), ("bnpo", True)]


@pytest.mark.parametrize(("form", "unbiased"), FORMS)
def test_loss_and_gradients_are_those_of_trl(form, unbiased, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    objective = {"objective": "grpo", "reward": vowels, "group_size": 4, "max_new_tokens": 6}
    objective |= {"beta": 0.2, "unbiased": unbiased, "temperature": 1.3, "form": form}
    job = Job("job", PROMPTS, LORA, objective=objective, steps=1, batch_size=3)
    share, loss, gradients, adapter = first_pass(model, tokenizer, job, tmp_path / "mine")
    trainer = trl.GRPOTrainer(
        model, vowels, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(PROMPTS),
        args=trl.GRPOConfig(**{k: v for k, v in options(tmp_path).items() if k != "max_length"},
                            loss_type=form, temperature=1.3, num_generations=4, max_completion_length=6,
                            use_bias_correction_kl=unbiased),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.beta = 0.2  # set late: the reference is in the batch, and no second copy is wanted
    rows = [row for group in share.examples for row in group.rows]
    prompts = [row.input_ids[row.labels == -100] for row in rows]
    answers = [row.input_ids[row.labels != -100] for row in rows]
    batch = {}
    for name, parts, left in (("prompt", prompts, True), ("completion", answers, False)):
        size = max(map(len, parts))
        ids, mask = torch.zeros(12, size, dtype=torch.long), torch.zeros(12, size, dtype=torch.long)
        for i, part in enumerate(parts):
            place = slice(size - len(part), size) if left else slice(0, len(part))
            ids[i, place], mask[i, place] = part.long(), 1
        batch[f"{name}_ids"], batch[f"{name}_mask"] = ids, mask
    reference = [values for group in share.examples for values in group.reference]
    batch["ref_per_token_logps"] = torch.nn.utils.rnn.pad_sequence(reference, batch_first=True)
    batch["advantages"] = torch.cat([group.advantages for group in share.examples])
    lorry.activate(model, "job")
    theirs = trainer._compute_loss(model.eval(), batch)
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-4, abs=1e-6)
    assert difference(gradients, trl_gradients(model, adapter, theirs)) < 1e-5
    rewards = torch.stack([group.rewards for group in share.examples])
    wanted = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"].view(3, 4), wanted)


def job(steps=30):
    records = [{"prompt": x.answer[:2], "answer": x.answer} for x in pocket.examples("copy", "train", 32, seed=0)]
    objective = {"objective": "grpo", "reward": vowels, "group_size": 8, "max_new_tokens": 8, "max_length": 64}
    common = {"steps": steps, "batch_size": 4, "learning_rate": 5e-3, "hold_out": 0.25}
    return Job("policy", records, LORA, objective=objective, **common)


def test_rewarded_answers_become_likelier(tmp_path):
    result = train(*pocket.load(), job(), tmp_path)
    assert result.ok, result.report
    held = result["policy"]["eval"]
    assert held["end"]["reward"] > held["start"]["reward"] + 0.05


def test_a_policy_beside_text_is_what_it_is_alone(tmp_path):
    text = Job("text", [{"text": "the lorry"}] * 8, LORA, objective="causal", steps=3, batch_size=4)
    together = train(*pocket.load(), [text, job(3)], tmp_path / "together")
    assert together.ok, together.report
    alone = train(*pocket.load(), job(3), tmp_path / "alone")
    assert difference(tensors(together, "policy"), tensors(alone, "policy")) == 0


def test_a_reward_is_read_from_a_file_and_gets_the_columns(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(
        "def exact(prompts, completions, answer):\n    return [c == a for c, a in zip(completions, answer)]\n"
    )
    assert make_objective("grpo", {"reward": f"{path}:exact"}).rewarded()(["a"], ["b"], answer=["b"]) == [True]
    with pytest.raises(DataError, match="has no function 'exakt'"):
        make_objective("grpo", {"reward": f"{path}:exakt"}).rewarded()


def test_what_cannot_be_learned_from_is_refused(tmp_path):
    with pytest.raises(DataError, match="GRPO needs a reward"):
        make_objective("grpo").encode(byte_tokenizer(), PROMPTS)
    with pytest.raises(DataError, match="group_size must be at least 2"):
        make_objective("grpo", {"group_size": 1})
    with pytest.raises(DataError, match="No prompt leaves room"):
        make_objective("grpo", {"reward": vowels, "max_length": 64}).encode(byte_tokenizer(), PROMPTS)
