"""The keys of recipes for people and for editors: docs/recipes.md and a JSON schema, made from the structs."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import NODEFAULT, Meta, Struct

from runtime.trainer.recipe.dataset import Dataset
from runtime.trainer.recipe.keys import DATASET_NOTED, DATASET_REFUSED, NOTED, READ_AS, REFUSED
from runtime.trainer.recipe.schema import INTERNAL, Recipe
from runtime.trainer.recipe.types import describe
from runtime.trainer.recipe.values import FsdpConfig

T = TypeVar("T")

# -- reference text --------------------------------------------------------------------------------
#
# The prose of docs/recipes.md, around the tables that are made from the structs.

HEAD = """
# Recipes

Generated from `runtime/trainer/recipe` by `eft recipe docs`; do not edit.

A recipe is one YAML file that describes a fine-tuning job. Keys are named as in
[Axolotl](https://github.com/axolotl-ai-cloud/axolotl)'s recipes and mean the same, so most of its LoRA and QLoRA recipes run
once they name data that the server may read. Ours are `name`, `publish`, `devices`, `job_weight` and `job_priority`. No key
is ignored in silence: it works,
or the plan notes why it makes no difference, or the recipe is refused with the reason.

```sh
eft recipe new --output recipe.yaml     # a commented recipe to start from
eft recipe check recipe.yaml            # every problem at once, then the plan: rows, tokens, steps, memory, examples
eft train recipe.yaml --follow          # the job, with the data files that the recipe names, on the running server
eft recipe check recipe.yaml --keys-only    # the verdict of each key, without a model or data
eft recipe explain fsdp_config          # what one key does here
eft recipe convert job.yaml > recipe.yaml   # from LLaMA-Factory's YAML, or the JSON of an OpenAI fine-tuning job
eft recipe schema > recipe.schema.json  # for editors
```

`eft recipe check` asks the running server, and prints the same as `eft train --dry-run` and, as JSON, `?dry_run=1`. With
`--model` it needs no server. The same with curl, for a recipe that has `path: data/rows.jsonl`:

```sh
curl -F recipe=@recipe.yaml -F file=@data/rows.jsonl 'localhost:8000/admin/train?dry_run=1'
curl -F recipe=@recipe.yaml -F file=@data/rows.jsonl localhost:8000/admin/train
curl --data-binary @recipe.yaml localhost:8000/admin/train    # where the data lies under a data root; not -d
curl localhost:8000/admin/jobs/ftjob-…                        # the id is in the answer; how far, how long still
curl -N -H 'Accept: text/event-stream' localhost:8000/admin/jobs/ftjob-…/events    # everything, until its end
```

`settings/recipes/` has examples that run as they are.

The YAML is read by the rules of YAML 1.2: `2e-5` is a number, and `no` and `on` are texts, except where a key takes true
or false. One document, no aliases, no tags, no key twice. A null is the same as leaving the key out.
"""  # noqa: E501

TAIL = """
## What a row is

| `type` | a row | trained on |
|---|---|---|
| `chat_template` | `{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}` | the assistant's turns, each with the token that ends it |
| `alpaca` | `{"instruction": "…", "input": "…", "output": "…"}`; `input` may be absent or empty | the output and the end of text |
| `chat_template.alpaca` | the same rows, as a chat: instruction and input are the user's message | the output and the end of the turn |
| `prompt_completion` | `{"prompt": "…", "completion": "…"}` | the completion and the end of text |
| `completion` | `{"text": "…"}`; the field is `field` | everything; a text longer than `sequence_len` becomes several examples |
| `input_output` | `{"segments": [{"text": "…", "label": true}]}`, written with every special token | the segments whose label is true |
| `tokenized` | `{"input_ids": […], "labels": […], "attention_mask": […]}`; without labels everything is trained on | labels that are not -100 |
| a mapping | columns and text of your own: `type: {field_instruction: q, field_output: a, format: "{instruction} {input} "}` | the answer and the end of text |
| `auto` | `chat_template`, `alpaca`, `prompt_completion`, `completion`, `input_output` or `tokenized`, told by the fields of the first row | |

Relatives of `alpaca`, each a prompt and its answer as text: `alpaca_instruct`, `alpaca_chat` (`.load_qa`: question, answer;
`.load_camel_ai`: message_1, message_2; `.load_concise`, `.load_no_prompt`), `alpaca:chat`, `alpaca:chatml`, `alpaca:phi`, `alpaca_w_system` (a column
system; `.load_chat`, `.load_open_orca`: system_prompt, question, response), `gpteacher` (response), `gpt4all` (prompt, response),
`oasst` (INSTRUCTION, RESPONSE), `orcamini`, `metharme` (prompt, generation), `jeopardy` (question, category, answer), `summarizetldr` (article,
summary), `reflection` (reflection, corrected), `explainchoice` and `concisechoice` (question, choices, solution or explanation), and
`context_qa` (context, question, answer; `.load_v2`, `.load_404`). The plan shows the first rows as they are trained on.

Axolotl's older `type: sharegpt` (with `conversation`, `field`, `roles: {input, output}`, `field_human`, `field_model`) is read
as `type: chat_template`, `field_messages: conversations`, `message_property_mappings: {role: from, content: value}`, and the plan
notes those lines.

Chats are rendered with the served model's own chat template or the one that the recipe names, and texts are tokenised as a
prompt of `/v1/completions` is: what the adapter is trained on is what it will be asked with. A template that writes something
else than the model's own goes with the adapter (`chat_template` in its `eft.json`), and requests to the adapter are rendered with
it, end where it ends an answer, and begin as its rows did. Built in, by Axolotl's names and ours: {templates}.
All chats of a recipe have one template. Where the vocabulary lacks a template's end of a turn, it is written as several tokens, and
requests to the adapter stop at its text. Tools and calls are described to a template without them as in serving. Text of a special
token inside a message stays text. Where an answer begins is found by rendering the chat up to it, with the prompt that
serving would give; a template under which the beginning of a chat is not rendered as the chat's beginning (some drop earlier
reasoning) gives an error with the row's number. Where the tokenizer joins the end of that prompt and the beginning of
an answer (one that begins with a line break) into one token, that token is trained on. Where no token ends an answer (a
base model with a template of other tokens), or `train_on_eos` is `none`, plan, job and log warn that the adapter will not
learn to stop.

A message with `weight: 0` (or `false` in `message_field_training`) is not trained on, one with `weight: 1` is. So it is with
the parts of a message, by their `train` or `weight`: such parts follow each other without a separator, and what is marked is
trained on to the letter. A token that would reach across the border of two parts is taken apart there; put the space at
the beginning of the later part, as tokenizers do, and none is. Parts without those marks are given to the template as in
serving: one that walks parts gets them, one that prints a text gets them on lines of their own. Roles called human, gpt, bot, model and the like are known,
`roles` adds others, and `roles_to_train` takes any of the names. A row's `tools` are passed to the template. Of tools and
their calls, keys that are null are left out at any depth (Parquet fills rows with them), empty `tool_calls` too, and
`arguments` that are JSON text become an object. The column `system` (`field_system`) is the first message of a chat that begins
with none.

Files are JSONL, JSON (an array of objects), CSV with a header, or Parquet. They come with the recipe, or lie under one of
the server's data roots (`trainer.data_roots`). Data sets of a hub (`path: org/name`, with `name`, `revision` and any split) are
fetched where the setting `trainer.hub` allows it and the extra `hub` is installed; other URLs are not. A file that was sent is known by the
recipe's path, or by its base name where one file alone has it, as curl sends `-F file=@data/rows.jsonl`; else name the part:
`-F a/rows.jsonl=@a/rows.jsonl`. `*`, `?` and `[…]` in a path stand for files in the order of their names; a file of `/v1/files` with the
purpose fine-tune is named by its id (`path: file-…`). A folder is not read whole: name the files in it (`path: data`,
`data_files: ["*.jsonl"]`).

A row that cannot be read or teaches nothing, such as one with an empty answer, stops the job before it starts: the first ten
are listed with file, number, column and what is wrong. Rows that are left out or cut for their length are listed by number in
the plan, as are columns and fields that nothing reads.

## Tokens of its own

`tokens`, `eos_token` and `additional_special_tokens` that the vocabulary lacks are added for this adapter: in free rows of the
embedding where there are some, else beyond them. Their rows begin near the mean of all rows and are trained, in the head too
where it is a matrix of its own. `added_tokens_overrides` gives reserved tokens other texts, and trains their rows. Tokens of
`tokens` show in answers, as in Axolotl; tokens that the chat template writes do not, and their text in a client's message stays
text. `eos_token` ends the adapter's texts beside what ends the model's. `settings/recipes/tokens.yaml` is an example.

Rows of known tokens are trained with `peft_trainable_token_indices`, and whole matrices with `lora_modules_to_save:
[embed_tokens, lm_head]`: beside each adapter a server then holds these rows, for a vocabulary of 128,256 and a hidden size of
4096 in bfloat16 1 GB a matrix, up to the setting `adapters.max_vocabulary_bytes`. In training a value takes 16 bytes with AdamW.

The adapter's folder is PEFT's, with `trainable_token_indices` and `modules_to_save` in its configuration. Where there are ids
beyond the base's, PEFT needs `model.resize_token_embeddings(N)` before it loads the adapter: the plan says N, and `eft.json`
has the tokens. Adapters that PEFT or Axolotl have written so are served too, with the added tokens of the tokenizer.json that
lies beside them. Other adapters and the base know nothing of these tokens: their ids are refused there. Models that run in
transformers' own modules have no such rows.

## Optimisers and schedules

| `optimizer` | |
|---|---|
| `adamw_torch`, `adamw_torch_fused`, `optimi_adamw`, `paged_adamw_32bit` | AdamW, in torch's fused kernel |
| `adamw_8bit`, `adamw_bnb_8bit`, `paged_adamw_8bit`, `ao_adamw_…` | AdamW of bitsandbytes with 8-bit states on a GPU, else the same in 32 bits |
| `lion…` | Lion (arXiv:2302.06675), by `adam_beta1` and `adam_beta2` |
| `adafactor` | transformers', as its trainer sets it: no relative step, no scaling by parameters |
| `muon` | torch's `Muon` |
| `schedule_free_adamw`, `schedule_free_radam`, `schedule_free_sgd` | of the package schedulefree: a mean of weights in place of a schedule. That mean is evaluated and published; use `lr_scheduler: constant_with_warmup` |
| `adopt_adamw`, `came_pytorch` | of the package pytorch-optimizer; CAME by `adam_beta3` and `adam_epsilon2` too |
| `sgd` | plain |

Adafactor, CAME and Muon look at each matrix of an adapter as a whole, as PEFT holds it; they are refused where ranks hold parts of
them. The packages of the last two rows come with `pip install 'eft-server[optimizers]'`. The state of each is in checkpoints. `loraplus_lr_ratio` is LoRA+ (arXiv:2402.12354): B matrices learn at that much times the rate.
`neftune_noise_alpha` adds NEFTune's noise to the input of the first layer, in training alone: drawn from the seed and the step.

`lr_scheduler` is one of transformers' (`linear`, `cosine`, `cosine_with_restarts`, `cosine_with_min_lr`, `polynomial`, `inverse_sqrt`,
`constant`, `constant_with_warmup`), with the same options in `lr_scheduler_kwargs`; `one_cycle`, torch's with `pct_start` from the
warmup and without its cycle of moments; or Axolotl's `rex`. `cosine_min_lr_ratio`, `cosine_constant_lr_ratio` and
`lr_quadratic_warmup` are Axolotl's.

## Preferences

With `rl`, a row has two answers to a prompt, of which the chosen one is better, or (`kto`) one answer and a label.

| `rl` | loss | its own keys |
|---|---|---|
| `dpo` | by log-ratios of model and reference (arXiv:2305.18290); other losses by `dpo_loss_type` | `dpo_…`, `rpo_alpha` |
| `ipo` | the same with a squared loss on means of tokens (arXiv:2310.12036) | `rpo_alpha` |
| `kto` | single answers, each labelled as desirable or not (arXiv:2402.01306) | `kto_…` |
| `orpo` | likelihood of prompt and chosen answer, and an odds ratio (arXiv:2403.07691); no reference | `orpo_alpha` |
| `simpo` | means of log-probabilities and a margin (arXiv:2405.14734); no reference | `simpo_gamma`, `cpo_alpha` |
| `cpo` | sums of log-probabilities (arXiv:2401.08417); no reference | `cpo_alpha` |

Losses and gradients are TRL's. The reference is the served model without the adapter, or with the one of `lora_model_dir`: there is no
second copy of its weights. Its log-probabilities are computed once a row, when the row is first met, and kept with checkpoints. `lora_dropout` is applied where a
recipe has it (TRL turns it off). In `kto` each answer is also computed after another row's prompt, to estimate the divergence.

| `type` | a row | the prompt |
|---|---|---|
| `chat_template.default` | `{"messages": […], "chosen": {…}, "rejected": {…}}`; the columns are `field_messages`, `field_chosen`, `field_rejected` | the messages |
| `chat_template.argilla`, `….argilla_chat` | `{"chosen": […], "rejected": […]}` | all but the last message, which must be the same in both |
| `chatml.intel`, `llama3.intel` | `{"system": "…", "question": "…", "chosen": "…", "rejected": "…"}` | `question` |
| `….icr`, `….prompt_pairs`, `….ultra` | the same | `input`, `prompt`, `prompt` |
| `….argilla` | `{"instruction": "…", "chosen_response": "…", "rejected_response": "…"}` | `instruction` |
| `chatml`, `llama3` | `chosen` or `chosen_response`, `rejected` or `rejected_response` | `prompt`, `input`, `question` or `instruction` |
| `zephyr.nectar` | `{"prompt": "…", "answers": [{"answer": "…", "rank": 1}, …]}`: the best against the worst | `prompt` |
| `openai` | `{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}` | `input` |
| `user_defined.default` | texts, as `field_…` and `…_format` say (also written `type: {field_prompt: …, prompt_format: …}`) | `field_prompt` in `prompt_format` |
| `passthrough` | `{"prompt": "…", "chosen": "…", "rejected": "…"}`: texts as they stand | `prompt` |

An answer is a text, a message, or a chat that it ends. With `kto`, `completion` (`field_completion`) and `label` (`field_label`)
stand in place of `chosen` and `rejected`. All but the last two types are rendered by the chat template; `llama3.…` and the like
say which one that must be. A pair of which one sequence is too long is left out whole, and so is one of equal answers.

`micro_batch_size` and `val_set_size` count pairs, which stay together, also in the bins of `sample_packing`. Steps and
evaluations report `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`, `logps/chosen` and `logps/rejected`,
and a gate may ask for them: `publish: {when: "rewards/margins > 0.5"}`. Evaluated pairs decide by their loss which weights are the
best.

## How the adapter is asked

As its rows were rendered; the plan says so at "ask it", and the version keeps it (`eft.json` beside PEFT's files).

| rows | ask |
|---|---|
| chats | `/v1/chat/completions`, with the system message that the rows have |
| `alpaca` | `/v1/completions`, with the prompt below: an adapter of alpaca's rows has seen no chat |
| `prompt_completion`, `completion` | `/v1/completions`, with a prompt like those of the rows |

```
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
```

With an `input`, the first line ends "…describes a task, paired with an input that provides further context. Write…", and
`### Input:` and the input stand before `### Response:`. A line break follows `### Response:`. `eft chat NAME` does all of this by
itself, and takes the system message of the rows where they all have the same. To ask in chats, train such rows with
`type: chat_template.alpaca`. Every answer names the version that gave it in the header `X-Eft-Adapter-Version`.

`eft adapters download NAME` copies a version as PEFT's folder, with `base_model_name_or_path` as the recipe's `base_model`
(`GET /admin/adapters/NAME/export` is the same as tar); `eft adapters show NAME` says where it lies on the server.

### For other programs

```sh
eft export tickets --to tickets-merged                               # a model directory, for transformers and vLLM
eft export tickets@2 --to tickets.gguf --format gguf --type q8_0     # for llama.cpp, Ollama and LM Studio
eft export tickets --to tickets-lora.gguf --format gguf-lora         # the adapter alone, for llama.cpp's --lora
```

`eft export` takes a name on the server or a folder of PEFT's. The base is read from its own files, or from `--model`, and each
weight is rounded once. It prints the difference to the adapter as it is served: the share of equal tokens, the largest
difference of a logit, the divergence. A base whose files hold integers is merged in floats where they are GGUF, and refused
where they are bitsandbytes': give the model that it was made from. GGUF types are f32, f16, bf16, q8_0 and q4_k; rows that
are no whole blocks of q4_k are written as q8_0 or f16. An adapter's own template, tokens, rows of embedding and head, and ends of
answers go into the merged model and the GGUF file, with the larger vocabulary where there are new ids; a peft export has
`eft.json`, which says so. From a directory GGUF is written for Llama, Mistral, Qwen 2 and 3,
SmolLM3, OLMo 2 and Granite; from a GGUF base for every architecture that is read, with its metadata unchanged. Over HTTP:
`GET /admin/adapters/NAME/export?format=merged|gguf|gguf-lora&type=…`.

## Kinds of adapters, and going on from one

`peft_use_dora: true` trains a magnitude for each output beside the factors (arXiv:2402.09353), as PEFT does; the adapter is served
beside plain ones, and exported merged: GGUF files of adapters alone have no place for magnitudes. On a base in integers the norms
are of the weights as they are served.

`lora_rank_pattern` and `lora_alpha_pattern` give single linears another rank or alpha, as PEFT's `rank_pattern` and
`alpha_pattern` do: `{q_proj: 32, "(layers.0|layers.1).mlp.*": 4}`. A key is the end of a full name, from a dot on, or a regular
expression; the first that matches counts, and one that means no adapted linear is an error. PEFT sorts keys when it saves: where
several mean one linear, the adapter is written with a key for each linear.

`peft_init_lora_weights` says what an adapter begins with. PEFT takes the first product of `pissa` and `olora` out of the base. Here
the base is shared: the product is taken off in training, and the adapter is published with twice the rank, as PEFT's
`path_initial_model_for_weight_conversion` does, for the base as it is. `pissa` decomposes each weight whole, which takes long
for a large model; `pissa_niter_16` does not. `loftq` begins with what rounding took from the base's own files where it is served in
integers, divided by the scale, so that it fits any alpha.

`lora_model_dir` goes on from an adapter: its weights are the first ones, its ranks, alphas, targets and kind hold, and its chat
template where the recipe names none. A key that says otherwise is an error. The optimiser begins afresh. The job keeps a copy,
and `went_on_from` of the version says where it came from. Of preferences, it is the reference.

## Steps

A step is `gradient_accumulation_steps` micro-batches of `micro_batch_size` examples, or packed bins; the last step of an
epoch is smaller where they do not come out even. Nothing is ever padded: examples of a micro-batch lie one after the other,
and attention keeps them apart. With `sample_packing`, bins are made once, and each epoch goes through them in another order.
The number of steps is `max_steps`, or `num_epochs` times the steps of an epoch, rounded up. The order depends on
`seed` and the epoch alone, so that a resumed job goes on with the rows that it would have had.

Warmup is never longer than the run: `warmup_steps: 100` of 5 steps are 5, where transformers would keep to a hundredth of
the rate a step. The plan warns where all steps, or more than half of them, are warmup. `warmup_ratio` is rounded down, as
Axolotl's `int()` does. A job fails when its loss is not a number, or is above `loss_watchdog_threshold` for
`loss_watchdog_patience` steps in a row: by default above ln(vocabulary) + 1 for 3 steps, which is worse than guessing (11.8 for a
vocabulary of 49,152). A step that takes long reports how far it is, and how long the job will still take, every five to
thirty seconds: in its events, in `step_progress` and `estimated_finish` of the job, and in what `eft train --follow` shows.
So does the reading of the data before, in rows (`rows_read`). Tokenised rows are kept for later jobs on the same data.

## Evaluation

The test data (`val_set_size` or `test_datasets`) is scored as often as `eval_strategy`, `eval_steps` or `evals_per_epoch` say,
and at the end: loss, perplexity, and the share of tokens that were the likeliest one. With `do_causal_lm_eval: true` the model
is also asked: the server generates answers with the weights of that step, greedily, behind all other requests, to the prompts of
the test rows or of `generation_datasets`, and compares each with the row's last answer. Training waits meanwhile. The model is
evaluated once before the first step, too.

| metric | |
|---|---|
| `exact_match` | share of answers that are the row's, but for space around them |
| `token_f1` | mean F1 of words and signs, in any case of letters |
| `bleu` (also `sacrebleu`), `chrf`, `ter` | sacrebleu's, from 0 to 100; extra `evaluation` |
| `rouge_l` | rouge-score's F1 of the longest common subsequence; extra `evaluation` |
| `regex` | share of answers in which `generation_regex` is found |
| `json_valid` | share of answers that are one JSON value |
| `tool_call` | share of answers with the row's calls of tools, of the rows and answers that have some |
| your own | `generation_scorers: ["module:function"]`, of `(prompt, answer, reference)`: the mean of its numbers. The setting `trainer.scorers` must name the function |

A metric that `metric_for_best_model`, or `publish.when`, names is computed without being listed. `eval_table_size` answers are shown:
in the job's events and log, and, before and after, as `samples` of `GET /admin/jobs/{id}`.

The best weights by `metric_for_best_model` are published, unless `load_best_model_at_end` is false; `early_stopping_patience` goes by
the same metric. `publish.when` is a condition on metrics of the published weights, `train_…` for training's, and `base.…` for
the evaluation before the first step. It has numbers, `+ - * /`, comparisons, `and`, `or`, `not` and parentheses, and is not
met where a metric is not known:

```yaml
eval_causal_lm_metrics: [exact_match, chrf]
metric_for_best_model: exact_match
publish:
  when: "exact_match >= base.exact_match + 0.02 and eval_loss < 1.5"
```

Every step and evaluation is a line of the job's log. `use_tensorboard`, `use_wandb` (or `wandb_project`), `use_mlflow` and
`use_trackio` record the numbers in the formats of these tools too, in folders of the job beside its log. Nothing is sent: W&B's runs
are offline, and `wandb sync` sends them; `TRACKIO_DIR=FOLDER trackio show` shows trackio's. A logger that fails, or is not installed, is named in the job's events, and the job goes on.
"""  # noqa: E501


_TEMPLATES = """
`alpaca`, `aya`, `chatml`, `cohere`, `command_a`, `deepseek_v2`, `deepseek_v3`, `exaone`, `exaone4`, `falcon_h1`,
`gemma`, `gemma3`, `gemma3n`, `gemma4`, `jamba`, `llama2`, `llama3`, `llama4`, `metharme`, `mistral`, `mistral_v1`,
`mistral_v2v3`, `mistral_v3_tekken`, `mistral_v7_tekken`, `nemotron_h`, `phi3`, `phi_3`, `phi_35`, `phi_4`, `qwen2.5`,
`qwen3`, `qwen_25`, `vicuna`, `zephyr`
""".strip()

GROUPS = {
    "model": "Model and result",
    "lora": "Adapter",
    "data": "Data",
    "training": "Training",
    "preferences": "Preferences",
    "evaluation": "Evaluation and checkpoints",
    "launched": "Devices of their own",
}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, noted keys included: for editors that check YAML."""
    schema = msgspec.json.schema(Recipe)
    properties = schema["$defs"]["Recipe"]["properties"]
    for name in INTERNAL:
        del properties[name]
    for name, why in NOTED.items():
        properties[name] = {"description": f"Ignored: {why}."}
    return schema


def reference() -> str:
    """The page docs/recipes.md."""
    lines = [HEAD.rstrip()]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", "", *_table(Recipe, group)]
        if group == "data":
            lines += ["", "### An entry of `datasets` and `test_datasets`", "", *_table(Dataset)]
        if group == "launched":
            lines += ["", *_LAUNCHED, "", "### `fsdp_config`", "", *_table(FsdpConfig)]
    lines += ["", "## Accepted and noted", "", *_NOTED_HEAD, "", "| key | ignored because |", "|---|---|"]
    lines += [f"| {_names(names)} | {why} |" for why, names in _by_reason(NOTED, str)]
    lines += [f"| {_names(names, '`datasets`: ')} | {why} |" for why, names in _by_reason(DATASET_NOTED, str)]
    lines += ["", "## Older names", "", "| key | read as |", "|---|---|"]
    lines += [f"| `{name}` | `{new}` |" for name, new in READ_AS.items()]
    lines += ["", "## Refused", "", *_REFUSED_HEAD, "", "| key | |", "|---|---|"]
    lines += [f"| {_names(names)} | {why} |" for why, names in _by_reason(REFUSED, lambda refused: refused.why)]
    lines += [
        f"| {_names(names, '`datasets`: ')} | {why} |" for why, names in _by_reason(DATASET_REFUSED, lambda r: r.why)
    ]
    lines += ["", TAIL.strip().replace("{templates}", _TEMPLATES)]
    return "\n".join(lines) + "\n"


_LAUNCHED = [
    "These act where the server has devices set aside (`trainer.devices`, [launched-jobs.md](launched-jobs.md)): the",
    "job then runs in processes of its own, and so does a recipe without `adapter`, which trains all weights.",
    "Elsewhere they only say how something is computed: the plan notes them, and the job runs inside the server.",
]
_NOTED_HEAD = [
    "These say how something is computed or where a copy goes, never what is learned. The plan has a note for each",
    "that is given and not null or false.",
]
_REFUSED_HEAD = [
    "Null, false and empty values of these are accepted: they ask for nothing. Every other key is unknown, and an",
    "error that names the nearest known one.",
]


def _by_reason(table: Mapping[str, T], why: Callable[[T], str]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for name, value in table.items():
        found.setdefault(why(value), []).append(name)
    return list(found.items())


def _names(names: list[str], of: str = "") -> str:
    return of + " ".join(f"`{name}`" for name in names)


_UNLIMITED = re.compile(" and at most (2147483647|9223372036854775807)")
"""Limits that say no more than what a machine's numbers hold."""


def _table(struct: type[Struct], group: str | None = None) -> list[str]:
    hints = get_type_hints(struct, include_extras=True)
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(struct):
        metas = [meta for meta in get_args(hints[field.name])[1:] if isinstance(meta, Meta)]
        text = next((meta.description for meta in metas if meta.description), None)
        own = next((meta.extra["group"] for meta in metas if meta.extra), None)
        if text is not None and own == group:
            takes = _UNLIMITED.sub("", describe(hints[field.name]))
            rows.append(f"| `{field.name}` | {takes} | {_default(field)} | {text} |")
    return rows


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default is NODEFAULT:
        return "required" if field.default_factory is NODEFAULT else "none"
    if field.default is None or field.default in ((), {}):
        return "none"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{value if isinstance(value, str) else msgspec.json.encode(value).decode()}`"
