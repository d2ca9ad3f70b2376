"""Grammars that hold an output to a form: JSON schemas, regular expressions, choices, and calls of tools."""

from runtime.text.grammar.budget import ThinkingBudget
from runtime.text.grammar.compiler import MAX_FORCED, Grammar, GrammarCompiler, GrammarFailed, GrammarState
from runtime.text.grammar.source import GrammarBuilder, Part, choice_part, json_part, lark_part, regex_part

__all__ = [
    "MAX_FORCED",
    "Grammar",
    "GrammarBuilder",
    "GrammarCompiler",
    "GrammarFailed",
    "GrammarState",
    "Part",
    "ThinkingBudget",
    "choice_part",
    "json_part",
    "lark_part",
    "regex_part",
]
