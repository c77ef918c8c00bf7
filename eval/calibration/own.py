"""OwnDeployment: what a user says of the deployment whose result files or metrics cannot say it."""

from dataclasses import dataclass

import numpy as np

from hbmgym.cli import option
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.engines import EngineProfile
from hbmgym.eval.calibration.bench_files import BenchRun
from hbmgym.eval.calibration.rows import WEIGHT_NAMES, Deployment, Row, locate_model
from hbmgym.memory_backend.geometry import STATE_BYTES

_DEFAULTS = ServingConfig()


@dataclass(frozen=True)
class OwnDeployment:
    """Flags of the command line that describe a deployment."""

    model: str = option(_DEFAULTS.model, "model served, lower-case slug, or its config.json")
    gpu: str = option(_DEFAULTS.gpu, "GPU")
    tensor_parallel: int = option(1, "GPUs of the tensor-parallel group")
    expert_parallel: int = option(1, "GPUs of these that share the experts out whole")
    weight_dtype: str = option(_DEFAULTS.weight_dtype, "dtype of the weights: bf16, fp8, nvfp4 or mxfp4")
    kv_dtype: str = option(_DEFAULTS.kv_dtype, "dtype of the KV cache: bf16, fp16 or fp8")
    state_dtype: str = option(_DEFAULTS.state_dtype, f"dtype of the recurrent state: {', '.join(STATE_BYTES)}")
    version: str = option("", "version of the engine")
    prefill_chunk: int = option(_DEFAULTS.prefill_budget, "most prompt tokens of one iteration")
    receive_interval: int = option(1, "SGLang's scheduler_recv_interval")
    served_name: str = option("", "model_name of the metrics, where a server has several")

    def deployment(self, engine: str) -> Deployment:
        """As the calibration has it; `engine` is vLLM or SGLang."""
        return Deployment(
            self.model,
            self.gpu,
            self.tensor_parallel,
            self.expert_parallel,
            WEIGHT_NAMES.get(self.weight_dtype, self.weight_dtype),
            self.kv_dtype,
            self.state_dtype,
            engine,
            self.version,
        )

    def config(self, engine: EngineProfile) -> ServingConfig:
        """A configuration whose costs are the deployment's; ValueError in one line."""
        return ServingConfig(
            model=locate_model(self.model),
            gpu=self.gpu,
            tensor_parallel=self.tensor_parallel,
            expert_parallel=self.expert_parallel,
            weight_dtype=WEIGHT_NAMES.get(self.weight_dtype, self.weight_dtype),
            kv_dtype=self.kv_dtype,
            state_dtype=self.state_dtype,
            prefill_budget=self.prefill_chunk,
            receive_interval=self.receive_interval,
            engine=engine,
        )

    def row(self, run: BenchRun) -> Row:
        """A run of this deployment: its lengths as they were sent, means over its requests."""
        tpots = run.tpot_s[np.isfinite(run.tpot_s)]
        measured = {"ttft": 1e3 * float(run.ttft_s.mean())}
        if len(tpots):
            measured["tpot"] = 1e3 * float(tpots.mean())
        return Row(
            where=run.file,
            deployment=self.deployment(run.engine),
            date=run.date,
            input_tokens=round(float(run.input_tokens.mean())),
            output_tokens=round(float(run.output_tokens.mean())),
            shortest=None,
            concurrency=min(run.concurrency, len(run.input_tokens)),
            requests=len(run.input_tokens),
            prefill_chunk=self.prefill_chunk,
            receive_interval=self.receive_interval,
            statistic="mean",
            speculative=False,
            measured=measured,
            refused={},
            source=run.file,
            lengths=(tuple(run.input_tokens.tolist()), tuple(run.output_tokens.tolist())),
        )
