"""Grammars of schemas."""

from typing import Any

from runtime.text.grammar import GrammarBuilder, GrammarCompiler, json_part


def text_of(compiler: GrammarCompiler, schema: Any) -> str:
    builder = GrammarBuilder(compiler.special_id)
    return builder.build(builder.part("body", json_part(schema, "schema")))
