"""The app that every verb joins."""

import typer

app = typer.Typer(
    name="innsteer",
    help="Nonlinear steering of language models that you can measure and serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
data_verbs = typer.Typer(help="Look at data before it is used.", no_args_is_help=True)
app.add_typer(data_verbs, name="data")
