"""An adapter goes to another base by a kit: what the kit holds, what is kept, what is asked."""

import json
import random

import pytest
import torch

import lorry
from lorry import pocket
from lorry.core.errors import CheckpointError, OptionError
from lorry.training import DataError
from lorry.training.task import Setting
from lorry.transfer.distance import mmd
from lorry.transfer.distil import TransferOptions, learn, sample, transfer
from lorry.transfer.generate import Prompted, from_file
from lorry.transfer.kit import Base, Kit, KitOptions, make_kit
from lorry.transfer.membership import Membership

LORA = {"method": "lora", "rank": 4, "alpha": 8}
SHORT = "{input}{name}?"


def words(seeds, count, seed):
    """A user's generator: lines of the skill on other words."""
    draw = random.Random(seed)
    return ["star:" + "".join(draw.choices("xyzab", k=4)) + ">" for _ in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A kit of an adapter that was trained for a few steps, its base and its data."""
    base = Base(*pocket.load(), "pocket")
    records = [{"prompt": e.prompt, "completion": e.answer} for e in pocket.examples("star", "train", 40, 0)]
    pairs = [(r["prompt"], r["completion"]) for r in records]
    adapter, _ = learn(base, pairs, TransferOptions(method=LORA, steps=4, learning_rate=5e-3), "source")
    how = KitOptions(steps=8, question=SHORT, rank=4)
    folder = tmp_path_factory.mktemp("kit") / "kit"
    kit = make_kit(base, adapter, records, folder, name="star", generator=words, options=how)
    return kit, base, records


def options(**more):
    return TransferOptions(**{"method": LORA, "steps": 1, "count": 6, "max_new_tokens": 10, **more})


def test_the_kit_holds_no_example_but_the_seeds(made):
    kit, _, records = made
    everything = b"".join(path.read_bytes() for path in kit.folder.rglob("*") if path.is_file())
    inside = [r["prompt"] for r in records if r["prompt"].encode() in everything]
    assert sorted(inside) == sorted(kit.prompts) and len(kit.seeds) == 5 and kit.count == 40
    again = Kit.open(kit.folder)
    assert again.seeds == kit.seeds and again.facts == kit.facts and again.membership() == kit.membership()


def test_a_folder_that_is_no_kit_is_refused(tmp_path, made):
    with pytest.raises(CheckpointError, match=r"kit.json"):
        Kit.open(tmp_path)
    with pytest.raises(OptionError, match="not empty"):
        make_kit(made[1], None, made[2], made[0].folder, name="x", generator=words)
    with pytest.raises(DataError, match="expected 'prompt'"):
        make_kit(made[1], None, [{"text": "a"}], tmp_path / "x", name="x", generator=words)


def test_the_discriminator_learns_binary_cross_entropy_on_two_tokens_and_begins_as_the_base():
    model, tokenizer = pocket.load()
    task, records = (
        Membership(dataset="d", question=SHORT),
        [{"prompt": "ab", "real": True}, {"prompt": "c", "real": False}],
    )
    adapter = lorry.attach(model, LORA)
    setting = Setting(model, tokenizer)
    batch = task.collate(setting, task.encode(tokenizer, records).examples)
    loss, count = task.loss(task.forward(setting, batch), batch.targets)
    yes, no = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "yn")
    wanted = 0.0
    for record in records:
        ids = tokenizer(record["prompt"] + "d?", add_special_tokens=False, return_tensors="pt")["input_ids"]
        pair = model(ids).logits[0, -1, [yes, no]].double().log_softmax(-1)
        wanted -= float(pair[0 if record["real"] else 1].detach())
    assert count == 2 and float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    fresh = task.margins(setting, adapter.name, ["ab", "c"])
    assert torch.equal(fresh, task.margins(setting, None, ["ab", "c"]))
    with pytest.raises(DataError, match="same token"):
        Membership(yes="yes", no="yet").encode(tokenizer, records)


def test_every_kept_input_is_taken_for_the_data_and_exactly_as_many_as_wanted_are_kept(made):
    kit, base, _ = made
    asked = []

    def counted(seeds, count, seed):
        asked.append(count)
        return [*seeds, *words(seeds, count - len(seeds), seed)]

    found = sample(kit, base, counted, options(filtered=False, count=9))
    assert len(set(found.inputs)) == 9 and not set(found.inputs) & set(kit.prompts) and found.attempts == sum(asked)
    adapter = lorry.load(base.model, kit.discriminator, name="judge", activate=False)
    scores = kit.membership().margins(Setting(base.model, base.tokenizer), "judge", words([], 60, 3))
    adapter.detach()
    taken = int((scores > 0).sum())
    try:
        kept = sample(kit, base, lambda s, n, seed: words(s, 60, 3), options(count=max(1, taken // 4), max_attempts=9))
    except DataError as error:
        assert "accepted among" in str(error) and not taken
    else:
        assert all(margin > 0 for margin in kept.margins) and len(kept.margins) == len(kept.inputs)


def test_a_generator_that_repeats_itself_ends_with_the_rate(made):
    kit, base, _ = made
    with pytest.raises(DataError, match=r"1 inputs of 6 were accepted among 12 that were written"):
        sample(kit, base, lambda s, n, seed: ["star:aa>"] * n, options(filtered=False, max_attempts=2))


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_the_target_may_have_another_method_and_result_and_facts_are_written(made, tmp_path, method):
    kit, base, _ = made
    target = Base(pocket.load()[0], base.tokenizer, "second")
    how = options(method={"method": method, "rank": 2}, filtered=False)
    adapter, facts = transfer(kit, base, target, out=tmp_path / "out", generator=words, options=how)
    assert json.loads((tmp_path / "out" / "transfer.json").read_text()) == facts and facts["inputs"] == 6
    assert adapter.method.info.slug == method
    hop = Base(pocket.load()[0], base.tokenizer, "third")
    _, more = transfer(kit, base, hop, generator=words, options=how, teacher=(target, tmp_path / "out" / "adapter"))
    assert more["teacher"] == "second"
    with pytest.raises(OptionError, match="not empty"):
        transfer(kit, base, target, out=tmp_path / "out", generator=words, options=how)


def test_a_model_writes_inputs_after_seeds_reproducibly():
    model, tokenizer = pocket.load()
    writer = Prompted(model, tokenizer, "openings", end=">", max_new_tokens=12)
    found = writer(["reverse:lorry>", "sort:truck>"], 24, 1)
    assert found == writer(["reverse:lorry>", "sort:truck>"], 24, 1)
    assert found and all(text.endswith(">") and text.count(">") == 1 for text in found)
    with pytest.raises(OptionError, match="openings"):
        Prompted(model, tokenizer, "tricks")


def test_a_function_of_the_users_own_is_found_in_its_file(tmp_path):
    (tmp_path / "own.py").write_text("def more(seeds, count, seed):\n    return [str(seed)] * count\n")
    assert from_file(f"{tmp_path / 'own.py'}:more")([], 2, 7) == ["7", "7"]
    with pytest.raises(OptionError, match="no function 'less'"):
        from_file(f"{tmp_path / 'own.py'}:less")
    with pytest.raises(OptionError, match="FILE.py"):
        from_file(str(tmp_path / "none.py:more"))


def test_the_discrepancy_is_zero_for_equal_samples_and_grows_with_a_shift():
    sample_ = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert mmd(sample_, sample_) == pytest.approx(0, abs=1e-12)
    assert mmd(sample_, sample_ + 2, 1.0) > mmd(sample_, sample_ + 0.5, 1.0) > 0


def test_an_adapter_goes_to_a_model_of_another_tokenizer(made, shared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kit, base, _ = made
    folder = shared / "models" / "stories260k"
    target = Base(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), "stories260k")
    how = options(filtered=False, steps=30, learning_rate=1e-2)
    adapter, facts = transfer(kit, base, target, generator=words, options=how)
    fresh = Base(AutoModelForCausalLM.from_pretrained(folder), target.tokenizer)
    _, short = transfer(kit, base, fresh, generator=words, options=options(filtered=False))
    assert adapter.receipt.sites and facts["final_loss"] < short["final_loss"]
