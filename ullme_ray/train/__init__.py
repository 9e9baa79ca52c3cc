"""Fine-tuning on Ray Train and DeepSpeed. `loop.py` is the place to start reading."""

from ullme_ray.train.launch import TrainResult, preflight, run_train

__all__ = ["TrainResult", "preflight", "run_train"]
