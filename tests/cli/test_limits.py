"""`lorry limits`: the figures of heads without and with an adapter."""

from lorry.cli.main import MISUSE


def test_before_and_after_as_json_table_and_picture(run_json, lorry, base, data, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    from lorry.attention import head_limits
    from lorry.cli.bases import load_tokenizer

    facts = run_json("limits", base, "--data", data, "-a", adapter, "--plot", tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert len(facts["before"]) == len(facts["after"]) == 4 and facts["rows"] == 10
    assert all(h["query_update"] == 0 for h in facts["before"])
    assert all(h["query_update"] > 0 for h in facts["after"]) and facts["before"] != facts["after"]
    # the same from Python: a prompt, its completion and the end of the text
    row = load_tokenizer(str(base))("red > green </s>", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    longest = max(h["gamma"] for h in facts["before"])
    assert 0 < max(h.gamma for h in head_limits(model, [{"input_ids": row}])) <= longest * 1.0001
    shown = lorry("limits", base, "--data", data, "-a", adapter)
    assert shown.exit_code == 0 and "self_attn" in shown.stdout and " > " in shown.stdout
    alone = run_json("limits", base, "--data", data, "--limit", 1)
    assert "after" not in alone and alone["rows"] == 1


def test_bad_input_is_refused_with_what_to_do(lorry, base, data):
    for arguments, says in (
        (("--tolerance", 0), "above 0"),
        (("-a", "nowhere"), "nowhere"),
        (("--objective", "dpo"), "cannot be measured one by one"),
    ):
        result = lorry("limits", base, "--data", data, *arguments)
        assert result.exit_code == MISUSE and says in result.stderr, result.stderr
