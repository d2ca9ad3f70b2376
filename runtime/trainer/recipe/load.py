"""A recipe's text to a `Recipe`: every key accounted for, every problem found at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, get_type_hints

import msgspec
import regex
from msgspec import NODEFAULT, Struct

from runtime.adapters.store import name_problem
from runtime.errors import InvalidRequest, ModelNotFound
from runtime.trainer.recipe import types
from runtime.trainer.recipe.dataset import Dataset, UserType
from runtime.trainer.recipe.document import Document, Problem, RecipeError, read_document
from runtime.trainer.recipe.keys import (
    DATASET_NOTED,
    DATASET_REFUSED,
    DECISIVE,
    NOTED,
    REFUSED,
    Refused,
    is_off,
    modernise,
    notes_of,
)
from runtime.trainer.recipe.launch import FSDP_NOTED, NO_ADAPTER, launch_notes, launch_of, launch_problems
from runtime.trainer.recipe.publish import (
    GENERATED,
    OF_LOSS,
    REWARDS,
    GateMetric,
    higher_is_better,
    plain_metric,
    scorer_name,
)
from runtime.trainer.recipe.rules import (
    adapter_problems,
    flatten_types,
    optimizer_problems,
    preference_problems,
    schedule_problems,
    take_unbuilt,
)
from runtime.trainer.recipe.schema import ADAPTER_KEYS, DATA_GROUPS, INTERNAL, Recipe
from runtime.trainer.recipe.types import ROLES, role_names, unknown_roles
from runtime.trainer.recipe.values import FsdpConfig
from settings import suggest

# -- convert ---------------------------------------------------------------------------------------
#
# From plain values to the structs of a recipe, collecting every problem instead of stopping at the first.

S = TypeVar("S", bound=Struct)

_STAND_INS: Mapping[str, Any] = {"adapter": "lora", "learning_rate": 1e-4, "datasets": (), "path": "-"}
"""Values in place of keys that are missing and have no default."""

MAX_HINTS = 50
"""Unknown keys of one mapping for which the nearest known one is looked for."""

_TABLES: Mapping[type[Struct], tuple[Mapping[str, str], Mapping[str, Refused]]] = {
    Recipe: (NOTED, REFUSED),
    Dataset: (DATASET_NOTED, DATASET_REFUSED),
    FsdpConfig: (FSDP_NOTED, {}),
}
"""Known keys besides a struct's own: noted ones, and refused ones."""

Reporter = Callable[[str, str], None]
"""Called with the path of a key and what is wrong with it."""


def convert_struct(struct: type[S], values: Mapping[str, Any], path: str, report: Reporter) -> S:
    """The struct. What was reported has its default in it, so that the rest can be checked, too.

    A null is the same as a key that is absent, and so is an empty value where the type does not take it.
    """
    hints = get_type_hints(struct, include_extras=True)
    fields = {field.name: field for field in msgspec.structs.fields(struct) if field.name not in INTERNAL}
    noted, refused = _TABLES.get(struct, ({}, {}))
    beside = {*noted, *refused}
    for key, refusal in refused.items():
        if not refusal.asks_for_nothing(values.get(key)):
            report(_join(path, key), f"is not supported: {refusal.why}")
    given: dict[str, Any] = {}
    unknown = [name for name in values if name not in fields and name not in beside]
    for index, name in enumerate(unknown):
        near = suggest.hint(name, [*fields, *beside], cutoff=0.75) if index < MAX_HINTS else ""
        report(_join(path, name[:64]), f"unknown key{near}")
    for name, field in fields.items():
        value = values.get(name)
        if value is None or _is_empty(value, hints[name], field):
            if field.default is NODEFAULT and field.default_factory is NODEFAULT:
                report(_join(path, name), f"is missing: expected {types.describe(hints[name])}")
                given[name] = _STAND_INS[name]
            continue
        try:
            given[name] = _convert(hints[name], value, _join(path, name), report)
        except ValueError as error:
            report(_join(path, name), str(error) + _near(value, hints[name]))
            if name in _STAND_INS:
                given[name] = _STAND_INS[name]
    return struct(**given)


def _convert(hint: Any, value: Any, path: str, report: Reporter) -> Any:
    inner, many = types.struct_of(hint, value)
    if inner is None:
        return types.convert(value, hint)
    if not many:
        if not isinstance(value, dict):
            raise ValueError(f"expected {types.describe(hint)}, got {types.show(value)}")
        return convert_struct(inner, value, path, report)
    items = ([value] if value else []) if isinstance(value, dict) else value
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"expected {types.describe(hint)}, got {types.show(value)}")
    types.check_length(len(items), hint)
    return tuple(convert_struct(inner, item, f"{path}[{index}]", report) for index, item in enumerate(items))


def _is_empty(value: Any, hint: Any, field: msgspec.structs.FieldInfo) -> bool:
    """True for an empty or false value of an optional key whose type does not take it: it asks for nothing."""
    if not is_off(value) or field.required:
        return False
    try:
        types.convert(value, hint)
    except ValueError:
        return True
    return False


def _near(value: object, hint: Any) -> str:
    return suggest.hint(value, types.literals(hint)) if isinstance(value, str) else ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# -- checks ----------------------------------------------------------------------------------------
#
# What the keys of a recipe must not say together, and what they come to.
#
# Types and limits of single keys were checked before; nothing here knows the model or the data.

Found = tuple[str, str]
"""A key and what is wrong with it."""

_ONE_OF = [
    ("warmup_steps", "warmup_ratio"),
    ("save_steps", "saves_per_epoch"),
    ("eval_steps", "evals_per_epoch"),
    ("val_set_size", "test_datasets"),
]
_TEMPLATES_OWN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
"""Variables of a template that the chat decides."""
_AMOUNTS = ("eval_steps", "save_steps", "warmup_steps", "val_set_size")


def find_problems(recipe: Recipe, values: Mapping[str, Any], *, max_lora_rank: int) -> Iterator[Found]:
    """Every conflict. `values` are the keys as they were given."""
    given = {key for key, value in values.items() if not is_off(value, (0, 0.0, "no"))}
    for one, other in _ONE_OF:
        if one in given and other in given:
            yield other, f"give {one} or {other}, not both"
    yield from _sizes(recipe, values)
    yield from schedule_problems(recipe)
    yield from optimizer_problems(recipe)
    yield from preference_problems(recipe, values)
    if recipe.adapter is not None:
        yield from adapter_problems(recipe, given, max_lora_rank=max_lora_rank)
    if recipe.embedding_lr is not None and recipe.embedding_lr_scale is not None:
        yield "embedding_lr_scale", "give embedding_lr or embedding_lr_scale, not both"
    names_none = recipe.lora_target_linear is False and recipe.lora_target_modules is None
    if names_none and recipe.adapter is not None and recipe.lora_model_dir is None:
        yield "lora_target_linear", "is false, and lora_target_modules names nothing: there is nothing to train"
    if (recipe.dataset_shard_num is None) != (recipe.dataset_shard_idx is None):
        yield "dataset_shard_num", "and dataset_shard_idx belong together: give both, or neither"
    elif recipe.dataset_shard_num is not None and (recipe.dataset_shard_idx or 0) >= recipe.dataset_shard_num:
        yield "dataset_shard_idx", f"must be below dataset_shard_num ({recipe.dataset_shard_num})"
    if recipe.streaming and recipe.max_steps is None:
        yield "streaming", "needs max_steps: data is read as far as the steps take"
    if recipe.sample_packing and recipe.group_by_length:
        yield "group_by_length", "has no meaning with sample_packing, which fills its bins by length; set one of them"
    if recipe.chat_template == "jinja" and recipe.chat_template_jinja is None:
        yield "chat_template_jinja", "is missing: chat_template is jinja"
    for name in recipe.chat_template_kwargs:
        if not name.isidentifier() or name in _TEMPLATES_OWN:
            yield f"chat_template_kwargs.{name[:64]}", "is no variable of a template that a recipe may set"
    if recipe.name is not None and (problem := name_problem(recipe.name)):
        yield "name", problem
    if isinstance(recipe.lora_target_modules, str):
        yield from _pattern(recipe.lora_target_modules)
    yield from evaluation_problems(recipe, given)
    yield from _datasets(recipe)


def resolve_batch(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """With micro-batch size and accumulation worked out from `batch_size`. Raises `InvalidRequest`."""
    whole = recipe.batch_size
    if whole is None:
        return recipe
    micro, steps = values.get("micro_batch_size"), values.get("gradient_accumulation_steps")
    if micro is None and steps is not None and whole % recipe.gradient_accumulation_steps == 0:
        return msgspec.structs.replace(recipe, micro_batch_size=whole // recipe.gradient_accumulation_steps)
    if steps is None and whole % recipe.micro_batch_size == 0:
        return msgspec.structs.replace(recipe, gradient_accumulation_steps=whole // recipe.micro_batch_size)
    if whole == recipe.effective_batch:
        return recipe
    given = f"{recipe.micro_batch_size} × {recipe.gradient_accumulation_steps} = {recipe.effective_batch}"
    raise InvalidRequest(
        f"is {whole}, and micro_batch_size × gradient_accumulation_steps is {given}: give whole numbers that agree, or "
        "leave one of the three out",
        param="batch_size",
    )


def _sizes(recipe: Recipe, values: Mapping[str, Any]) -> Iterator[Found]:
    for name in _AMOUNTS:
        amount = getattr(recipe, name)
        if amount is not None and amount >= 1 and not float(amount).is_integer():
            yield name, f"expected a whole number, or a share below 1, got {amount}"
    for name in ("eval_steps", "save_steps"):
        if getattr(recipe, name) == 0 and values.get(name) is not None:
            yield name, "must be above 0; leave it out to use the default"
    if recipe.min_sample_len > recipe.sequence_len:
        yield "min_sample_len", f"must be at most sequence_len ({recipe.sequence_len}), got {recipe.min_sample_len}"


# -- evaluation ------------------------------------------------------------------------------------
#
# What is measured when, which metric decides, and what a gate may ask for.

_NEEDS_DATA = "needs test data: set val_set_size or test_datasets"
_FUNCTION = regex.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def evaluation_problems(recipe: Recipe, given: set[str]) -> Iterator[Found]:
    """Conflicts of the keys of evaluations. `given` are the keys that are on."""
    yield from _evaluated_data(recipe)
    yield from _times(recipe, given)
    yield from _best(recipe)
    yield from _generation(recipe)
    if problem := recipe.publish.problem():
        yield "publish.when", problem
    for metric in recipe.publish.metrics:
        if problem := _gate_problem(recipe, metric):
            yield "publish.when", problem
            return


def _evaluated_data(recipe: Recipe) -> Iterator[Found]:
    """Keys that ask for test data where there is none.

    Recipes come with `evals_per_epoch` whether or not they hold anything out, as Axolotl allows: noted.
    """
    if recipe.evaluates:
        return
    if recipe.early_stopping_patience is not None:
        yield "early_stopping_patience", _NEEDS_DATA
    if recipe.save_strategy == "best":
        yield "save_strategy", f"best {_NEEDS_DATA}"
    if recipe.do_causal_lm_eval:
        yield "do_causal_lm_eval", f"{_NEEDS_DATA}, or generation_datasets"


def _times(recipe: Recipe, given: set[str]) -> Iterator[Found]:
    if recipe.eval_strategy == "no":
        for name in ("eval_steps", "evals_per_epoch", "early_stopping_patience"):
            if name in given:
                yield name, "has no meaning with `eval_strategy: no`"
    for kind, names in (("eval", ("eval_steps", "evals_per_epoch")), ("save", ("save_steps", "saves_per_epoch"))):
        strategy = getattr(recipe, f"{kind}_strategy")
        if strategy == "steps" and not given.intersection(names):
            yield f"{kind}_strategy", f"steps needs {kind}_steps"
        if strategy == "epoch" and names[0] in given:
            yield names[0], f"has no meaning with `{kind}_strategy: epoch`"


def known_metrics(recipe: Recipe) -> tuple[str, ...]:
    """Metrics that evaluations of this recipe may have."""
    own = [name for name in OF_LOSS if recipe.rl is None or name != "perplexity"]
    rewards = REWARDS if recipe.rl is not None else ()
    return (*own, *rewards, *GENERATED, *map(scorer_name, recipe.generation_scorers))


def _best(recipe: Recipe) -> Iterator[Found]:
    metric = plain_metric(recipe.metric_for_best_model)
    if problem := _unknown(recipe, metric):
        yield "metric_for_best_model", problem
    elif metric in GENERATED and recipe.do_causal_lm_eval is False:
        yield "metric_for_best_model", f"is {metric}, and do_causal_lm_eval is false: no answers are generated"
    elif metric != "loss" and not recipe.evaluates:
        yield "metric_for_best_model", _NEEDS_DATA
    elif metric in (*OF_LOSS, *REWARDS, *GENERATED) and recipe.greater_is_better not in (
        None,
        higher_is_better(metric),
    ):
        better = "higher" if higher_is_better(metric) else "lower"
        yield "greater_is_better", f"is at odds with metric_for_best_model: of {metric}, the {better} is better"


def _generation(recipe: Recipe) -> Iterator[Found]:
    if recipe.generation_regex is not None:
        try:
            regex.compile(recipe.generation_regex)
        except regex.error as error:
            yield "generation_regex", f"is no regular expression: {error}"
    elif "regex" in recipe.generated_metrics:
        yield "generation_regex", "is missing: the metric regex is asked for"
    for function in recipe.generation_scorers:
        if not _FUNCTION.fullmatch(function):
            yield "generation_scorers", f"expected module:function, got {function[:80]!r}"
    names = [scorer_name(function) for function in recipe.generation_scorers]
    if taken := [name for name in names if name in (*OF_LOSS, *GENERATED) or names.count(name) > 1]:
        yield "generation_scorers", f"{taken[0]} is the name of another metric: rename the function"
    if recipe.do_causal_lm_eval is False:
        for name in ("generation_datasets", "generation_scorers"):
            if getattr(recipe, name):
                yield name, "has no meaning with `do_causal_lm_eval: false`"


def _gate_problem(recipe: Recipe, metric: GateMetric) -> str | None:
    if problem := _unknown(recipe, metric.metric):
        return problem
    if metric.scope == "train":
        measured = metric.metric in ("loss", "accuracy", *REWARDS)
        return None if measured else f"{metric} is not known: {metric.metric} is measured on test data alone"
    if not recipe.evaluates:
        return f"{metric} {_NEEDS_DATA}"
    if metric.metric in GENERATED and recipe.do_causal_lm_eval is False:
        return f"{metric} is of generated answers, and do_causal_lm_eval is false"
    return None


def _unknown(recipe: Recipe, metric: str) -> str | None:
    """The problem of a metric that evaluations do not have."""
    known = known_metrics(recipe)
    if metric in known:
        return None
    if metric in REWARDS:
        return f"{metric} is of preferences, and there is no rl"
    near = suggest.hint(metric, known)
    return f"{metric[:80]!r} is no metric of this recipe{near}; there are {', '.join(known)}"


# -- entries of data -------------------------------------------------------------------------------


def _datasets(recipe: Recipe) -> Iterator[Found]:
    for group in DATA_GROUPS:
        for index, entry in enumerate(getattr(recipe, group)):
            path = f"{group}[{index}]"
            if entry.train_on_eos and entry.train_on_eot and entry.train_on_eos != entry.train_on_eot:
                yield f"{path}.train_on_eot", "ends of turns are of one kind here: must be equal to train_on_eos"
            if entry.shards_idx >= (entry.shards or entry.shards_idx + 1):
                yield f"{path}.shards_idx", f"must be below shards ({entry.shards}), got {entry.shards_idx}"
            if isinstance(entry.type, UserType):
                yield from _user_type(entry.type, f"{path}.type")
            yield from _roles(entry, path)


def _user_type(form: UserType, path: str) -> Iterator[Found]:
    for name, allowed in (("format", {"instruction", "input"}), ("no_input_format", {"instruction"})):
        text = getattr(form, name)
        if unknown := set(regex.findall(r"\{(\w*)\}", text)) - allowed:
            known = " and ".join("{" + field + "}" for field in sorted(allowed, reverse=True))
            yield f"{path}.{name}", f"has {{{min(unknown)}}}; known are {known}"
        if "{instruction}" not in text:
            yield f"{path}.{name}", "has no {instruction}, so the answer would not depend on it"
    if "{system}" not in form.system_format:
        yield f"{path}.system_format", "has no {system}"


def _roles(entry: Dataset, path: str) -> Iterator[Found]:
    for role in unknown_roles(entry.roles):
        yield f"{path}.roles", f"{role[:64]!r} is no role; there are {', '.join(ROLES)}"
    names = role_names(entry.roles)
    for name in entry.roles_to_train:
        if name not in names:
            known = ", ".join(sorted(names))
            yield f"{path}.roles_to_train", f"{name[:64]!r} is no role; known are {known}, and what `roles` adds"


def _pattern(pattern: str) -> Iterator[Found]:
    try:
        regex.compile(pattern)
    except regex.error as error:
        yield "lora_target_modules", f"is no regular expression: {error}"


_SWITCHES_ELSEWHERE = ("offload", "offload_disk", "unsloth")


def load_recipe(data: bytes, *, max_lora_rank: int, served: Iterable[str] | None = None, devices: int = 0) -> Recipe:
    """Read a recipe's YAML. `served` are the names of the served model, if it is to be checked; `devices` is the number
    of devices that are set aside for jobs.

    Raises `RecipeError` with all problems, each with its key and line, and `ModelNotFound`.
    """
    return recipe_from(read_document(data), max_lora_rank=max_lora_rank, served=served, devices=devices)


def recipe_from(
    document: Document, *, max_lora_rank: int, served: Iterable[str] | None = None, devices: int = 0
) -> Recipe:
    """The same for values that did not come as YAML, such as a JSON object's: `Document(values)`."""
    modern = modernise(flatten_types(document.values))
    values, problems = _checkpointing(modern.values), list[Problem]()
    if is_off(values.get("adapter")) and not devices:
        values["adapter"] = "lora"
        problems.append(Problem("adapter", NO_ADAPTER, document.lines.get("adapter")))

    def report(key: str, message: str) -> None:
        problems.append(Problem(key, message, document.lines.get(key)))

    for key, message in take_unbuilt(values):
        report(key, message)
    recipe = convert_struct(Recipe, values, "", report)
    reported = {problem.key for problem in problems}
    found = find_problems(recipe, values, max_lora_rank=max_lora_rank)
    for key, message in (*found, *launch_problems(recipe, values, devices)):
        if key not in reported:
            report(key, message)
    if not reported & {"batch_size", "micro_batch_size", "gradient_accumulation_steps"}:
        try:
            recipe = resolve_batch(recipe, values)
        except InvalidRequest as error:
            report(error.param or "batch_size", error.message)
    if problems:
        raise RecipeError(sorted(_essential(problems, values), key=lambda problem: problem.line or 0))
    if served is not None:
        check_base_model(recipe, served)
    left_out = tuple(key for key in ADAPTER_KEYS if values.get(key) is None or _names_nothing(key, values[key]))
    launched = launch_of(recipe, devices) is not None
    notes = (*modern.notes, *notes_of(recipe, document.values, launched=launched))
    notes = (*notes, *launch_notes(recipe, document.values, devices))
    return msgspec.structs.replace(recipe, notes=notes, left_out=left_out)


def _names_nothing(key: str, value: Any) -> bool:
    return (key.startswith("lora_target") or key.endswith("_pattern")) and is_off(value)


def _essential(problems: list[Problem], values: Mapping[str, Any]) -> list[Problem]:
    """The problems that no other one settles: a recipe for another kind of training has one."""
    keys = {problem.key for problem in problems}
    whole = "adapter" in keys and not any(name.startswith(("lora_", "peft")) and values[name] for name in values)
    if decisive := next((key for key in (*DECISIVE, *(["adapter"] if whole else [])) if key in keys), None):
        return [problem for problem in problems if problem.key == decisive]
    return [problem for problem in problems if problem.key not in REFUSED or REFUSED[problem.key].of not in keys - {""}]


def check_base_model(recipe: Recipe, served: Iterable[str]) -> None:
    """Raise `ModelNotFound` unless the recipe's base is the served model, or it names none.

    A path or hub id is the served model when its last part is one of its names, in any case.
    """
    if recipe.base_model is None:
        return
    names = list(served)
    if _last(recipe.base_model) not in {_last(name) for name in names} and recipe.base_model not in names:
        raise ModelNotFound(
            f"base_model is {recipe.base_model[:200]!r}, but this server serves {names[0]!r}: a job trains on the "
            "served model. Leave base_model out, or start a server with the other model.",
            param="base_model",
        )


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _checkpointing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Axolotl's other ways of gradient checkpointing save memory elsewhere; here they are all the one way."""
    if values.get("gradient_checkpointing") in _SWITCHES_ELSEWHERE:
        return {**values, "gradient_checkpointing": True}
    return dict(values)
