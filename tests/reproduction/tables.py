"""Write the tables and pictures of README.md from the JSON files: PYTHONPATH=tests python -m reproduction.tables.

A table stands between `<!-- NAME -->` and `<!-- end -->`. Nothing else in README.md is touched.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping

from . import plots, policy_tables, runs, training_tables
from .measured import HERE, Results, read
from .writing import CIFAR10, CIFAR10_ALONE, IMDB, IMDB_WHOLE

README, PAPER = HERE / "README.md", HERE / "paper.json"
BOTH = [
    (CIFAR10, "same", "CIFAR-10, m = 25, the paper's order"),
    (CIFAR10, "reshuffled", "CIFAR-10, m = 25, reshuffled"),
]
OTHERS = [(IMDB, "same", "IMDB, m = 25, the paper's order")]
ALONE = [(CIFAR10_ALONE, "same", "CIFAR-10, m = 1, the paper's order")]
WHOLE = [(IMDB_WHOLE, "same", "IMDB, all rows, m = 25, the paper's order")]
COMPARED = [BOTH[0], *OTHERS, *ALONE, *WHOLE]
CAUSES = {
    f"{IMDB}/bln": "The cause is not shown. Which reviews are the fifth moves it more than the seed does: see below.",
}
_PLACE = re.compile(r"<!-- ([a-z0-9-]+) -->\n.*?<!-- end -->", re.DOTALL)

TABLES: Mapping[str, Callable[[Results], list[str]]] = {
    "missing": training_tables.missing,
    "cifar10": lambda results: training_tables.training(results, CIFAR10),
    "places": lambda results: training_tables.places(results, CIFAR10),
    "differences": lambda results: training_tables.differences(results, COMPARED, CAUSES),
    "fifths": lambda results: training_tables.fifths(results, IMDB),
    "convergence": lambda results: training_tables.convergence(results, BOTH + OTHERS),
    "epochs-same": lambda results: training_tables.epochs(results, CIFAR10, "same"),
    "epochs-reshuffled": lambda results: training_tables.epochs(results, CIFAR10, "reshuffled"),
    "policies": lambda results: policy_tables.policies(results, CIFAR10),
    "correlations": lambda results: policy_tables.correlations(results, BOTH + OTHERS + WHOLE + ALONE),
    "flattery": lambda results: policy_tables.flattery(results, BOTH + OTHERS),
    "serving-same": lambda results: policy_tables.serving(results, CIFAR10, "same"),
    "serving-reshuffled": lambda results: policy_tables.serving(results, CIFAR10, "reshuffled"),
    "alone": lambda results: training_tables.training(results, CIFAR10_ALONE),
    "alone-policies": lambda results: policy_tables.policies(results, CIFAR10_ALONE),
    "alone-serving": lambda results: policy_tables.serving(results, CIFAR10_ALONE, "same"),
    "imdb": lambda results: training_tables.training(results, IMDB),
    "imdb-whole": lambda results: training_tables.training(results, IMDB_WHOLE),
    "imdb-whole-policies": lambda results: policy_tables.policies(results, IMDB_WHOLE),
    "imdb-whole-serving": lambda results: policy_tables.serving(results, IMDB_WHOLE, "same"),
    "served": policy_tables.served,
    "imdb-policies": lambda results: policy_tables.policies(results, IMDB),
    "imdb-serving": lambda results: policy_tables.serving(results, IMDB, "same"),
}


def filled(text: str, results: Results) -> str:
    """Return a README with its tables written anew.

    Raises:
        ValueError: it has a place for a table that there is not, or none for one that there is.
    """
    places = [match[1] for match in _PLACE.finditer(text)]
    if sorted(places) != sorted(TABLES):
        raise ValueError(f"Expected a place for each of {sorted(TABLES)}. Received: {sorted(places)}.")
    return _PLACE.sub(lambda match: _block(match[1], TABLES[match[1]](results)), text)


def _block(name: str, lines: list[str]) -> str:
    return "\n".join((f"<!-- {name} -->", *lines, "<!-- end -->"))


def main() -> int:
    """Write them."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    results = read(runs.RESULTS, PAPER, [run.name for run in runs.plan()])
    README.write_text(filled(README.read_text(encoding="utf-8"), results), encoding="utf-8")
    plots.write(results, HERE / "plots")
    print("\n".join(training_tables.missing(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
