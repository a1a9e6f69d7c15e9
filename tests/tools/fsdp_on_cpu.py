"""
Run `run_gres.py` with FSDP2 on CPUs: `torchrun --nproc_per_node 2 tests/tools/fsdp_on_cpu.py ARGUMENTS`.

PyTorch shards parameters on CPUs, over gloo, as on cards. accelerate only uses this on cards and silently trains data parallel
elsewhere. This script makes it shard on CPUs too; all other code is that of accelerate and the program.
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
