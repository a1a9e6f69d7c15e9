"""Run `benchmarks/NAME.py` for `python -m benchmarks NAME [options]`. Without a name, list the benchmarks."""

import pkgutil
import runpy
import sys

import benchmarks


def main(argv: list[str]) -> None:
    names = sorted(
        module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_")
    )
    usage = f"usage: python -m benchmarks {{{','.join(names)}}} [options]"
    if argv and argv[0] in ("-h", "--help"):
        print(
            f"{usage}\n\n`python -m benchmarks NAME --help` explains a benchmark; figures are in benchmarks/results."
        )
        return
    if not argv or argv[0] not in names:
        sys.exit(usage)
    sys.argv = argv
    runpy.run_module(f"benchmarks.{argv[0]}", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
