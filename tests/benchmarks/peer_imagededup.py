"""Hashes of the pictures of a folder by imagededup, as one line of JSON; run in its own environment by copies.py."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Every method on every file, in the order of their names."""
    from imagededup.methods import AHash, DHash, PHash, WHash

    files = sorted(Path(sys.argv[1]).iterdir())
    hashes, cost_ms = {}, {}
    for method in (PHash, DHash, AHash, WHash):
        hasher = method(verbose=False)
        started = time.process_time()
        hashes[method.__name__] = [hasher.encode_image(image_file=str(file)) for file in files]
        cost_ms[method.__name__] = 1e3 * (time.process_time() - started) / len(files)
    print(json.dumps({"hashes": hashes, "ms": cost_ms, "version": version("imagededup")}))


if __name__ == "__main__":
    main()
