"""Settings of the HTTP API: its connections and keys, what it stores for clients, and caps on single requests."""

from typing import Annotated, Literal

from msgspec import Struct

from settings.units import (
    Bytes,
    Count,
    HostPattern,
    NonEmpty,
    NonzeroShare,
    OriginPattern,
    Port,
    RootPath,
    Seconds,
    doc,
)


class ServerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP server."""

    host: Annotated[NonEmpty, doc("Address to listen on.")] = "127.0.0.1"
    port: Annotated[Port, doc("Port to listen on; 0 takes a free one and prints it.")] = 8000
    uds: Annotated[
        NonEmpty | None,
        doc(
            "Unix socket to listen on, instead of host and port. Users who may write to the file may connect; /admin "
            "takes a key, or the token in the state directory's file admin-token.",
            example="/run/eft/eft.sock",
        ),
    ] = None
    root_path: Annotated[
        RootPath,
        doc(
            "Prefix of all paths behind a proxy that routes by path, such as /llm. Paths without it are answered too: "
            "some proxies take it off.",
            expects="empty, or a path such as /llm without a slash at its end",
        ),
    ] = ""
    api_key: Annotated[
        tuple[NonEmpty, ...],
        doc(
            "Keys that clients must send as `Authorization: Bearer …`; none: no key is asked for. In a variable, "
            "commas stand between keys. A flag shows in the list of processes: prefer the variable, or keys_file.",
            secret=True,
        ),
    ] = ()
    admin_key: Annotated[
        tuple[NonEmpty, ...],
        doc("Keys for /admin and for loading adapters; they open everything else too. See local_admin.", secret=True),
    ] = ()
    keys_file: Annotated[
        NonEmpty | None,
        doc(
            "File of keys with names, scopes and limits, made by `eft keys new`; read again when it changes.",
            example="/etc/eft/keys.json",
        ),
    ] = None
    local_admin: Annotated[
        Literal["open", "token"],
        doc(
            "Without a key of any kind, on a server that listens on loopback: open lets requests straight from this "
            "machine use /admin; token asks for the token in the state directory's file admin-token, as every other "
            "server does."
        ),
    ] = "open"
    allowed_hosts: Annotated[
        tuple[HostPattern, ...],
        doc(
            "Names, beside those of this machine, by which a server without API keys may be addressed (`Host`): "
            "`name`, `name:port`, `*.name`, or `*` for any. A server beyond loopback also answers to IP addresses.",
            expects="a list of host names, each alone or with a port, `*.name`, or `*`",
        ),
    ] = ()
    cors_origins: Annotated[
        tuple[OriginPattern, ...],
        doc(
            "Origins whose pages may use the API, but not /admin, from a browser, such as `https://app.example`; `*` "
            "for any.",
            expects="a list of origins, such as https://app.example or http://localhost:3000, or `*`",
        ),
    ] = ()
    key_requests_per_minute: Annotated[
        Count | None,
        doc("Most POST requests of one API key in a minute; without keys, of all clients together.", example=600),
    ] = None
    key_tokens_per_minute: Annotated[
        Count | None, doc("Most tokens of one API key in a minute, prompts and outputs together.", example="100K")
    ] = None
    key_max_concurrent: Annotated[
        Count | None, doc("Most requests of one API key that are being answered at once.", example=32)
    ] = None
    key_max_queue_share: Annotated[
        NonzeroShare | None,
        doc("Largest share of scheduler.max_waiting that the sequences of one API key may take.", example=0.5),
    ] = None
    key_min_priority: Annotated[
        int | None, doc("Lowest `priority`, the most urgent, that an API key may ask for.", example=0)
    ] = None
    key_min_deadline: Annotated[
        Seconds | None, doc("Shortest `deadline_ms` that an API key may ask for.", example="1s")
    ] = None
    audit_file: Annotated[
        NonEmpty | None,
        doc(
            "File to append a line of JSON to for each admin action, beside the log.",
            example="/var/log/eft/audit.jsonl",
        ),
    ] = None
    max_event_streams: Annotated[
        Count, doc("Most clients that follow jobs' events, the overview or the status at once.")
    ] = 64
    response_role: Annotated[NonEmpty, doc("Role of the messages that chats are answered with.")] = "assistant"
    public_metrics: Annotated[bool, doc("Serve /metrics without a key.")] = True
    page_enabled: Annotated[bool, doc("Serve the page at /.")] = True
    docs_enabled: Annotated[bool, doc("Serve the OpenAPI schema and the API reference.")] = True
    max_body: Annotated[Bytes, doc("Largest request body.")] = 16 * 1024**2
    max_connections: Annotated[
        Count, doc("Most connections at once, fewer where descriptors are short; further ones wait to be accepted.")
    ] = 8192
    header_timeout: Annotated[Seconds, doc("A request's headers must be complete in this time.")] = 10.0
    body_timeout: Annotated[Seconds, doc("A request's body must be complete in this time.")] = 60.0
    write_timeout: Annotated[Seconds, doc("A client that reads nothing for this long is cut off.")] = 60.0
    drain_timeout: Annotated[Seconds, doc("On SIGTERM, running requests get this long to finish.")] = 30.0
    step_timeout: Annotated[
        Seconds,
        doc("/health answers 503 when a step, or anything else that the engine's thread does, takes longer than this."),
    ] = 120.0


class FileSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files of /v1/files, and the batches of /v1/batches that read and write them."""

    max_file: Annotated[Bytes, doc("Largest file that is uploaded to /v1/files.")] = 512 * 1024**2
    max_files_total: Annotated[Bytes, doc("Most bytes of all files together; an upload beyond is answered 413.")] = (
        10 * 1024**3
    )
    keep_files: Annotated[
        Seconds | None,
        doc("Delete a file this long after it was made, outputs of batches too. Default: never.", example="30d"),
    ] = None
    keep_batches: Annotated[
        Seconds | None,
        doc("Delete a batch this long after its end, with the files that it wrote. Default: never.", example="30d"),
    ] = None
    max_batches: Annotated[Count, doc("Most batches that have not ended; one more is answered 429.")] = 100
    max_batch_lines: Annotated[Count, doc("Most requests in a batch.")] = 50_000
    batch_concurrency: Annotated[
        Count, doc("Most requests of batches that are computed at once, of all batches together.")
    ] = 16


class ResponseSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Stored responses of /v1/responses, and stored chats, which count as such."""

    keep_responses: Annotated[Seconds | None, doc("Delete a stored response this long after it was made.")] = (
        30 * 86_400.0
    )
    max_responses: Annotated[Count, doc("Most stored responses of a key; one more deletes its oldest.")] = 100_000
    max_responses_total: Annotated[
        Bytes,
        doc(
            "Most bytes of all stored responses together; beyond, the oldest are deleted of the key that has the most."
        ),
    ] = 4 * 1024**3
    max_events_total: Annotated[
        Bytes,
        doc(
            "Most bytes of the events of streams in the background, which are kept in memory; beyond, the oldest are "
            "dropped of the responses that have ended."
        ),
    ] = 64 * 1024**2


class FeedbackSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Feedback on answers: /v1/feedback."""

    accept_feedback: Annotated[bool, doc("Store feedback, with the texts that its sender puts into it.")] = True
    keep_feedback: Annotated[Seconds | None, doc("Delete feedback this long after it was given.")] = 365 * 86_400.0
    max_feedback: Annotated[Count, doc("Most stored feedback of a key; one more deletes its oldest.")] = 100_000
    max_feedback_total: Annotated[
        Bytes,
        doc("Most bytes of all feedback together; beyond, the oldest is deleted of the key that has the most."),
    ] = 1024**3
    max_feedback_size: Annotated[Bytes, doc("Largest feedback, as JSON.")] = 256 * 1024


class LimitSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Caps on single requests; beyond them the answer is a 400 that names the cap."""

    max_stop: Annotated[Count, doc("Most stop strings in a request.")] = 16
    max_stop_chars: Annotated[Count, doc("Most characters of a stop string, or of a bad word.")] = 256
    max_stop_token_ids: Annotated[Count, doc("Most stop token ids in a request.")] = 128
    max_bad_words: Annotated[Count, doc("Most bad words in a request.")] = 128
    max_logit_bias: Annotated[Count, doc("Most tokens with a `logit_bias` in a request.")] = 1024
    max_logprobs: Annotated[
        Count, doc("Most tokens at each position whose log-probabilities a request may ask for.")
    ] = 20
    max_n: Annotated[Count, doc("Most choices (`n`) in a request.")] = 64
    max_beam_candidates: Annotated[
        Count, doc("Most next tokens of a beam that are compared: beams times one more than there are stop token ids.")
    ] = 512
    max_prompts: Annotated[Count, doc("Most prompts in one completions request.")] = 256
    max_inputs: Annotated[Count, doc("Most inputs in a request to embed, score or rank texts.")] = 2048
    max_sequences: Annotated[Count, doc("Most sequences of a request: its prompts times `n` or `best_of`.")] = 1024
    max_messages: Annotated[Count, doc("Most messages in a chat.")] = 4096
    max_content_parts: Annotated[Count, doc("Most content parts in all messages of a chat.")] = 8192
    max_template_kwargs: Annotated[Bytes, doc("Largest `chat_template_kwargs`, as JSON.")] = 1024
    max_tools: Annotated[Count, doc("Most tools in a request.")] = 128
    max_grammar: Annotated[
        Bytes, doc("Most bytes of all schemas and grammars in a request, those of tools included.")
    ] = 512 * 1024
    grammar_timeout: Annotated[Seconds, doc("Longest time that compiling a request's grammar may take.")] = 10.0
    max_label: Annotated[
        Count,
        doc(
            "Most characters of `user`, `safety_identifier`, `prompt_cache_key`, `session_id`, of a key or value of "
            "`metadata`, and of a message's `name` or `tool_call_id`."
        ),
    ] = 512
    max_metadata: Annotated[Count, doc("Most entries of `metadata`.")] = 16
    max_tokenize_chars: Annotated[
        Count, doc("Most characters of a text for /tokenize, or of a prompt that is truncated.")
    ] = 2 * 1024**2
    max_detokenize_tokens: Annotated[Count, doc("Most token ids for /detokenize.")] = 1024**2
    unknown_fields: Annotated[
        Literal["ignore", "warn", "reject"],
        doc("Fields that we do not know: warn names them in the X-Eft-Warning header and the log."),
    ] = "warn"
