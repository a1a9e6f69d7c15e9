"""Turn checkpoints of the original GSVA code into a directory that the Auto classes load, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TokenizersBackend

# The tokens the original adds to its base tokenizer, in the order it adds them: the two ordinary ones first, then the
# special ones (prepare_model_tokenizer.py:14-25 of LeapLabTHU/GSVA 618dc79). `<image>` is ours: the original cuts the
# text there and never gives it an id.
ORDINARY_TOKENS = ("[SEG]", "[REJ]")
SPECIAL_TOKENS = ("<im_start>", "<im_end>")
IMAGE_TOKEN = "<image>"

# Texts on which the rebuilt tokenizer must agree with sentencepiece itself; they hold what a tokenizer of another kind
# would get wrong: runs of blanks, line ends, bytes outside the vocabulary, compatibility characters, long words.
_PROBES = (
    " Sure, the second man from the left,  in a red shirt",
    ", antidisestablishmentarianism",
    "\n What are",
    "\u00e9\u00e8 \u7532 \ufb01ne \U0001f600 \u0660\u0661 \t x\u00a0y",
    "3.14159 == 2 ** 10;",
)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _base_added_tokens(directory: Path) -> dict[str, int]:
    """Tokens a base directory has beside the sentencepiece vocabulary, `{text: id}`."""
    tokens = {entry["content"]: int(i)
              for i, entry in _read_json(directory / "tokenizer_config.json").get("added_tokens_decoder", {}).items()}
    return tokens | _read_json(directory / "added_tokens.json")


def _refuse_non_legacy(directory: Path) -> None:
    config = _read_json(directory / "tokenizer_config.json")
    name = config.get("tokenizer_class") or "LlamaTokenizer"
    why = None
    if name.removesuffix("Fast") != "LlamaTokenizer":
        why = f"tokenizer_class is {name!r}, not 'LlamaTokenizer'"
    elif config.get("legacy") is False:
        why = ("it has \"legacy\": false, with which every piece of text after an added token is cut differently and "
               "[SEG] and [REJ] both get the id of the bare '\u2581'")
    elif config.get("add_bos_token") is False or config.get("add_eos_token"):
        why = "add_bos_token must be true and add_eos_token false"
    if why:
        raise ValueError(f"{directory / 'tokenizer_config.json'}: GSVA was trained with the legacy LLaMA tokenizer, and "
                         f"this one is another: {why}. Pass the directory of the LLaVA base the checkpoint was made from.")


def build_llama_tokenizer(
    source: str | Path,
    added_tokens: dict[str, int] | None = None,
    model_max_length: int = 1024,
) -> TokenizersBackend:
    """Rebuild the slow, legacy LLaMA tokenizer of the original with GSVA's tokens, with exactly its ids.

    No setting of a `LlamaTokenizer` of transformers 5 gives these ids, so the fast tokenizer is put together by hand
    from the pieces and scores of the sentencepiece model. Text between two added tokens is encoded on its own, with
    its own leading `\u2581`, as the legacy tokenizer does. Reload the result with `AutoTokenizer`.

    Args:
        source: `tokenizer.model`, or the base directory that holds it (whose added tokens are then read too).
        added_tokens: tokens the base vocabulary already has beside the sentencepiece pieces, `{text: id}`. Ids of
            `[SEG]`, `[REJ]`, `<im_start>`, `<im_end>` follow them, but a token already there keeps its id.
        model_max_length: longest text in tokens, `<image>` counted as its patches; 1024 is the original's.

    Returns:
        The tokenizer; `<image>` is its last token, one id after the original's vocabulary unless the base has it.

    Raises:
        ValueError: not a legacy LLaMA (BPE, byte fallback, dummy prefix) tokenizer, or ids that do not line up.
        FileNotFoundError: no `tokenizer.model`.
        ImportError: sentencepiece is not installed.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import TokenizersBackend
    from transformers.tokenization_utils_base import generate_merges

    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError("Reading tokenizer.model needs sentencepiece: pip install sentencepiece") from error

    path = Path(source)
    if path.is_dir():
        _refuse_non_legacy(path)
        added_tokens = _base_added_tokens(path) if added_tokens is None else added_tokens
        path = path / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the sentencepiece model of LLaMA (500 kB) is needed for exact ids.")
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # sentencepiece raises bare RuntimeError or OSError with a C++ message
        raise ValueError(f"{path} is not a sentencepiece model ({error}).") from error

    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    scores = {piece: pieces.get_score(i) for piece, i in vocab.items()}
    if [pieces.id_to_piece(i) for i in range(min(3, len(pieces)))] != ["<unk>", "<s>", "</s>"]:
        raise ValueError(f"{path}: the first pieces of a LLaMA model are <unk>, <s>, </s>; these are not.")
    backend = Tokenizer(models.BPE(vocab, generate_merges(vocab, scores), fuse_unk=True, byte_fallback=True,
                                   unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    for probe in _PROBES:
        if backend.encode(probe).ids != pieces.encode(probe):
            raise ValueError(f"{path} is not a LLaMA sentencepiece model (BPE with byte fallback, identity "
                             f"normalisation and dummy prefix): {probe!r} is cut differently.")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])

    # normalized=False everywhere: with True, "\u2581" would be put before the token is looked for.
    new = {t: i for t, i in sorted((added_tokens or {}).items(), key=lambda item: item[1]) if t not in vocab}
    for token in ORDINARY_TOKENS + SPECIAL_TOKENS + (IMAGE_TOKEN,):
        new.setdefault(token, len(vocab) + len(new))
    for token in new:
        special = token in SPECIAL_TOKENS or token == IMAGE_TOKEN
        backend.add_tokens([AddedToken(token, normalized=False, special=special)])
    tokenizer = TokenizersBackend(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        additional_special_tokens=[*SPECIAL_TOKENS, IMAGE_TOKEN],
        padding_side="right", clean_up_tokenization_spaces=False, model_max_length=model_max_length,
    )
    wrong = {t: (i, tokenizer.convert_tokens_to_ids(t)) for t, i in new.items()
             if tokenizer.convert_tokens_to_ids(t) != i}
    if wrong:
        raise ValueError(f"The added tokens of {source} leave gaps in the ids; (wanted, got): {wrong}.")
    return tokenizer
