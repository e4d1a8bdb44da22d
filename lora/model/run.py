"""What always travels together while a model is trained."""

from dataclasses import dataclass

import torch

from lora.config.schema import Config
from lora.data.sampler import TrainingData
from lora.model.task import Task


@dataclass
class Run:
    """A task with its data and configuration, and where it is computed."""

    task: Task
    config: Config
    data: TrainingData
    device: torch.device
    dtype: torch.dtype  # of the computation
