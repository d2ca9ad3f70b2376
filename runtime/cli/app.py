"""The `eft` application: its commands, imported when they are called, and its exit codes.

0: done. 1: it failed. 2: wrong usage or settings. 130: stopped with Ctrl-C. Errors are one message
on stderr; EFT_DEBUG=1 adds the traceback.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from runtime.cli.output import CommandError
from runtime.support.version import version
from settings.errors import SettingsError

INTERRUPTED = 130

app = App(
    name="eft",
    help="Serve a language model, and fine-tune adapters for it, from one copy of the weights.",
    version=version,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
    # Of a flag given twice the last one counts, so that a script's flags can be added to; a list collects them all.
    default_parameter=Parameter(allow_repeating=True),
)
_bench = App(name="bench", help="Measure a server, or the engine alone.")
_adapters = App(name="adapters", help="See and change the adapters of a running server.")
_jobs = App(name="jobs", help="See, hold and end the training jobs of a server.")
_keys = App(name="keys", help="Make, list and revoke the API keys of a keys file.")
_state = App(name="state", help="Look after the state directory of a server on this machine.")
_kernels = App(name="kernels", help="Compile the C++ kernels.")
_models = App(name="models", help="What models can be served, whether one is whole, and moves to another.")
_config = App(name="config", help="Show the settings, and write files to start from.")
_recipe = App(name="recipe", help="Check fine-tuning recipes, and write one to start from.")

_SERVE = """Serve a model over the OpenAI API, until Ctrl-C or SIGTERM.

Exit code 0: stopped; 1: it could not load or listen; 2: wrong usage or settings."""
_CHAT = """Chat with a server, or with a model loaded here.

An adapter is asked as it was trained: with the system message of its rows, or in alpaca's prompt. Piped input: one
question a line. In the dialogue: /model, /compare, /reset, /system, /save, /help, /exit. Ctrl-C stops an answer."""
_BATCH = """Run a file of OpenAI batch lines, through a server or a model loaded here.

Resumable: run it again, and it goes on where it stopped. Exit code 0: every request succeeded; 1: some
failed (the output says why); 2: wrong usage."""

_VERIFY = """Check a model's files and tensors, and compare what it computes with transformers.

Needs the memory of the model in float32 twice, one after the other. Exit code 0: nothing is wrong; 1: something is."""

_SWAP = """Move a running server to a whole model that a job has trained, or back.

Requests that have begun end on the old model, and new ones go to the new one, or wait for it. The name in requests
stays. Exit code 0: done; 1: it failed, and the old model is served."""

_CHECK = """Check a recipe and its data, and print what would be trained: the same as eft train --dry-run.

By a server that runs on this machine, or by --url; with --model, or where none runs, it is checked here. Exit code 0:
it can run; 2: it cannot, and every problem is listed."""
_TRAIN = """Train an adapter from a recipe, on a running server, or with a model loaded here (--model).

The data files that the recipe names are sent along, where they are on this machine. Exit code 0: published (or, without
--follow, queued); 1: refused, failed or cancelled; 2: wrong usage; 3: trained, and not good enough to publish."""

_TOP = """Watch a server: requests, tokens, latencies, training's share and jobs.

A live view on a terminal; elsewhere a line for each sample, with --json an object."""
_COMPLETION = """Print a script that completes eft's commands and flags in a shell.

bash: eft completion bash > ~/.local/share/bash-completion/completions/eft
zsh: eft completion zsh > a folder of $fpath, as _eft
fish: eft completion fish > ~/.config/fish/completions/eft.fish"""

_EXPORT = """Write an adapter for other programs: merged into its base, as GGUF, or alone.

The base is read from its own files, on this machine. A base whose files hold integers (GGUF) is merged in floats and
written as asked; the difference to what is served is measured and printed."""

_BUILD = """Compile the C++ kernels for this machine's processor, with progress.

Otherwise the first start does it. Exit code 0: they are there, or there is no compiler, which is said; 1: it failed."""

_REBUILD = """Make the database of the state directory again from its folders.

What has rows stays as it is. Jobs that had not ended go on when the server is started. Exit code 0: done; 1: some
folders could not be taken in, and are listed."""

# By name, so that a command's module is imported when it is called, or its help is shown. The
# first paragraph of a help is shown in the list of commands.
_LAZY = [
    (app, "serve", "serve", _SERVE),
    (app, "chat", "chat", _CHAT),
    (app, "batch", "batch", _BATCH),
    (app, "train", "train", _TRAIN),
    (app, "top", "top", _TOP),
    (_jobs, "list", "jobs:list_jobs", "List the jobs, the newest first."),
    (_jobs, "show", "jobs:show", "Show one job, with its plan and checkpoints."),
    (_jobs, "events", "jobs:events", "Print what happened in a job; --follow waits for more until its end."),
    (_jobs, "logs", "jobs:logs", "Print the end of a job's log."),
    (_jobs, "cancel", "jobs:cancel", "End a job: at once, or after the step that is running."),
    (_jobs, "pause", "jobs:pause", "Hold a job; others go first meanwhile."),
    (_jobs, "resume", "jobs:resume", "Let a paused or failed job go on where it stood."),
    (_jobs, "rerun", "jobs:rerun", "Start a job again, with the same data and --set KEY=VALUE of its recipe."),
    (_jobs, "compare", "jobs:compare", "Show what differs between two jobs: recipe, results and curves."),
    (_jobs, "report", "jobs:report", "Write a job as one HTML page: curves, evaluations, answers, data, recipe."),
    (_jobs, "rm", "jobs:remove", "Delete jobs that have ended, with their files; what they published stays."),
    (_state, "du", "state:du", "Print what in the state directory takes how much room."),
    (_state, "prune", "state:prune", "Delete what is old: jobs, checkpoints, uploaded files, lost+found."),
    (_state, "rebuild", "state:rebuild", _REBUILD),
    (app, "export", "export", _EXPORT),
    (app, "completion", "app:completion", _COMPLETION),
    (app, "doctor", "doctor", "Report what was found on this machine, and what is broken."),
    (_kernels, "build", "doctor:build_kernels", _BUILD),
    (_adapters, "list", "adapters:list_adapters", "Print every adapter and the version that its name means."),
    (_adapters, "show", "adapters:show", "Print the versions of an adapter."),
    (_adapters, "load", "adapters:load", "Load an adapter from a folder on the server, or one that was unloaded."),
    (_adapters, "unload", "adapters:unload", "Serve an adapter no more; its versions stay."),
    (_adapters, "promote", "adapters:promote", "Point an adapter's name to another of its versions."),
    (_adapters, "rollback", "adapters:rollback", "Point an adapter's name to the version before."),
    (_adapters, "alias", "adapters:alias", "Give an adapter another name too."),
    (_adapters, "unalias", "adapters:unalias", "Take an adapter's other name away."),
    (_adapters, "canary", "adapters:canary", "Send a share of the requests for an adapter to another version of it."),
    (_adapters, "upload", "adapters:upload", "Send an adapter of PEFT's to a server, as a version of a name."),
    (_adapters, "download", "adapters:download", "Copy an adapter to this machine, as a folder of PEFT's."),
    (_adapters, "delete", "adapters:delete", "Delete an adapter, or one of its versions."),
    (_keys, "new", "keys:new", "Make a key, and print it: the file keeps only its digest."),
    (_keys, "list", "keys:list_keys", "Print the names, scopes and limits of the keys."),
    (_keys, "revoke", "keys:revoke", "Take a key out of the file; servers refuse it within seconds."),
    (_models, "list", "models:list_models", "Print the architectures that can be served, ours and those of plugins."),
    (_models, "swap", "models:swap", _SWAP),
    (_models, "verify", "models:verify", _VERIFY),
    (_bench, "serve", "bench:bench_serve", "Measure any OpenAI-style server under load: latencies and throughput."),
    (_bench, "offline", "bench:bench_offline", "Measure the engine, without a server."),
    (_config, "show", "config:show", "Print each setting, its value and where it came from."),
    (_config, "example", "config:example", "Print a settings file with every key, commented out."),
    (_config, "docs", "config:docs", "Print the reference page of all settings, in Markdown."),
    (_config, "api", "config:api", "Print the reference page of the fields of requests, in Markdown."),
    (_config, "cli", "config:cli", "Print the reference page of the commands, in Markdown."),
    (_config, "metrics", "config:metrics", "Print the reference page of the metrics, in Markdown."),
    (_config, "path", "config:path", "Print the path of the settings file that would be read."),
    (_recipe, "check", "recipe:check", _CHECK),
    (_recipe, "new", "recipe:new", "Print a commented recipe to start from, or write it to a file."),
    (_recipe, "explain", "recipe:explain", "Print what a key of recipes does here."),
    (_recipe, "convert", "recipe:convert", "Print a job of LLaMA-Factory or OpenAI as a recipe."),
    (_recipe, "schema", "recipe:schema", "Print the JSON schema of recipes, for editors."),
    (_recipe, "docs", "recipe:docs", "Print the reference page of recipes, in Markdown."),
]
for _parent, _name, _target, _help in _LAZY:
    _module, _, _function = _target.partition(":")
    _parent.command(f"runtime.cli.{_module}:{_function or _module}", name=_name, help=_help)
app.command(_adapters)
app.command(_bench)
app.command(_config)
app.command(_recipe)
app.command(_jobs)
app.command(_keys)
app.command(_state)
app.command(_models)
app.command(_kernels)


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="The shell.")], /) -> None:
    """Print the script of one shell."""
    print(app.generate_completion(prog_name="eft", shell=shell))


def run(argv: Sequence[str] | None = None) -> int:
    """Parse and run a command line. Returns the exit code; raises nothing."""
    try:
        result = app(argv, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except BrokenPipeError:  # `eft config docs | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _fail(error)
    return result if isinstance(result, int) else 0


def _fail(error: Exception) -> int:
    if os.environ.get("EFT_DEBUG") == "1":
        traceback.print_exception(error)
    problems = error.problems if isinstance(error, SettingsError) else (_message(error),)
    for problem in problems:
        print(f"eft: {problem}", file=sys.stderr)
    if isinstance(error, SettingsError | CycloptsError):
        return 2
    return error.exit_code if isinstance(error, CommandError) else 1


def _message(error: Exception) -> str:
    """Message for the user. Our own exceptions need no more than their text; others get their class too."""
    ours = type(error).__module__.split(".")[0] in ("runtime", "kernels", "settings", "cyclopts")
    return str(error) if ours and str(error) else f"{type(error).__name__}: {error}"
