"""The command line: ``lvd curate RECIPE``, ``lvd train RECIPE``, and what looks at their results.

Heavy imports wait for their command.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.session import Outcome

DEFAULT_RUN = "data/smoke/run"
PAPER = "lvd142m"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did its work, 1 when it could not, 2 when it was asked for wrongly."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"not understood: {' '.join(rest)}")
    if rest:  # values may stand behind options
        options.overrides = [*options.overrides, *rest]
    if options.command is None:
        parser.print_help()
        return 0
    from curation.lease import LeaseLostError
    from pipelines.runner import StageFailedError
    from training.config import ConfigError

    again = "the same command goes on from there"
    try:
        return int(options.do(options))
    except BrokenPipeError:
        return 0
    except ConfigError as error:
        text, code = str(error), 2
    except (StageFailedError, LeaseLostError) as error:
        text, code = f"{error}\nlvd: what was done stays; {again}", 1
    except OSError as error:  # a disk that filled up, a file that went
        text, code = f"{error}; {again}", 1
    except KeyboardInterrupt:
        text, code = f"stopped; {again}", 130
    print(f"lvd: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lvd", description="Build an LVD-142M-like image set from the web, and train a DINOv2 on it."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, do: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(do=do)
        return sub

    sub = command("curate", _curate, "do what is not done of a recipe: from urls to training tars")
    sub.add_argument("recipe", help="smoke, lvd1m, lvd142m, or the path of a .yaml file")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values laid over the recipe")
    sub.add_argument("--until", metavar="STAGE", help="stop after this stage")
    sub.add_argument("--limit", type=int, metavar="N", help="take the first N shards of the sources only")
    sub.add_argument("--dry-run", action="store_true", help="print what is missing and what is stale, do nothing")
    sub.add_argument("--redo", action="append", default=[], metavar="STAGE", help="do this stage again")
    sub.add_argument(
        "--retry",
        action="append",
        default=[],
        metavar="transient|CLASS",
        help="fetch rows again that failed with this class, or with any that may pass; all else stays",
    )
    sub.add_argument("--json", action="store_true", help="print the end of the run as JSON")

    sub = command("estimate", _estimate, "say what a recipe will take: rows, bytes, hours, machines, money")
    sub.add_argument("recipe", help="smoke, lvd1m, lvd142m, or the path of a .yaml file")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values laid over the recipe")
    sub.add_argument("--hours", type=float, default=24.0, metavar="N", help="for the number of machines (default 24)")
    text = "such as cpu_hour=0.03; default: assumptions of pipelines/estimate/rates.yaml"
    sub.add_argument("--price", action="append", default=[], metavar="NAME=USD", help=text)
    text = "a rate of that file, such as stages.fetch=2"
    sub.add_argument("--rate", action="append", default=[], metavar="NAME=VALUE", help=text)
    sub.add_argument("--json", action="store_true", help="print the estimate as JSON, each rate with its source")

    sub = command("train", _train, "train what a recipe describes, from where it stands")
    sub.add_argument(
        "recipe", help="vits14_smoke, vitl16_short, vitl14, … (pipelines/recipes/training), or a .yaml file"
    )
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values laid over the recipe")
    sub.add_argument("--json", action="store_true", help="print the end of the run as JSON")

    sub = command("export", _export, "write a trained network as timm, Hugging Face or dinov2's hub reads it")
    sub.add_argument("weights", help="network.safetensors or teacher.safetensors of a stage")
    sub.add_argument("--to", required=True, choices=("timm", "hf", "hub"))
    sub.add_argument("--out", required=True, metavar="PATH", help="file (timm, hub) or folder (hf)")

    sub = command("eval", _eval, "measure a trained network on labelled pictures: kNN and linear probe")
    sub.add_argument("weights", help="network.safetensors or teacher.safetensors of a stage")
    sub.add_argument("--kind", required=True, choices=("run", "tars", "folder", "parquet"), help="of the pictures")
    sub.add_argument("--data", required=True, metavar="LOCATION", help="where they lie")
    sub.add_argument("--label", default="label", help="column or json field of the label; a folder's is `folder`")
    sub.add_argument("--split", nargs=2, metavar=("TRAIN", "TEST"), help="values of a parquet's column `split`")
    sub.add_argument("--readout", default="cls_mean", choices=("cls", "mean", "cls_mean"))
    sub.add_argument("--size", type=int, metavar="PX", help="side of the square; default: what it was trained with")
    sub.add_argument("--linear", action="store_true", help="also train linear probes")
    sub.add_argument("--json", action="store_true")

    sub = command("show", _show, "print a recipe as it resolves")
    sub.add_argument("recipe")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value")

    _add_run_commands(command)
    return parser


def _add_run_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    for name, do, text in (
        ("status", _status, "say what is done of a run, also while it lives"),
        ("funnel", _funnel, "print how many pictures each stage left, and why the others went"),
        ("verify", _verify, "read every tar of a run and hold it against the manifest"),
        ("report", _report, "write one HTML page about a run"),
        ("clean", _clean, "remove stored objects that no table names any more"),
    ):
        _run_argument(command(name, do, text)).add_argument("--json", action="store_true")
    sub = command("card", _card, "write a card of a finished run: card.md for people, card.json for programs")
    sub.add_argument("run", nargs="?", default=argparse.SUPPRESS, metavar="RUN", help="the same as --run RUN")
    _run_argument(sub).add_argument("--json", action="store_true", help="print the card as JSON")
    sub = command("takedown", _takedown, "take pictures out of a pool for good, and out of the tars of a run")
    sub.add_argument("lists", nargs="+", metavar="LIST", help="a .txt or .csv list; or an address, a sha256, a hash")
    text = "of the entries; default: told from each, where 64 hex digits are a sha256"
    sub.add_argument("--kind", choices=("url", "sha256", "phash", "pdq"), help=text)
    sub.add_argument("--radius", type=int, metavar="BITS", help="that may differ (default: 4 of a pHash, 31 of a PDQ)")
    sub.add_argument("--reason", metavar="TEXT", help="kept with the rules")
    sub.add_argument("--dry-run", action="store_true", help="print which pictures would go, do nothing")
    _run_argument(sub).add_argument("--json", action="store_true")
    sub = command("explain", _explain, "tell the whole life of one picture")
    sub.add_argument("picture", metavar="ID|URL")
    _run_argument(sub)
    sub = command("sql", _sql, "run a report, view or check of sql/, or a file of your own")
    sub.add_argument("name", help="a report (funnel, hosts, query_sets, …), a view, a check, or a path ending in .sql")
    _run_argument(sub).add_argument("--json", action="store_true")
    sub = command("score", _score, "hold a run against the truth of its sample web")
    _run_argument(sub).add_argument("--json", action="store_true")
    sub.add_argument("--truth", metavar="PARQUET", help="default: of the sample web that the run was made from")


def _run_argument(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    sub.add_argument("--run", default=DEFAULT_RUN, metavar="ROOT", help=f"root of the run (default {DEFAULT_RUN})")
    return sub


# Curate


def _recipe(options: argparse.Namespace) -> Any:
    from pipelines.curate import CurateRecipe
    from pipelines.recipe import load_recipe

    return load_recipe(CurateRecipe, options.recipe, options.overrides)


def _curate(options: argparse.Namespace) -> int:
    from pipelines.preflight import Options
    from pipelines.session import curate, describe_plan

    started = time.monotonic()
    if options.limit is not None:
        options.overrides = [*options.overrides, f"execution.max_shards={options.limit}"]
    recipe = _recipe(options)
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if options.json else _say
    asked = Options(until=options.until, redo=tuple(options.redo), retry=tuple(options.retry), dry_run=options.dry_run)
    outcome = curate(recipe, asked, say)
    if options.dry_run:
        print("\n".join(describe_plan(outcome.lines)))
        return 0
    nothing = ""
    if not outcome.summary.num_jobs:
        num_done = sum(line.num_done for line in outcome.lines)
        nothing = (
            f"nothing to do: all {num_done:,} parts of {recipe.name} were done ({time.monotonic() - started:.1f} s)"
        )
    if options.until:
        if nothing:
            say(nothing)
        say(f"done until {options.until}; the same command without --until goes on")
        return 0
    return _end(recipe, outcome, nothing, as_json=options.json)


def _estimate(options: argparse.Namespace) -> int:
    from pipelines.estimate.estimate import as_json, estimate
    from pipelines.estimate.table import format_estimate
    from training.config import ConfigError

    if not options.hours > 0:
        raise ConfigError(f"--hours: got {options.hours:g}, allowed: above 0")
    overrides = [*(f"price.{price}" for price in options.price), *options.rate]
    found = estimate(_recipe(options), hours=options.hours, overrides=overrides)
    print(json.dumps(as_json(found)) if options.json else "\n".join(format_estimate(found)))
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _end(recipe: Any, outcome: Outcome, nothing: str, *, as_json: bool) -> int:
    """Checks, funnel, score, costs, where the result lies and what to do next."""
    from curation.query import run_checks
    from pipelines.report.funnel import format_funnel, funnel
    from pipelines.report.retrieval import format_retrieval, query_sets
    from pipelines.results import opened, score_run

    with opened(recipe.run) as database:
        broken = run_checks(database.connection)
        rows = funnel(database.connection)
        sets = query_sets(database.connection)
        score = score_run(database) if database.truth is not None else None
    if as_json:
        print(json.dumps({**_facts(recipe, outcome, rows, score, broken), "query_sets": sets}))
    else:
        print()
        print(format_funnel(rows))
        if sets:
            print()
            print("\n".join(format_retrieval(sets)))
        if score is not None:
            from pipelines.report.score import format_score

            print()
            print(format_score(score))
        print()
        if nothing:
            print(nothing)
        else:
            _print_costs(outcome)
        print(f"tars      {recipe.run}/tars")
        print(f"manifest  {recipe.run}/manifest")
        print(f"next      pd.read_parquet({recipe.run + '/manifest'!r}); lvd report --run {recipe.run}")
    for name, count in broken.items():
        print(
            f"lvd: check {name} found {count:,} rows; look at them with: lvd sql {name} --run {recipe.run}",
            file=sys.stderr,
        )
    return 1 if broken else 0


def _facts(recipe: Any, outcome: Outcome, rows: Any, score: Any, broken: dict[str, int]) -> dict[str, Any]:
    from pipelines.report.score import score_json

    costs = {name: vars(cost) for name, cost in outcome.summary.costs.items()}
    return {
        "recipe": recipe.name,
        "run": recipe.run,
        "pool": recipe.pool,
        "num_jobs": outcome.summary.num_jobs,
        "wall_s": outcome.wall_s,
        "driver_peak_bytes": outcome.driver_peak_bytes,
        "worker_peak_bytes": list(outcome.summary.peaks.values()),
        "costs": costs,
        "funnel": [row._asdict() if hasattr(row, "_asdict") else vars(row) for row in rows],
        "score": None if score is None else score_json(score),
        "broken_checks": broken,
    }


def _print_costs(outcome: Outcome) -> None:
    import os

    peaks = {pid: peak for pid, peak in outcome.summary.peaks.items() if pid != os.getpid()}
    workers = (
        f"of each worker {', '.join(f'{peak / 1e6:.0f}' for peak in peaks.values())} MB" if peaks else "no workers"
    )
    cpu = sum(cost.cpu_s for cost in outcome.summary.costs.values())
    print(f"time      {outcome.wall_s:.0f} s, {cpu:.0f} CPU s in stages")
    print(f"memory    peak of the driver {outcome.driver_peak_bytes / 1e6:.0f} MB; {workers}")


def _show(options: argparse.Namespace) -> int:
    from curation.retrieve.plan import format_plan, planned
    from pipelines.curate import CurateRecipe
    from pipelines.recipe import TRAINING_RECIPES, differences, dump_recipe, find_recipe, load_recipe

    if (TRAINING_RECIPES / f"{options.recipe}.yaml").is_file():
        return _show_training(options)
    recipe = _recipe(options)
    header = [line for line in find_recipe(options.recipe).read_text().splitlines() if line.startswith("#")]
    print("\n".join(header))
    print(dump_recipe(recipe), end="")
    if recipe.queries:
        print("# the query sets ask for")
        for line in format_plan(planned(recipe.queries, images={})):
            print(f"# {line}")
    if find_recipe(options.recipe) != find_recipe(PAPER):
        paper = load_recipe(CurateRecipe, PAPER)
        print(f"# differs from {PAPER}, sources and sets apart, in")
        for key, here, there in differences(recipe, paper):
            print(f"#   {key}: {here} ({PAPER}: {there})")
    return 0


def _show_training(options: argparse.Namespace) -> int:
    from pipelines.recipe import TRAINING_RECIPES, dump_recipe, find_recipe
    from pipelines.train import load_training_recipe

    recipe = load_training_recipe(options.recipe, options.overrides)
    text = find_recipe(options.recipe, TRAINING_RECIPES).read_text()
    print("\n".join(line for line in text.splitlines() if line.startswith("#")))
    print(dump_recipe(recipe), end="")
    return 0


# Train


def _train(options: argparse.Namespace) -> int:
    import os

    from pipelines.train import load_training_recipe, train

    recipe = load_training_recipe(options.recipe, options.overrides)
    is_main = os.environ.get("RANK", "0") == "0"
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if options.json else _say
    end = train(recipe, say)
    if not is_main:
        return 0
    if options.json:
        print(json.dumps(end))
        return 0
    print()
    print(f"time      {end['wall_s']:.0f} s")
    if end["teacher"] is None:
        return 0
    print(f"plot      {end['plot']}")
    print(f"teacher   {end['teacher']}")
    print(f"next      lvd curate smoke embed.name=checkpoint:{end['teacher']} run=data/smoke/run2")
    return 0


def _export(options: argparse.Namespace) -> int:
    from training.export import export

    for path in export(Path(options.weights), options.to, Path(options.out)):
        print(f"written   {path}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    from pipelines.train import evaluate

    found = evaluate(options)
    print(json.dumps(found) if options.json else "\n".join(f"{name:<24}{value:.4f}" for name, value in found.items()))
    return 0


# Looking at a run


def _status(options: argparse.Namespace) -> int:
    from pipelines.results import status

    print(status(options.run, as_json=options.json))
    return 0


def _funnel(options: argparse.Namespace) -> int:
    from pipelines.report.funnel import format_funnel, funnel
    from pipelines.results import opened

    with opened(options.run) as database:
        rows = funnel(database.connection)
    if options.json:
        print(json.dumps([row._asdict() if hasattr(row, "_asdict") else vars(row) for row in rows]))
    else:
        print(format_funnel(rows))
    return 0


def _explain(options: argparse.Namespace) -> int:
    from pipelines.report.explain import explain
    from pipelines.results import opened

    with opened(options.run) as database:
        print(explain(database.connection, options.picture))
    return 0


def _sql(options: argparse.Namespace) -> int:
    from curation.query import run_sql
    from pipelines.results import opened

    with opened(options.run) as database:
        frame = run_sql(database.connection, options.name)
    if options.json:
        print(frame.to_json(orient="records"))
    else:
        print(frame.to_string(index=False, na_rep="") if len(frame) else "no rows")
    return 0


def _score(options: argparse.Namespace) -> int:
    from pipelines.report.score import format_score, score_json
    from pipelines.results import opened, score_run

    with opened(options.run) as database:
        score = score_run(database, Path(options.truth) if options.truth else None)
    print(json.dumps(score_json(score)) if options.json else format_score(score))
    return 0 if score.ok else 1


def _verify(options: argparse.Namespace) -> int:
    from pipelines.results import verify_run

    problems, num_samples = verify_run(options.run)
    if options.json:
        print(json.dumps({"num_samples": num_samples, "problems": problems}))
    else:
        for problem in problems:
            print(problem)
        print(f"{num_samples:,} samples read, {len(problems):,} problems")
    return 1 if problems else 0


def _report(options: argparse.Namespace) -> int:
    from pipelines.results import write_page

    path = write_page(options.run)
    print(json.dumps({"page": str(path)}) if options.json else f"page      {path}")
    return 0


def _card(options: argparse.Namespace) -> int:
    from pipelines.results import CARD, CARD_JSON, write_card

    card = write_card(options.run)
    if options.json:
        print(json.dumps(card))
    else:
        print(f"card      {options.run}/{CARD}")
        print(f"json      {options.run}/{CARD_JSON}")
    return 0


def _takedown(options: argparse.Namespace) -> int:
    from pipelines.takedown import Request, lines_of, takedown

    request = Request(
        entries=options.lists,
        kind=options.kind,
        radius_bits=options.radius,
        reason=options.reason,
        dry_run=options.dry_run,
    )
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if options.json else _say
    found = takedown(options.run, request, say)
    if options.json:
        purged = vars(found.purged) | {"image_ids": sorted(found.purged.image_ids)}
        print(json.dumps(vars(found) | {"purged": purged}))
    else:
        print("\n".join(lines_of(found, options.run, dry_run=options.dry_run)))
    return 0


def _clean(options: argparse.Namespace) -> int:
    from pipelines.results import clean

    removed = clean(options.run)
    print(
        json.dumps(removed) if options.json else f"{removed['objects']:,} objects removed, {removed['bytes']:,} bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
