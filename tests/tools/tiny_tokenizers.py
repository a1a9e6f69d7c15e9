"""Tokenizers of every kind that bases have, trained on the spot."""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the man on the left in a red shirt, and two dogs that run",
    "Sure,the dog:x, a cat on the right:y. What are they in this image?",
    "it is the segmentation of a person in blue. USER: ASSISTANT: Sure,it is user assistant",
] * 20
# The patterns of GPT-4's, Llama 3's and Qwen2's tokenizers, which differ in how many digits go together.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHAT = ["<image>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
KINDS = ("gpt2", "qwen2", "llama3", "sentencepiece old", "sentencepiece new", "gemma")


def _empty(kind: str) -> Tokenizer:
    """Return the tokenizer of a kind before training."""
    is_bytes = kind in ("gpt2", "qwen2", "llama3")
    tokenizer = Tokenizer(models.BPE() if is_bytes else models.BPE(unk_token="<unk>", byte_fallback=True))
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif is_bytes:
        digits = "" if kind == "qwen2" else "{1,3}"
        split = pre_tokenizers.Split(Regex(PATTERN % digits), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    elif kind == "sentencepiece old":  # llama 2 and llava 1.5: a blank is put before all text between added tokens
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "sentencepiece new":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.ByteLevel() if is_bytes else decoders.Sequence(fallback)
    return tokenizer


@cache
def _trained(kind: str) -> str:
    tokenizer = _empty(kind)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind in ("gpt2", "qwen2", "llama3") else ["▁", "\n"]
    first = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=first, initial_alphabet=list(alphabet), show_progress=False
    )
    if kind == "sentencepiece new":  # as SentencePiece trains, no merge goes over a blank
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    elif kind in ("sentencepiece old", "gemma"):
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.pre_tokenizer = _empty(kind).pre_tokenizer
    return tokenizer.to_str()


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a new tokenizer of a kind, with the special tokens of chats."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind)), clean_up_tokenization_spaces=False, **SPECIAL
    )
    wrapped.add_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT], special_tokens=True)
    wrapped._set_model_specific_special_tokens({"image_token": "<image>"})
    return wrapped
