"""Messages, and what a match means."""

import pytest
import torch

from lorry.core.errors import OptionError
from lorry.protection import messages


def test_thresholds_are_those_of_the_binomial_tail():
    assert messages.threshold_for(48, 1.1e-3) == 35
    assert messages.false_positive_rate(48, 35) == pytest.approx(1.0e-3, rel=0.1)
    assert messages.false_positive_rate(48, 42) == pytest.approx(5e-8, rel=0.1)
    assert messages.false_positive_rate(8, 0) == 1 and messages.p_value(8, 8) == 2**-8


def test_random_bits_pass_as_often_as_is_said():
    g = torch.Generator().manual_seed(0)
    read, secret = torch.randint(2, (20000, 16), generator=g), messages.drawn(16, g)
    threshold = messages.threshold_for(16, 0.05)
    passed = float(((read == secret).sum(1) >= threshold).double().mean())
    assert passed == pytest.approx(messages.false_positive_rate(16, threshold), abs=0.005) and passed < 0.05


def test_what_proves_nothing_is_refused():
    for text in ("00000000", "00000001"):
        with pytest.raises(OptionError, match="zero message stands for"):
            messages.check_message(messages.from_text(text))
    with pytest.raises(OptionError, match="cannot prove anything"):
        messages.threshold_for(8, 1e-6)
    with pytest.raises(OptionError, match="8 bits, found 3"):
        messages.from_text("010", 8)
    with pytest.raises(OptionError, match="zeros and ones"):
        messages.from_text("01x")


def test_drawn_messages_may_be_given():
    g = torch.Generator().manual_seed(1)
    for bits in (1, 2, 7, 48):
        made = messages.check_message(messages.drawn(bits, g))
        assert torch.equal(messages.from_text(messages.to_text(made), bits), made)
