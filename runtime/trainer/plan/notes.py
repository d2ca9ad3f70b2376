"""Notes on a plan: likely mistakes, rows and fields that are left out, and the form of requests to the adapter."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

from runtime.adapters.card import Prompt
from runtime.text.tokenizer import Tokenizer
from runtime.text.turn_end import turn_end
from runtime.trainer.data.examples import ReadDataset, RowCounts, RowRef
from runtime.trainer.data.formats import ChatFormat
from runtime.trainer.plan.served_model import TemplateChoice
from runtime.trainer.recipe import Recipe
from runtime.trainer.schedule import Schedule

_FLAGS = frozenset({"train", "training", "weight", "loss", "mask", "masked", "trainable"})
"""Fields of messages that usually flag what is trained on."""
_MOST_FIELDS = 10
"""Columns that one note names."""


# -- likely mistakes ---------------------------------------------------------------------------


def stop_texts(tokenizer: Tokenizer, ends: Collection[int]) -> tuple[str, ...]:
    """The text that ends an answer in chats, where no single id does; empty where one does, or where there is no such
    text."""
    end = turn_end(tokenizer, ends)
    text = end.text.strip()
    return (text,) if end.token_id is None and text else ()


def end_warnings(
    datasets: Sequence[ReadDataset], tokenizer: Tokenizer, ends: Collection[int], *, stops_at_text: bool = False
) -> Iterator[str]:
    """Warnings where the adapter will not learn to stop, or begins otherwise than the model is used to. `ends` are the
    ids that end a turn; `stops_at_text`: where none does, requests to the adapter end at a text."""
    chats = [(dataset, dataset.format) for dataset in datasets if isinstance(dataset.format, ChatFormat)]
    end = turn_end(tokenizer, ends)
    if chats:
        yield from end.problems[:-1] if stops_at_text else end.problems
    for dataset, form in chats:
        yield from _chat_ends(dataset, form, tokenizer, known=end.token_id is None)
    if len(chats) < len(datasets) and not tokenizer.eos_ids:
        yield "The model has no token that ends a text: the adapter will not learn to stop. Send stop strings."


def _chat_ends(dataset: ReadDataset, form: ChatFormat, tokenizer: Tokenizer, *, known: bool) -> Iterator[str]:
    """`known`: the warning that the template ends no turn with a token is given already."""
    ends, total = form.encoder.turn_ends, form.encoder.turn_ends.total()
    if (unended := ends[None]) and not known:
        yield (
            f"{dataset.param}: after {unended} of {total} answers no token follows that ends a turn: the adapter will "
            "not learn to stop after such."
        )
    if dataset.entry.eos == "none" and total > unended:
        yield (
            f"{dataset.param}.train_on_eos is none: no token that ends a turn is trained on, so the adapter will not "
            "learn to stop."
        )


def mask_warnings(datasets: Sequence[ReadDataset], recipe: Recipe) -> Iterator[str]:
    """Warnings where flags of messages and parts are not acted on."""
    for dataset in datasets:
        if recipe.train_on_inputs and isinstance(dataset.format, ChatFormat) and dataset.format.seen.masked:
            yield (
                f"{dataset.param}: train_on_inputs trains on every token, also on messages and parts whose flags say "
                "that they are not to be trained on."
            )


def schedule_warnings(recipe: Recipe, schedule: Schedule) -> Iterator[str]:
    """Warnings where the learning rate never reaches the recipe's, or hardly does."""
    total, warmup = schedule.total_steps, schedule.warmup_steps
    if warmup and warmup >= total:
        steps = "The only step is" if total == 1 else f"All {total} steps are"
        asked = _asked_warmup(recipe)
        highest = recipe.learning_rate * (total - 1) / warmup
        packed = " sample_packing makes few bins of many rows: lower sequence_len, or" if recipe.sample_packing else ""
        yield (
            f"{steps} warmup{asked}: the learning rate rises from 0 to {highest:.3g} in the last step, and never is "
            f"{recipe.learning_rate:.3g}. Lower warmup_steps (0.1 is a tenth of the steps), or train for more steps:"
            f"{packed} lower gradient_accumulation_steps or micro_batch_size, or raise num_epochs."
        )
    elif 2 * warmup > total:
        yield f"{warmup} of {total} steps are warmup{_asked_warmup(recipe)}: more than half of the training."


def _asked_warmup(recipe: Recipe) -> str:
    if recipe.warmup_steps is None or recipe.warmup_steps < 1:
        return ""
    return f" (warmup_steps is {recipe.warmup_steps:g})"


# -- rows and fields ---------------------------------------------------------------------------


def row_notes(recipe: Recipe, counts: RowCounts, group: str) -> Iterator[str]:
    """Rows that are not used, or not as they stand, by their numbers."""
    where = "" if group == "datasets" else f" of {group}"
    limit = f"sequence_len ({recipe.sequence_len})"
    if counts.untrained:
        what = "have no token to train on, such as chats without an answer"
        yield f"{counts.untrained} rows{where} {what}: {_rows(counts, 'untrained')}."
    if counts.ties:
        what = "have two answers that are the same and are left out"
        yield f"{counts.ties} rows{where} {what}: {_rows(counts, 'ties')}."
    if counts.too_long:
        yield f"{counts.too_long} rows{where} are longer than {limit} and left out: {_rows(counts, 'too_long')}."
    if counts.truncated:
        what = f"are longer than {limit} and cut, their ends with it"
        yield f"{counts.truncated} rows{where} {what}: {_rows(counts, 'truncated')}."
    if counts.cut:
        yield f"{counts.cut} rows{where} are longer than {limit} and cut into several examples: {_rows(counts, 'cut')}."
    if counts.too_short:
        what = f"have fewer tokens than min_sample_len ({recipe.min_sample_len}) and are left out"
        yield f"{counts.too_short} rows{where} {what}: {_rows(counts, 'too_short')}."


def _rows(counts: RowCounts, what: str) -> str:
    """`d.jsonl rows 3 (612 tokens), 9 (700 tokens) and 4 more`."""
    listed = counts.named.get(what, [])
    groups = [
        f"{file} row{'s' if len(rows) > 1 else ''} {', '.join(f'{row.row} ({row.tokens} tokens)' for row in rows)}"
        for file, rows in ((file, list[RowRef](rows)) for file, rows in groupby(listed, key=lambda row: row.file))
    ]
    more = getattr(counts, what) - len(listed)
    return "; ".join(groups) + (f" and {more} more" if more else "")


def unread_notes(datasets: Sequence[ReadDataset], unused: Sequence[str]) -> Iterator[str]:
    """Columns, fields of messages and files that nothing reads."""
    for dataset in datasets:
        form = dataset.format
        if columns := form.columns - form.fields:
            yield f"{dataset.param}: nothing reads the {_fields('column', columns)}."
        if isinstance(form, ChatFormat) and (fields := form.seen.unread):
            flags = sorted(fields & _FLAGS)
            hint = f" (if {flags[0]} says what is trained on, set message_field_training: {flags[0]})" if flags else ""
            yield f"{dataset.param}: nothing reads the messages' {_fields('field', fields)}{hint}."
    if unused:
        yield f"The recipe names no such file, so what was sent is not used: {', '.join(sorted(unused)[:10])}."


def _fields(noun: str, names: set[str]) -> str:
    shown = ", ".join(name[:40] for name in sorted(names)[:_MOST_FIELDS])
    more = f" and {len(names) - _MOST_FIELDS} more" if len(names) > _MOST_FIELDS else ""
    return f"{noun}{'s' if len(names) > 1 else ''} {shown}{more}"


# -- requests to the adapter -------------------------------------------------------------------


def prompt_of(datasets: Sequence[ReadDataset]) -> Prompt:
    """Form of requests to the adapter: as most of the training rows were rendered."""
    ((likeliest, _), *_) = _formats(datasets).most_common(1)
    prompts = {dataset.format.prompt for dataset in _training(datasets) if dataset.format.prompt.format == likeliest}
    return prompts.pop() if len(prompts) == 1 else Prompt(format=prompts.pop().format)


def template_notes(template: TemplateChoice | None, prompt: Prompt) -> Iterator[str]:
    """A note where chats are not written with the served model's own template."""
    if template is not None and prompt.format == "chat":
        yield (
            f"Chats are written with the template {template.name}, not with the served model's own. It goes with the "
            "adapter, which is asked with it."
        )


def format_notes(datasets: Sequence[ReadDataset]) -> Iterator[str]:
    """Notes where rows are rendered in several ways, of which requests have one."""
    counts = _formats(datasets)
    if len(counts) > 1:
        shares = ", ".join(f"{count} as {format}" for format, count in counts.most_common())
        yield f"Rows are rendered in several ways ({shares}): a request has one of them."


def _formats(datasets: Sequence[ReadDataset]) -> Counter[str]:
    """Number of training rows by the way in which they are rendered."""
    counts: Counter[str] = Counter()
    for dataset in _training(datasets):
        counts[dataset.format.prompt.format] += dataset.num_examples
    return counts


def _training(datasets: Sequence[ReadDataset]) -> list[ReadDataset]:
    return [dataset for dataset in datasets if dataset.param.startswith("datasets")]


def how_to_ask(prompt: Prompt, *, chats: bool) -> str:
    """Form of a request to the adapter, in a sentence. `chats`: the model has a chat template."""
    if prompt.format == "alpaca":
        other = " To ask in chats, train with `type: chat_template.alpaca`." if chats else ""
        return (
            "in /v1/completions, as `eft chat` does: rows of type alpaca are trained on as texts, not as chats. The "
            f"prompt is {prompt.template!r}.{other}"
        )
    if prompt.format == "text":
        return "in /v1/completions, with a prompt like those of the rows: they are trained on as texts, not as chats."
    if prompt.system is None:
        return "in /v1/chat/completions."
    shown = prompt.system if len(prompt.system) <= 200 else prompt.system[:197] + "…"
    return (
        f"in /v1/chat/completions, with the system message that every chat begins with, as `eft chat` does: {shown!r}."
    )


def generation_notes(recipe: Recipe, rows: int, examples: int) -> list[str]:
    """Remarks on the answers that evaluations generate: to `rows` of `examples`."""
    if not recipe.num_generated:
        return []
    if not examples:
        return ["No answers are generated: there are neither test data nor generation_datasets."]
    less = f" of {examples} (generation_rows is {recipe.generation_rows})" if rows == recipe.generation_rows else ""
    return [f"Evaluations generate answers of up to {recipe.eval_max_new_tokens} tokens to {rows} rows{less}."]
