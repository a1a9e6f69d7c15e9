"""Rebuild the LLaMA tokenizer of the original with GSVA's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modeling_gsva.loading_gsva import foreign_content

from .reading import read_json, short_repr

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import TokenizersBackend

# The tokens the original adds to its base tokenizer, in the order it adds them: the two ordinary ones first, then the
# special ones (prepare_model_tokenizer.py:14-25 of LeapLabTHU/GSVA 618dc79). `<image>` is ours: the original cuts the
# text there and never gives it an id.
ORDINARY_TOKENS = ("[SEG]", "[REJ]")
SPECIAL_TOKENS = ("<im_start>", "<im_end>")
IMAGE_TOKEN = "<image>"

# Texts on which the rebuilt tokenizer must agree with sentencepiece. A tokenizer of another kind would get them wrong: runs
# of blanks, line ends, bytes outside the vocabulary, compatibility characters, long words.
_PROBES = (
    " Sure, the second man from the left,  in a red shirt",
    ", antidisestablishmentarianism",
    "\n What are",
    "\u00e9\u00e8 \u7532 \ufb01ne \U0001f600 \u0660\u0661 \t x\u00a0y",
    "3.14159 == 2 ** 10;",
)


def base_added_tokens(directory: Path) -> dict[str, int]:
    """Return the tokens that a base directory adds to the sentencepiece vocabulary, `{text: id}`.

    Raises:
        ValueError: A file of the directory does not map tokens to ids.
    """
    try:
        tokens = {
            entry["content"]: int(i) if i.isdecimal() else i
            for i, entry in read_json(directory / "tokenizer_config.json").get("added_tokens_decoder", {}).items()
        } | read_json(directory / "added_tokens.json")
        if wrong := [
            (t, i) for t, i in tokens.items() if not isinstance(t, str) or type(i) is not int or not 0 <= i < 2**31
        ]:
            raise TypeError(f"a token and its id are {short_repr(wrong[0])}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory}: added_tokens.json or added_tokens_decoder in tokenizer_config.json does not map tokens to ids "
            f"({error}); download them again."
        ) from None
    return tokens


def refuse_non_legacy(directory: Path) -> None:
    """Raise ValueError if a base directory's tokenizer_config.json describes another tokenizer than legacy LLaMA's."""
    config = read_json(directory / "tokenizer_config.json")
    name = str(config.get("tokenizer_class") or "LlamaTokenizer")
    reason = None
    if name.removesuffix("Fast") != "LlamaTokenizer":
        reason = f"tokenizer_class is {name!r}, not 'LlamaTokenizer'"
    elif config.get("legacy") is False:
        reason = (
            'it has "legacy": false, with which every piece of text after an added token is cut differently and '
            "[SEG] and [REJ] both get the id of the bare '\u2581'"
        )
    elif config.get("add_bos_token") is False or config.get("add_eos_token"):
        reason = "add_bos_token must be true and add_eos_token false"
    if reason:
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}: GSVA was trained with the legacy LLaMA tokenizer, and "
            f"this one is another: {reason}. Pass the directory of the LLaVA base the checkpoint was made from."
        )


def build_llama_tokenizer(
    source: str | Path,
    added_tokens: dict[str, int] | None = None,
    model_max_length: int = 1024,
) -> TokenizersBackend:
    """Rebuild the slow, legacy LLaMA tokenizer of the original with GSVA's tokens and exactly its ids.

    No setting of a `LlamaTokenizer` of transformers 5 gives these ids. The fast tokenizer is therefore built from the
    pieces and scores of the sentencepiece model. Text between two added tokens is encoded separately, with a leading
    `\u2581`, as the legacy tokenizer does. Reload the result with `AutoTokenizer`.

    Args:
        source: `tokenizer.model`, or the base directory that holds it. The added tokens of a directory are read, too.
        added_tokens: Tokens that the base vocabulary has beside the sentencepiece pieces, `{text: id}`. Ids of
            `[SEG]`, `[REJ]`, `<im_start>`, `<im_end>` follow them, but a token that is there already keeps its id.
        model_max_length: Longest text in tokens, `<image>` counted as its patches; 1024 is the original's.

    Returns:
        The tokenizer. `<image>` is its last token, one id after the original's vocabulary unless the base has it.

    Raises:
        ValueError: The tokenizer is not a legacy LLaMA one (BPE, byte fallback, dummy prefix), or its ids have gaps.
        FileNotFoundError: There is no `tokenizer.model`.
        ImportError: sentencepiece is not installed.
    """
    from tokenizers import AddedToken
    from transformers import TokenizersBackend

    path = Path(source)
    if path.is_dir():
        refuse_non_legacy(path)
        added_tokens = base_added_tokens(path) if added_tokens is None else added_tokens
        path = path / "tokenizer.model"
    backend = _bpe_tokenizer(path)
    vocab = backend.get_vocab(with_added_tokens=False)

    # normalized=False everywhere: with True, "\u2581" would be put before the token before the text is searched for it.
    new = {t: i for t, i in sorted((added_tokens or {}).items(), key=lambda item: item[1]) if t not in vocab}
    for token in ORDINARY_TOKENS + SPECIAL_TOKENS + (IMAGE_TOKEN,):
        new.setdefault(token, len(vocab) + len(new))
    special = (*SPECIAL_TOKENS, IMAGE_TOKEN)
    backend.add_tokens([AddedToken(token, normalized=False, special=token in special) for token in new])
    tokenizer = TokenizersBackend(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        additional_special_tokens=list(special),
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )
    wrong = {
        t: (i, tokenizer.convert_tokens_to_ids(t)) for t, i in new.items() if tokenizer.convert_tokens_to_ids(t) != i
    }
    if wrong:
        raise ValueError(f"The added tokens of {source} leave gaps in the ids; (expected, got): {wrong}.")
    return tokenizer


def _bpe_tokenizer(path: Path) -> Tokenizer:
    """Return the fast tokenizer with the pieces of a sentencepiece model and `<unk>`, `<s>`, `</s>` as special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers.tokenization_utils_base import generate_merges

    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError("Reading tokenizer.model needs sentencepiece: pip install sentencepiece") from error

    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the sentencepiece model of LLaMA (500 kB) is needed for exact ids."
        )
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # sentencepiece raises bare RuntimeError or OSError with a C++ message
        problem = foreign_content(path)
        raise ValueError(
            f"{path} is not a sentencepiece model" + (f": it {problem}." if problem else f" ({error}).")
        ) from error

    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    scores = {piece: pieces.get_score(i) for piece, i in vocab.items()}
    if [pieces.id_to_piece(i) for i in range(min(3, len(pieces)))] != ["<unk>", "<s>", "</s>"]:
        raise ValueError(f"{path}: the first pieces of a LLaMA model are <unk>, <s>, </s>; these are not.")
    backend = Tokenizer(
        models.BPE(vocab, generate_merges(vocab, scores), fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for probe in _PROBES:
        if backend.encode(probe).ids != pieces.encode(probe):
            raise ValueError(
                f"{path} is not a LLaMA sentencepiece model (BPE with byte fallback, identity "
                f"normalisation and dummy prefix): {probe!r} is cut differently."
            )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return backend
