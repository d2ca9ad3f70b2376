"""Request fields of OpenAI's API that are known but not acted on.

A field that is accepted and then ignored deceives the client. So each of these may only hold a neutral value,
which changes nothing, and any other value is refused by name.
"""

from collections.abc import Mapping
from typing import Any

_NEVER: tuple[Any, ...] = (None,)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # OpenAI: chat and completions
    "audio": _NEVER,
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": _NEVER,
    "prediction": _NEVER,
    "prompt_cache_options": (None, {}),
    "prompt_cache_retention": (None, "in_memory", "in-memory"),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "top_logprobs": (None, 0),  # a chat acts on it
    "verbosity": (None, "medium"),
    "web_search_options": _NEVER,
    # vLLM's additions
    "add_special_tokens": (None, False),  # in a chat the template writes them; completions act on the field
    "chat_template": _NEVER,  # for chats
    "documents": (None, []),  # a chat acts on it
    "ec_transfer_params": _NEVER,
    "echo": (None, False),  # completions act on it
    "guided_decoding_backend": (None, "auto", "guidance"),
    "guided_whitespace_pattern": _NEVER,
    "kv_transfer_params": _NEVER,
    "logits_processors": (None, []),
    "logprob_token_ids": (None, []),
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "prompt_embeds": _NEVER,
    "repetition_detection": _NEVER,
    "return_mm_kwargs": (None, True),
    "return_prompt_text": (None, False),
    "return_token_offsets": (None, False),
    "routed_experts_prompt_start": (None, 0),
    "stream_interval": (None, 1),
    "vllm_xargs": (None, {}),
    "watermarking": (None, False),
}
"""Field name → its neutral values. A number stands for its integer and float form."""

INSTEAD: Mapping[str, str] = {
    "add_special_tokens": "A chat's template writes the special tokens; completions act on the field.",
    "audio": "Answers are text.",
    "chat_template": "The operator sets one with --chat-template.",
    "documents": "Put their text into the prompt, or send a chat.",
    "echo": "Completions echo their prompt; in a chat the last message can be continued with continue_final_message.",
    "ec_transfer_params": "There is no transfer of caches between servers.",
    "function_call": "Use tool_choice.",
    "functions": "Use tools.",
    "guided_decoding_backend": "There is one backend: leave the field out.",
    "guided_whitespace_pattern": "Write white space into the grammar.",
    "kv_transfer_params": "There is no transfer of KV between servers.",
    "logprob_token_ids": "Use top_logprobs; in completions, logprobs.",
    "logits_processors": "Use logit_bias, allowed_token_ids, bad_words or the penalties.",
    "media_io_kwargs": "Prompts are text.",
    "mm_processor_kwargs": "Prompts are text.",
    "modalities": "Answers are text.",
    "moderation": "Check the text before it is sent.",
    "prediction": "The server guesses ahead by itself, with the setting scheduler.speculative_tokens.",
    "prompt_cache_options": "Prompts are cached by their content; cache_salt separates them.",
    "prompt_cache_retention": "Prompts are cached by their content, while there is memory.",
    "prompt_embeds": "Send a text or token ids in prompt.",
    "repetition_detection": "Use repetition_penalty, frequency_penalty or presence_penalty.",
    "return_mm_kwargs": "Prompts are text.",
    "return_prompt_text": "Send return_token_ids, and the ids to /detokenize.",
    "return_token_offsets": "/tokenize with return_token_strs shows where tokens begin.",
    "routed_experts_prompt_start": "The routing of experts is not reported.",
    "service_tier": "Use priority, where the server's scheduler.policy is priority.",
    "store": "Only chats are stored, and responses.",
    "stream_interval": "Every step's tokens are sent at once; a slow reader gets them merged.",
    "suffix": "Completions act on it, where the model has tokens to fill in a middle.",
    "top_logprobs": "In completions, logprobs is the number itself.",
    "verbosity": "Ask for it in a message, or limit max_tokens.",
    "vllm_xargs": "There are no further arguments: leave the field out.",
    "watermarking": "Answers are not marked.",
    "web_search_options": "Search before the request, and put what was found into a message.",
}
"""Field name → the way to what it asks for, or the reason why there is none."""

COMPLETION_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "include_reasoning": (None, True, False),  # without reasoning there is none to include
    "parallel_tool_calls": (None, True, False),  # without tools there are no calls, in parallel or not
    "reasoning_effort": (None, "none"),
    "thinking_token_budget": _NEVER,
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}
"""The same for completions, which do not act on what is for chats."""
