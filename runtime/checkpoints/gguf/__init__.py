"""GGUF files: container, metadata, blocks of quantised weights, tokenizer, and the families that llama.cpp names."""
