"""Train a sentencepiece model of LLaMA's kind that is small enough for a test."""

from pathlib import Path

TEXT = [
    "the man on the left in a red shirt",
    "a unicorn, and two dogs that run",
    "Sure, the segmentation of it is here",
] * 8
VOCAB_SIZE = 320


def train(prefix: Path) -> Path:
    """BPE with byte fallback and without normalisation, as LLaMA's was trained; `<unk>`, `<s>`, `</s>` come first."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")
