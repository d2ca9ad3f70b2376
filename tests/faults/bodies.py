"""Bad input from the catalogue, as bodies and as bytes: every one of them is answered with a 4xx, or not at all."""

from typing import Any

GENERATE = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]

BAD_BODIES: list[tuple[str, Any]] = [
    (GENERATE, {}),
    (GENERATE, []),
    (GENERATE, {"prompt": ""}),
    (GENERATE, {"prompt": []}),
    (GENERATE, {"prompt": "a", "max_tokens": -1}),
    (GENERATE, {"prompt": "a", "max_tokens": 2**63}),
    (GENERATE, {"prompt": "a", "max_tokens": 100_000}),
    (GENERATE, {"prompt": "a", "n": 10**9}),
    (GENERATE, {"prompt": "a", "n": 4, "best_of": 2}),
    (GENERATE, {"prompt": "a", "temperature": -1}),
    (GENERATE, {"prompt": "a", "temperature": 1e308}),
    (GENERATE, {"prompt": "a", "top_p": 0}),
    (GENERATE, {"prompt": "a", "top_p": 1.1}),
    (GENERATE, {"prompt": "a", "top_k": -2}),
    (GENERATE, {"prompt": "a", "top_k": 1.5}),
    (GENERATE, {"prompt": "a", "seed": 2**64}),
    (GENERATE, {"prompt": "a", "stop": ["x"] * 1000}),
    (GENERATE, {"prompt": "a", "stop": ""}),
    (GENERATE, {"prompt": "a", "stop_token_ids": [10**9]}),
    (GENERATE, {"prompt": "a", "stop_token_ids": [-1]}),
    (GENERATE, {"prompt": "a", "min_tokens": 9, "max_tokens": 2}),
    (GENERATE, {"prompt": [10**9]}),
    (GENERATE, {"prompt": [-1]}),
    (GENERATE, {"prompt": [True]}),
    (GENERATE, {"prompt": "a", "stream": "yes"}),
    (GENERATE, {"prompt": "a", "model": "no such model"}),
    (GENERATE, {"prompt": "the newt " * 5000}),
    (GENERATE, {"prompt": "a", "cache_salt": "x" * 4000}),
    (GENERATE, {"prompt": "a", "logit_bias": {"x": 1}}),
    (GENERATE, {"prompt": "a", "use_beam_search": True, "n": 10**6}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}),
    (CHAT, {"messages": [{"role": "user", "content": None}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]}),
    (CHAT, {"messages": HELLO * 10_000}),
    (CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}),
    (CHAT, {"messages": HELLO, "response_format": {"type": "stsring"}}),
    ("/tokenize", {}),
    ("/detokenize", {"tokens": [10**9]}),
    ("/v1/load_lora_adapter", {"lora_name": "../x", "lora_path": "/etc"}),
    ("/v1/unload_lora_adapter", {"lora_name": "no such adapter"}),
    ("/admin/train", {"name": "not YAML"}),
]

BAD_BYTES: list[bytes] = [
    b"",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/1.1\r\nX-",
    b"GET /v1/models/\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20,
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-H: " + b"y" * 70_000 + b"\r\n\r\n",
]
