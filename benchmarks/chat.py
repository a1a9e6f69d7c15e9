"""Measure what a second question about an image costs with the cache of the first one, and without.

    python -m benchmarks chat [--quick]

A random model of 164 million parameters, whose images take 576 tokens, answers two questions about an image with 16
tokens each. The tokens that its language model reads and the images that are encoded are counted, not assumed. The answers must
be the same. The benchmark prints a table and writes benchmarks/results/chat.json.
"""

import argparse
import statistics
import time

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, SamConfig

from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaImageProcessor, GsvaProcessor

from ._workload import THREADS, Elsewhere, busy_line, machine, make_tokenizer, write_result

SIDE, PATCH, NEW_TOKENS, ROUNDS, LAYERS = 336, 14, 16, 3, 11  # (336 / 14)² = 576 image tokens
FIRST, SECOND = "Where is the man in the red shirt?", "And the dog beside him, can you segment it, too?"


def make_model(layers: int) -> tuple[GsvaForConditionalGeneration, GsvaProcessor]:
    """Return a random model, whose language model has so many layers, and its processor."""
    image_processor = GsvaImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, sam_size={"longest_edge": 512}
    )
    processor = GsvaProcessor(image_processor, make_tokenizer(), patch_size=PATCH, chat_template=None)
    config = GsvaConfig(
        vision_config=CLIPVisionConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
                                       image_size=SIDE, patch_size=PATCH),
        text_config=LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
                                vocab_size=4096, max_position_embeddings=2048),
        sam_config=SamConfig(vision_config={"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "mlp_dim": 768,
                                            "global_attn_indexes": [2, 5], "image_size": 512, "patch_size": 16, "window_size": 14,
                                            "output_channels": 256},
                             prompt_encoder_config={"hidden_size": 256, "image_size": 512, "patch_size": 16}),
        image_token_id=processor.image_token_id, seg_token_id=processor.seg_token_id, rej_token_id=processor.rej_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GsvaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model, processor


def conversation(processor: GsvaProcessor, *turns: str):
    """Return the inputs of questions and answers in turn about a grey image."""
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": [{"type": "text", "text": text}]}
        for n, text in enumerate(turns)
    ]
    messages[0]["content"].insert(0, {"type": "image", "image": Image.new("RGB", (640, 480), "grey")})
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


class Count:
    """Counts the tokens that the language model reads, and the images that CLIP and SAM encode."""

    def __init__(self, model: GsvaForConditionalGeneration):
        self.tokens = self.images = 0
        towers = (model.model.vision_tower, model.sam.vision_encoder)
        model.model.language_model.register_forward_pre_hook(self._read, with_kwargs=True)
        for tower in towers:
            tower.register_forward_pre_hook(self._encoded)

    def _read(self, module, args, kwargs) -> None:
        self.tokens += kwargs["inputs_embeds"].shape[1]

    def _encoded(self, module, args) -> None:
        self.images += 1


def measure(rounds: int, layers: int) -> dict:
    """Return tokens, runs of a tower and seconds (the median of the rounds) of the second answer, with and without the cache."""
    model, processor = make_model(layers)
    count, elsewhere, options = Count(model), Elsewhere(), {"method": "generate", "max_new_tokens": NEW_TOKENS}
    first = conversation(processor, FIRST)
    result: dict = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_prompt": first["input_ids"].shape[1],
    }
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    answers: list[list[int]] = []
    for _ in range(rounds):
        cache = model.new_cache()
        answer = model.segment(**first, **options, cache=cache)
        text = processor.tokenizer.decode(answer.sequences[0, int(answer.answer_starts[0]) :])
        second = conversation(processor, FIRST, text, SECOND)
        result["second_prompt"] = second["input_ids"].shape[1]
        for way, times in seconds.items():
            count.tokens = count.images = 0
            start = time.perf_counter()
            outputs = model.segment(**second, **options, **({"cache": cache} if way == "with" else {}))
            times.append(time.perf_counter() - start)
            result[way] = {"tokens": count.tokens, "tower_runs": count.images}
            answers.append(outputs.sequences[0, int(outputs.answer_starts[0]) :].tolist())
    for way, times in seconds.items():
        result[way]["seconds"] = round(statistics.median(times), 2)
    result["same_answers"] = all(answer == answers[0] for answer in answers)
    return {**result, "machine": machine(elsewhere)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks chat", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="measure one round with 2 layers, and do not write the result file"
    )
    quick = parser.parse_args(argv).quick
    torch.set_num_threads(THREADS)
    result = measure(*((1, 2) if quick else (ROUNDS, LAYERS)))
    print(f"{result['parameters'] / 1e6:.0f} million parameters, second prompt of {result['second_prompt']} tokens")
    for way in ("without", "with"):
        row = result[way]
        print(
            f"{way:<8} cache: {row['tokens']:>5} tokens, {row['tower_runs']} runs of a tower, {row['seconds']:.2f} s"
        )
    print(f"{'the same' if result['same_answers'] else 'DIFFERENT'} answers; {busy_line(result)}")
    if not quick:
        write_result("chat", result)


if __name__ == "__main__":
    main()
