"""`python -m benchmarks NAME [options]` runs `benchmarks/NAME.py`; without a name it says what there is."""

import pkgutil
import runpy
import sys

import benchmarks


def main(argv: list[str]) -> None:
    names = sorted(
        module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_")
    )
    if not argv or argv[0] not in names:
        sys.exit(f"usage: python -m benchmarks {{{','.join(names)}}} [options]")
    sys.argv = argv
    runpy.run_module(f"benchmarks.{argv[0]}", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
