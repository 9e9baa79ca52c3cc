"""The command line: parses, delegates, and turns errors into exit codes. 0 done, 1 failed, 2 bad job file or usage.

Imports neither torch nor ray before a command needs them, so `check` and `--help` answer at once.
"""

from __future__ import annotations

import typer

from ullme_ray.cli import cluster, files, results, stages

app = typer.Typer(
    help="Turn a decoder LLM into a text embedder and put it to work on Ray, from one YAML job file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (  # in the order of --help
    *(files.init, files.check, files.plan, stages.run, files.runs, files.render),
    *(stages.train, stages.mine, stages.evaluate, stages.embed),
    *(results.table, stages.serve, results.search, results.report, results.export),
    *(cluster.submit, cluster.status, cluster.logs, cluster.stop),
):
    app.command()(command)


def main() -> None:
    """Entry of `ullme-ray` and `python -m ullme_ray`."""
    app(prog_name="ullme-ray")
