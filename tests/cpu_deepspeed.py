"""Lightning's DeepSpeed strategy on two CPUs, for tests: it wants a GPU in three places, DeepSpeed itself in none."""

import importlib
from unittest import mock

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy


class CPUDeepSpeed(DeepSpeedStrategy):
    """ZeRO over gloo."""

    def __init__(self, stage=2, offload=False):
        super().__init__(
            stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3,
            allgather_bucket_size=5_000, reduce_bucket_size=5_000,
        )  # fmt: skip
        # As in a large model: what is not in use is given up, but for what is small.
        zero = self.config["zero_optimization"]
        zero |= {"stage3_param_persistence_threshold": 100, "stage3_max_reuse_distance": 0}
        zero |= {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        reset_seed()
        self.set_world_ranks()
        # Compiled on every machine anew, and not needed. The attribute of that name is torch itself.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, *args, **kwargs):
        with mock.patch.object(CPUDeepSpeed, "root_device", torch.device("cpu", self.local_rank)):
            return super()._setup_model_and_optimizer(*args, **kwargs)

    def _initialize_deepspeed_inference(self, model):
        with mock.patch.object(CPUDeepSpeed, "root_device", torch.device("cpu", self.local_rank)):
            super()._initialize_deepspeed_inference(model)
