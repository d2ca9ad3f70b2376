"""What `eft serve` prints when it is ready: where it listens, and two snippets to try it with."""

import shlex

import msgspec

_QUESTION = "Why is the sky blue?"


def banner(url: str, model: str, *, needs_key: bool) -> str:
    """`needs_key`: the snippets then read the key from EFT_API_KEY; the key itself is never printed."""
    return (
        f"Serving {model} at {url} (Ctrl-C stops it). Try:\n\n"
        f"{_curl(url, model, needs_key)}\n\n"
        f"or, after `pip install openai`:\n\n{_python(url, model, needs_key)}\n"
    )


def _curl(url: str, model: str, needs_key: bool) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 64}
    lines = [f"curl {url}/v1/chat/completions", "-H 'Content-Type: application/json'"]
    if needs_key:
        lines.append('-H "Authorization: Bearer $EFT_API_KEY"')
    lines.append(f"-d {shlex.quote(msgspec.json.encode(body).decode())}")
    return " \\\n  ".join(lines)


def _python(url: str, model: str, needs_key: bool) -> str:
    key = 'os.environ["EFT_API_KEY"]' if needs_key else '"none"'
    return "\n".join(
        [
            *(["import os", ""] if needs_key else []),
            "from openai import OpenAI",
            "",
            f'client = OpenAI(base_url="{url}/v1", api_key={key})',
            "stream = client.chat.completions.create(",
            f"    model={msgspec.json.encode(model).decode()},",
            f'    messages=[{{"role": "user", "content": "{_QUESTION}"}}],',
            "    stream=True,",
            ")",
            "for chunk in stream:",
            '    print(chunk.choices[0].delta.content or "", end="", flush=True)',
        ]
    )
