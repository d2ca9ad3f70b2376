"""Between text and token ids: tokenizer, chat template, special text, detokenizer."""
