"""Answers that keep to a grammar, whatever the model would rather say."""

import json
import random
import re
import sys

import jsonschema
import pytest
import torch
from serving.tokenizers_of_tests import byte_level, pocket, stories

from lorry.core.errors import OptionError
from lorry.serving.request import Grammar, Request, Sampling
from lorry.serving.sampling import Chooser, TextStream, Vocabulary, check_sampling, choose


@pytest.fixture(scope="module", params=["pocket", "stories", "byte_level"])
def vocabulary(request):
    """Logits are wider than the tokenizer."""
    if request.param == "stories":
        tokenizer = stories(request.getfixturevalue("shared"))
    else:
        tokenizer = {"pocket": pocket, "byte_level": byte_level}[request.param]()
    return Vocabulary(len(tokenizer) + 5, (tokenizer.eos_token_id,), tokenizer)


def answers(vocabulary, grammars, seed=0, max_tokens=400, **options):
    """Texts of answers to random logits that lean to the end, all in one batch; None where the limit came first."""
    tokenizer = vocabulary.tokenizer
    choosers = [
        Chooser(
            Request(str(i), (3,), sampling=Sampling(max_tokens, 1.0, seed=seed + i, grammar=grammar, **options)),
            vocabulary,
        )
        for i, grammar in enumerate(grammars)
    ]
    generator = torch.Generator().manual_seed(seed)
    closing = [t for t in range(len(tokenizer)) if set(tokenizer.decode([t]).strip()) & set('"}],')]
    for _ in range(max_tokens):
        going = [each for each in choosers if each.finish is None]
        if not going:
            break
        logits = 2 * torch.randn(len(going), vocabulary.size, generator=generator)
        logits[:, closing] += 4
        logits[:, vocabulary.ends[0]] += 6
        choose(logits, going)
    texts = []
    for each in choosers:
        stream = TextStream(tokenizer)
        text = stream.push(each.tokens) + stream.finish()
        texts.append(text if each.finish == "stop" else None)
    return texts


def schema_of(draw, depth=2):
    kind = draw.choice(["string", "integer", "number", "boolean", "null", "enum", "const", "array", "object", "anyOf"])
    if kind in ("array", "object", "anyOf") and depth == 0:
        kind = "integer"
    if kind == "string":
        low = draw.randrange(3)
        more = draw.choice([{}, {"minLength": low, "maxLength": low + draw.randrange(4)}, {"pattern": "^[a-c]{2,4}$"}])
        return {"type": "string", **more}
    if kind == "integer":
        low = draw.randrange(-20, 20)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randrange(1, 200)}
    if kind in ("number", "boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": draw.sample(["a", "z", 1, 2.5, None, True, ["x"]], 3)}
    if kind == "const":
        return {"const": draw.choice(["x y", 3, None, {"a": [1]}])}
    if kind == "anyOf":
        return {"anyOf": [schema_of(draw, depth - 1) for _ in range(2)]}
    if kind == "array":
        low = draw.randrange(3)
        return {"type": "array", "items": schema_of(draw, depth - 1), "minItems": low, "maxItems": low + 2}
    names = draw.sample(["a", "b b", "c", 'd"'], draw.randrange(1, 4))
    return {
        "type": "object",
        "properties": {name: schema_of(draw, depth - 1) for name in names},
        "required": names[: draw.randrange(len(names) + 1)],
        "additionalProperties": False,
    }


def test_answers_to_random_schemas_parse_and_validate(vocabulary):
    draw = random.Random(5)
    schemas = [schema_of(draw) for _ in range(200)]
    grammars = [Grammar("json_schema", json.dumps(schema)) for schema in schemas]
    texts = answers(vocabulary, grammars)
    done = [(schema, text) for schema, text in zip(schemas, texts, strict=True) if text is not None]
    assert len(done) > 190
    for schema, text in done:
        jsonschema.validate(json.loads(text), schema)


def test_any_json(vocabulary):
    texts = [text for text in answers(vocabulary, [Grammar("json")] * 30, seed=3) if text is not None]
    assert len(texts) > 20
    for text in texts:
        json.loads(text)


def test_expressions_and_grammars(vocabulary):
    expression = "[a-c]+(x|yz)[0-9]{2}"
    for text in answers(vocabulary, [Grammar("regex", expression)] * 8, max_tokens=200):
        assert text is None or re.fullmatch(expression, text)
    grammar = 'root ::= item ("," item)*\nitem ::= "on" | "off"'
    texts = answers(vocabulary, [Grammar("ebnf", grammar)] * 8, max_tokens=200)
    assert any(texts)
    assert all(text is None or set(text.split(",")) <= {"on", "off"} for text in texts)


def test_rows_without_a_grammar_are_as_they_would_be(vocabulary):
    options = Sampling(temperature=1.0, seed=4, max_tokens=9)
    free, alone = (Chooser(Request("f", (3,), sampling=options), vocabulary) for _ in range(2))
    kept = Chooser(Request("k", (3,), sampling=Sampling(9, 1.0, seed=4, grammar=Grammar("json"))), vocabulary)
    logits = torch.randn(2, vocabulary.size, generator=torch.Generator().manual_seed(0))
    choose(logits, [free, kept])
    choose(logits[:1], [alone])
    assert free.tokens == alone.tokens


def test_a_grammar_at_its_end_ends_the_answer_though_it_is_short(vocabulary):
    for options in ({"min_tokens": 30}, {"ignore_end": True}):
        texts = answers(vocabulary, [Grammar("regex", "(yes|no)")] * 4, max_tokens=40, **options)
        assert set(texts) <= {"yes", "no"}


def test_without_an_end_of_the_model_the_grammar_ends_the_answer():
    tokenizer = pocket()
    vocabulary = Vocabulary(len(tokenizer), (), tokenizer)
    sampling = Sampling(40, 1.0, seed=1, grammar=Grammar("regex", "ab{2}c"))
    each = Chooser(Request("r", (3,), sampling=sampling), vocabulary)
    while each.finish is None:
        choose(torch.zeros(1, vocabulary.size), [each])
    assert (tokenizer.decode(each.tokens), each.finish) == ("abbc", "stop")


def test_a_text_that_the_tokens_cannot_spell_is_an_error_of_its_row_alone():
    vocabulary = Vocabulary(len(pocket()), (1,), pocket())
    grammars = [Grammar("regex", "a日"), Grammar("regex", "ab")]
    stuck, fine = (
        Chooser(Request("r", (3,), sampling=Sampling(9, 1.0, top_k=3, seed=0, logprobs=1, grammar=g)), vocabulary)
        for g in grammars
    )
    choose(torch.zeros(2, vocabulary.size), [stuck, fine])
    found = choose(torch.zeros(2, vocabulary.size), [stuck, fine])
    assert (stuck.finish, found[0].token, len(stuck.tokens)) == ("error", -1, 1)
    assert "cannot spell" in stuck.error
    assert pocket().decode(fine.tokens) == "ab"


def test_a_grammar_is_compiled_once():
    vocabulary = Vocabulary(len(pocket()), (1,), pocket())
    sizes = []
    for _ in range(2):
        vocabulary.matcher(Grammar("regex", "[a-z]{1,30}x"))
        sizes.append(vocabulary._compiler.get_cache_size_bytes())
    assert 0 < sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", '{"type":', "no JSON"),
        ("json_schema", '{"type": "strin"}', 'cannot be kept to: Unsupported type "strin"'),
        ("json_schema", "[]", "cannot be kept to: Schema should be an object"),
        ("json_schema", '{"$ref": "#/x"}', "Cannot find field x"),
        (
            "json_schema",
            '{"type": "object", "properties": {"a": {"multipleOf": 3}}}',
            "#/properties/a: the keyword 'multi",
        ),
        ("json_schema", '{"items": {"not": {"type": "string"}}}', "#/items: the keyword 'not'"),
        ("json_schema", '{"type": "string", "pattern": "a*", "maxLength": 3}', "'maxLength' and 'pattern'"),
        ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "branches of 'oneOf'"),
        ("json_schema", '{"allOf": [{"type": "string"}, {"minLength": 3}]}', "'allOf' of more than one"),
        ("json_schema", '{"anyOf": [{"type": "string"}], "maxLength": 3}', "'anyOf', 'maxLength'"),
        ("json_schema", '{"minLength": 3}', "'minLength' is not enforced without a 'type'"),
        ("json_schema", '{"type": "object", "required": ["z"], "properties": {"a": {}}}', "names 'z'"),
        ("json_schema", '{"type": "string", "enum": ["a"], "minLength": 4}', "'enum', 'minLength'"),
        ("json_schema", '{"type": "string", "pattern": "a\\\\\\\\b"}', "backslash in 'pattern'"),
        ("regex", "([", "regular expression cannot be kept to: Regex parsing error"),
        ("ebnf", "root ::= x", 'EBNF grammar cannot be kept to: .*Rule "x" is not defined'),
    ],
)
def test_broken_grammars_are_refused_with_what_is_wrong(kind, text, words):
    vocabulary = Vocabulary(len(pocket()), (1,), pocket())
    with pytest.raises(OptionError, match=words):
        check_sampling(Sampling(grammar=Grammar(kind, text)), vocabulary)


def test_branches_that_are_apart_may_be_one_of(vocabulary):
    def shape(kind):
        return {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]} | {
            "additionalProperties": False
        }

    schema = {"oneOf": [shape("circle"), shape("square"), {"type": "null"}]}
    (text,) = answers(vocabulary, [Grammar("json_schema", json.dumps(schema))])
    jsonschema.validate(json.loads(text), schema)


def test_without_xgrammar_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ImportError, match=r"pip install 'lorry\[serve\]'"):
        check_sampling(Sampling(grammar=Grammar("json")), Vocabulary(len(pocket()), (1,), pocket()))


def test_a_grammar_needs_a_tokenizer():
    with pytest.raises(OptionError, match="needs the model's tokenizer"):
        check_sampling(Sampling(grammar=Grammar("json")), Vocabulary(10, (1,)))
