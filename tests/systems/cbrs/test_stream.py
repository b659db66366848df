"""A stream loses nothing: whatever moment it ends at, all is answered once."""

import json

import pytest

from lorry.core.errors import CheckpointError, OptionError
from lorry.systems.cbrs import Journal, Message, answer_all, of_file, of_folder, webhook

MESSAGES = [Message(str(i), f"message {i} ü") for i in range(6)]


def answer(text: str) -> dict[str, str]:
    return {"said": text.upper()}


class Power(Exception):
    """It fails."""


def test_after_a_failure_the_rest_is_answered_and_nothing_twice(tmp_path):
    seen: list[str] = []

    def failing(text: str) -> dict[str, str]:
        seen.append(text)
        if len(seen) == 4:
            raise Power
        return answer(text)

    journal = Journal(tmp_path / "done.jsonl")
    with pytest.raises(Power):
        answer_all(MESSAGES, failing, journal)
    journal.close()
    again = Journal(tmp_path / "done.jsonl")
    assert answer_all(MESSAGES, failing, again) == 3
    lines = [json.loads(line) for line in (tmp_path / "done.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [message.id for message in MESSAGES]
    assert seen == [m.text for m in MESSAGES[:4]] + [m.text for m in MESSAGES[3:]]
    assert answer_all(MESSAGES, failing, again) == 0


def test_a_journal_that_was_cut_at_any_byte_is_completed(tmp_path):
    path = tmp_path / "done.jsonl"
    answer_all(MESSAGES[:2], answer, Journal(path))
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        journal = Journal(path)
        answer_all(MESSAGES[:2], answer, journal)
        journal.close()
        assert path.read_bytes() == whole


def test_a_damaged_line_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "done.jsonl"
    path.write_text('{"id": "0"}\nnonsense\n')
    with pytest.raises(CheckpointError, match="line 2 is no JSON object"):
        Journal(path)
    assert path.read_text() == '{"id": "0"}\nnonsense\n'


def test_a_file_gives_whole_lines_with_lasting_names(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes('first\rü\n\n{"text": "second", "id": "s"}\n{brace\nhalf'.encode())
    found = list(of_file(path))
    assert [each.text for each in found] == ["first\rü", "second", "{brace"]
    assert found[1].id == "s"
    with path.open("ab") as file:
        file.write(b" done\n")
    later = list(of_file(path))
    assert later[:3] == found and later[3].text == "half done"
    assert len({each.id for each in later}) == 4
    with pytest.raises(OptionError, match="There is no file"):
        list(of_file(tmp_path / "none"))


def test_a_folder_gives_a_message_for_each_file(tmp_path):
    (tmp_path / "b.txt").write_text("two\n")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.part").write_text("not yet")
    assert list(of_folder(tmp_path)) == [Message("a.txt", "one"), Message("b.txt", "two")]
    with pytest.raises(OptionError, match="There is no folder"):
        list(of_folder(tmp_path / "a.txt"))


def test_what_the_webhook_acknowledged_is_there_after_a_restart(tmp_path):
    pytest.importorskip("httpx")
    from starlette.testclient import TestClient

    path = tmp_path / "in.jsonl"
    client = TestClient(webhook(Journal(path)))
    assert client.post("/messages", json={"id": "1", "text": "O- needed\nnow"}).status_code == 202
    assert client.post("/messages", json={"id": "1", "text": "O- needed\nnow"}).status_code == 200
    for bad in ({"id": "2"}, {"id": "2", "text": ""}, [], {"id": 2, "text": "x"}):
        assert client.post("/messages", json=bad).status_code == 400
    assert client.post("/messages", json={"id": "3", "text": "x" * 70000}).status_code == 413
    assert list(of_file(path)) == [Message("1", "O- needed\nnow")]
    assert "1" in Journal(path)
