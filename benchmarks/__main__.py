"""`python -m benchmarks NAME [options]` → `benchmarks.NAME.main(options)`; without a name, what there is."""

import importlib
import pkgutil
import sys

import benchmarks


def main(argv: list[str]) -> None:
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_"))
    if not argv or argv[0] not in names:
        sys.exit(f"usage: python -m benchmarks {{{','.join(names)}}} [options]")
    importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
