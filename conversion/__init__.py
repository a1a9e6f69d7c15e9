"""Make directories that the Auto classes load, of models of today and of checkpoints of the original GSVA code, and back.

`convert_checkpoint.py` is the command line. `convert_base`, `convert` and `reverse` take its parsed arguments.
"""

from .any_base import convert_base
from .convert import convert
from .keys import to_original, to_ours
from .reverse import reverse
from .tokenizer import build_llama_tokenizer

__all__ = ["build_llama_tokenizer", "convert", "convert_base", "reverse", "to_original", "to_ours"]
