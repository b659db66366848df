"""The evaluation harness that people use gets the same scores from a server as offline."""

import json
import logging

import pytest
import torch
import yaml

import lorry
from lorry import pocket

COUNT = 10
TASK = {
    "task": "boolq_here",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}>",
    "doc_to_choice": ["true", "false"],
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(scope="module")
def questions(shared):
    """The first questions of BoolQ, short enough for the pocket model."""
    rows = json.loads((shared / "data" / "boolq_train.json").read_text(encoding="utf-8"))
    found = [row["instruction"].partition("question: ")[2].partition("\n")[0] for row in rows[:COUNT]]
    return [{"question": text, "answer": row["answer"]} for text, row in zip(found, rows, strict=False)]


def offline(folder, questions):
    """Return the log-likelihood of each choice, by plain torch."""
    model, tokenizer = pocket.load()
    lorry.load(model, folder, name="math")
    found = []
    for row in questions:
        for choice in TASK["doc_to_choice"]:
            start = len(tokenizer(row["question"] + ">", add_special_tokens=False)["input_ids"])
            ids = tokenizer(f"{row['question']}>{choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            found.append(sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids))))
    return found


@pytest.mark.filterwarnings("ignore")
def test_local_completions_scores_as_offline(server, shelf, questions, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    data = tmp_path / "boolq.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "boolq_here.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "math",
            "base_url": f"{server.url}/v1/completions",
            "tokenizer_backend": "remote",  # /tokenizer_info, /tokenize, /detokenize
            "max_length": 255,
            "batch_size": 4,
            "max_retries": 1,
        },
        tasks=["boolq_here"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["boolq_here"], key=lambda sample: sample["doc_id"])
    served = [float(answer[0][0]) for sample in samples for answer in sample["resps"]]
    expected = offline(shelf["math"], questions)
    torch.testing.assert_close(torch.tensor(served), torch.tensor(expected), atol=1e-3, rtol=1e-4)
    likelier = ["true" if a >= b else "false" for a, b in zip(expected[::2], expected[1::2], strict=True)]
    right = [said == row["answer"] for said, row in zip(likelier, questions, strict=True)]
    assert found["results"]["boolq_here"]["acc,none"] == sum(right) / COUNT
