"""A real Hugging Face model directory, small enough to build and run in a test.

The weights are random (drawn from `seed`), the files are what transformers itself writes, and the
tokenizer is a byte-level BPE trained here on the text below. Imports nothing heavy until called.
"""

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 512
BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
"""In the order of their ids: 0, 1, 2, as in SmolLM2."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = """
The newt is a small amphibian that lives both in water and on land. A young newt is called an eft, and
an eft may wander through the forest for years before it returns to the pond where it was born. When the
rain comes in spring, thousands of them cross the road at night; children carry lanterns and help them.
user asks a question, the assistant answers it, and the system says how. What is the capital of France?
The capital of France is Paris. How many legs does a spider have? A spider has eight legs. Write a short
story about a robot who learns to paint. Once upon a time there was a robot who wanted to learn painting.
def add(a, b): return a + b  # numbers: 0 1 2 3 4 5 6 7 8 9 10 100 1000 3.14159 2024
"""


def make_tiny_llama(path: Path, *, seed: int = 0, **config_overrides: Any) -> Path:
    """Write a random two-layer Llama to `path` (created when absent) and return `path`.

    `config_overrides` are fields of transformers' `LlamaConfig`. The spread of the weights is wider than
    the usual 0.02, so that the logits are far enough apart for greedy decoding to be a stable oracle.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    path.mkdir(parents=True, exist_ok=True)
    ids = make_tiny_tokenizer(path)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[EOS],
        "pad_token_id": ids[PAD],
        "dtype": "float32",
    }
    fields.update(config_overrides)
    config = LlamaConfig(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(path)
    return path


def make_tiny_tokenizer(path: Path) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json; return the ids of the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"corpus too small: {tokenizer.get_vocab_size()} tokens instead of {VOCAB_SIZE}")
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
