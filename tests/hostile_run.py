"""Runs the fetch stage of a recipe in a process of its own: who was contacted, and how much memory it took at most.

``python hostile_run.py RECIPE ADDRESS:PORT …``: places that may be contacted. Any other is refused before a packet
leaves, and told. Prints one line of JSON.
"""

import json
import sys
from pathlib import Path

refused: list[str] = []
allowed = set(sys.argv[2:])


def watch(event, details):
    if event == "socket.connect" and isinstance(details[1], tuple):
        place = f"{details[1][0]}:{details[1][1]}"
        if place not in allowed:
            refused.append(place)
            raise OSError(f"no test contacts {place}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        refused.append(f"asked the system for {details[0]}")
        raise OSError("no test asks the system for a name")


def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main():
    sys.addaudithook(watch)
    from pipelines.curate import CurateRecipe
    from pipelines.preflight import Options
    from pipelines.recipe import load_recipe
    from pipelines.session import curate

    recipe = load_recipe(CurateRecipe, sys.argv[1], [])
    curate(recipe, Options(until="screened"), lambda text: None)
    before = peak_bytes()
    outcome = curate(recipe, Options(until="fetched"), lambda text: None)
    again = curate(recipe, Options(until="fetched"), lambda text: None)
    told = {"refused": refused, "before_bytes": before, "peak_bytes": peak_bytes(), "wall_s": outcome.wall_s}
    print(json.dumps({**told, "num_jobs_again": again.summary.num_jobs}))


if __name__ == "__main__":
    main()
