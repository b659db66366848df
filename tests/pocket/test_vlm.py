"""The shipped VLM: it loads, it is small, it answers about pictures what its page says it can, and learns the rest."""

import torch

from lorry.pocket import clip, vlm


def test_both_models_fit_into_twelve_megabytes_and_say_nothing_of_where_they_were_made():
    files = [file for folder in (clip.path(), vlm.path()) for file in folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja"}
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert not [file for file in files if file.suffix == ".json" and "/work" in file.read_text()]


def test_the_model_answers_base_questions_better_than_chance_and_not_the_held_out_ones():
    model, processor = vlm.load()
    assert type(model).__name__ == "LlavaForConditionalGeneration" and not model.training
    found = {
        name: vlm.exact_match(model, processor, vlm.questions(name, "test", 48, 3)) for name in ("back", "texture")
    }
    assert found["back"] >= 0.9 and found["texture"] >= 0.5, found
    assert vlm.exact_match(model, processor, vlm.questions("title", "test", 24, 3)) <= 0.1


def test_a_batch_learns_answers_alone():
    model, processor = vlm.load()
    asked = vlm.questions("row", "test", 2, 0)
    batch = vlm.coded(processor, [[one] for one in asked])
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == [f"{one.answer}\n" for one in asked]
    assert torch.isfinite(vlm.loss_of(model, batch))
