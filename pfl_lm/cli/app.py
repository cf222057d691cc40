"""The verbs of ``pfl-lm``. Each imports what it needs when it is called, so that help is quick."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

import pfl_lm
from pfl_lm.cli.exits import exits

app = typer.Typer(
    name="pfl-lm",
    help="Personalized federated fine-tuning of language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # what users write, `[q_proj]` for one, is text and never markup
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="KEY=VALUE, for example federation.rounds=6.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
ClientId = Annotated[str, typer.Option("--id", metavar="ID", help="The client's id.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pfl-lm {pfl_lm.__version__}")
        raise typer.Exit


@app.callback()
def _pfl_lm(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def finetune(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, as `plan` does.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this recipe's run, if it has begun.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune one adapter per client, as the recipe says.

    OVERRIDES change keys of the recipe: federation.rounds=6 adapter.r=16
    """
    if dry_run:
        plan(recipe, overrides, debug)
        return
    with exits(debug=debug):
        from pfl_lm.cli.finetune import finetune as verb

        verb(recipe, overrides or [], resume=resume)


@app.command()
def resume(
    run: RunFolder,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", metavar="N", help="Rounds in all; more extend a finished run."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Go on with a run that was interrupted, as if it never had been; or extend a finished one."""
    with exits(debug=debug):
        from pfl_lm.cli.resume import resume as verb

        verb(run, rounds)


@app.command()
def join(
    run: RunFolder,
    client: ClientId,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Its rows, and no others; not for one that data.holdout_clients kept for later.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Add a client to a run that has begun: it takes part from the next round on.

    If the run is finished, the client gets its adapter at once, by one turn of its own.
    """
    with exits(debug=debug):
        from pfl_lm.cli.members import join as verb

        verb(run, client, data)


@app.command()
def remove(
    run: RunFolder,
    client: ClientId,
    replay: Annotated[
        bool, typer.Option("--replay", help="Then run all rounds again, without it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Take a client out of a run: its state, adapter, card, scores and rows of the ledger.

    What the shared adapter has learned from it stays in it, unless --replay is given.
    """
    with exits(debug=debug):
        from pfl_lm.cli.members import remove as verb

        verb(run, client, replay=replay)


@app.command()
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", metavar="A,B", help="Methods, such as fedavg,fedavg:sgd@0.5/1."),
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="0,1,2", help="Seeds.")] = None,
    rates: Annotated[
        str | None,
        typer.Option("--rates", metavar="X,Y", help="Learning rates to choose from."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="The comparison's folder."),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; report what is there.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run several methods on the same clients, and say which is better, for whom, and how surely.

    A method is [LABEL=]METHOD[:PRESET][:OPTIMIZER][:OPTION=VALUE][@RATE/RATE]. What is not given
    here is as in the recipe's section `compare`. What was run before is kept.
    """
    with exits(debug=debug):
        from pfl_lm.cli.compare import compare as verb
        from pfl_lm.compare.plan import Asked

        asked = Asked(methods or [], seeds, rates, output)
        verb(recipe, overrides or [], asked, report_only=report_only)


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Check a recipe and the files it names; write nothing.

    OVERRIDES change keys of the recipe: federation.rounds=6 adapter.r=16
    """
    with exits(debug=debug):
        from pfl_lm.cli.validate import validate as verb

        verb(recipe, overrides or [])


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Say what a run would be: clients, sizes, memory, files; load no weights, write nothing.

    OVERRIDES change keys of the recipe: federation.rounds=6 adapter.r=16
    """
    with exits(debug=debug):
        from pfl_lm.cli.plan import plan as verb

        verb(recipe, overrides or [])


@app.command()
def bench(
    recipe: Annotated[
        Path | None, typer.Argument(help="The recipe, a YAML file; the quickstart without one.")
    ] = None,
    overrides: Overrides = None,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", min=1, help="Turns of each way that count.")
    ] = 5,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="T", min=1, help="Optimizer steps of a turn."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="A,B", help="Of loop, trainer, reload; all without it."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers to FILE.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two repeats of at most two steps, and no memory.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Measure memory, in a process for each way.")] = True,
    debug: Debug = False,
) -> None:
    """Measure how fast a recipe trains here: against loops written by hand, and the machine itself.

    A client's turn is taken by pfl-lm, by plain PyTorch loops, and by a Trainer of transformers, in
    turn and on the same rows. Nothing is written but FILE.
    """
    with exits(debug=debug):
        from pfl_lm.cli.bench import Asked
        from pfl_lm.cli.bench import bench as verb

        asked = Asked(repeats, steps, tuple(against or ()), json, quick=quick, memory=memory)
        verb(recipe, overrides or [], asked)


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    client: Annotated[
        str | None, typer.Option("--client", metavar="ID", help="Only this client.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show one example of each client as the model sees it, lengths, and rows that stand twice.

    OVERRIDES change keys of the recipe: data.max_length=256
    """
    with exits(debug=debug):
        from pfl_lm.cli.preview import preview as verb

        verb(recipe, overrides or [], client)


@app.command()
def diagnose(
    run: RunFolder,
    round: Annotated[
        int | None,
        typer.Option("--round", metavar="N", help="Show this round's layers; the last without it."),
    ] = None,
    samples: Annotated[
        int,
        typer.Option("--samples", metavar="N", min=1, max=100, help="Noises for each train row."),
    ] = 2,
    no_bound: Annotated[
        bool, typer.Option("--no-bound", help="No PAC-Bayes style figures: load no model.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Show what happened inside a run's turns, layer by layer, if they have noted it.

    That is with runtime.diagnostics=true. All of it goes to diagnostics.csv in the run folder. Of a
    finished run, a PAC-Bayes style figure for each client is added, with whether it is vacuous.
    """
    with exits(debug=debug):
        from pfl_lm.cli.diagnose import diagnose as verb

        verb(run, round, samples=samples, bound=not no_bound)


@app.command()
def push(
    run: RunFolder,
    repo: Annotated[str, typer.Option("--repo", metavar="ORG/NAME", help="Where to push to.")],
    clients: Annotated[
        list[str] | None,
        typer.Option("--clients", metavar="A,B", help="Only these clients' adapters."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see them; private without this.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be sent; send nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Push a run's adapters to one repository on the Hugging Face Hub.

    The token is that of `hf auth login`, or of the variable HF_TOKEN. What is there already is not
    sent again.
    """
    with exits(debug=debug):
        from pfl_lm.cli.push import push as verb

        verb(run, repo, clients or [], public=public, dry_run=dry_run)


@app.command()
def init(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A file of rows, or a folder of clients' files.")
    ],
    client_column: Annotated[
        str | None,
        typer.Option("--client-column", metavar="COLUMN", help="Says whose row it is; or client."),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", metavar="ID", help="The backbone, a Hub id or a folder."),
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="The recipe to write.")
    ] = Path("recipe.yaml"),
    debug: Debug = False,
) -> None:
    """Write a recipe for a file of data, to be read and changed; nothing is overwritten."""
    with exits(debug=debug):
        from pfl_lm.cli.init import init as verb

        verb(data, client_column, model, output)


recipes = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(
    recipes, name="recipes", help="The recipes that come with pfl-lm: list them, copy one."
)


@recipes.command(name="list")
def list_recipes(debug: Debug = False) -> None:
    """List the recipes that come with pfl-lm."""
    with exits(debug=debug):
        from pfl_lm.cli.recipes import list_recipes as verb

        verb()


@recipes.command(name="copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which one, as `list` has it.")],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where to; not given: here.")
    ] = Path(),
    debug: Debug = False,
) -> None:
    """Copy a recipe and the data that come with it, to be changed; nothing is overwritten."""
    with exits(debug=debug):
        from pfl_lm.cli.recipes import copy as verb

        verb(name, folder)


def main() -> None:
    """Run the command line; every exit is a `SystemExit`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a client's id may not fit its encoding
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="pfl-lm")
