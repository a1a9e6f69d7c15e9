"""
Open a web page on which people drop an image and ask for expressions.

    python -m demo
    python -m demo --model runs/finetune_shapes --port 7861
"""

import argparse
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_gsva  # noqa: F401  registers the Auto classes

DEFAULT_MODEL = str(Path(__file__).parents[1] / "assets/tiny_gsva_gres")  # the trained model in the box


def main(argv: list[str] | None = None) -> int:
    """Run the command line. An error that the user can mend ends it with status 1 and one line."""
    parser = argparse.ArgumentParser(
        prog="python -m demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="directory or Hub name of a model")
    parser.add_argument("--share", choices=("yes", "no"), default="no", help="yes: a public address, through gradio")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines, too")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    options = parser.parse_args(argv)
    try:
        from .page import build, launch_options
        from .session import Assistant
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        print("The web demo needs gradio: pip install '.[demo]'", file=sys.stderr)
        return 1
    try:
        processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(
            options.model, trust_remote_code=True, dtype="auto", device_map="auto"
        )
    except (OSError, ValueError) as error:
        print(f"--model {options.model} cannot be loaded: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="gsva-demo-") as folder:
        page = build(Assistant(model, processor), Path(folder))
        try:
            page.launch(
                server_name=options.host, server_port=options.port, share=options.share == "yes",
                allowed_paths=[folder], **launch_options(),
            )  # fmt: skip
        except OSError as error:  # the port is taken
            print(f"--port {options.port}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
