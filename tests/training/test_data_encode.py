import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training.tiny_tokenizers import CHATML, MARKED, byte_tokenizer, pair_tokenizer

from lorry.training.data import DataError, load_records
from lorry.training.encode import encode_causal, encode_completion, special_prefix, tokenize
from lorry.training.objectives import Causal, Chat, Classification, Completion
from lorry.training.rows import IGNORE

TOKENIZER = byte_tokenizer()
PAIRS = pair_tokenizer()


@pytest.fixture(scope="module")
def stories(shared):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(shared / "models" / "stories260k")


def labelled_text(tokenizer, row):
    return tokenizer.decode([t for t in row.labels.tolist() if t != IGNORE])


texts = st.lists(st.text(alphabet="ab the lorry.\n", min_size=0, max_size=40), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(2, 12), st.booleans())
def test_causal_rows_hold_every_token_of_every_document(docs, length, packing):
    docs = [*docs, "the lorry"]
    encoded = encode_causal(TOKENIZER, docs, max_length=length, packing=packing)
    wanted = [[1, *ids, 2] for d, ids in zip(docs, tokenize(TOKENIZER, docs), strict=True) if d.strip()]
    lost = encoded.report.notes.get("tokens left out in blocks without anything to predict", 0)
    assert encoded.report.tokens + lost == sum(map(len, wanted))
    assert encoded.report.kept == len(wanted) and encoded.report.records == len(docs)
    assert encoded.report.dropped.get("without text", 0) == len(docs) - len(wanted)
    assert encoded.report.label_tokens == sum(r.label_count for r in encoded.rows)
    for row in encoded.rows:
        assert 2 <= len(row) <= length and row.labels[0] == IGNORE
        assert (row.position_ids is not None) == packing
        kept = row.labels != IGNORE
        assert torch.equal(row.labels[kept], row.input_ids[kept])
        if not packing:
            assert kept[1:].all()
        else:
            assert not kept[row.input_ids == 1].any()  # no beginning of a document is predicted


def test_causal_without_eos_or_bos():
    plain = byte_tokenizer(bos=False)
    assert special_prefix(plain) == [] and special_prefix(TOKENIZER) == [1] and special_prefix(PAIRS) == [1]
    rows = encode_causal(plain, ["the lorry"], max_length=99, add_eos=False).rows
    assert rows[0].input_ids.tolist() == tokenize(plain, ["the lorry"])[0]


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="ab the:lorry \n", max_size=20),
    st.text(alphabet="ab the:lorry \n", min_size=1, max_size=20),
    st.booleans(),
)
def test_completion_labels_are_the_completion_and_the_prompt_is_tokenized_alone(prompt, completion, packing):
    row = encode_completion(TOKENIZER, [(prompt, completion)], max_length=200, packing=packing).rows[0]
    before = [1, *tokenize(TOKENIZER, [prompt])[0]]
    assert row.input_ids.tolist()[: len(before)] == before
    assert row.labels.tolist()[: len(before)] == [IGNORE] * len(before)
    assert row.labels.tolist()[len(before) :] == row.input_ids.tolist()[len(before) :]
    assert TOKENIZER.decode(row.input_ids[1:].tolist()) == prompt + completion + "</s>"
    assert labelled_text(TOKENIZER, row) == completion + "</s>"


def test_completion_truncation_policies():
    pairs = [("the lorry carries the load", "yes"), ("q", "yes no"), ("a", "")]
    full = encode_completion(TOKENIZER, pairs, max_length=99)
    lengths = [len(r) for r in full.rows]
    assert full.report.dropped == {"without a completion": 1} and full.report.truncated == 0
    short = lengths[0] - 2
    assert lengths[1] < short
    right = encode_completion(TOKENIZER, pairs[:2], max_length=short)
    kept_label = full.rows[0].labels[:short]
    assert (kept_label != IGNORE).any() == (right.report.truncated == 1)
    left = encode_completion(TOKENIZER, pairs[:2], max_length=short, truncation="left")
    assert left.report.truncated == 1 and left.rows[0].input_ids[0] == 1
    assert labelled_text(TOKENIZER, left.rows[0]) == "yes</s>"
    assert torch.equal(left.rows[0].input_ids[1:], full.rows[0].input_ids[3:])
    drop = encode_completion(TOKENIZER, pairs[:2], max_length=short, truncation="drop")
    assert drop.report.dropped == {"longer than max_length": 1} and len(drop) == 1
    masked = encode_completion(TOKENIZER, pairs[:2], max_length=lengths[1])
    assert masked.report.dropped == {"with no label left after truncation": 1}
    assert "1 with no label left after truncation" in str(masked.report)
    assert json.loads(json.dumps(masked.report.as_dict()))["kept"] == 1
    with pytest.raises(DataError, match=r"(?i)none of the 1 records .*raise max_length \(now 3\)"):
        encode_completion(TOKENIZER, pairs[:1], max_length=3)
    with pytest.raises(DataError, match="(?i)at least 2"):
        encode_completion(TOKENIZER, pairs, max_length=1)


def test_completion_columns_and_templates():
    def first(objective, record):
        return TOKENIZER.decode(objective.encode(TOKENIZER, [record]).rows[0].input_ids.tolist())

    assert first(Completion(), {"prompt": "p:", "completion": "c"}) == "<s>p:c</s>"
    assert first(Completion(), {"question": "q", "answer": "a"}) == "<s>q\na</s>"
    assert first(Completion(), {"instruction": "i", "input": "", "output": "o"}) == "<s>i\no</s>"
    record = {"instruction": "i", "input": "x", "output": "o"}
    assert first(Completion(), record) == "<s>i\n\nx\no</s>"
    assert first(Completion(separator=" "), record) == "<s>i\n\nx o</s>"
    templated = Completion(template="Q: {instruction} ({input}){{}}\nA:", completion_column="input")
    assert first(templated, record) == "<s>Q: i (x){{}}\nA:x</s>"
    assert Completion().prompt(record) == "i\n\nx\n"
    with pytest.raises(
        DataError, match=r"(?i)no column for the completion: looked for completion.*found columns \['prompt'"
    ):
        first(Completion(), {"prompt": "p", "reply": "c"})
    with pytest.raises(DataError, match="(?i)no column 'repl' for the completion.*did you mean 'reply'"):
        first(Completion(completion_column="repl"), {"prompt": "p", "reply": "c"})
    with pytest.raises(DataError, match="(?i)names no column"):
        first(Completion(template="Q:"), record)
    with pytest.raises(DataError, match="(?i)record 1: column 'completion' holds a NoneType, expected text"):
        Completion().encode(TOKENIZER, [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": None}])
    with pytest.raises(DataError, match="(?i)record 1 has no column 'completion'"):
        Completion().encode(TOKENIZER, [{"prompt": "p", "completion": "c"}, {"prompt": "p"}])


CONVERSATION = [
    {"role": "system", "content": "carry"},
    {"role": "user", "content": "the load?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "the town?"},
    {"role": "assistant", "content": "no, the lorry"},
]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("packing", [False, True])
def test_chat_labels_the_assistant_turns_alone(template, packing):
    tokenizer = byte_tokenizer(template=template)
    row = Chat(packing=packing).encode(tokenizer, [{"messages": CONVERSATION}]).rows[0]
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(row.input_ids.tolist()) == whole
    assert labelled_text(tokenizer, row) == "yes<end>\nno, the lorry<end>\n"
    last = Chat(turns="last").encode(tokenizer, [{"messages": CONVERSATION}]).rows[0]
    assert labelled_text(tokenizer, last) == "no, the lorry<end>\n"


def test_chat_with_a_tokenizer_that_knows_no_offsets():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert not tokenizer.is_fast
    row = Chat(template=CHATML).encode(tokenizer, [{"messages": CONVERSATION}]).rows[0]
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, chat_template=CHATML)
    assert tokenizer.decode(row.input_ids.tolist()) == whole
    assert labelled_text(tokenizer, row) == "yes<end>\nno, the lorry<end>\n"


def test_chat_forms_of_messages():
    tokenizer = byte_tokenizer(template=CHATML)
    shared_gpt = [{"from": "human", "value": "the load?"}, {"from": "gpt", "value": "yes"}]
    plain = [{"role": "user", "content": "the load?"}, {"role": "assistant", "content": "yes"}]
    rows = [
        Chat().encode(tokenizer, [record]).rows[0].input_ids.tolist()
        for record in ({"conversations": shared_gpt}, {"messages": plain}, {"messages": json.dumps(plain)})
    ]
    assert rows[0] == rows[1] == rows[2]
    encoded = Chat().encode(tokenizer, [{"messages": plain}, {"messages": plain[:1]}])
    assert encoded.report.dropped == {"without an assistant turn": 1}
    for bad, message in [
        ("text", "not JSON"),
        (3, "found a int"),
        (["a"], "message 0 is a str"),
        ([{"role": "user"}], r"keys \['role'\]"),
    ]:
        with pytest.raises(DataError, match=f"(?i)record 0.*{message}"):
            Chat().encode(tokenizer, [{"messages": bad}])


def test_chat_without_a_template_says_what_to_do():
    with pytest.raises(DataError, match=r"(?i)no chat template; give one with template=.*'completion'"):
        Chat().encode(TOKENIZER, [{"messages": CONVERSATION}])
    row = Chat(template=CHATML).encode(TOKENIZER, [{"messages": CONVERSATION}]).rows[0]
    assert labelled_text(TOKENIZER, row) == "yes<end>\nno, the lorry<end>\n"


def test_chat_template_that_rewrites_earlier_turns():
    # As templates of reasoning models do: what the assistant thought is shown in the last turn alone.
    rewriting = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n"
        "{% if m['role'] == 'assistant' and loop.last %}(thought){% endif %}"
        "{{ m['content'] }}<end>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = byte_tokenizer(template=rewriting)
    with pytest.raises(DataError, match="(?i)record 0: .*message 2 cannot be told apart; train with turns='last'"):
        Chat().encode(tokenizer, [{"messages": CONVERSATION}])
    row = Chat(turns="last").encode(tokenizer, [{"messages": CONVERSATION}]).rows[0]
    assert labelled_text(tokenizer, row) == "(thought)no, the lorry<end>\n"


def test_chat_template_that_refuses():
    tokenizer = byte_tokenizer(template="{{ raise_exception('no system turns') }}")
    with pytest.raises(DataError, match="(?i)record 0: the chat template refuses the conversation: no system turns"):
        Chat().encode(tokenizer, [{"messages": CONVERSATION}])


def test_classification_texts_pairs_and_labels():
    records = [
        {"sentence1": "ab", "sentence2": "cd", "label": "no"},
        {"sentence1": "abcdefghij", "sentence2": "x", "label": "yes"},
        {"sentence1": " ", "sentence2": "x", "label": "yes"},
    ]
    objective = Classification(max_length=8)
    encoded = objective.encode(PAIRS, records)
    assert [r.label for r in encoded.rows] == [0, 1]
    assert encoded.rows[0].input_ids.tolist() == [1, 4, 5, 2, 6, 7, 2]
    assert encoded.rows[0].token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert len(encoded.rows[1]) == 8
    assert encoded.report.truncated == 1 and encoded.report.dropped == {"without text": 1}
    dropped = Classification(max_length=8, truncation="drop").encode(PAIRS, records)
    assert dropped.report.dropped == {"longer than max_length": 1, "without text": 1}
    assert [r.label for r in objective.encode(PAIRS, records, labels=["yes", "no"]).rows] == [1, 0]
    with pytest.raises(DataError, match="(?i)record 0: unknown label 'no'; did you mean 'nope'"):
        objective.encode(PAIRS, records, labels=["nope", "yes"])


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["1", "0", "10", "2"], ("0", "1", "2", "10")),
        ([1, -1], ("-1", "1")),
        ([1.0, 0.0], ("0", "1")),
        ([True, False], ("false", "true")),
        (["pos ", "neg", "pos"], ("neg", "pos")),
    ],
)
def test_label_names_are_stable(values, names):
    records = [{"text": "a", "label": v} for v in values]
    assert Classification().label_names(records) == Classification().label_names(records[::-1]) == names
    assert [r.label for r in Classification().encode(PAIRS, records).rows] == [
        names.index(n) for n in (str(int(v)) if isinstance(v, float) else str(v).lower().strip() for v in values)
    ]


def test_bad_labels():
    for value, message in [(None, "None"), (0.5, "0.5"), ("", "''")]:
        with pytest.raises(DataError, match=f"(?i)record 1: column 'label' holds {message}, expected a class"):
            Classification().label_names([{"text": "a", "label": 1}, {"text": "a", "label": value}])
    with pytest.raises(DataError, match="(?i)one class 'a'"):
        Classification().label_names([{"text": "a", "label": "a"}])


def test_hold_out_of_blocks_keeps_order_and_counts():
    encoded = encode_causal(TOKENIZER, ["the lorry carries the load " * 20], max_length=8)
    rest, held = encoded.hold_out(0.2)
    assert [*rest.rows, *held.rows] == list(encoded.rows)
    assert rest.report.tokens + held.report.tokens == encoded.report.tokens
    drawn = encoded.hold_out(0.2, seed=3)[1]
    assert len(drawn) == len(held) and list(drawn.rows) != list(held.rows)


def test_real_text_and_tokenizer(shared, stories):
    records = load_records(shared / "data" / "tinyshakespeare.txt", limit=2000)
    plain = Causal(max_length=128).encode(stories, records)
    packed = Causal(max_length=128, packing=True).encode(stories, records)
    assert plain.report.tokens == packed.report.tokens > 20_000
    ids = [t for r in plain.rows for t in r.input_ids.tolist()]
    assert ids[0] == 1 and ids[-1] == 2
    assert stories.decode(ids[1:-1]).strip() == records[0]["text"].strip()


def test_real_instructions(shared, stories):
    boolq = load_records(shared / "data" / "boolq_train.json", limit=200)
    for packing in (False, True):
        encoded = Completion(max_length=512, packing=packing).encode(stories, boolq)
        assert encoded.report.kept == 200 and encoded.report.truncated == 0
        said = "".join(labelled_text(stories, r) for r in encoded.rows)
        # The first word of a completion carries no space that the record does not have.
        assert said.count("the correct answer is ") == 200 and said.count("</s>") == 200
    assert len(encoded) < 200
    gsm = load_records(shared / "data" / "gsm8k_test.jsonl", limit=200)
    encoded = Completion(max_length=512, template="Question: {question}\nAnswer: ").encode(stories, gsm)
    report = encoded.report
    assert report.kept + sum(report.dropped.values()) == 200 and report.truncated > 0
    whole = encoded.rows[0]
    assert stories.decode(whole.input_ids.tolist()[1:-1]).strip() == (
        f"Question: {gsm[0]['question']}\nAnswer: {gsm[0]['answer']}"
    )


def test_real_sentences(shared, stories):
    train = load_records(shared / "data" / "sst2", "train", limit=300)
    dev = load_records(shared / "data" / "sst2", "dev", limit=50)
    objective = Classification(max_length=64)
    names = objective.label_names(train)
    assert names == ("0", "1")
    encoded = objective.encode(stories, dev, labels=names)
    assert [r.label for r in encoded.rows] == [int(r["label"]) for r in dev]
