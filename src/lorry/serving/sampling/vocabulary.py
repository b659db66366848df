"""What the entries of a row of logits stand for, and the grammars that were compiled for them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from typing import Any, Self

from lorry.core.errors import OptionError
from lorry.serving.request import Grammar

from .schemas import enforced

#: Bytes of compiled grammars that are kept.
KEPT_GRAMMARS = 1 << 28
#: Most characters of white space in a row in answers that keep to a JSON schema.
WHITESPACE = 32


class Vocabulary:
    """The tokens of one model.

    Parameters
    ----------
    size
        Width of the logits; it may exceed the tokenizer's number of tokens.
    ends
        Tokens at which the model ends an answer.
    tokenizer
        A tokenizer of transformers; only grammars need one.
    """

    def __init__(self, size: int, ends: Iterable[int] = (), tokenizer: Any = None) -> None:
        self.size = size
        self.ends = tuple(sorted(set(ends)))
        self.tokenizer = tokenizer
        special = getattr(tokenizer, "all_special_ids", ())
        #: Tokens that are no text to a grammar, whatever their names look like.
        self.wordless = tuple(sorted(token for token in set(special).difference(self.ends) if token < size))
        self._compiler: Any = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Self:
        """Return the vocabulary of a language model of transformers: its ends are those of its generation config, of
        its config or of the tokenizer, the first that says any.
        """
        config = model.config.get_text_config()
        said = (getattr(model, "generation_config", None), config, tokenizer)
        ends = next((e for e in (getattr(s, "eos_token_id", None) for s in said) if e is not None), ())
        return cls(config.vocab_size, (ends,) if isinstance(ends, int) else ends, tokenizer)

    def matcher(self, grammar: Grammar) -> Any:
        """Return a fresh xgrammar ``GrammarMatcher``; a grammar that was compiled before is not compiled again.

        Without any token in `ends` the text is at its end as soon as the grammar lets it be.

        Raises
        ------
        OptionError
            The grammar is broken, or says what cannot be kept to, or there is no tokenizer.
        ImportError
            Xgrammar is not installed.
        """
        xgrammar = _xgrammar()
        with self._lock:
            compiled = self._compiled(xgrammar, grammar)
        return xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=not self.ends)

    def _compiled(self, xgrammar: Any, grammar: Grammar) -> Any:
        if self._compiler is None:
            if self.tokenizer is None:
                raise OptionError("A grammar needs the model's tokenizer, and this vocabulary has none. Give it one.")
            info = xgrammar.TokenizerInfo.from_huggingface(
                self.tokenizer, vocab_size=self.size, stop_token_ids=list(self.ends) or None
            )
            self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=KEPT_GRAMMARS)
        text = enforced(grammar.text) if grammar.kind == "json_schema" else grammar.text
        try:
            if grammar.kind == "json":
                return self._compiler.compile_builtin_json_grammar()
            if grammar.kind == "json_schema":
                return self._compiler.compile_json_schema(text, max_whitespace_cnt=WHITESPACE)
            if grammar.kind == "regex":
                return self._compiler.compile_regex(text)
            return self._compiler.compile_grammar(text)
        except (RuntimeError, ValueError) as error:
            raise OptionError(_said(grammar, error)) from error


def _xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise ImportError("Grammars need xgrammar: pip install 'lorry[serve]'.") from error
    return xgrammar


def _said(grammar: Grammar, error: Exception) -> str:
    """Return a sentence around what xgrammar says, without its time and its source's line."""
    what = {"json_schema": "JSON schema", "regex": "regular expression", "ebnf": "EBNF grammar"}
    why = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error).strip())
    why = re.sub(r"^Check failed: .*? is false: ", "", why).rstrip(".")
    return f"The {what.get(grammar.kind, 'grammar')} cannot be kept to: {why}. Mend it and send the request again."
