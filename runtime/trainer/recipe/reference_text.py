"""The prose of docs/recipes.md, around the tables that are made from the structs."""

HEAD = """
# Recipes

Generated from `runtime/trainer/recipe` by `eft recipe docs`; do not edit.

A recipe is one YAML file that describes a fine-tuning job. Keys are named as in
[Axolotl](https://github.com/axolotl-ai-cloud/axolotl)'s recipes and mean the same, so most of its LoRA and QLoRA recipes run
once they name data that the server may read. Ours are `name` and `publish`. No key is ignored in silence: it works,
or the plan notes why it makes no difference, or the recipe is refused with the reason.

```sh
eft recipe new --output recipe.yaml     # a commented recipe to start from
eft recipe check recipe.yaml            # every problem at once, then the plan: rows, tokens, steps, memory, examples
eft recipe schema > recipe.schema.json  # for editors
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
| `prompt_completion` | `{"prompt": "…", "completion": "…"}` | the completion and the end of text |
| `completion` | `{"text": "…"}`; the field is `field` | everything |
| `auto` | any of these, told by the fields of the first row | |

Chats are rendered with the served model's own chat template, and texts are tokenised as a prompt of `/v1/completions` is: what
the adapter is trained on is what it will be asked with. So a recipe may name the template (`chatml` where the model's
is one), and cannot change it: start the server with `--chat-template FILE` for that. Text of a special token inside a
message stays text. Where an answer begins is found by rendering the chat up to it, with the prompt that
serving would give; a template under which the beginning of a chat is not rendered as the chat's beginning (some drop earlier
reasoning) gives an error with the row's number. Where the tokenizer joins the end of that prompt and the beginning of
an answer (one that begins with a line break) into one token, that token is trained on.

A message with `weight: 0` (or `false` in `message_field_training`) is not trained on, one with `weight: 1` is. Roles
called human, gpt, bot, model and the like are known; `roles` adds others. A row's `tools` are passed to the template.

Files are JSONL, JSON (an array of objects), CSV with a header, or Parquet. They come with the recipe, or lie under one of
the server's data roots (`trainer.data_roots`); URLs and data sets of a hub are not fetched. A row that cannot be read
stops the job before it starts: the first ten are listed with their numbers and what is wrong.

## Steps

A step is `gradient_accumulation_steps` micro-batches of `micro_batch_size` examples, or packed bins; the last step of an
epoch is smaller where they do not come out even. Nothing is ever padded: examples of a micro-batch lie one after the other,
and attention keeps them apart. With `sample_packing`, bins are made once, and each epoch goes through them in another order.
The number of steps is `max_steps`, or `num_epochs` times the steps of an epoch, rounded up. The order depends on
`seed` and the epoch alone, so that a resumed job goes on with the rows that it would have had.
"""  # noqa: E501
