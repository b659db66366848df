"""``lorry``: the program, its commands, and how errors become exit codes."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lorry.cli import (
    bench,
    chat,
    claims,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    federate,
    fuse,
    generate,
    init,
    inspect_adapter,
    limits,
    merge,
    methods,
    parts,
    plan,
    probe,
    push,
    sample,
    search,
    serve,
    sign,
    simulate,
    study,
    systems,
    train,
    transfer,
)
from lorry.cli.output import failure, out, print_json
from lorry.core.errors import CheckpointError, FingerprintError, LorryError, OptionError, SiteError, near_misses

#: Exit codes: the user asked for something that cannot be done; something that should work did not.
MISUSE, FAILURE, INTERRUPTED = 2, 1, 130
#: Shells that can complete, and the variable by which a shell asks for completions.
SHELLS = ("bash", "zsh", "fish")
COMPLETE = "_LORRY_COMPLETE"


class Program(TyperGroup):
    """A group of commands that turns errors into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see `exit_code` for what becomes of errors."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            failure(str(stop) or "interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            if ctx.params.get("debug"):
                traceback.print_exc(file=sys.stderr)
            failure(one_line(error, code))
            raise typer.Exit(code) from None


def exit_code(error: Exception) -> int | None:
    """Return 2 for misuse, 1 for failure, None for errors that are the command line's own.

    The command line's own are usage errors and exits, which it prints and numbers by itself.
    """
    if type(error).__module__.split(".")[0] in ("click", "typer") or isinstance(error, BrokenPipeError):
        return None
    # only the module that defines DataError can have raised one, and nothing is imported to look at another
    data = sys.modules.get("lorry.training.data_errors")
    misuse = (OptionError, SiteError, CheckpointError, FingerprintError, *((data.DataError,) if data else ()))
    if isinstance(error, misuse):
        return MISUSE
    return FAILURE


def one_line(error: Exception, code: int) -> str:
    """Return the message of an error; for one that nobody foresaw, its type and where to read more."""
    if code == MISUSE or isinstance(error, LorryError):
        return str(error)
    if isinstance(error, OSError | ImportError):
        return f"{error}"
    return f"Unexpected {type(error).__name__}: {error} (run `lorry --debug ...` for the traceback)"


app = typer.Typer(
    name="lorry",
    cls=Program,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        version()
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    threads: Annotated[
        int, typer.Option(help="CPU threads; 0 leaves torch's choice. Tiny models run fastest on one.", min=0)
    ] = 0,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """LoRA adapters through their whole life: plan, train, study, merge, fuse, serve and convert them, with
    proof.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not debug:
        # said while modules are imported, before anything can be told to be quiet, and no business of the
        # user's
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
    if threads:
        import torch

        torch.set_num_threads(threads)


@app.command()
def version(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Print the versions of Lorry, Python and torch."""
    import platform
    from importlib.metadata import version as installed

    import lorry

    facts = {"lorry": lorry.__version__, "python": platform.python_version(), "torch": installed("torch")}
    if as_json:
        print_json(facts)
    else:
        out().print("  ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


@app.command()
def completion(shell: Annotated[str, typer.Argument(help=f"{', '.join(SHELLS[:-1])} or {SHELLS[-1]}.")]) -> None:
    """Print the script that completes commands and flags in a shell.

    For bash: lorry completion bash > ~/.local/share/bash-completion/completions/lorry
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    if shell not in SHELLS:
        raise OptionError(
            f"There is no completion for '{shell}'.{near_misses(shell, SHELLS)} Expected one of {', '.join(SHELLS)}."
        )
    print(get_completion_script(prog_name="lorry", complete_var=COMPLETE, shell=shell))


app.command("init")(init.init)
app.command("methods")(methods.methods)
app.command("plan")(plan.plan)
app.command("compare")(compare.compare)
app.command("train", cls=train.TrainCommand)(train.train)
app.command("study")(study.study)
app.command("federate")(federate.federate)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("sample")(sample.sample)
app.command("probe")(probe.probe)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("simulate")(simulate.simulate)
app.command("fuse")(fuse.fuse)
app.command("merge")(merge.merge)
app.command("split")(parts.split)
app.command("unite")(parts.unite)
app.command("convert")(convert.convert)
app.command("push")(push.push)
app.command("pull")(push.pull)
app.command("codec")(sign.codec)
app.command("kit")(transfer.kit)
app.command("transfer")(transfer.transfer)
app.command("sign")(sign.sign)
app.command("verify")(sign.verify)
app.command("search")(search.search)
app.command("inspect")(inspect_adapter.inspect)
app.command("limits")(limits.limits)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.add_typer(claims.group)
app.add_typer(systems.group)

if COMPLETE in os.environ:
    from typer.completion import completion_init  # type: ignore[attr-defined]

    completion_init()  # typer itself does so only for programs with its flags --install-completion
