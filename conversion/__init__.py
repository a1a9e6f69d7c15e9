"""Convert checkpoints of the original GSVA code into directories that the Auto classes load, and back.

`convert_checkpoint.py` is the command line. `convert` and `reverse` take its parsed arguments.
"""

from .convert import convert
from .keys import to_original, to_ours
from .reverse import reverse
from .tokenizer import build_llama_tokenizer

__all__ = ["build_llama_tokenizer", "convert", "reverse", "to_original", "to_ours"]
