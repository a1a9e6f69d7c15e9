"""
`run_gres.py` under FSDP2 without a card: `torchrun --nproc_per_node 2 tests/tools/fsdp_on_cpu.py ...` and so on.

PyTorch shards parameters on processors, over gloo, as it does on cards. accelerate asks for that on cards only and trains data
parallel elsewhere, without a word; here it is made to ask. All the rest is its own code and the program's.
"""

import sys

from accelerate import state
from accelerate.utils import DistributedType

_begin = state.AcceleratorState.__init__


def _sharded(self, *args, fsdp_plugin=None, **kwargs):
    _begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


state.AcceleratorState.__init__ = _sharded

if __name__ == "__main__":
    from run_gres import main

    sys.exit(main())
