"""
Write a checkpoint of DeepSpeed's ZeRO-2 that holds given weights: `deepspeed_checkpoint.py FOLDER` in each process.

FOLDER holds `state.pt`, a state dict, and `frozen.json`, the names of its frozen parameters. The checkpoint is FOLDER/checkpoint.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn


def module_of(state: dict[str, torch.Tensor], frozen: set[str]) -> nn.Module:
    """Return nested modules that hold the weights under their names; whole numbers are buffers."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if tensor.is_floating_point():
            module.register_parameter(last, nn.Parameter(tensor.float(), requires_grad=name not in frozen))
        else:
            module.register_buffer(last, tensor)
    return root


def main(folder: Path) -> None:
    """Write the checkpoint."""
    import deepspeed

    state = torch.load(folder / "state.pt", weights_only=True)
    model = module_of(state, set(json.loads((folder / "frozen.json").read_text())))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
    }
    deepspeed.init_distributed("gloo")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
    engine.save_checkpoint(str(folder / "checkpoint"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
