"""A run: a task with its data and configuration, and where it is computed."""

from dataclasses import dataclass

import torch

from lora.config.schema import Config
from lora.data.sampler import TrainingData
from lora.model.task import Task


@dataclass
class Run:
    task: Task
    config: Config
    data: TrainingData
    device: torch.device
    dtype: torch.dtype  # of the computation
